"""Descriptors that run out, and the log line about it."""

from __future__ import annotations

import errno
import resource

import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from relayd.net.descriptors import RESERVE, Descriptors
from tests.support.standing import refuse


def test_a_full_table_is_logged_once_a_second() -> None:
    """However many listeners' pauses there are; the line says how many."""
    clock = Clock()
    table = Descriptors(clock)
    with capturedLogs() as events:
        for _ in range(30):
            table.log_pause("127.0.0.1:80", "Too many open files")
            clock.advance(0.125)
    assert table.pauses == 30
    assert [event["pauses"] for event in events] == [1, 9, 17, 25]
    assert formatEvent(events[1]) == (
        "127.0.0.1:80: Too many open files; clients wait until a session ends"
        " (paused 9 times so far; raise the limit with ulimit -n)"
    )


def test_the_reserve_is_a_part_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed number, but no more than a quarter of a small table."""
    for limit, first in ((1024, 1024 - RESERVE), (64, 64 - RESERVE), (20, 15), (4, 3)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=limit: (n, 10_000))
        table = Descriptors(Clock())
        assert table.is_low(first)
        assert not table.is_low(first - 1)


def test_a_limit_that_was_raised_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    table, limit = Descriptors(Clock()), [100]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit[0], 10_000))
    assert table.is_low(90)
    limit[0] = 1000
    assert not table.is_low(90)
    assert not table.is_low(900)
    assert table.is_low(990)


def test_an_unknown_limit_is_left_to_accept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """getrlimit(2) is refused: the table counts as large enough."""
    table = Descriptors(Clock())
    monkeypatch.setattr(resource, "getrlimit", refuse(errno.EPERM))
    assert not table.is_low(1 << 20)
