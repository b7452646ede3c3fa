"""What the check after each test finds: this is what a test leaves behind."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor

from tests.conftest import _left, _opened

#: One of each kind of descriptor that a test may leave.
KINDS: dict[str, Callable[[Path], int]] = {
    "file": lambda path: os.open(path, os.O_CREAT | os.O_RDWR),
    "another file": lambda path: os.open(path.with_suffix(".b"), os.O_CREAT),
    "pipe": lambda path: _one(*os.pipe()),
    "socket": lambda path: socket.socket().detach(),
    "another socket": lambda path: socket.socket().detach(),
}
if hasattr(os, "eventfd"):
    KINDS["epoll"] = lambda path: _epoll()
    KINDS["eventfd"] = lambda path: os.eventfd(0)


def _one(kept: int, other: int) -> int:
    os.close(other)
    return kept


def _epoll() -> int:
    with select.epoll() as made:
        return os.dup(made.fileno())


def left(before: dict[int, Any]) -> list[str]:
    live: Any = reactor
    found = _left(before, {*live.getReaders(), *live.getWriters()})
    return [each for each in found if each.startswith("descriptor ")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor_is_found(kind: str, tmp_path: Path) -> None:
    before = _opened()
    number = KINDS[kind](tmp_path / "a")
    try:
        name = os.readlink(f"/dev/fd/{number}")
        assert left(before) == [f"descriptor {number} {name}"]
    finally:
        os.close(number)
    assert left(before) == []


@pytest.mark.parametrize("kind", KINDS)
def test_another_one_of_the_same_number_is_found(kind: str, tmp_path: Path) -> None:
    """A test may close what its module has opened, and open something else."""
    for other in KINDS.keys() - {kind}:
        number, new = (KINDS[each](tmp_path / "a") for each in (kind, other))
        try:
            before = _opened()
            os.dup2(new, number)
            [found] = left(before)
            assert found.startswith(f"descriptor {number} ")
        finally:
            os.close(number)
            os.close(new)
