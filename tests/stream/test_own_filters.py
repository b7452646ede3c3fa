"""Filters of one session alone, on fakes: where they stand, and what leaves them be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch as patched

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock

from relayd.core.errors import ConfigError
from relayd.core.filtering import FilterFactory
from relayd.core.session import Ending
from relayd.net.transports import WriteRefused
from relayd.operating.living_filters import LivingFilters
from relayd.stream.bridge import Bridge
from relayd.stream.filtering import FilteredClosingBridge
from relayd.tcp import RelayProtocol
from tests.stream.test_retries import Relay as Retrying
from tests.support.fakes import FakeTransport
from tests.support.own_filters import Makes, Marks, Own, Sees
from tests.support.relays import Relay


class Notes(Own):
    """Knows what it has seen."""

    seen = b""

    def data(self, data: bytes) -> bytes:
        self.seen += data
        return data


class Routed(RelayProtocol):
    """Does what a test says before its server is dialled."""

    before: Callable[[Any], object] = staticmethod(lambda _: None)

    def decide(self, *said: Any) -> None:
        self.before(self)
        super().decide(*said)


def routed(relay: Any, before: Callable[[Any], object]) -> FakeTransport:
    """A client connects, of which this is done."""

    class Protocol(Routed):
        pass

    Protocol.before = staticmethod(before)
    relay.factory.protocol = Protocol
    client: FakeTransport = relay.client()
    return client


def filters(*factories: Any) -> Callable[[Any], None]:
    return lambda client: client.filter_alone(factories)


def protocols(relay: Any) -> list[Any]:
    return list(relay.factory.sessions.values())


def passes(source: FakeTransport, sink: FakeTransport, data: bytes) -> bytes:
    """What comes of this at the other end."""
    before = len(sink.taken)
    source.receive(data)
    sink.take()
    return bytes(sink.taken[before:])


def ends(relay: Any) -> None:
    relay.factory.abort_all()
    relay.clock.pump([0.0] * 4)
    relay.factory.stopFactory()
    assert not relay.factory.sessions
    assert not relay.clock.getDelayedCalls()


def test_they_stand_behind_those_of_the_relay() -> None:
    shared, own = Makes(Marks, b"1", name="shared"), Makes(Marks, b"2", name="mine")
    relay = Relay(filters=[shared])
    down = routed(relay, filters(own))
    up = relay.server.dials[-1].connect()
    [protocol] = protocols(relay)
    assert passes(down, up, b"a") == b"a12"
    assert passes(up, down, b"b") == b"b12"
    assert list(protocol.filters) == [shared, own]
    assert protocol.filtered == ["shared", "mine"]
    assert relay.factory.filters == (shared,)
    ends(relay)
    assert shared.closed_once()
    assert own.closed_once()


def test_other_sessions_know_nothing_of_them() -> None:
    own = Makes(Marks, b"!")
    relay = Relay()
    alone = routed(relay, filters(own))
    to_alone = relay.server.dials[-1].connect()
    other = routed(relay, lambda _: None)
    to_other = relay.server.dials[-1].connect()
    first, second = protocols(relay)
    assert type(second.bridge) is Bridge
    assert relay.factory.bridge is Bridge
    assert passes(other, to_other, b"a") == b"a"
    assert passes(alone, to_alone, b"a") == b"a!"
    assert (list(first.filters), list(second.filters)) == ([own], [])
    assert (first.filtered, list(second.filtered)) == (["own"], [])
    ends(relay)


def test_what_was_said_before_passes_them() -> None:
    relay = Relay()
    down = routed(relay, filters(Makes(Marks, b"!")))
    down.receive(b"early")
    up = relay.server.dials[-1].connect()
    up.take()
    assert up.taken == b"early!"
    ends(relay)


def test_it_is_spliced_once_they_have_seen_enough() -> None:
    relay = Relay()
    down = routed(relay, filters(Makes(Sees, 2)))
    up = relay.server.dials[-1].connect()
    [protocol] = protocols(relay)
    for _ in range(3):
        assert passes(down, up, b"ab") == b"ab"
        assert passes(up, down, b"ab") == b"ab"
    assert type(protocol.bridge) is Bridge
    ends(relay)


def test_none_that_wants_it_leaves_a_plain_bridge() -> None:
    relay = Relay()
    routed(relay, filters(Makes(Own, course="neither")))
    relay.server.dials[-1].connect()
    [protocol] = protocols(relay)
    assert type(protocol.bridge) is Bridge
    ends(relay)


def test_where_the_first_end_closes_both() -> None:
    relay = Relay(half_close=False)
    routed(relay, filters(Makes(Own)))
    relay.server.dials[-1].connect()
    [protocol] = protocols(relay)
    assert type(protocol.bridge) is FilteredClosingBridge
    ends(relay)


def test_the_last_that_were_said_count() -> None:
    first, second = Makes(Marks, b"1"), Makes(Marks, b"2")
    relay = Relay()

    def twice(client: Any) -> None:
        client.filter_alone([first])
        client.filter_alone([second])

    down = routed(relay, twice)
    assert passes(down, relay.server.dials[-1].connect(), b"a") == b"a2"
    routed(relay, lambda client: [client.filter_alone(each) for each in ([first], [])])
    relay.server.dials[-1].connect()
    assert type(protocols(relay)[-1].bridge) is Bridge
    assert not first.made
    ends(relay)


# -- what is refused


class ForDatagrams(FilterFactory):
    name = "loss"

    def build_datagram_filter(self, way: Any) -> Any:
        raise NotImplementedError


class Owns(Makes):
    owns = "/var/tmp/c.pcapng"


class Swells(Makes):
    growth = 1024


class OwnBridge(Bridge):
    pass


@pytest.mark.parametrize(
    ("shared", "own", "kind", "why"),
    [
        ([], [ForDatagrams()], ValueError, "filter loss is for UDP flows"),
        ([], [Makes], TypeError, "is no factory of filters"),
        ([Owns(Own)], [Owns(Own)], ConfigError, "two filters of a session have /var/"),
        ([], [Owns(Own)] * 2, ConfigError, "two filters of a session have /var/tmp"),
        ([Swells(Own)], [Swells(Own)], ConfigError, "1,048,576 bytes of one"),
    ],
)
def test_what_can_not_be(
    shared: list[Any], own: list[Any], kind: type[Exception], why: str
) -> None:
    """The session is as it was."""
    relay = Relay(filters=shared)

    def tried(client: Any) -> None:
        with pytest.raises(kind, match=why):
            client.filter_alone(own)
        assert client.own_filters == ()
        assert client.own_bridge is None

    routed(relay, tried)
    assert relay.server.dials
    ends(relay)


def test_a_bridge_of_a_program_has_none() -> None:
    relay = Relay()
    relay.factory.bridge = OwnBridge

    def tried(client: Any) -> None:
        with pytest.raises(TypeError, match="OwnBridge has no filters"):
            client.filter_alone([Makes(Own)])
        client.filter_alone([])

    routed(relay, tried)
    relay.server.dials[-1].connect()
    assert type(protocols(relay)[0].bridge) is OwnBridge
    ends(relay)


def test_it_is_too_late_once_it_is_relayed() -> None:
    relay = Relay()
    relay.client()
    relay.server.dials[-1].connect()
    [protocol] = protocols(relay)
    with pytest.raises(RuntimeError, match="is relayed already"):
        protocol.filter_alone([Makes(Own)])
    ends(relay)


# -- changes of the relay's


class Joins(FilterFactory):
    """Marks; equal to others with the same mark.

    :param rare: it passes sessions by.
    """

    joins = True

    def __init__(self, mark: bytes, *, rare: bool = False) -> None:
        self.mark, self.rare = mark, rare
        self.name = mark.decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Joins) and self.mark == other.mark

    def __hash__(self) -> int:
        return hash(self.mark)

    def build_filter(self, way: Any) -> Any:
        return None if self.rare else Marks(way, self.mark)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "marks"),
    [
        (b"", b"x", b"xx"),
        (b"x", b"", b"x"),
        (b"x", b"y", b"xy"),
        (b"", b"y", b"xy"),
        (b"y", b"", b"x"),
    ],
)
def test_a_reload_takes_off_none_of_its_own(
    before: bytes, after: bytes, marks: bytes, same: bool
) -> None:
    """Also if one is equal to what goes, or is what goes."""
    made = {each: Joins(bytes([each])) for each in before + after}
    own = made.get(ord("x"), Joins(b"x")) if same else Joins(b"x")
    old, new = [made[each] for each in before], [made[each] for each in after]
    relay = Relay(filters=old)
    living = LivingFilters(Clock())
    down = routed(relay, filters(own))
    up = relay.server.dials[-1].connect()
    dialled = routed(relay, filters(own))
    living.change([relay.factory], old, new)
    assert passes(down, up, b"-") == b"-" + marks
    assert passes(up, down, b"-") == b"-" + marks
    # One that was not relayed yet has what its relay has now, and then its own.
    to_dialled = relay.server.dials[-1].connect()
    assert passes(dialled, to_dialled, b"-") == b"-" + after + b"x"
    ends(relay)


def test_one_that_has_passed_a_session_by_takes_none_off() -> None:
    """As a fault of which so many sessions in a hundred have one."""
    rare, own = Joins(b"x", rare=True), Joins(b"x")
    relay = Relay(filters=[rare])
    down = routed(relay, filters(own))
    up = relay.server.dials[-1].connect()
    LivingFilters(Clock()).change([relay.factory], [rare], [])
    assert passes(down, up, b"-") == b"-x"
    ends(relay)


def test_a_relay_that_had_some_when_they_were_given() -> None:
    """And has none when the session is joined; or the other way round."""
    shared, own = Joins(b"s"), Joins(b"o")
    relay = Relay(filters=[shared])
    down = routed(relay, filters(own))
    relay.factory.filter_by([])
    assert passes(down, relay.server.dials[-1].connect(), b"-") == b"-o"
    down = routed(relay, filters(own))
    relay.factory.filter_by([shared])
    assert passes(down, relay.server.dials[-1].connect(), b"-") == b"-so"
    ends(relay)


def test_a_look_into_it_comes_and_goes() -> None:
    """As of `relayctl capture`."""
    own, look = Makes(Marks, b"!", name="mine"), Makes(Own, name="capture")
    relay = Relay()
    down = routed(relay, filters(own))
    up = relay.server.dials[-1].connect()
    [protocol] = protocols(relay)
    protocol.change_filters([], [look])
    assert protocol.filtered == ["mine", "capture"]
    protocol.change_filters([look, own], [])
    assert protocol.filtered == ["mine"]
    assert passes(down, up, b"a") == b"a!"
    ends(relay)
    assert look.closed_once()


# -- servers that reset at once


class Two(Retrying):
    """A relay with two servers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(2, **options)


@pytest.mark.parametrize("kind", [Own, Sees])
def test_what_they_may_have_seen_goes_to_no_other_server(kind: type[Own]) -> None:
    """They may have changed it; also those that have left."""
    relay = Two()
    down = routed(relay, filters(Makes(kind, course="up")))
    up = relay.endpoints[0].dials[-1].connect()
    down.receive(b"question")
    # All of it was refused.
    up.dataBuffer = b""
    up.lose(WriteRefused(b"question"))
    relay.clock.pump([0.0] * 4)
    [session] = relay.witness.sessions
    assert session.ending is Ending.UPSTREAM_RESET
    assert not relay.endpoints[1].dials
    relay.factory.stopFactory()


def test_another_server_has_them_as_well() -> None:
    own = Makes(Marks, b"!")
    relay = Two()
    down = routed(relay, filters(own))
    relay.endpoints[0].dials[-1].connect().lose(ConnectionLost())
    up = relay.endpoints[1].dials[-1].connect()
    assert passes(down, up, b"a") == b"a!"
    assert len(own.made) == 4
    ends(relay)
    assert own.closed_once()


def test_they_do_not_see_the_preamble() -> None:
    own = Makes(Notes)
    relay = Relay(send_proxy="v1")
    down = routed(relay, filters(own))
    down.receive(b"early")
    up = relay.server.dials[-1].connect()
    up.take()
    assert up.taken.startswith(b"PROXY ")
    assert own.of("up").seen == b"early"
    ends(relay)


@pytest.mark.parametrize("own", [(), (Makes(Marks, b"!"),)])
def test_no_byte_takes_an_ack_along_that_a_filter_may_keep(own: Any) -> None:
    """As of a client that has said something which is not read yet."""
    relay = Relay()

    def has_spoken(client: Any) -> None:
        client.transport.has_unread = lambda: True
        client.filter_alone(own)

    routed(relay, has_spoken)
    [protocol] = protocols(relay)
    # What may be spliced is decided by the kinds of both: here, as on the plane.
    with patched("relayd.stream.server_attempt.way_between", lambda *_: 1):
        assert protocol.pending.speaks_first() is (not own)
    protocol.pending.holds_back = False
    relay.server.dials[-1].connect()
    ends(relay)
