"""The clock beside the reactor: its calls, and what it looks at first.

They are tried on a reactor that stands still, with a timer that a test fires.
"""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.base import DelayedCall
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from zope.interface.verify import verifyObject

from relayd.core.observers import Observer
from relayd.net.descriptors import Descriptors
from relayd.net.log_throttle import LogThrottle
from relayd.net.monotonic import (
    UNSWEPT,
    MonotonicClock,
    monotonic,
)
from relayd.net.wheel import DeadlineWheel
from relayd.plane.poller import Plane
from relayd.socks4 import Socks4Factory
from relayd.stream.bridge import Timeouts
from relayd.stream.factory import StreamFactory
from relayd.udp_nat import Server, UdpNat
from tests.conftest import LoggedFailures
from tests.support.still_clock import Bench, bench

__all__ = ["bench"]


live: Any = reactor


# -- whose clock it is


def test_a_reactor_has_one_clock_and_keeps_its_own() -> None:
    clock = monotonic(reactor)
    assert clock is monotonic(reactor) is MonotonicClock.of(reactor)
    assert clock.seconds is time.monotonic
    assert live.seconds is not time.monotonic
    assert monotonic(clock) is clock


@pytest.mark.parametrize("given_one", [Clock(), MemoryReactorClock()])
def test_a_clock_of_another_kind_is_used_as_it_is(given_one: Any) -> None:
    assert monotonic(given_one) is given_one


def test_clocks_do_not_outlive_their_reactors() -> None:
    """A program that makes a reactor after another does not pile them up."""

    class Brief(type(live)):  # type: ignore[misc]
        """A reactor of Twisted's that opens nothing."""

        def __init__(self) -> None:
            pass

    brief = Brief()
    clock = weakref.ref(monotonic(brief))
    plane = weakref.ref(Plane.of(brief))
    assert isinstance(clock(), MonotonicClock)
    del brief
    gc.collect()
    assert (clock(), plane()) == (None, None)


def test_all_that_use_a_reactors_time_use_its_monotonic_clock() -> None:
    clock: Any = MonotonicClock.of(reactor)
    factory = StreamFactory(
        timeouts=Timeouts(), clock=live, observer=Observer(), gate=None
    )
    assert factory.clock is clock
    assert factory.now is time.monotonic
    assert factory.wheel._clock is clock
    assert factory.wheel._poll_time == clock.poll_time
    assert Socks4Factory(reactor).clock is clock
    nat = UdpNat(reactor, [Server("127.0.0.1", 9)])
    assert nat.clock is clock
    assert nat.ledger.now is time.monotonic
    assert DeadlineWheel(live, 1)._clock is LogThrottle(live)._clock is clock
    throttle: Any = Descriptors(reactor)._throttle._clock
    assert throttle.seconds is time.monotonic
    assert Plane(reactor).pipes._clock() is clock


# -- calls


def test_calls_are_made_in_the_order_of_their_times(bench: Bench) -> None:
    for delay in (3, 1, 2, 1, 3):
        bench.later(delay, (delay, bench.clock._pending))
    bench.pass_by(0.999)
    assert bench.made == []
    bench.pass_by(0.001)
    # Those of one time in the order in which they were asked for.
    assert bench.made == [(1, 1), (1, 3)]
    bench.pass_by(2)
    assert bench.made[2:] == [(2, 2), (3, 0), (3, 4)]


def test_a_call_has_its_arguments(bench: Bench) -> None:
    got: list[Any] = []
    bench.clock.callLater(0, lambda *a, **k: got.append((a, k)), 1, 2, callme=3)
    bench.clock.callLater(1, lambda *a, **k: got.append((a, k)), callable_=4)
    bench.pass_by(1)
    assert got == [((1, 2), {"callme": 3}), ((), {"callable_": 4})]


@pytest.mark.parametrize("delay", [-1, -1e-9, float("nan")])
def test_a_negative_delay_is_refused(bench: Bench, delay: float) -> None:
    with pytest.raises(ValueError, match="a delay must not be negative"):
        bench.later(delay, "never")


def test_an_endless_delay_is_not_made(bench: Bench) -> None:
    call = bench.later(float("inf"), "never")
    bench.pass_by(1e6)
    assert bench.made == []
    call.cancel()


def test_a_cancelled_call_is_not_made(bench: Bench) -> None:
    call, soon = bench.later(1, "late"), bench.later(0, "soon")
    assert verifyObject(IDelayedCall, call)
    assert call.active()
    assert call.getTime() == bench.now + 1
    call.cancel()
    soon.cancel()
    assert not call.active()
    with pytest.raises(AlreadyCancelled):
        call.cancel()
    made = bench.later(0, "made")
    bench.pass_by(5)
    assert bench.made == ["made"]
    with pytest.raises(AlreadyCalled):
        made.cancel()


def test_the_last_of_several_that_is_cancelled_by_another(bench: Bench) -> None:
    """In a turn, and in the course of those that are due."""
    for delay in (0, 1):
        calls: list[DelayedCall] = []
        calls.append(bench.later(delay, delay, lambda c=calls: c[1].cancel()))
        calls.append(bench.later(delay, "cancelled"))
        bench.pass_by(delay)
    assert bench.made == [0, 1]


def test_a_call_is_delayed(bench: Bench) -> None:
    reset, delayed = bench.later(1, "reset"), bench.later(1, "delayed")
    twice, soon = bench.later(1, "twice"), bench.later(0, "soon")
    reset.reset(3)
    delayed.delay(1)
    twice.delay(1)
    twice.delay(2)
    soon.reset(5)
    bench.pass_by(1)
    assert bench.made == []
    bench.pass_by(1)
    assert bench.made == ["delayed"]
    bench.pass_by(1)
    assert bench.made == ["delayed", "reset"]
    bench.pass_by(1)
    assert bench.made[2:] == ["twice"]
    bench.pass_by(1)
    assert bench.made[3:] == ["soon"]


def test_a_call_is_brought_forward(bench: Bench) -> None:
    reset, delayed = bench.later(9, "reset"), bench.later(9, "delayed")
    past, both = bench.later(9, "past"), bench.later(9, "both")
    reset.reset(2)
    delayed.delay(-8)
    past.reset(0)
    both.reset(1)
    both.reset(9)
    bench.settle()
    assert bench.made == ["past"]
    bench.pass_by(1)
    assert bench.made == ["past", "delayed"]
    bench.pass_by(1)
    assert bench.made == ["past", "delayed", "reset"]
    bench.pass_by(7)
    assert bench.made[3:] == ["both"]
    bench.pass_by(9)
    assert len(bench.made) == 4


def test_calls_ask_for_others(bench: Bench) -> None:
    """One that is made at once waits for the next turn, as with a reactor."""
    turns: list[int] = []

    def again(left: int) -> None:
        turns.append(bench.still.turns)
        if left:
            bench.clock.callLater(0, again, left - 1)

    bench.later(1, "first", lambda: bench.later(1, "second", lambda: again(3)))
    bench.pass_by(1)
    bench.pass_by(1)
    assert bench.made == ["first", "second"]
    assert len(set(turns)) == 4


def test_a_call_that_raises_stops_no_other(
    bench: Bench, logged_failures: LoggedFailures
) -> None:
    def fail(problem: BaseException) -> None:
        raise problem

    for delay, problem in ((0, OSError("zero")), (1, SystemExit("one"))):
        bench.later(delay, delay)
        bench.clock.callLater(delay, fail, problem)
        bench.later(delay, delay)
    bench.later(2, 2)
    bench.pass_by(1)
    bench.pass_by(1)
    assert bench.made == [0, 0, 1, 1, 2]
    assert "a timed call failed" in logged_failures.take("OSError: zero")
    assert "a timed call failed" in logged_failures.take("SystemExit: one")


@pytest.mark.cost
def test_thousands_of_cancelled_calls_are_not_kept(bench: Bench) -> None:
    """A test of cost.

    Beside one that is pending, and of calls that are moved to and fro.
    """
    kept = bench.later(1e6, "kept")
    most = 0
    for number in range(10_000):
        bench.later(1000 + number, number).cancel()
        most = max(most, len(bench.clock._calls))
    for number in range(5000):
        kept.reset(2e6 - number)
        kept.reset(1e6 - number)
        most = max(most, len(bench.clock._calls))
    assert most <= UNSWEPT + 1
    many = [bench.later(1000, number) for number in range(1000)]
    for call in many:
        call.cancel()
    assert len(bench.clock._calls) <= UNSWEPT + 1
    assert bench.clock.getDelayedCalls() == [kept]
    kept.cancel()
    assert not bench.clock._calls


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["later", "later", "cancel", "reset", "delay", "pass"]),
        st.integers(0, 30),
        st.integers(0, 8),
    ),
    max_size=60,
)


@given(acts=ACTS)
def test_it_makes_the_calls_that_a_clock_of_twisted_makes(
    acts: list[tuple[str, int, int]],
) -> None:
    """Whatever is cancelled and moved, at the same times."""
    model, expected = Clock(), []
    bench = Bench()
    begin = bench.now
    pairs: list[tuple[DelayedCall, Any]] = []
    for act, which, seconds in [*acts, ("pass", 0, 1000)]:
        if act == "later":
            name = len(pairs)
            pairs.append(
                (
                    bench.later(seconds, name),
                    model.callLater(seconds, lambda n=name: expected.append(n)),
                )
            )
        elif act == "pass":
            before = len(expected)
            model.advance(seconds)
            bench.pass_by(seconds)
            assert sorted(bench.made[before:]) == sorted(expected[before:])
            left = {each.getTime() for each in model.getDelayedCalls()}
            ours = {c.getTime() - begin for c in bench.clock.getDelayedCalls()}
            assert ours == left
            assert bench.clock._pending == len(model.getDelayedCalls())
            assert bench.armed is None or bench.armed > bench.now
        elif pairs:
            for each in pairs[which % len(pairs)]:
                if each.active():
                    # Not before now: a model in the past would not be fair.
                    arguments = () if act == "cancel" else (seconds,)
                    getattr(each, act)(*arguments)
    assert bench.armed is None


# -- the timer


def test_the_timer_is_open_while_a_call_is_pending(bench: Bench) -> None:
    bench.later(5, "x")
    first = bench.now + 5
    assert bench.armed == first
    bench.later(9, "y")
    assert bench.armed == first
    sooner = bench.later(1, "z")
    assert bench.armed == bench.now + 1
    sooner.cancel()
    # Woken in vain, it waits for the next.
    bench.pass_by(1)
    assert bench.armed == first
    bench.pass_by(4)
    assert bench.armed == bench.now + 4
    bench.pass_by(4)
    assert bench.armed is None
    assert bench.opened == 1


@pytest.mark.cost
def test_a_pair_of_call_and_cancel_does_not_open_and_close(bench: Bench) -> None:
    """A test of cost."""
    for _ in range(100):
        bench.later(5, "never").cancel()
    assert bench.opened == 1
    assert bench.armed is not None
    bench.settle()
    assert bench.armed is None


@pytest.mark.cost
def test_calls_of_no_delay_take_no_timer(bench: Bench) -> None:
    """A test of cost."""
    bench.later(0, 1)
    bench.later(0, 2)
    assert len(bench.still.calls) == 1
    bench.settle()
    assert bench.made == [1, 2]
    assert bench.opened == 0


@pytest.mark.cost
def test_calls_that_come_one_after_the_other_set_it_once_each(bench: Bench) -> None:
    """A test of cost.

    As the wheel's do: whoever is asked for by one that is made sets nothing.
    """

    def again() -> None:
        if len(bench.made) < 5:
            bench.later(2, "x", again)
            bench.later(1, "x", again).cancel()

    again()
    before = bench.set
    for _ in range(4):
        bench.pass_by(2)
    assert bench.set - before <= 8
    assert len(bench.made) == 5 or not bench.pass_by(2)
    assert bench.opened == 1


def test_zero_delay_survives_a_step_back_of_the_reactors_clock(bench: Bench) -> None:
    for step in (3600, 1e9):
        bench.later(0, "soon")
        bench.later(1, "later")
        bench.still.rightNow -= step
        bench.settle()
        bench.now += 1
        bench.fire()
        bench.still.rightNow = 0.0
        bench.settle()
    assert bench.made == ["soon", "later"] * 2


def test_a_timer_that_the_reactor_drops_is_opened_again(bench: Bench) -> None:
    """As it stops.  A later call does not forget those that were there."""
    bench.later(1, "a")
    bench.armed = None
    bench.clock._lost()
    bench.later(5, "b")
    assert bench.armed == bench.now + 1
    bench.pass_by(1)
    bench.pass_by(4)
    assert bench.made == ["a", "b"]
