"""Once a second at most, beginning with the first time."""

from __future__ import annotations

from twisted.internet.task import Clock

from relayd.seldom import Seldom


def test_there_is_a_line_a_second_however_much_happens() -> None:
    """Counted from the last line, not from the last time that something happened."""
    clock = Clock()
    seldom = Seldom(clock)
    due = []
    for _ in range(30):
        due.append(seldom.is_due())
        clock.advance(0.125)
    assert [number for number, is_due in enumerate(due) if is_due] == [0, 8, 16, 24]
    clock.advance(1000)
    assert [seldom.is_due(), seldom.is_due()] == [True, False]


def test_of_two_each_has_its_own_second() -> None:
    clock = Clock()
    assert Seldom(clock).is_due()
    assert Seldom(clock).is_due()
