"""The deadline wheel: everyone is looked at once a tick, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.net.wheel import DeadlineWheel
from tests.conftest import LoggedFailures

TICK = 1.0
#: Between two turns of the wheel.  A binary fraction, like all times here, so
#: that sums of them are exact.
STEP = TICK / DeadlineWheel.SPREAD


class StrictClock(Clock):
    """As reactors are: nothing can be asked for in the past."""

    def callLater(self, delay: float, *args: Any, **keywords: Any) -> Any:
        assert delay >= 0
        return super().callLater(delay, *args, **keywords)


class Item:
    """Remembers when it was looked at."""

    def __init__(
        self, clock: Clock, on_check: Callable[[], object] = lambda: None
    ) -> None:
        self.wheel_bucket: dict[Any, None] | None = None
        self.clock = clock
        self.on_check = on_check
        self.on_failed: Callable[[], object] = lambda: None
        self.looks: list[float] = []
        self.failures = 0

    def check(self, now: float) -> None:
        assert now == self.clock.seconds()
        self.looks.append(now)
        self.on_check()

    def check_failed(self) -> None:
        self.failures += 1
        self.on_failed()


@pytest.fixture
def clock() -> Clock:
    return StrictClock()


@pytest.fixture
def wheel(clock: Clock) -> DeadlineWheel:
    return DeadlineWheel(clock, TICK)


def run(clock: Clock, seconds: float) -> None:
    """Let time pass, in steps smaller than the wheel's."""
    clock.pump([STEP / 4] * round(seconds / STEP * 4))


def test_an_item_is_checked_once_a_tick(clock: Clock, wheel: DeadlineWheel) -> None:
    """The first look is one tick away, and the others follow at the same distance."""
    item = Item(clock)
    wheel.add(item)
    assert len(wheel) == 1
    run(clock, 4 * TICK)
    assert item.looks == [1.0, 2.0, 3.0, 4.0]
    wheel.discard(item)
    run(clock, 2 * TICK)
    assert len(item.looks) == 4
    assert len(wheel) == 0


def test_items_are_spread_over_the_tick(clock: Clock, wheel: DeadlineWheel) -> None:
    """Those that came at different times are not looked at in the same turn."""
    items = [Item(clock) for _ in range(DeadlineWheel.SPREAD)]
    for item in items:
        wheel.add(item)
        run(clock, STEP)
    run(clock, TICK)
    assert len({item.looks[0] for item in items}) == DeadlineWheel.SPREAD


def test_discarding_twice_or_without_having_added(
    clock: Clock, wheel: DeadlineWheel
) -> None:
    """Those who end a session need not know whether another did."""
    item, other = Item(clock), Item(clock)
    wheel.add(item)
    wheel.discard(other)
    wheel.discard(item)
    wheel.discard(item)
    assert len(wheel) == 0


def test_an_item_that_is_added_again_is_checked_as_before(
    clock: Clock, wheel: DeadlineWheel
) -> None:
    item = Item(clock)
    wheel.add(item)
    clock.advance(STEP)
    wheel.add(item)
    assert len(wheel) == 1
    clock.pump([STEP] * 16)
    assert item.looks == [TICK, 2 * TICK]
    wheel.discard(item)
    assert not len(wheel)


def test_an_item_may_come_back(clock: Clock, wheel: DeadlineWheel) -> None:
    """Off and on again: looked at once a tick, not twice."""
    item = Item(clock)
    wheel.add(item)
    run(clock, STEP)
    wheel.discard(item)
    wheel.add(item)
    run(clock, 2 * TICK)
    assert len(item.looks) == 2


def test_an_item_that_discards_itself_when_checked(
    clock: Clock, wheel: DeadlineWheel
) -> None:
    """A session that its deadline ends; its neighbours stay."""
    leaving, staying = Item(clock), Item(clock)
    leaving.on_check = lambda: wheel.discard(leaving)
    wheel.add(leaving)
    wheel.add(staying)
    run(clock, 3 * TICK)
    assert leaving.looks == [1.0]
    assert staying.looks == [1.0, 2.0, 3.0]


def test_an_item_that_another_discards(clock: Clock, wheel: DeadlineWheel) -> None:
    """It is not looked at any more, though its turn had come."""
    first, second = Item(clock), Item(clock)
    first.on_check = lambda: wheel.discard(second)
    wheel.add(first)
    wheel.add(second)
    run(clock, 2 * TICK)
    assert first.looks == [1.0, 2.0]
    assert second.looks == []


def test_an_item_that_is_added_during_a_check(
    clock: Clock, wheel: DeadlineWheel
) -> None:
    """Its first look is a tick away, not in the same turn."""
    late, early = Item(clock), Item(clock)

    def once() -> None:
        early.on_check = lambda: None
        wheel.add(late)

    early.on_check = once
    wheel.add(early)
    run(clock, 3 * TICK)
    assert late.looks == [2.0, 3.0]
    assert early.looks == [1.0, 2.0, 3.0]


def test_a_check_that_raises_fails_its_item_alone(
    clock: Clock, wheel: DeadlineWheel, logged_failures: LoggedFailures
) -> None:
    """It is logged with its traceback, and the next in line has its turn."""
    broken, sound = Item(clock, lambda: 1 // 0), Item(clock)
    broken.on_failed = lambda: wheel.discard(broken)
    wheel.add(broken)
    wheel.add(sound)
    run(clock, 2 * TICK)
    assert broken.failures == 1
    assert broken.looks == [1.0]
    assert sound.looks == [1.0, 2.0]
    assert "in check" in logged_failures.take("ZeroDivisionError")


def test_an_item_whose_check_failed_raises_stops_no_other(
    clock: Clock, wheel: DeadlineWheel, logged_failures: LoggedFailures
) -> None:
    """An error in one session must not end the deadlines of all the others."""
    broken, sound = Item(clock, lambda: 1 // 0), Item(clock)
    broken.on_failed = lambda: [][0]
    wheel.add(broken)
    wheel.add(sound)
    run(clock, 2 * TICK)
    assert sound.looks == [1.0, 2.0]
    # It is of no use to look at it again.
    assert broken.looks == [1.0]
    assert len(wheel) == 1
    assert logged_failures.take("ZeroDivisionError")
    assert logged_failures.take("IndexError")


def test_an_empty_wheel_drops_its_timer(clock: Clock, wheel: DeadlineWheel) -> None:
    """After a tick by itself; while something stands on it there is one timer."""
    assert not clock.getDelayedCalls()
    items = [Item(clock), Item(clock)]
    for item in items:
        wheel.add(item)
    assert len(clock.getDelayedCalls()) == 1
    for item in items:
        wheel.discard(item)
    run(clock, TICK)
    assert not clock.getDelayedCalls()


@pytest.mark.cost
def test_many_sessions_use_one_timer(clock: Clock, wheel: DeadlineWheel) -> None:
    """A test of cost.

    One at a time, they cost no timer each; nor once the wheel was settled.
    """
    for _ in range(2):
        item = Item(clock)
        wheel.add(item)
        timers = list(clock.getDelayedCalls())
        for _ in range(3):
            wheel.discard(item)
            wheel.add(item)
            assert clock.getDelayedCalls() == timers
        wheel.discard(item)
        wheel.settle()


def test_settling_an_empty_wheel_drops_its_timer_at_once(
    clock: Clock, wheel: DeadlineWheel
) -> None:
    """A program that has stopped listening is not kept waiting."""
    item = Item(clock)
    wheel.add(item)
    wheel.discard(item)
    wheel.settle()
    assert not clock.getDelayedCalls()
    wheel.settle()


def test_a_settled_wheel_drops_its_timer_with_its_last_item(
    clock: Clock, wheel: DeadlineWheel
) -> None:
    """Whether that leaves between two looks or during one."""
    item, last = Item(clock), Item(clock)
    last.on_check = lambda: wheel.discard(last)
    wheel.add(item)
    run(clock, STEP)
    wheel.add(last)
    wheel.settle()
    assert len(clock.getDelayedCalls()) == 1
    wheel.discard(item)
    assert len(clock.getDelayedCalls()) == 1
    run(clock, TICK)
    assert last.looks == [1.0 + STEP]
    assert not clock.getDelayedCalls()


def test_a_settled_wheel_can_be_used_again(clock: Clock, wheel: DeadlineWheel) -> None:
    """A relay that listens again after it had stopped."""
    wheel.settle()
    item = Item(clock)
    wheel.add(item)
    run(clock, TICK)
    assert item.looks == [1.0]
    wheel.discard(item)
    wheel.settle()
    assert not clock.getDelayedCalls()


# Times are in quarters of a step.  Now and then the reactor is busy for longer
# than a turn of the wheel, or than all its turns.
_ADVANCES = st.integers(1, 8) | st.integers(9, 100)
_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "brief", "adding"]), st.just(0))
    | st.tuples(st.just("discard"), st.integers(0, 20))
    | st.tuples(st.just("advance"), _ADVANCES),
    max_size=60,
)


@given(_OPERATIONS)
# A late turn in which an item adds another goes on to those that are due next.
@example([("adding", 0), ("advance", 4), ("add", 0), ("advance", 33)])
def test_every_item_is_checked_within_a_tick(operations: list[tuple[str, int]]) -> None:
    """In any history: each item in time, none that has left, one timer at most.

    Some items leave when they are looked at, and some add another one then.
    """
    clock = StrictClock()
    wheel = DeadlineWheel(clock, TICK)
    standing: dict[Item, float] = {}
    gone: dict[Item, int] = {}

    def add(kind: str) -> None:
        item = Item(clock)

        def on_check() -> None:
            if kind == "brief":
                remove(item)
                return
            standing[item] = clock.seconds()
            if kind == "adding" and len(item.looks) == 1:
                add("add")

        item.on_check = on_check
        standing[item] = clock.seconds()
        wheel.add(item)

    def remove(item: Item) -> None:
        wheel.discard(item)
        del standing[item]
        gone[item] = len(item.looks)

    for what, number in operations:
        if what == "advance":
            clock.advance(number * STEP / 4)
        elif what != "discard":
            add(what)
        elif number < len(standing):
            remove(list(standing)[number])
        now = clock.seconds()
        assert all(now - since <= TICK for since in standing.values())
        assert all(len(item.looks) == count for item, count in gone.items())
        assert len(wheel) == len(standing)
        assert len(clock.getDelayedCalls()) <= 1
        assert clock.getDelayedCalls() or not standing
