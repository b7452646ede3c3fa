"""A gate, or a bandwidth, in place of another one: who counts, and who waits."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.limits import Waiting
from relayd.admission.per_client import ClientPrefix, ConnectRate
from relayd.admission.rates import Rates
from relayd.admission.session_limits import SessionLimits
from relayd.core.errors import Refused
from tests.admission.test_bandwidth import Reader
from tests.admission.test_gates import refusal, session, waiting

WIDE = ClientPrefix(24, 56)


# -- sessions


def test_sessions_of_before_count() -> None:
    """In all and for their client, over several changes, until they are over."""
    first = SessionLimits(3, 2)
    held = [first.enter(session()), first.enter(session("192.0.2.2:1"))]
    second = SessionLimits(4, 1)
    second.succeed(first)
    assert second.sessions == 2
    assert refusal(second) == ("max_sessions_per_client", "--max-sessions-per-client 1")
    third = SessionLimits(3, 9)
    third.succeed(second)
    held.append(third.enter(session()))
    assert refusal(third, "192.0.2.3:1") == ("max_sessions", "--max-sessions 3")
    held[1].release()
    held[1].release()
    assert (third.sessions, third.clients) == (2, 1)
    for each in held:
        each.release()
    assert (third.sessions, third.clients) == (0, 0)


def test_a_limit_that_is_less_than_there_are() -> None:
    """Nobody is ended for it; and nobody comes until there is a place."""
    first = SessionLimits(3)
    held = [first.enter(session()) for _ in range(3)]
    second = SessionLimits(1)
    second.succeed(first)
    for each in held:
        assert refusal(second) == ("max_sessions", "--max-sessions 1")
        each.release()
    assert refusal(second) is None


@pytest.mark.parametrize(
    ("most", "prefix"), [(2, None), (2, WIDE), (None, None), (None, WIDE)]
)
def test_clients_are_told_apart_as_the_new_limit_says(
    most: int | None, prefix: ClientPrefix | None
) -> None:
    """Those of before, too; also where they were not told apart.

    :param most: of one client, before; `prefix`, how they were told apart then.
    """
    first = SessionLimits(9, most, prefix=prefix)
    held = [first.enter(session(each)) for each in ("192.0.2.1:1", "192.0.2.2:1")]
    second = SessionLimits(9, 3, prefix=WIDE)
    second.succeed(first)
    assert (second.sessions, second.clients, second.most_of_one) == (2, 1, 2)
    held.append(second.enter(session("192.0.2.3:1")))
    assert refusal(second, "192.0.2.77:1") is not None
    third = SessionLimits(9, 1)
    third.succeed(second)
    assert (third.sessions, third.clients, third.most_of_one) == (3, 3, 1)
    for each in held:
        each.release()
        each.release()
    assert (third.sessions, third.clients) == (0, 0)


def test_a_limit_of_one_client_that_is_gone_and_back() -> None:
    """Whoever came meanwhile counts."""
    clock = Clock()
    first = SessionLimits(2, 1, queue=5, queue_timeout=10, clock=clock)
    held = [first.enter(session())]
    second = SessionLimits(2, queue=5, queue_timeout=10, clock=clock)
    second.succeed(first)
    held.append(second.enter(session()))
    answer, _ = waiting(second, "192.0.2.1:2")
    _, told = waiting(second, "192.0.2.2:2")
    assert second.clients == 0
    third = SessionLimits(2, 4, queue=5, queue_timeout=10, clock=clock)
    third.succeed(second)
    assert (third.clients, third.most_of_one) == (2, 3)
    answer.cancel()
    assert (third.clients, third.most_of_one) == (2, 2)
    for each in held:
        each.release()
    assert (third.clients, third.most_of_one) == (1, 1)
    told[0].release()
    assert (third.sessions, third.clients, third.waiting) == (0, 0, 0)
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("changes", [1, 2, 3])
def test_who_is_asked_about_after_a_change_counts(changes: int) -> None:
    """As a client whose PROXY header comes later: those that are there now say."""
    clock = Clock()
    first = latest = SessionLimits(9, 9)
    for _ in range(changes):
        before = latest
        latest = SessionLimits(2, 9, queue=1, queue_timeout=10, clock=clock)
        latest.succeed(before)
    held = [first.enter(session()), latest.enter(session())]
    assert (first.sessions, latest.sessions, latest.most_of_one) == (0, 2, 2)
    _, told = waiting(first, "192.0.2.2:1")
    assert latest.waiting == 1
    assert refusal(first) == ("queue", "--queue 1, with --max-sessions 2")
    held[0].release()
    for each in (held[1], told[0]):
        each.release()
    assert (latest.sessions, latest.clients, latest.waiting) == (0, 0, 0)
    assert not clock.getDelayedCalls()


def test_one_that_follows_the_first_of_several() -> None:
    """It counts what the last of them has."""
    first, second, third = (SessionLimits(9) for _ in range(3))
    second.succeed(first)
    held = second.enter(session())
    third.succeed(first)
    assert third.sessions == 1
    held.release()
    assert third.sessions == 0


def test_limits_that_are_no_more() -> None:
    """Whoever waits is admitted, and so is whoever is asked about later."""
    clock = Clock()
    limits = SessionLimits(1, 3, queue=3, queue_timeout=10, clock=clock)
    held = [limits.enter(session())]
    told = [waiting(limits, "192.0.2.1:1")[1] for _ in range(2)]
    limits.lift()
    held += [each[0] for each in told]
    held += [limits.enter(session()) for _ in range(5)]
    for each in held:
        each.release()
        each.release()
    assert not clock.getDelayedCalls()
    alone = SessionLimits(1)
    alone.lift()
    assert alone.enter(session())


@pytest.mark.parametrize("prefix", [None, WIDE])
def test_who_waits_goes_on_waiting(prefix: Any) -> None:
    """In order, before those who come now, and no longer than these."""
    clock = Clock()
    first = SessionLimits(1, 5, queue=9, queue_timeout=100, clock=clock)
    held = first.enter(session())
    answer, one = waiting(first, "192.0.2.2:1")
    _, two = waiting(first, "192.0.2.3:1")
    _, three = waiting(first, "192.0.2.4:1")
    options: Any = {"queue": 3, "queue_timeout": 10, "clock": clock, "prefix": prefix}
    second = SessionLimits(1, 5, **options)
    second.succeed(first)
    assert (first.waiting, second.waiting) == (0, 3)
    assert refusal(second) is not None, "the queue is full"
    answer.cancel()
    assert len(one) == 1
    _, four = waiting(second, "192.0.2.5:1")
    held.release()
    assert len(two) == 1
    assert (second.sessions, second.waiting) == (1, 2)
    clock.advance(10)
    assert [each[0].value.reason for each in (three, four)] == ["queue_timeout"] * 2
    two[0].release()
    assert (second.sessions, second.clients, second.waiting) == (0, 0, 0)
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("most", [None, 5])
def test_who_waits_comes_in_if_there_is_a_place_now(most: int | None) -> None:
    clock = Clock()
    first = SessionLimits(1, queue=9, queue_timeout=10, clock=clock)
    held = [first.enter(session())]
    told = [waiting(first, "192.0.2.2:1")[1] for _ in range(3)]
    # One that limits clients only has no limit in all.
    second = SessionLimits(most, 7, clock=clock)
    second.succeed(first)
    held += [each[0] for each in told]
    assert (second.sessions, second.waiting) == (4, 0)
    for each in held:
        each.release()
    assert second.sessions == 0
    assert not clock.getDelayedCalls()


def test_who_waits_has_as_long_as_those_who_come() -> None:
    """Where the queue has more time than before."""
    clock = Clock()
    first = SessionLimits(1, queue=9, queue_timeout=10, clock=clock)
    first.enter(session())
    _, told = waiting(first, "192.0.2.2:1")
    clock.advance(6)
    second = SessionLimits(1, queue=9, queue_timeout=30, clock=clock)
    second.succeed(first)
    clock.advance(23)
    assert not told
    clock.advance(1)
    assert told[0].value.why == "--queue-timeout 30"


def test_it_is_done_once() -> None:
    """The factories of one relay share a gate, and so do those of before."""
    first = SessionLimits(3)
    held = first.enter(session())
    second = SessionLimits(3)
    second.succeed(first)
    held.release()
    second.enter(session())
    second.succeed(first)
    assert second.sessions == 1


# -- rates


def test_what_a_client_has_left_of_a_rate() -> None:
    """It is known, if the rate is the same for the same clients."""
    clock = Clock()
    first = ConnectRates(ConnectRate(2, 10), clock)
    assert [refusal(first) for _ in range(2)] == [None, None]
    same = ConnectRates(ConnectRate(2, 10), clock)
    same.succeed(first)
    assert refusal(same) is not None
    others: list[tuple[ConnectRate, ClientPrefix | None]] = [
        (ConnectRate(3, 10), None),
        (ConnectRate(2, 10), WIDE),
    ]
    for rate, prefix in others:
        another = ConnectRates(rate, clock, prefix)
        another.succeed(same)
        assert refusal(another) is None


def test_the_bandwidth_of_before_and_after_is_one() -> None:
    """What a relay may have, it has once."""
    clock = Clock()
    rates = Rates(down=1000.0)
    first = Bandwidth(rates, clock=clock)
    old = Reader(first, "192.0.2.1:1", None)
    second = Bandwidth(rates, clock=clock)
    second.succeed(first)
    new = Reader(second, "192.0.2.2:1", None)
    for _ in range(1000):
        clock.advance(0.01)
        for reader in (old, new):
            if not reader.paused:
                granted = reader.pace.grant(10_000)
                reader.pace.spend(granted)
                reader.read += granted
                if not granted:
                    reader.pace.wait()
    assert 9_000 <= old.read + new.read <= 11_000
    assert second.waits == first.waits > 0
    for reader in (old, new):
        reader.limits.release()
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("per_client", [None, Rates(down=5.0)])
def test_another_bandwidth_is_for_those_who_come(per_client: Rates | None) -> None:
    """The others keep theirs."""
    clock = Clock()
    first = Bandwidth(Rates(down=10.0), per_client, clock=clock)
    old = Reader(first, "192.0.2.1:1", None)
    second = Bandwidth(Rates(down=1e6), per_client, clock=clock)
    second.succeed(first)
    new = Reader(second, "192.0.2.1:1", None)
    assert old.pace.quantum < 100
    assert (first.clients, second.clients) == (1, 1) if per_client else (0, 0)
    for reader in (old, new):
        reader.limits.release()
    assert (first.clients, second.clients) == (0, 0)


# -- tables of who waits


def test_a_table_gets_other_limits() -> None:
    """Nobody is evicted for that; then there is a place again."""
    table: Waiting[int] = Waiting("things", 3, 3, Clock())
    for number in range(3):
        table.add(number, "")
    assert table.limited_as(Waiting("things", 2, 1, Clock())) is table
    assert len(table) == 3
    with pytest.raises(Refused, match="2 things wait"):
        table.add(3, "a")
    table.discard(0)
    table.discard(1)
    with pytest.raises(Refused, match="1 things of this client"):
        table.add(3, "")
    table.add(3, "a")
    assert table.hits == 2
