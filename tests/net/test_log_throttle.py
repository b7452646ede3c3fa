"""The log throttle: once a second at most, the first time at once."""

from __future__ import annotations

from twisted.internet.task import Clock

from relayd.net.log_throttle import LogThrottle


def test_one_line_a_second_is_due() -> None:
    """Counted from the last line, not from the last time that something happened."""
    clock = Clock()
    throttle = LogThrottle(clock)
    due = []
    for _ in range(30):
        due.append(throttle.is_due())
        clock.advance(0.125)
    assert [number for number, is_due in enumerate(due) if is_due] == [0, 8, 16, 24]
    clock.advance(1000)
    assert [throttle.is_due(), throttle.is_due()] == [True, False]


def test_throttles_are_independent() -> None:
    clock = Clock()
    assert LogThrottle(clock).is_due()
    assert LogThrottle(clock).is_due()
