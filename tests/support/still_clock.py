"""A clock on a reactor that stands still, with a timer that a test fires."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.base import DelayedCall
from twisted.internet.task import Clock

from relayd.net.monotonic import (
    MonotonicClock,
)


class Still(Clock):
    """A reactor that stands still, whose own clock anybody may set.

    :ivar turns: how many it has taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rightNow = 1e9
        self.turns = 0

    def turn(self) -> None:
        """Make the calls that are due by its clock; not those asked for meanwhile."""
        self.turns += 1
        for call in [each for each in self.calls if each.getTime() <= self.rightNow]:
            self.calls.remove(call)
            call.called = 1
            call.func(*call.args, **call.kw)


class Bench:
    """A clock with a timer that fires when the bench's time has come.

    :ivar now: the time.
    :ivar armed: when the timer fires, or None: there is none.
    :ivar opened: how many timers there have been.
    :ivar made: the names of the calls that were made.
    """

    def __init__(self) -> None:
        self.now = 5000.0
        self.armed: float | None = None
        self.opened = self.set = 0
        self.still = Still()
        self.clock = MonotonicClock(
            self.still, seconds=lambda: self.now, open_timer=self.timer
        )
        self.made: list[Any] = []
        self._woken: Callable[[], None] = lambda: None

    def timer(self, _: Any, due: float, woken: Any, lost: Any) -> Bench:
        """In place of `relayd.net.timers.open_timer`."""
        assert self.armed is None, "the last one is open"
        self.opened += 1
        self._woken = woken
        self.arm(due)
        return self

    def arm(self, due: float) -> None:
        self.set += 1
        self.armed = due

    def close(self) -> None:
        self.armed = None

    def later(self, delay: float, name: Any, does: Any = lambda: None) -> DelayedCall:
        """A call that is noted as `name` when it is made."""

        def call() -> None:
            self.made.append(name)
            does()

        return self.clock.callLater(delay, call)

    def fire(self) -> None:
        """The reactor's events: the timer's is one, as long as it is not set again."""
        if self.armed is not None and self.armed <= self.now:
            self._woken()

    def settle(self) -> None:
        """Turns until nothing is to be done at this time."""
        for _ in range(1000):
            self.fire()
            if not self.still.calls:
                return
            self.still.turn()
        raise AssertionError("it never rests")

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.settle()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.settle()
    assert not made.clock.getDelayedCalls(), "calls are left"
    assert made.armed is None, "the timer is left"
