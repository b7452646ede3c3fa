"""RelayFactory on fakes: accept, gate, choose, join, shut down."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyClass

from relayd.core.errors import Refused
from relayd.core.interfaces import IDialer, IGate
from relayd.core.observers import Observer, Observers
from relayd.core.session import Ending, Session
from relayd.net.monotonic import MonotonicClock
from relayd.net.upstream import Upstream
from relayd.stream.attempt import Attempt
from relayd.stream.factory import Unserved
from relayd.tcp import RelayFactory, RelayProtocol
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.relays import Relay, Turnstile, Witness


def test_a_session_from_accept_to_end() -> None:
    relay = Relay()
    client = relay.client()
    client.receive(b"early")
    relay.clock.advance(0.5)
    server = relay.server.dial.connect()
    client.receive(b" bird")
    server.take()
    assert server.taken == b"early bird"
    server.receive(b"worm")
    client.take()
    relay.clock.advance(1.5)
    client.receive_eof()
    server.receive_eof()
    session = relay.session
    assert session.client == "192.0.2.1:50000"
    assert session.listener == "192.0.2.2:80"
    assert session.upstream == "192.0.2.1:9000"
    assert session.connected_at == session.connect_seconds == 0.5
    assert (session.attempts, session.queue_seconds) == (1, 0)
    assert session.duration == 2.0
    assert (session.up.read, session.down.read) == (10, 4)
    relay.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


def test_both_connections_get_no_delay_at_once_and_keepalive_if_they_last() -> None:
    """At the wheel's first look, once: a short session does without."""
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()
    for transport in (client, server):
        assert transport.getTcpNoDelay()
        assert not transport.getTcpKeepAlive()
    relay.clock.pump([1.0] * 3)
    for transport in (client, server):
        assert transport.log.count("keepalive=True") == 1
    client.lose()


def test_a_factory_that_makes_its_own_protocols_gets_options_too() -> None:
    class Own(RelayFactory):
        def buildProtocol(self, addr: Any) -> Any:
            return self.protocol(self, "a client of ours")

    transport = FakeTransport()
    factory = Own(FakeEndpoint(), clock=Clock(), observer=Observer())
    transport.connect(factory.buildProtocol(transport.peer))
    assert transport.getTcpNoDelay()
    transport.lose()
    factory.stopFactory()


def test_a_factory_may_have_no_protocol_for_a_client() -> None:
    relay = Relay()
    relay.factory.protocol = lambda *_: None
    assert relay.factory.build_named("192.0.2.1:50000") is None
    assert relay.factory.buildProtocol(FakeTransport().peer) is None


@pytest.mark.parametrize(
    "problem", [OSError(22, "Invalid argument"), AttributeError("setTcpNoDelay")]
)
def test_options_that_can_not_be_set_are_no_error(problem: Exception) -> None:
    """The socket is dead, or the transport wraps one that has no such options."""
    relay = Relay()
    transport = FakeTransport()

    def refuse(_: bool) -> None:
        raise problem

    transport.setTcpNoDelay = refuse  # type: ignore[method-assign]
    protocol: Any = relay.factory.buildProtocol(transport.peer)
    transport.connect(protocol)
    assert relay.witness.heard[0] == "opened"
    server = FakeTransport()
    server.setTcpNoDelay = refuse  # type: ignore[method-assign]
    dial = relay.server.dial
    server.connect(dial.factory.buildProtocol(server.peer))
    dial.deferred.callback(server.protocol)
    assert relay.witness.heard[-1] == "connected 192.0.2.1:50000"
    transport.lose()


def test_an_observer_may_end_what_has_just_connected() -> None:
    """Both connections are reset, and the drain does not wait for them."""
    relay = Relay()
    relay.witness.connected = (  # type: ignore[method-assign]
        lambda session: relay.factory.drain(0)
    )
    relay.factory.observer = Observers(relay.witness)
    client = relay.client()
    server = relay.server.dial.connect()
    assert not client.connected
    assert not server.connected
    relay.over("opened", "dialing server:80", "closed drained")


@pytest.mark.parametrize("moment", ["opened", "dialing"])
@pytest.mark.parametrize("ended", ["abort_session", "end"])
def test_an_observer_may_end_a_session_that_is_not_dialled_yet(
    moment: str, ended: str
) -> None:
    """Then it is not dialled."""
    relay = Relay()

    def end(session: Session) -> None:
        getattr(Witness, moment)(relay.witness, session)
        getattr(relay.factory.sessions[session.id], ended)(Ending.DENIED)

    setattr(relay.witness, moment, end)
    relay.factory.observer = Observers(relay.witness)
    client = relay.client()
    assert not relay.server.dials
    assert not client.connected
    before = ["opened"] if moment == "opened" else ["opened", "dialing server:80"]
    relay.over(*before, "closed denied")


def test_endings_are_counted() -> None:
    """By their words, but for those of sessions that ended well."""
    relay = Relay()
    for _ in range(2):
        relay.client()
        relay.server.dials.pop().fail(error.ConnectionRefusedError())
    relay.gate.problem = Refused("not today")
    relay.client()
    relay.gate.problem = None
    client = relay.client()
    server = relay.server.dial.connect()
    client.receive_eof()
    server.receive_eof()
    assert relay.factory.endings == {"connect_refused": 2, "refused": 1}


@implementer(IDialer)
class Redialed:
    """Answers at once: refuses, and then connects."""

    peer_name = "192.0.2.9:80"

    def __init__(self) -> None:
        self.dials = 0
        self.last: FakeDial | None = None

    def dial(self, caller: Any) -> Any:
        self.dials += 1
        if self.dials == 1:
            caller.dial_failed(Failure(error.ConnectionRefusedError()))
            return None
        self.last = FakeDial()
        return self.last


class FakeDial:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_a_dial_that_follows_one_that_failed_at_once_can_be_cancelled() -> None:
    class Persistent(RelayProtocol):
        def attempt_failed(self, attempt: Attempt) -> None:
            self.dial(self.factory.pool.choose(self.session))

    relay = Relay()
    dialer: Any = Redialed()
    relay.factory.protocol = Persistent
    relay.factory.pool = Pool.of(Upstream(dialer, "server:80"))
    client = relay.client()
    assert dialer.dials == 2
    client.lose()
    assert dialer.last.cancelled
    relay.over("opened", "dialing server:80", "dialing server:80", "closed client_left")


def test_the_upstream_may_speak_first() -> None:
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()
    server.receive(b"220 ready")
    client.take()
    assert client.taken == b"220 ready"
    client.lose()


# -- the gate


def test_a_refused_client_is_closed_and_nothing_is_dialled() -> None:
    relay = Relay()
    relay.gate.problem = Refused("the shop is shut")
    client = relay.client()
    assert not client.connected
    assert relay.server.dials == []
    assert relay.session.ending is Ending.REFUSED
    assert relay.session.ended_at is not None
    relay.over("refused the shop is shut")


def test_a_gate_with_a_bug_lets_nobody_in(logged_failures: LoggedFailures) -> None:
    relay = Relay()
    relay.gate.problem = ZeroDivisionError("in the gate")
    client = relay.client()
    assert not client.connected
    logged_failures.take("in the gate")
    relay.over("refused could not be opened")


def test_a_lease_that_fails_is_logged_only(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()
    client = relay.client()

    def broken() -> None:
        relay.gate.inside -= 1
        raise ZeroDivisionError("in release")

    monkeypatch.setattr(relay.gate, "release", broken)
    client.lose()
    logged_failures.take("in release")
    relay.over("opened", "dialing server:80", "closed client_left")


def test_the_interfaces_are_what_is_asked_for() -> None:
    assert verifyClass(IGate, Turnstile)


# -- deadlines, through the wheel


def test_the_wheel_watches_a_joined_session() -> None:
    relay = Relay(stall_timeout=10)
    client = relay.client()
    server = relay.server.dial.connect()
    client.receive(b"x")
    relay.clock.pump([0.5] * 24)
    assert not server.connected
    assert relay.witness.heard[-1] == "closed upstream_stalled"


def test_a_deadline_that_fails_ends_its_session_only(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()
    client = relay.client()
    relay.server.dial.connect()
    other = relay.client()
    relay.server.dials[1].connect()
    [first, _] = relay.factory.sessions.values()
    assert first.bridge is not None

    def broken(_: object, now: float) -> None:
        raise ZeroDivisionError("in check")

    monkeypatch.setattr(first, "check", broken.__get__(first))
    relay.clock.pump([0.5] * 4)
    logged_failures.take("in check")
    assert not client.connected
    assert other.connected
    assert relay.witness.heard[-1] == "closed failed"
    relay.factory.abort_all()


# -- shutting down


def drained(relay: Relay, timeout: float) -> list[None]:
    done: list[None] = []
    relay.factory.drain(timeout).addCallback(done.append)
    relay.clock.advance(0)
    return done


def test_a_relay_without_sessions_is_drained_at_once() -> None:
    relay = Relay()
    assert drained(relay, 10) == [None]
    late = relay.factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1))
    assert isinstance(late, Unserved)


def test_a_drain_lets_sessions_finish() -> None:
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()
    done = drained(relay, 10)
    again = drained(relay, 10)
    client.receive(b"last request")
    client.receive_eof()
    server.take()
    relay.clock.advance(5)
    assert not done
    server.receive_eof()
    assert done == again == [None]
    relay.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


def test_a_drain_does_not_wait_for_ever() -> None:
    relay = Relay()
    relay.client()
    relay.server.dial.connect()
    relay.client()
    done = drained(relay, 10)
    relay.clock.advance(9.9)
    assert not done
    relay.clock.advance(0.2)
    assert done == [None]
    assert relay.server.cancelled == 1
    assert relay.witness.heard[-2:] == ["closed drained", "closed drained"]


def test_a_second_drain_may_be_shorter() -> None:
    relay = Relay()
    relay.client()
    first = drained(relay, 10)
    assert drained(relay, 0) == [None]
    assert first == [None]
    relay.over("opened", "dialing server:80", "closed drained")


def test_a_listener_that_opens_again_is_served() -> None:
    """And a drain of it then is one of its own, with its own time."""
    relay = Relay()
    factory = relay.factory
    for number in range(2):
        factory.doStart()
        client = relay.client()
        relay.server.dials[number].connect()
        factory.doStop()
        done = drained(relay, 10)
        late = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1))
        assert isinstance(late, Unserved)
        relay.clock.advance(9.9)
        assert client.connected
        relay.clock.advance(0.2)
        assert done == [None]
    assert relay.witness.heard[-1] == "closed drained"
    assert relay.clock.getDelayedCalls() == []


# -- the constructor


def test_what_can_be_relayed_to() -> None:
    with pytest.raises(TypeError, match="needs a Pool"):
        RelayFactory("127.0.0.1:80", clock=Clock())  # type: ignore[arg-type]


def test_an_endpoint_alone_will_do() -> None:
    server = FakeEndpoint()
    factory = RelayFactory(server, clock=Clock(), observer=Observer())
    client = FakeTransport()
    protocol: Any = factory.buildProtocol(None)
    client.connect(protocol)
    assert len(server.dials) == 1
    assert protocol.session.upstream == "FakeEndpoint"
    client.lose()


def test_a_negative_timeout_is_refused() -> None:
    with pytest.raises(ValueError, match="stall must not be negative"):
        RelayFactory(FakeEndpoint(), stall_timeout=-1, clock=Clock())


def test_time_comes_from_the_reactor_unless_given() -> None:
    from twisted.internet import reactor

    # Not by what `reactor.seconds` says, which somebody may set.
    assert RelayFactory(FakeEndpoint()).clock is MonotonicClock.of(reactor)
