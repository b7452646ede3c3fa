"""Descriptors are counted, a part at a time, and limits read, where the system says."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest

from relayd.operating.process_counts import PART, count_descriptors, max_descriptors
from tests.support.shown import whole as result


def test_open_descriptors_are_counted() -> None:
    """Whether the kernel says how many there are, or each has to be counted."""
    for folder in ("/proc/self/fd", "/proc/self/fdinfo"):
        before = result(count_descriptors(folder))
        with open(os.devnull), open(os.devnull):
            assert result(count_descriptors(folder)) == before + 2
        # os.listdir has one of its own.
        assert before == len(os.listdir("/proc/self/fd")) - 1


def test_many_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Folder(list[int]):
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("os.scandir", lambda _: Folder(range(3 * PART + 1)))
    assert len(list(count_descriptors("/proc/self/fdinfo"))) == 3


def test_a_system_that_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert math.isnan(result(count_descriptors(str(tmp_path / "none"))))

    def refused(_: int) -> Any:
        raise OSError(errno.EPERM, "refused")

    assert max_descriptors() > 0
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert max_descriptors() == float("inf")
    monkeypatch.setattr("resource.getrlimit", refused)
    assert max_descriptors() != max_descriptors()
