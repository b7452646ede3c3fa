"""A factory in place of another one: what was counted is counted on."""

from __future__ import annotations

from typing import Any

from twisted.internet import error
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.core.counts import SessionCounts
from relayd.core.errors import Refused
from relayd.net.upstream import Upstream
from relayd.preludes.socks4 import Command, write_request
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint
from tests.support.proxies import Proxy
from tests.support.relays import Relay


def two(**options: Any) -> tuple[Relay, Relay]:
    """A relay, and the one that is to succeed it."""
    return Relay(name="web", **options), Relay(name="web")


def sessions_end(relay: Relay) -> None:
    """One is refused by its server, one by the gate, one says nothing."""
    relay.client()
    relay.server.dials[-1].fail(error.ConnectionRefusedError())
    relay.gate.problem = Refused("closed today", "hours")
    relay.client()
    relay.gate.problem = None
    client = relay.client()
    server = relay.server.dials[-1].connect()
    client.receive_eof()
    server.receive_eof()


def test_totals_go_on() -> None:
    """Those of before and of after count together, whoever is asked."""
    old, new = two()
    old.factory.counts = SessionCounts(["server:80"])
    sessions_end(old)
    new.factory.succeed(old.factory)
    for each in (new, old):
        sessions_end(each)
    for each in (old, new):
        assert each.factory.endings == {"connect_refused": 3, "refused": 3}
        assert each.factory.refusals == {"hours": 3}
        assert each.factory.silent == 3
        assert each.factory.counts is not None
        assert each.factory.counts.closed == {"done": 3, "connect_refused": 3}
        assert each.factory.counts.refused == {"hours": 3}


def test_sequence_numbers_go_on() -> None:
    """No two sessions of a relay have one."""
    old, new = two()
    old.client()
    new.factory.succeed(old.factory)
    for each in (new, old, new):
        each.client()
    ordinals = [each.ordinal for each in (*old.witness.sessions, *new.witness.sessions)]
    assert sorted(ordinals) == [0, 1, 2, 3]


def test_sessions_stay_where_they_are() -> None:
    """The new one has none of them, and is drained without them."""
    old, new = two()
    client = old.client()
    new.factory.succeed(old.factory)
    assert len(old.factory.sessions) == 1
    assert not new.factory.sessions
    new.factory.drain(0)
    assert not client.aborted
    old.factory.drain(0)
    assert client.aborted


def test_several_factories_of_one_relay() -> None:
    """Of the ports of a range: one total, and each its own sequence."""
    one, other = two()
    other.factory.share_totals(one.factory)
    for each in (one, other):
        sessions_end(each)
        assert [session.ordinal for session in each.witness.sessions] == [0, -1, 1]
    assert one.factory.endings == {"connect_refused": 2, "refused": 2}


def test_failures_are_counted_on(logged_failures: LoggedFailures) -> None:
    old, new = two()
    old.gate.problem = new.gate.problem = ZeroDivisionError()
    old.client()
    logged_failures.take("could not be opened")
    new.factory.succeed(old.factory)
    # A second has not passed: there is no other line.
    new.client()
    assert new.factory.failures == old.factory.failures == 2


def test_retries_are_counted_on() -> None:
    """Also over one that has none."""
    clock = Clock()
    made = [
        RelayFactory(Upstream(FakeEndpoint(clock), "db:1"), clock=clock, retries=count)
        for count in (1, 0, 2)
    ]
    assert [each.retries is None for each in made] == [False, True, False]
    first, second, third = made
    assert first.retries is not None
    assert third.retries is not None
    first.retries.tally.count = 5
    second.succeed(first)
    third.succeed(second)
    assert third.retries.count == 5
    third.retries.tally.count += 1
    assert {each.totals.retried.count for each in made} == {6}


def test_waits_for_bandwidth_are_counted_on() -> None:
    """Also over one whose bandwidth has no limit, and by another limit."""
    clock = Clock()
    limits = [Bandwidth(Rates(down=rate), clock=clock) for rate in (10.0, 20.0)]
    limits[0].tally.count = 3
    first = Relay(name="web", bandwidth=limits[0])
    second, third = Relay(name="web"), Relay(name="web", bandwidth=limits[1])
    second.factory.succeed(first.factory)
    assert second.factory.totals.waits == 3
    third.factory.succeed(second.factory)
    limits[1].tally.count += 1
    assert third.factory.totals.waits == limits[0].waits == limits[1].waits == 4
    # One that never had a limit, and gets one.
    plain, limited = Relay(), Relay(bandwidth=Bandwidth(Rates(down=1.0), clock=clock))
    assert plain.factory.totals.waits == 0
    limited.factory.succeed(plain.factory)
    limited.factory.bandwidth.tally.count = 2  # type: ignore[union-attr]
    assert plain.factory.totals.waits == limited.factory.totals.waits == 2


def test_a_bandwidth_of_somebody_elses() -> None:
    """It has no tally, and is left alone."""

    class Own:
        waits = 7

        def enter(self, session: Any) -> Any:
            raise NotImplementedError

    first = Relay(bandwidth=Own())
    second = Relay(bandwidth=Own())
    second.factory.succeed(first.factory)
    assert second.factory.totals.waited is None


def test_the_tables_of_a_proxy() -> None:
    """One for the handshakes of before and after, and one for the BINDs; new limits."""
    old = Proxy(max_handshakes=5, max_binds=3)
    new = Proxy(max_handshakes=2, max_handshakes_per_client=2)
    first = old.client(b"\4")
    old.factory.handshakes.hits = 4
    new.factory.succeed(old.factory)
    assert new.factory.handshakes is old.factory.handshakes
    assert new.factory.binds is old.factory.binds
    assert (new.factory.handshakes.limit, new.factory.binds.limit) == (2, 256)
    assert new.factory.handshakes.hits == 4
    second = new.client(b"\4")
    assert len(new.factory.handshakes) == 2
    # The oldest goes, whichever factory it has.
    new.client(b"\4")
    assert first.disconnecting
    assert not second.disconnecting
    assert new.factory.handshakes.hits == 5
    first.lose()
    assert new.factory.endings == {"evicted": 1}
    bind = write_request(Command.BIND, "192.0.2.9", 80)
    old.client(bind)
    new.client(bind)
    assert len(new.factory.binds) == 2


def test_a_proxy_that_succeeds_a_relay() -> None:
    """It has tables of its own."""
    relay, proxy = Relay(), Proxy()
    sessions_end(relay)
    mine = proxy.factory.handshakes
    proxy.factory.succeed(relay.factory)
    assert proxy.factory.handshakes is mine
    assert proxy.factory.refusals == {"hours": 1}
