"""What outlives a change of settings, with factories as the settings make them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import pytest
from twisted.internet import reactor

from relayd.admission.gates import RulesGate
from relayd.admission.per_client import ConnectRate
from relayd.admission.rates import Rates
from relayd.admission.session_limits import SessionLimits
from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.config import (
    Admission,
    Config,
    Relay,
    Socks4Relay,
    Socks4Settings,
)
from relayd.observing.line_log import EVENTS
from relayd.operating.relays import unit_of
from relayd.operating.standing import Listening
from relayd.operating.succession import succeed, take_over
from relayd.operating.units import Workshop
from tests.admission.test_gates import session

LIMITED = Admission(max_sessions=5, max_connects_per_client=ConnectRate(9, 10))


def tcp(listen: str, *, name: str = "web", **settings: Any) -> list[Listening]:
    dest = "10.0.0.1:80-82" if "-" in listen else "10.0.0.1:80"
    relay = Relay((LISTEN.parse(listen),), (DEST.parse(dest),), name)
    relay = attrs.evolve(relay, **settings)
    return unit_of(relay, Workshop(Config(()), reactor, EVENTS)).listenings


def ordinal(listening: Listening) -> int:
    """The next sequence number of a listener."""
    factory: Any = listening.factory
    return int(next(factory.ordinals))


def totals(*listenings: Listening) -> set[Any]:
    return {each.factory.totals for each in listenings}  # type: ignore[attr-defined]


def test_a_relay_whose_settings_change() -> None:
    """By its listener; it knows who is there, by its gate."""
    [old], [new] = tcp("80", admission=LIMITED), tcp("80", admission=LIMITED)
    gate: Any = old.factory.gate  # type: ignore[attr-defined]
    gate.enter(session())
    ordinal(old)
    succeed([new], [old])
    assert len(totals(old, new)) == 1
    assert ordinal(new) == 1
    [rates, limits] = new.factory.gate.gates  # type: ignore[attr-defined]
    assert len(rates) == limits.sessions == 1


def test_the_ports_of_a_range() -> None:
    """Each follows its own; a new port begins anew; all have one total."""
    before = tcp("80-82", admission=LIMITED)
    for number, each in enumerate(before):
        for _ in range(10 * number):
            ordinal(each)
    after = tcp("81-83", admission=LIMITED)
    assert len(totals(*after)) == 1
    succeed(after, before)
    assert [ordinal(each) for each in after] == [10, 20, 0]
    assert len(totals(*before, *after)) == 1


def test_relays_of_other_names_are_others() -> None:
    """They may swap their ports."""
    before = [*tcp("80"), *tcp("81", name="db")]
    after = [*tcp("81"), *tcp("80", name="db"), *tcp("82", name="new")]
    succeed(after, before)
    web, db, new = (each.factory.totals for each in after)  # type: ignore[attr-defined]
    assert len({web, db, new}) == 3
    assert [web] == [*totals(before[0])]
    assert [db] == [*totals(before[1])]


def test_one_that_stays_is_left_alone() -> None:
    [old] = tcp("80", admission=LIMITED)
    before = old.factory.totals  # type: ignore[attr-defined]
    # Its listener is another one.
    other = attrs.evolve(old, name="81")
    succeed([old, other], [old])
    assert old.factory.totals is before  # type: ignore[attr-defined]


def test_one_that_is_back() -> None:
    """While it has sessions of before; else it begins anew."""
    [gone], [back] = tcp("80"), tcp("80")
    succeed([back], [], [gone.factory])
    assert len(totals(gone, back)) == 1


def test_the_listeners_of_a_proxy() -> None:
    def proxy(most: int) -> list[Listening]:
        listeners = [LISTEN.parse("127.0.0.1:1"), LISTEN.parse("127.0.0.1:2")]
        settings = Socks4Settings(max_binds=most)
        relay = Socks4Relay(listeners=listeners, name="p", socks4=settings)
        return unit_of(relay, Workshop(Config(()), reactor, EVENTS)).listenings

    before, after = proxy(3), proxy(4)
    succeed(after, before)
    factories: list[Any] = [each.factory for each in (*before, *after)]
    assert len({each.binds for each in factories}) == 1
    assert len({each.handshakes for each in factories}) == 1
    assert len({each.totals for each in factories}) == 1
    assert {each.binds.limit for each in factories} == {4}


@pytest.mark.parametrize("other", [None, object(), RulesGate([])])
def test_a_gate_of_another_kind(other: Any) -> None:
    """Nothing is known of who was there, and nothing is asked of somebody else's."""
    gate = SessionLimits(1)
    take_over(gate, other)
    take_over(gate, gate)
    assert gate.enter(session())
    assert gate.sessions == 1
    # Its limit is no more.
    take_over(other, gate)
    assert gate.enter(session())


def test_clients_that_those_of_before_have_still_to_ask_about() -> None:
    """They ask what is there now, after any number of changes; also if nothing is."""
    rates = Admission(bandwidth=Rates(down=1e6))
    settings = [Admission(), LIMITED, Admission(), rates, LIMITED]
    generations = [tcp("80", admission=each) for each in settings]
    older: list[Any] = []
    for before, after in pairwise(generations):
        # Those without a session are forgotten, but for the latest.
        older.append(before[0].factory)
        succeed(after, before, older)
        new: Any = after[0].factory
        assert {each.gate for each in older} == {new.gate}
        assert {each.bandwidth for each in older} == {new.bandwidth}


def test_a_relay_that_is_back_follows_the_latest_of_before() -> None:
    """Several are there still that have sessions, the oldest first."""
    generations = [tcp("80", admission=LIMITED)]
    for number in range(6, 8):
        settings = attrs.evolve(LIMITED, max_sessions=number)
        generations.append(tcp("80", admission=settings))
        succeed(generations[-1], generations[-2])
    former: list[Any] = [each.factory for [each] in generations]
    former[-1].gate.enter(session())
    [back] = tcp("80", admission=attrs.evolve(LIMITED, max_sessions=9))
    succeed([back], [], former)
    limits = back.factory.gate.gates[-1]  # type: ignore[attr-defined]
    assert (limits.sessions, limits.max_sessions) == (1, 9)
