"""What has arrived is looked at before the calls that are due are made."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
from twisted.internet.task import Clock

from relayd.net.monotonic import (
    LATE,
    MAX_TURNS,
    TURNS,
    poll_time,
)
from tests.support.still_clock import Bench, bench

__all__ = ["bench"]


def test_a_due_call_waits_for_the_current_turn(bench: Bench) -> None:
    bench.later(1, "due")
    bench.now += 1
    bench.fire()
    assert bench.made == []
    bench.still.turn()
    assert bench.made == ["due"]


@pytest.mark.parametrize("late", [LATE + 0.01, 1e5])
def test_a_late_call_waits_for_whole_turns(bench: Bench, late: float) -> None:
    bench.later(1, "due")
    bench.later(1 + late, "due, too")
    bench.now += 1 + late
    bench.fire()
    for _ in range(TURNS):
        bench.still.turn()
        assert bench.made == []
        # The event is there until the timer is set again.
        bench.fire()
    bench.still.turn()
    assert bench.made == ["due", "due, too"]


def test_a_call_that_is_not_late_does_not_wait_for_turns(bench: Bench) -> None:
    bench.later(1, "due")
    bench.now += 1 + LATE * 0.9
    bench.fire()
    bench.still.turn()
    assert bench.made == ["due"]


def test_turns_are_added_while_a_source_has_more_events(bench: Bench) -> None:
    one, other = Reading(), Reading()
    bench.clock.sources.update((one, other))
    bench.later(1, "due")
    bench.now += 10
    bench.fire()
    other.has_more_events = True
    for _ in range(10):
        bench.still.turn()
        bench.fire()
    assert bench.made == []
    other.has_more_events = False
    bench.still.turn()
    assert bench.made == ["due"]


def test_the_added_turns_are_limited(bench: Bench) -> None:
    source = Reading()
    source.has_more_events = True
    bench.clock.sources.add(source)
    bench.later(1, "due")
    bench.now += 10
    bench.settle()
    assert bench.made == ["due"]
    assert bench.still.turns == MAX_TURNS + 1


def test_a_source_is_referenced_weakly(bench: Bench) -> None:
    bench.clock.sources.add(Reading())
    gc.collect()
    assert not bench.clock.sources


def test_calls_of_no_delay_do_not_wait(bench: Bench) -> None:
    """They may be what somebody takes what has arrived with."""
    bench.later(1, "due")
    bench.now += 10
    bench.fire()
    bench.later(0, "soon")
    bench.still.turn()
    assert bench.made == ["soon"]
    bench.settle()
    assert bench.made == ["soon", "due"]


@pytest.mark.parametrize("late", [0.0, 10.0])
def test_deadlines_are_compared_with_the_time_of_polling(
    bench: Bench, late: float
) -> None:
    """Wherever the machine is paused, or a call takes its time, after that."""
    told: list[float] = []

    def judge() -> None:
        bench.now += 100
        told.append(poll_time(bench.clock)())

    for _ in range(2):
        bench.later(1, "judge", judge)
    bench.later(50, "not yet due at that time")
    bench.now += 1 + late
    bench.fire()
    for _ in range(TURNS if late else 0):
        bench.still.turn()
    # The last turn before the judgement, which may have read what came until now.
    looked = bench.now
    bench.now += 100
    bench.still.turn()
    assert told == [looked, looked]
    bench.settle()
    assert bench.made == ["judge", "judge", "not yet due at that time"]


def test_a_long_turn_does_not_stop_due_calls(bench: Bench) -> None:
    """Any number of them."""
    for number in range(3):
        bench.later(1 + number, number)
    bench.now += 5
    for _ in range(2 * TURNS + 3):
        bench.fire()
        bench.still.turn()
        bench.now += 10 * LATE
    assert bench.made == [0, 1, 2]


def test_the_poll_time_of_another_clock_is_its_time() -> None:
    other = Clock()
    other.advance(7)
    assert poll_time(other)() == 7


class Reading(SimpleNamespace):
    """Something that the clock asks."""

    has_more_events = False
    __hash__ = object.__hash__
