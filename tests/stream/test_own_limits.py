"""Limits of one session alone, on fakes: its bytes, its time, and those of its key."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.lifetimes import Lifetime
from relayd.admission.rates import Rates
from relayd.core.errors import Refused
from relayd.core.pauses import ALLOWANCE
from relayd.core.routing import NO_LIMITS, RouteLimits
from relayd.core.session import Ending, PacedDirection
from relayd.stream.relay import StreamRelay
from tests.stream.test_own_filters import Routed, ends, protocols, routed
from tests.support.fakes import FakeTransport
from tests.support.own_filters import Makes, Marks
from tests.support.proxies import CONNECT, Proxy
from tests.support.relays import Relay

STEP = 0.05


def limits(**said: Any) -> Any:
    return lambda client: client.limit_alone(RouteLimits(**said))


def join(relay: Relay, **said: Any) -> tuple[FakeTransport, FakeTransport]:
    """A client with these limits, and its server."""
    client = routed(relay, limits(**said))
    server = relay.server.dials[-1].connect()
    client.capacity = server.capacity = 1 << 30
    return client, server


def run(relay: Relay, seconds: float) -> None:
    calls = relay.clock.getDelayedCalls
    for _ in range(round(seconds / STEP)):
        relay.clock.advance(STEP)
        # What the turn has scheduled.
        while any(c.getTime() <= relay.clock.seconds() for c in calls()):
            relay.clock.advance(0)


# -- sessions


def test_a_session_counts_for_a_limit_that_is_new_time_and_again() -> None:
    """More often than calls may nest."""
    relay = Relay()
    client = relay.client()
    [protocol] = relay.factory.sessions.values()
    for _ in range(2000):
        protocol.count_for(relay.gate.enter(protocol.session))
    assert relay.gate.inside == 2001
    client.lose()
    assert relay.gate.inside == 0


# -- bytes


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("shared", [None, 1e6, 1e4])
def test_bandwidth_of_one_session(shared: float | None, way: str) -> None:
    """Beside that of its relay: what is less holds; others have only that."""
    relay = Relay()
    if shared is not None:
        rates = Rates(shared, shared)
        relay.factory.bandwidth = Bandwidth(None, None, rates, clock=relay.clock)
    alone = join(relay, bandwidth=Rates(2e4, 2e4))
    other = join(relay)
    for client, server in (alone, other):
        (client if way == "up" else server).arrive(bytes(100_000))
    run(relay, 2)
    least = min(2e4, shared or 2e4)
    for (client, server), rate in ((alone, least), (other, shared or 1e9)):
        taken = len((server if way == "up" else client).taken)
        assert taken == pytest.approx(min(2 * rate, 100_000), rel=0.2)
    ends(relay)


def test_the_other_way_is_not_limited() -> None:
    relay = Relay()
    client, server = join(relay, bandwidth=Rates(up=1e3))
    client.arrive(bytes(100_000))
    server.arrive(bytes(100_000))
    run(relay, 1)
    assert len(client.taken) == 100_000
    assert len(server.taken) == pytest.approx(1e3, rel=0.3)
    ends(relay)


def test_what_is_never_limited_is_paced_by_nothing() -> None:
    relay = Relay()
    join(relay)
    join(relay, bandwidth=Rates(up=1e3))
    plain, paced = (each.session for each in protocols(relay))
    assert not isinstance(plain.up, PacedDirection)
    assert isinstance(paced.up, PacedDirection)
    assert paced.down.pace is None
    assert protocols(relay)[0]._limits is None
    ends(relay)


def test_what_it_has_said_before_is_counted() -> None:
    """And is not lost: its record goes on where it was."""
    relay = Relay()

    def has_spoken(client: Any) -> None:
        client.dataReceived(bytes(5000))
        client.limit_alone(RouteLimits(bandwidth=Rates(up=1e4)))

    client = routed(relay, has_spoken)
    server = relay.server.dials[-1].connect()
    server.capacity = 1 << 30
    client.arrive(bytes(100_000))
    run(relay, 2)
    assert len(server.taken) == pytest.approx(2e4, rel=0.2)
    [protocol] = protocols(relay)
    assert protocol.session.up is protocol.direction
    assert protocol.session.up.read == len(server.taken)
    ends(relay)


def test_its_limit_and_its_filters_go_together() -> None:
    relay = Relay()

    def both(client: Any) -> None:
        client.limit_alone(RouteLimits(bandwidth=Rates(1e4, 1e4)))
        client.filter_alone([Makes(Marks, b"")])

    client = routed(relay, both)
    server = relay.server.dials[-1].connect()
    server.capacity = 1 << 30
    client.arrive(bytes(100_000))
    run(relay, 2)
    assert len(server.taken) == pytest.approx(2e4, rel=0.2)
    ends(relay)


def test_a_client_is_not_read_ahead_of_its_limit() -> None:
    relay = Relay()
    client = routed(relay, limits(bandwidth=Rates(1e4, 1e4)))
    [protocol] = protocols(relay)
    assert protocol.paused & ALLOWANCE
    client.arrive(bytes(1000))
    assert client.waiting == 1000
    ends(relay)


def test_waits_count_with_those_of_the_relay() -> None:
    for shared in (False, True):
        relay = Relay()
        assert relay.factory.totals.waited is None
        if shared:
            bandwidth = Bandwidth(Rates(1e9, 1e9), clock=relay.clock)
            relay.factory.bandwidth = bandwidth
            relay.factory.totals.waited = bandwidth.tally
        client, _ = join(relay, bandwidth=Rates(1e3, 1e3))
        client.arrive(bytes(10_000))
        run(relay, 1)
        assert relay.factory.totals.waits > 0
        ends(relay)


def test_a_bandwidth_of_a_program_must_know_of_it() -> None:
    class Lease:
        def release(self) -> None:
            """Nothing."""

    class Own:
        waits = 0

        def enter(self, session: Any) -> Any:
            return Lease()

    relay = Relay(bandwidth=Own())

    def tried(client: Any) -> None:
        with pytest.raises(TypeError, match="Lease limits no single sessions"):
            client.limit_alone(RouteLimits(bandwidth=Rates(1, 1)))

    routed(relay, tried)
    ends(relay)


# -- time


def age(relay: Relay, seconds: float, *sides: FakeTransport) -> None:
    """Something moves all the time."""
    for _ in range(round(seconds * 2)):
        relay.clock.advance(0.5)
        for each in sides:
            if each.connected and each.reading:
                each.receive(b"x")
            each.take()


@pytest.mark.parametrize(
    ("shared", "own", "why"),
    [
        (None, 10, "the route's max_age 10"),
        (100, 10, "the route's max_age 10"),
        (10, 100, "--max-age 10"),
    ],
)
def test_the_earlier_of_two_ages(shared: float | None, own: float, why: str) -> None:
    lifetime = None if shared is None else Lifetime(shared)
    relay = Relay(lifetime=lifetime, idle_timeout=0)
    client, server = join(relay, max_age=own)
    other = join(relay, max_age=None)
    [session, second] = relay.witness.sessions
    age(relay, 8.5, client, server, *other)
    assert session.ending is None
    age(relay, 2.5, client, server, *other)
    assert session.ending is Ending.MAX_AGE
    assert session.detail == why
    assert 9 <= session.duration <= 11
    assert (second.ending is None) is (shared != 10)
    ends(relay)


def test_no_age_is_for_ever() -> None:
    relay = Relay(idle_timeout=0)
    sides = join(relay, max_age=0)
    [protocol] = protocols(relay)
    assert protocol.watches == ()
    age(relay, 100, *sides)
    assert protocol.session.ending is None
    ends(relay)


def test_it_ages_only_while_it_is_relayed() -> None:
    """As with `--max-age`: what it has waited for is not its own time."""
    relay = Relay(connect_timeout=0, idle_timeout=0)
    client = routed(relay, limits(max_age=10))
    relay.clock.pump([0.5] * 40)
    [session] = relay.witness.sessions
    assert session.ending is None
    server = relay.server.dials[-1].connect()
    age(relay, 8.5, client, server)
    assert session.ending is None
    age(relay, 2.5, client, server)
    assert session.ending is Ending.MAX_AGE
    ends(relay)


# -- those of its key


class Denies(Routed):
    """As a relay does with a route's refusal."""

    def decide(self, *said: Any) -> None:
        try:
            super().decide(*said)
        except Refused as refusal:
            self.end(Ending.DENIED, refusal.why)


def keyed(relay: Relay, key: str, most: int = 1) -> FakeTransport:
    class Protocol(Denies):
        before = staticmethod(limits(sessions=most, key=key))

    relay.factory.protocol = Protocol
    return relay.client()


def test_so_many_sessions_of_a_key() -> None:
    relay = Relay()
    first = keyed(relay, "a", 2)
    keyed(relay, "a", 2)
    over = keyed(relay, "a", 2)
    keyed(relay, "b", 2)
    over.take()
    assert not over.connected
    assert [each.detail for each in relay.witness.sessions if each.ending] == [
        "the limit of sessions of 'a' is reached: 2"
    ]
    own: Any = relay.factory.own_limits
    assert own.counts == {"a": 2, "b": 1}
    # One that has left, in whichever way, gives its place to the next one.
    first.lose()
    assert own.counts == {"a": 1, "b": 1}
    next_one = keyed(relay, "a", 2)
    next_one.take()
    assert next_one.connected
    assert relay.gate.inside == 3
    ends(relay)
    assert own.counts == {}
    assert relay.gate.inside == 0


def test_one_that_is_refused_takes_nothing() -> None:
    relay = Relay()
    keyed(relay, "a")

    def tried(client: Any) -> None:
        said = RouteLimits(sessions=1, key="a", bandwidth=Rates(1, 1), max_age=1)
        with pytest.raises(Refused):
            client.limit_alone(said)
        assert client.watches == ()
        assert client._limits is None

    routed(relay, tried)
    ends(relay)


def test_without_a_key_all_are_of_one() -> None:
    relay = Relay()
    keyed(relay, "")
    keyed(relay, "").take()
    assert [each.detail for each in relay.witness.sessions if each.ending] == [
        "the limit of sessions of '' is reached: 1"
    ]
    ends(relay)


def test_a_reload_forgets_none() -> None:
    """Those of before and of after are of one relay."""
    old, new = Relay(name="web"), Relay(name="web")
    before = keyed(old, "a", 2)
    new.factory.succeed(old.factory)
    keyed(new, "a", 2)
    keyed(new, "a", 2).take()
    assert [each.ending for each in new.witness.sessions] == [None, Ending.DENIED]
    # Also one that came before and is decided about after.
    keyed(old, "a", 2).take()
    assert [each.ending for each in old.witness.sessions] == [None, Ending.DENIED]
    before.lose()
    keyed(new, "a", 2)
    assert new.witness.sessions[-1].ending is None
    ends(old)
    ends(new)


def test_relays_have_nothing_together() -> None:
    one, other = Relay(), Relay()
    keyed(one, "a")
    keyed(other, "a")
    assert other.witness.sessions[-1].ending is None
    ends(one)
    ends(other)


# -- when, and where


def test_nothing_is_said() -> None:
    relay = Relay()
    client = routed(relay, lambda client: client.limit_alone(NO_LIMITS))
    [protocol] = protocols(relay)
    assert protocol._limits is None
    assert protocol.watches == ()
    client.lose()
    ends(relay)


def test_one_that_is_over_holds_nothing() -> None:
    """Its client has left while it was decided about."""
    relay = Relay()
    client = relay.client()
    [protocol] = protocols(relay)
    client.lose()
    said = RouteLimits(sessions=1, key="a", bandwidth=Rates(1, 1), max_age=1)
    protocol.limit_alone(said)
    own: Any = relay.factory.own_limits
    assert own.counts == {}
    assert protocol._limits is None
    ends(relay)


def test_it_is_too_late_once_it_is_relayed() -> None:
    relay = Relay()
    join(relay)
    [protocol] = protocols(relay)
    with pytest.raises(RuntimeError, match="is relayed already"):
        protocol.limit_alone(RouteLimits(max_age=1))
    ends(relay)


def test_a_relay_of_a_program_may_have_none() -> None:
    assert StreamRelay.own_limits is None
    relay = Relay()
    relay.factory.own_limits = None

    def tried(client: Any) -> None:
        with pytest.raises(TypeError, match="RelayFactory limits no single sessions"):
            client.limit_alone(RouteLimits(max_age=1))
        client.limit_alone(NO_LIMITS)

    routed(relay, tried)
    ends(relay)


def test_a_proxy_has_them_as_well() -> None:
    proxy = Proxy()
    client = proxy.client()
    [protocol] = proxy.factory.sessions.values()
    protocol.limit_alone(RouteLimits(sessions=1, key="a", max_age=10))
    client.receive(CONNECT)
    own: Any = proxy.factory.own_limits
    assert own.counts == {"a": 1}
    client.lose()
    assert own.counts == {}
