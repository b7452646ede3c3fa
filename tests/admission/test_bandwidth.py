"""Limits of bandwidth: readers on a clock, that take what they are granted."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth, Pace
from relayd.admission.buckets import Bucket
from relayd.admission.per_client import ClientPrefix
from relayd.admission.rates import Rates
from relayd.core.pauses import ALLOWANCE
from relayd.core.session import PacedDirection
from tests.conftest import LoggedFailures

#: Seconds between two steps of the clock.
STEP = 0.01


@attrs.define(eq=False)
class Record:
    """What a Bandwidth sees of a session."""

    client: str = "192.0.2.1:1000"
    up: PacedDirection = attrs.Factory(PacedDirection)
    down: PacedDirection = attrs.Factory(PacedDirection)


class Reader:
    """What reads for the server's side of a session.

    :param demand: bytes that come in a second; None: there are always more.
    """

    def __init__(self, bandwidth: Bandwidth, client: str, demand: float | None) -> None:
        self.session = Record(client)
        self.limits = bandwidth.enter(self.session)
        self.demand = demand
        self.unread = 0.0
        self.read = 0
        self.paused = False
        self.pauses = 0
        self.longest = 0.0
        self._clock_at = 0.0
        pace = self.session.down.pace
        assert isinstance(pace, Pace)
        self.pace = pace
        pace.follow(self)

    def pause(self, reason: int) -> None:
        assert reason == ALLOWANCE
        assert not self.paused
        self.paused = True
        self.pauses += 1

    def resume(self, reason: int) -> None:
        assert reason == ALLOWANCE
        assert self.paused
        self.paused = False
        self.go_on()

    def step(self) -> None:
        """Bytes come."""
        if self.demand is not None:
            self.unread += self.demand * STEP
        if not self.paused:
            self.go_on()

    def go_on(self) -> None:
        """Read all that may be read."""
        while True:
            asked = self.pace.grant(1 << 17)
            if not asked:
                self.pace.wait()
                assert self.paused
                return
            count = asked if self.demand is None else min(asked, int(self.unread))
            if count:
                self.unread -= count
                self.read += count
                self.pace.spend(count)
            if count < asked:
                self.pace.rest()
                return


def run(clock: Clock, readers: list[Reader], seconds: float) -> list[int]:
    """Let the readers read; returns how much each has read."""
    before = [each.read for each in readers]
    for _ in range(round(seconds / STEP)):
        for each in readers:
            each.step()
        clock.advance(STEP)
    return [each.read - was for each, was in zip(readers, before, strict=True)]


def down(rate: float | None) -> Rates | None:
    return None if rate is None else Rates(down=rate)


def shares(demands: list[float], rate: float) -> list[float]:
    """Max-min fair shares of a rate, by filling up."""
    left, given_to = rate, dict.fromkeys(range(len(demands)), 0.0)
    for place, each in enumerate(sorted(given_to, key=demands.__getitem__)):
        given_to[each] = min(demands[each], left / (len(demands) - place))
        left -= given_to[each]
    return [given_to[each] for each in range(len(demands))]


@pytest.mark.parametrize("rate", [100.0, 1e3, 2e4, 1e5, 1e6, 5e7])
def test_a_rate_is_kept_exactly_and_smoothly(rate: float) -> None:
    clock = Clock()
    reader = Reader(Bandwidth(per_session=down(rate), clock=clock), "c:1", None)
    [first] = run(clock, [reader], 10)
    assert first == pytest.approx(rate * 10, rel=0.05 if rate >= 1e5 else 0.1)
    # Not a bit faster later on, nor at any quarter of a second.
    parts = [run(clock, [reader], 0.26)[0] for _ in range(40)]
    assert sum(parts) == pytest.approx(rate * 10.4, rel=0.03)
    assert min(parts) > 0
    assert not reader.limits.release()


@given(
    rate=st.floats(1e3, 1e7),
    demands=st.lists(st.none() | st.floats(1e2, 1e6), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=50)
def test_shares_of_a_limit_are_fair(rate: float, demands: list[float | None]) -> None:
    clock = Clock()
    bandwidth = Bandwidth(down(rate), clock=clock)
    readers = [Reader(bandwidth, f"192.0.2.1:{n}", d) for n, d in enumerate(demands)]
    run(clock, readers, 2)
    seconds = 5
    got = run(clock, readers, seconds)
    assert sum(got) <= rate * seconds * 1.05
    wanted = [1e12 if each is None else each for each in demands]
    for each, share in zip(got, shares(wanted, rate), strict=True):
        assert each >= share * seconds * 0.9 - 1
        # Who has waited catches up.
        assert each <= share * seconds * 1.1 + 3 * rate * 0.25
    for reader in readers:
        reader.limits.release()
    assert not clock.getDelayedCalls()


@given(
    rates=st.tuples(*[st.none() | st.sampled_from([2e3, 3e4, 4e5])] * 3).filter(any),
    clients=st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=50)
def test_several_limits_together(
    rates: tuple[float | None, ...], clients: list[int]
) -> None:
    """None is exceeded, and nobody starves."""
    clock = Clock()
    relay, per_client, per_session = rates
    bandwidth = Bandwidth(*map(down, rates), clock=clock)
    readers = [
        Reader(bandwidth, f"192.0.2.{client}:{n}", None)
        for n, client in enumerate(clients)
    ]
    run(clock, readers, 1)
    seconds = 5
    got = run(clock, readers, seconds)
    of_client = [
        sum(n for n, client in zip(got, clients, strict=True) if client == one)
        for one in set(clients)
    ]
    most = sum(
        min(
            per_client or 1e12,
            clients.count(one) * (per_session or 1e12),
        )
        for one in set(clients)
    )
    most = min(most, relay or 1e12)
    assert sum(got) == pytest.approx(most * seconds, rel=0.06)
    assert all(n <= (per_client or 1e12) * seconds * 1.05 for n in of_client)
    assert all(n <= (per_session or 1e12) * seconds * 1.05 for n in got)
    fair = most / len(clients)
    assert min(got) >= fair * seconds * 0.1
    for reader in readers:
        reader.limits.release()
    assert not clock.getDelayedCalls()
    assert bandwidth.clients == 0


def test_who_needs_little_does_not_wait_behind_a_bulk() -> None:
    clock = Clock()
    bandwidth = Bandwidth(down(1e5), clock=clock)
    bulk, little = Reader(bandwidth, "a:1", None), Reader(bandwidth, "b:1", 1000)
    run(clock, [bulk, little], 2)
    before = little.unread
    got = run(clock, [bulk, little], 10)
    assert little.unread <= before + 500
    assert got[1] == pytest.approx(10_000, rel=0.05)
    assert got[0] == pytest.approx(990_000, rel=0.05)


def test_who_is_late_gets_no_more_than_the_others() -> None:
    """What comes while they read their parts is for all of them."""
    clock = Clock()
    bandwidth = Bandwidth(down(1e6), clock=clock)
    readers = [Reader(bandwidth, f"c:{n}", None) for n in range(10)]
    for each in readers:
        each.go_on()
    before = [each.read for each in readers]
    late = readers[0].resume

    def slowly(reason: int) -> None:
        clock.advance(0.05)
        late(reason)

    readers[0].resume = slowly  # type: ignore[method-assign]
    clock.advance(0.2)
    more = [each.read - had for each, had in zip(readers, before, strict=True)]
    assert min(more) > 0
    assert max(more) == min(more)
    for each in readers:
        each.limits.release()


def test_who_reads_later_leaves_something_to_the_others() -> None:
    clock = Clock()
    bandwidth = Bandwidth(down(1e5), clock=clock)
    [first, second] = (Reader(bandwidth, f"c:{n}", None) for n in range(2))
    assert first.pace.take(1 << 17) == 8192
    assert second.pace.grant(1 << 17) == 8192
    first.pace.spend(100)
    second.pace.spend(8192)
    assert not second.pace.grant(1)
    # It has half a second, and gives back what it has not read.
    clock.advance(0.01)
    assert first.pace.grant(1 << 17) == 8092
    first.pace.rest()
    assert second.pace.grant(1 << 17) == 8092 + 1000
    for each in (first, second):
        each.limits.release()


def test_debts_are_paid() -> None:
    """A read that brings more than was granted, as a TLS record does."""
    clock = Clock()
    bandwidth = Bandwidth(per_session=down(1e5), clock=clock)
    reader = Reader(bandwidth, "c:1", None)
    reader.pace.spend(1_000_000)
    [got] = run(clock, [reader], 9)
    assert got == 0
    [got] = run(clock, [reader], 10)
    assert got == pytest.approx(910_000, rel=0.05)


def test_a_session_that_was_reset_is_not_limited_any_more() -> None:
    clock = Clock()
    bandwidth = Bandwidth(down(1e4), clock=clock)
    first, second = Reader(bandwidth, "c:1", 1e6), Reader(bandwidth, "c:2", None)
    run(clock, [first, second], 5)
    assert first.paused
    first.pace.lift()
    assert not first.paused
    assert int(first.unread) == 0
    # And that is nobody else's debt.
    [got] = run(clock, [second], 10)
    assert got == pytest.approx(1e5, rel=0.1)


def test_one_timer_while_somebody_waits() -> None:
    clock = Clock()
    bandwidth = Bandwidth(per_session=down(1e4), clock=clock)
    readers = [Reader(bandwidth, f"c:{n}", None) for n in range(50)]
    assert not clock.getDelayedCalls()
    for _ in range(300):
        run(clock, readers, STEP)
        assert len(clock.getDelayedCalls()) == 1
    for each in readers[1:]:
        each.limits.release()
        assert len(clock.getDelayedCalls()) == 1
    readers[0].limits.release()
    assert not clock.getDelayedCalls()
    assert bandwidth.waits == sum(each.pauses for each in readers) > 50


def test_one_that_can_not_be_resumed_does_not_keep_the_others(
    logged_failures: LoggedFailures,
) -> None:
    clock = Clock()
    bandwidth = Bandwidth(down(1e4), clock=clock)
    readers = [Reader(bandwidth, f"c:{n}", None) for n in range(3)]

    def fail(reason: int) -> None:
        raise ZeroDivisionError

    readers[0].resume = fail  # type: ignore[method-assign]
    [_, second, third] = run(clock, readers, 10)
    assert second == pytest.approx(third, rel=0.1)
    assert second + third > 8e4
    assert logged_failures.take("ZeroDivisionError")
    for each in readers:
        each.limits.release()


def test_a_session_that_is_ended_as_another_is_woken() -> None:
    """Both have their turn; who is woken first ends the other."""
    clock = Clock()
    bandwidth = Bandwidth(down(1e4), clock=clock)
    readers = [Reader(bandwidth, f"c:{n}", None) for n in range(2)]
    run(clock, readers, STEP)
    assert [each.paused for each in readers] == [True, True]

    def end_the_other(reason: int) -> None:
        readers[1].limits.release()

    readers[0].resume = end_the_other  # type: ignore[method-assign]
    clock.advance(1)
    readers[0].limits.release()
    assert not clock.getDelayedCalls()


def test_a_session_that_reads_while_it_waits_and_ends() -> None:
    """TLS hands on all that it has: another limit is short after that."""
    clock = Clock()
    bandwidth = Bandwidth(down(1e5), None, down(4e5), clock=clock)
    reader = Reader(bandwidth, "c:1", None)
    reader.pace.spend(30_000)
    reader.go_on()
    assert reader.paused
    reader.pace.spend(60_000)
    assert not reader.pace.grant(1)
    reader.limits.release()
    assert not clock.getDelayedCalls()


def test_ways_are_apart_and_one_may_have_no_limit() -> None:
    clock = Clock()
    session = Record()
    bandwidth = Bandwidth(Rates(up=1000), None, Rates(up=100), clock=clock)
    limits = bandwidth.enter(session)
    assert session.down.pace is None
    assert session.up.pace is not None
    assert session.up.pace.quantum == 25
    limits.release()


# -- clients


def test_clients_are_told_apart_by_their_keys() -> None:
    clock = Clock()
    bandwidth = Bandwidth(None, down(1e5), clock=clock, prefix=ClientPrefix(24, 64))
    names = ["192.0.2.1:1", "192.0.2.9:1", "192.0.3.1:1", "[2001:db8::1]:1"]
    readers = [Reader(bandwidth, name, None) for name in names]
    assert bandwidth.clients == 3
    got = run(clock, readers, 10)
    assert got[0] + got[1] == pytest.approx(1e6, rel=0.05)
    assert got[0] == pytest.approx(got[1], rel=0.1)
    assert got[2] == pytest.approx(1e6, rel=0.05)
    for each in readers:
        each.limits.release()
    assert bandwidth.clients == 0


def test_a_client_of_a_unix_socket_has_no_limit_of_its_own() -> None:
    bandwidth = Bandwidth(None, down(1e5), clock=Clock())
    session = Record("unix:/run/x")
    limits = bandwidth.enter(session)
    assert session.down.pace is None
    assert bandwidth.clients == 0
    limits.release()


def test_a_client_that_returns_gets_nothing_for_that() -> None:
    clock = Clock()
    bandwidth = Bandwidth(None, down(1e5), clock=clock)
    total = 0
    for _ in range(1000):
        reader = Reader(bandwidth, "192.0.2.1:1", None)
        total += run(clock, [reader], STEP)[0]
        reader.limits.release()
    assert total == pytest.approx(1e6, rel=0.05)
    assert bandwidth.remembered == 1


def test_clients_are_remembered_until_they_would_get_no_more_if_they_were_new() -> None:
    clock = Clock()
    bandwidth = Bandwidth(None, down(1e5), clock=clock)
    for number in range(5):
        reader = Reader(bandwidth, f"192.0.2.{number}:1", None)
        reader.go_on()
        reader.limits.release()
    assert bandwidth.remembered == 5
    clock.advance(1)
    Reader(bandwidth, "192.0.3.1:1", 0).limits.release()
    assert bandwidth.remembered <= 2
    assert bandwidth.evicted == 0


def test_the_table_of_clients_has_a_limit() -> None:
    clock = Clock()
    bandwidth = Bandwidth(None, down(1e5), clock=clock, max_clients=3)
    for number in range(10):
        reader = Reader(bandwidth, f"192.0.2.{number}:1", None)
        reader.go_on()
        reader.limits.release()
        assert bandwidth.remembered <= 3
    assert bandwidth.evicted == 7
    with pytest.raises(ValueError, match="max_clients"):
        Bandwidth(clock=clock, max_clients=0)


Steps = st.lists(
    st.tuples(
        st.sampled_from(["enter", "leave", "read", "lift", "wait", "time"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(steps=Steps)
@settings(deadline=None, max_examples=200)
def test_whatever_happens_nothing_is_left(steps: Any) -> None:
    clock = Clock()
    bandwidth = Bandwidth(down(1e4), down(5e3), down(3e3), clock=clock)
    living: list[Reader] = []
    for what, number in steps:
        each = living[number % len(living)] if living else None
        if what == "enter":
            living.append(Reader(bandwidth, f"192.0.2.{number}:1", number * 1e4))
        elif what == "time":
            run(clock, living, number * 0.05)
        elif each is None:
            continue
        elif what == "leave":
            living.remove(each)
            each.limits.release()
            each.limits.release()
        elif what == "read" and not each.paused:
            each.unread += 1e5
            each.go_on()
        elif what == "lift":
            each.pace.lift()
    assert bandwidth.clients == len({r.session.client.split(":")[0] for r in living})
    for each in living:
        each.limits.release()
    assert bandwidth.clients == 0
    assert not clock.getDelayedCalls()


def test_a_quantum_is_a_tenth_of_a_second_within_limits() -> None:
    sizes = {rate: Bucket(rate, 0.0).quantum for rate in (1, 1e4, 1e5, 1e6, 1e9)}
    assert sizes == {1: 1, 1e4: 2500, 1e5: 16384, 1e6: 1e5, 1e9: 1e8}
