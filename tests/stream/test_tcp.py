"""RelayFactory on fakes: accept, gate, choose, dial, join, shut down."""

from __future__ import annotations

import gc
import socket
import weakref
from typing import Any

import pytest
from OpenSSL import SSL
from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyClass

from relayd.core.errors import Refused
from relayd.core.interfaces import IDialer, IGate, ILease
from relayd.core.observers import Observer, Observers
from relayd.core.session import Ending, Session
from relayd.net.dialing import SocketEndpoint
from relayd.net.monotonic import MonotonicClock
from relayd.net.tls import ServerIdentity
from relayd.net.upstream import Upstream
from relayd.stream.attempt import Attempt
from relayd.stream.bridge import HOLD_LIMIT
from relayd.stream.session import LEFT_GRACE
from relayd.tcp import RelayFactory, RelayProtocol
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTLSTransport, FakeTransport


class Witness(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.sessions: list[Session] = []

    def opened(self, session: Session) -> None:
        self.heard.append("opened")
        self.sessions.append(session)

    def dialing(self, session: Session) -> None:
        self.heard.append(f"dialing {session.upstream}")

    def connected(self, session: Session) -> None:
        self.heard.append(f"connected {session.upstream}")

    def closed(self, session: Session) -> None:
        assert session.ending is not None
        self.heard.append(f"closed {session.ending.word}")

    def refused(self, session: Session, why: str) -> None:
        self.heard.append(f"refused {why}")
        self.sessions.append(session)


@implementer(IGate, ILease)
class Turnstile:
    """Counts those inside, and refuses when told to."""

    def __init__(self) -> None:
        self.inside = 0
        self.problem: Exception | None = None

    def enter(self, session: Session) -> ILease:
        if self.problem is not None:
            raise self.problem
        self.inside += 1
        return self

    def release(self) -> None:
        self.inside -= 1


class Relay:
    """A relay on fakes."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.server = FakeEndpoint(self.clock)
        self.witness = Witness()
        self.gate = Turnstile()
        self.factory = RelayFactory(
            Upstream(self.server, "server:80"),
            clock=self.clock,
            observer=self.witness,
            gate=self.gate,
            **options,
        )

    def client(self) -> FakeTransport:
        """A client connects."""
        transport = FakeTransport(clock=self.clock)
        protocol = self.factory.buildProtocol(transport.peer)
        assert protocol is not None
        return transport.connect(protocol)

    @property
    def session(self) -> Session:
        [session] = self.witness.sessions
        return session

    def over(self, *heard: str) -> None:
        """The observer heard this, and nothing is left."""
        assert self.witness.heard == list(heard)
        assert not self.factory.sessions
        assert self.gate.inside == 0
        assert len(self.factory.wheel) == 0
        self.factory.stopFactory()
        assert not self.clock.getDelayedCalls()


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
    assert session.connected_at == 0.5
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


# -- the client while the server is dialled


def test_a_client_that_resets_cancels_the_dial() -> None:
    relay = Relay()
    client = relay.client()
    client.lose()
    assert relay.server.cancelled == 1
    relay.over("opened", "dialing server:80", "closed client_left")


def test_a_client_that_only_ends_its_side_gets_a_grace() -> None:
    relay = Relay()
    client = relay.client()
    client.receive_eof()
    relay.clock.advance(LEFT_GRACE / 2)
    assert relay.server.cancelled == 0
    relay.clock.pump([0.2] * 10)
    assert relay.server.cancelled == 1
    relay.over("opened", "dialing server:80", "closed client_left")


def test_a_client_that_waits_for_a_banner_gets_it() -> None:
    relay = Relay()
    client = relay.client()
    client.receive_eof()
    server = relay.server.dial.connect()
    assert server.write_shut
    relay.clock.pump([0.2] * 10)
    server.receive(b"banner")
    server.receive_eof()
    client.take()
    assert client.taken == b"banner"
    relay.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


def test_a_client_that_sent_a_request_waits_for_its_answer() -> None:
    relay = Relay()
    client = relay.client()
    client.receive(b"request")
    client.receive_eof()
    relay.clock.pump([0.5] * 10)
    assert relay.server.cancelled == 0
    server = relay.server.dial.connect()
    server.take()
    assert server.taken == b"request"
    assert server.write_shut
    client.lose()


def test_what_a_client_sends_meanwhile_is_bounded() -> None:
    relay = Relay()
    client = relay.client()
    sent = 0
    while client.reading:
        client.receive(bytes(10_000))
        sent += 10_000
    assert HOLD_LIMIT <= sent < HOLD_LIMIT + 10_000
    client.lose()


def test_an_endpoint_that_connects_after_all_is_reset() -> None:
    relay = Relay()
    client = relay.client()
    dial = relay.server.dial
    protocol: Any = dial.factory.buildProtocol(None)
    late = FakeTransport()
    client.lose()
    # The Deferred was cancelled, and what it says now Twisted drops: the leg
    # itself must see that nobody waits for it.
    late.connect(protocol)
    relay.over("opened", "dialing server:80", "closed client_left")
    assert not late.connected


# -- dials that fail


@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.ConnectionRefusedError("no"), Ending.CONNECT_REFUSED),
        (error.TimeoutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.TCPTimedOutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.DNSLookupError("who"), Ending.UNRESOLVED),
        (error.NoRouteError("where"), Ending.CONNECT_FAILED),
        (error.ConnectBindError("EMFILE"), Ending.CONNECT_FAILED),
        (OSError(5, "odd"), Ending.CONNECT_FAILED),
        (CancelledError(), Ending.CONNECT_FAILED),
    ],
)
def test_a_failed_dial_closes_the_client_and_says_why(
    problem: Exception, ending: Ending
) -> None:
    relay = Relay()
    client = relay.client()
    client.receive(b"request")
    relay.server.dial.fail(problem)
    assert client.log[-1] == "close"
    assert relay.session.ending is ending
    assert relay.session.detail
    assert "\n" not in relay.session.detail
    relay.over("opened", "dialing server:80", f"closed {ending.word}")


@pytest.mark.parametrize("side", ["client", "server", "client, not joined"])
def test_a_loss_that_nobody_tells_of_keeps_no_session(side: str) -> None:
    """An override that a foreign transport has called, and that keeps it to itself."""

    class Silent(RelayProtocol):
        def connectionLost(self, reason: Any = None) -> None:
            """Not ours."""

    relay = Relay(idle_timeout=2)
    ending = "closed idle"
    if side != "server":
        relay.factory.protocol = Silent
    client = relay.client()
    if side == "client, not joined":
        [protocol] = relay.factory.sessions.values()
        protocol.abort_session(Ending.DRAINED)
        ending = "closed drained"
    else:
        server = relay.server.dial.connect()
        if side == "server":
            server.protocol.connectionLost = Silent.connectionLost
        (client if side == "client" else server).lose()
    relay.clock.pump([0.25] * 20)
    assert not client.connected
    heard = [] if side == "client, not joined" else ["connected 192.0.2.1:9000"]
    relay.over("opened", "dialing server:80", *heard, ending)


@pytest.mark.cost
@pytest.mark.parametrize("outcome", ["connects", "fails", "is cancelled"])
def test_an_endpoint_that_keeps_its_factory_keeps_no_session(outcome: str) -> None:
    """A test of cost.

    As Twisted's do, in a cycle of references, until the collector finds it.
    """
    relay = Relay()
    client = relay.client()
    [protocol] = map(weakref.ref, relay.factory.sessions.values())
    factory = relay.server.dial.factory
    if outcome == "connects":
        server = relay.server.dial.connect()
        client.receive_eof()
        server.receive_eof()
        del server
    elif outcome == "fails":
        relay.server.dial.fail(error.ConnectError())
    else:
        client.lose()
    assert not relay.factory.sessions
    # What the fakes keep.
    del client.protocol
    relay.server.dials.clear()
    gc.disable()
    try:
        assert protocol() is None
    finally:
        gc.enable()
    # Built late, it is not left connected.
    assert not FakeTransport().connect(factory.buildProtocol(None)).connected


def test_last_words_may_take_longer_than_an_abort() -> None:
    """A session whose ending is decided goes on until they are delivered."""
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()
    client.receive(b"last words")
    client.lose(error.ConnectionLost())
    relay.clock.pump([0.25] * 20)
    assert server.connected
    server.take()
    relay.clock.pump([0.25] * 4)
    assert server.taken == b"last words"
    relay.over(
        *("opened", "dialing server:80", "connected 192.0.2.1:9000"),
        "closed downstream_reset",
    )


@pytest.mark.parametrize("late", ["fails", "is cancelled", "connects"])
def test_an_endpoint_that_goes_on_after_it_connected(late: str) -> None:
    """It connected the leg, and had more to do: the connection is not left behind."""
    relay = Relay(connect_timeout=1)
    client = relay.client()
    dial = relay.server.dial
    protocol: Any = dial.factory.buildProtocol(None)
    transport = FakeTransport(clock=relay.clock).connect(protocol)
    if late == "fails":
        dial.fail(error.ConnectError(string="no handshake"))
    elif late == "is cancelled":
        client.lose()
    else:
        client.receive(b"x")
        relay.clock.pump([0.2] * 10)
        assert relay.server.cancelled == 1
    assert not transport.connected
    assert not relay.factory.sessions
    client.lose()


def test_an_endpoint_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    relay = Relay()
    relay.client()
    relay.server.dial.fail(ZeroDivisionError("the endpoint's"))
    assert "the endpoint's" in logged_failures.take("ZeroDivisionError")
    relay.over("opened", "dialing server:80", "closed failed")


def test_an_endpoint_that_raises_ends_its_session_only(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()

    def broken(_: object) -> None:
        raise ZeroDivisionError("in connect")

    monkeypatch.setattr(relay.server, "connect", broken)
    client = relay.client()
    assert not client.connected
    logged_failures.take("in connect")
    relay.over("opened", "dialing server:80", "closed failed")


def test_an_endpoint_that_connects_something_else_is_a_failure(
    logged_failures: LoggedFailures,
) -> None:
    relay = Relay()
    client = relay.client()
    relay.server.dial.deferred.callback(None)  # type: ignore[arg-type]
    client.turn()
    assert not client.connected
    logged_failures.take("not what it was given")
    relay.over("opened", "dialing server:80", "closed failed")


def test_a_join_that_fails_leaves_neither_connection(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()
    client = relay.client()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("in registerProducer")

    monkeypatch.setattr(client, "registerProducer", broken)
    server = relay.server.dial.connect()
    assert not client.connected
    assert not server.connected
    logged_failures.take("in registerProducer")
    assert relay.session.ending is Ending.FAILED


def test_a_server_lost_as_soon_as_it_was_connected() -> None:
    relay = Relay()
    client = relay.client()
    dial = relay.server.dial
    protocol: Any = dial.factory.buildProtocol(None)
    transport = FakeTransport().connect(protocol)
    transport.lose()
    dial.deferred.callback(protocol)
    client.turn()
    assert not client.connected
    relay.over("opened", "dialing server:80", "closed connect_failed")


def test_a_server_that_does_not_answer_in_time() -> None:
    relay = Relay(connect_timeout=10)
    client = relay.client()
    relay.clock.pump([1] * 9)
    assert client.connected
    relay.clock.pump([1] * 3)
    assert relay.server.cancelled == 1
    assert client.log[-1] == "close"
    assert relay.session.detail == "no connection in 10 s"
    relay.over("opened", "dialing server:80", "closed connect_timeout")


def test_no_connect_timeout_means_never() -> None:
    relay = Relay(connect_timeout=0)
    client = relay.client()
    relay.clock.pump([1] * 1000)
    assert client.connected
    client.lose()


def test_a_client_that_does_not_answer_the_close_is_reset() -> None:
    relay = Relay()
    client = relay.client()
    # TLS: the close waits for the client's own.
    client.dataBuffer = b"close_notify"
    relay.server.dial.fail(error.ConnectionRefusedError())
    assert client.connected
    relay.clock.pump([1] * 8)
    assert client.log[-1] == "abort"
    relay.over("opened", "dialing server:80", "closed connect_refused")


def test_an_empty_pool_closes_the_client() -> None:
    clock, witness = Clock(), Witness()
    factory = RelayFactory(Pool([]), clock=clock, observer=witness)
    client = FakeTransport()
    protocol: Any = factory.buildProtocol(None)
    client.connect(protocol)
    assert witness.heard == ["opened", "closed no_upstream"]
    factory.stopFactory()
    assert not clock.getDelayedCalls()


def test_several_servers_take_turns() -> None:
    servers = [FakeEndpoint(), FakeEndpoint(), FakeEndpoint()]
    pool = Pool(Upstream(each, str(n)) for n, each in enumerate(servers))
    factory = RelayFactory(pool, clock=Clock(), observer=Observer())
    for _ in range(7):
        protocol: Any = factory.buildProtocol(None)
        FakeTransport().connect(protocol)
    assert [len(each.dials) for each in servers] == [3, 2, 2]


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


# -- TLS, of the client


def secret_client(relay: Relay, wrapper: Any = None) -> FakeTLSTransport:
    """A client with TLS connects; `wrapper` stands between TLS and the relay."""
    transport = FakeTLSTransport(clock=relay.clock)
    protocol: Any = relay.factory.buildProtocol(transport.peer)
    if wrapper is not None:
        protocol = wrapper(WrappingFactory(relay.factory), protocol)
    transport.connect(protocol)
    return transport


def test_nothing_is_dialled_before_a_tls_handshake_is_done() -> None:
    """It was let in, and is counted; what comes with the end of it is kept."""
    relay = Relay()
    client = secret_client(relay)
    assert relay.witness.heard == ["opened"]
    assert len(relay.factory.sessions) == relay.gate.inside == 1
    relay.clock.advance(29)
    assert not relay.server.dials
    client.shake_hands()
    client.receive(b"early")
    # Its time is over; that of the dial begins.
    relay.clock.pump([0.5] * 18)
    server = relay.server.dial.connect()
    server.take()
    assert server.taken == b"early"
    # A second one changes nothing.
    client.shake_hands()
    client.lose(ConnectionDone())
    server.lose(ConnectionDone())
    relay.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_a_tls_handshake_has_a_deadline(limit: float) -> None:
    """Unless it has none."""
    relay = Relay(handshake_timeout=limit)
    client = secret_client(relay)
    relay.clock.pump([0.25] * 12)
    assert client.connected is not bool(limit)
    if limit:
        assert relay.session.detail == "no TLS handshake in 2 s"
        assert not relay.server.dials
        relay.over("opened", "closed handshake_timeout")
    client.lose()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_handshake_that_a_late_relay_has_just_read_goes_on(steps: int) -> None:
    """For two looks more at most, however often it comes further."""
    relay = Relay(handshake_timeout=2.0)
    client = secret_client(relay)
    for step in range(steps):
        # The relay was stopped, and finds what has been sent meanwhile.
        client.connection.stage = b"%d" % step
        relay.clock.advance(3)
        assert client.connected is (step < 2)
    relay.clock.advance(3)
    assert not client.connected
    assert not relay.server.dials
    relay.over("opened", "closed handshake_timeout")


def test_one_that_came_further_before_the_last_look_does_not() -> None:
    relay = Relay(handshake_timeout=2.0)
    client = secret_client(relay)
    client.connection.stage = b"half"
    relay.clock.pump([0.25] * 10)
    assert not client.connected
    relay.over("opened", "closed handshake_timeout")


@pytest.mark.parametrize("comes_on", [True, False])
def test_a_servers_handshake_that_a_late_relay_has_just_read(comes_on: bool) -> None:
    relay = Relay(connect_timeout=2.0)
    client = relay.client()
    server = relay.server.dial.connect(transport=FakeTLSTransport())
    if comes_on:
        server.connection.stage = b"half"
    relay.clock.advance(3)
    assert server.connected is comes_on
    if comes_on:
        server.connection.name = None
        server.shake_hands()
        assert relay.session.connected_at is not None
    client.lose()
    server.lose()


def test_a_client_that_a_gate_is_against_shakes_no_hands() -> None:
    relay = Relay()
    relay.gate.problem = Refused("not you")
    client = secret_client(relay)
    assert not client.connected
    relay.over("refused not you")


@pytest.mark.parametrize(
    ("reason", "ending", "detail"),
    [
        (ConnectionDone(), "client_left", "in the middle of its TLS handshake"),
        (ConnectionLost(), "client_left", "in the middle of its TLS handshake"),
        (
            OSError(110, "timed out"),
            "client_left",
            "in the middle of its TLS handshake",
        ),
        (
            SSL.Error([("SSL routines", "", "http request")]),
            "bad_request",
            "TLS handshake: http request",
        ),
        (SSL.Error([]), "bad_request", "TLS handshake: Error([])"),
        (SSL.Error(), "bad_request", "TLS handshake: Error()"),
    ],
)
def test_a_tls_handshake_that_fails(
    reason: Exception, ending: str, detail: str
) -> None:
    relay = Relay()
    secret_client(relay).lose(reason)
    assert relay.session.detail == detail
    relay.over("opened", f"closed {ending}")


def test_a_handshake_that_is_done_too_late() -> None:
    """The session has ended, and its connection closes."""
    relay = Relay()
    client = secret_client(relay)
    [protocol] = relay.factory.sessions.values()
    client.dataBuffer = b"something to write"
    protocol.end(Ending.NO_UPSTREAM)
    client.shake_hands()
    assert not relay.server.dials
    client.take()
    relay.over("opened", "closed no_upstream")


def test_a_client_whose_wrapper_tells_nothing_is_dialled_for_at_once() -> None:
    """It claims to be TLS, and nobody will say when the handshake is done."""
    relay = Relay()
    client = secret_client(relay, ProtocolWrapper)
    assert len(relay.server.dials) == 1
    client.lose()
    relay.over("opened", "dialing server:80", "closed client_left")


def test_a_relay_that_fails_after_a_tls_handshake_ends_that_session(
    monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    relay = Relay()
    client = secret_client(relay)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("no choice")

    monkeypatch.setattr(Pool, "choose", broken)
    client.shake_hands()
    assert not client.connected
    logged_failures.take("no choice")
    relay.over("opened", "closed failed")


# -- TLS, of the server


def secret_server(relay: Relay) -> tuple[FakeTransport, FakeTLSTransport]:
    """A client, and the server that it is connected to but for the handshake."""
    client = relay.client()
    client.receive(b"a secret")
    return client, relay.server.dial.connect(transport=FakeTLSTransport(9000))


def test_a_tls_server_is_connected_when_its_handshake_is_done() -> None:
    relay = Relay()
    client, server = secret_server(relay)
    relay.clock.advance(9)
    assert relay.witness.heard == ["opened", "dialing server:80"]
    assert not server.dataBuffer
    server.shake_hands()
    assert relay.session.connected_at == 9
    server.take()
    assert server.taken == b"a secret"
    client.lose(ConnectionDone())
    server.lose(ConnectionDone())
    relay.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


def test_a_tls_handshake_is_a_part_of_the_dial() -> None:
    relay = Relay()
    client, server = secret_server(relay)
    relay.clock.pump([0.5] * 21)
    assert relay.session.detail == "no TLS handshake in 10 s"
    assert not client.connected
    assert not server.connected
    relay.over("opened", "dialing server:80", "closed connect_timeout")


@pytest.mark.parametrize("early", [True, False])
def test_a_tls_server_that_is_lost_in_its_handshake(early: bool) -> None:
    """Before the endpoint says that it is connected, too."""
    relay = Relay()
    client = relay.client()
    if early:
        dial = relay.server.dial
        transport = FakeTLSTransport(9000)
        leg = dial.factory.buildProtocol(transport.peer)
        assert leg is not None
        transport.connect(leg)
        transport.lose(ConnectionDone())
        dial.deferred.callback(leg)
        client.turn()
    else:
        relay.server.dial.connect(transport=FakeTLSTransport(9000)).lose()
    assert relay.session.detail == "TLS handshake: the server closed its connection"
    assert not client.connected
    relay.over("opened", "dialing server:80", "closed connect_failed")


def test_a_handshake_may_be_done_before_the_endpoint_says_so() -> None:
    relay = Relay()
    relay.client()
    dial = relay.server.dial
    transport = FakeTLSTransport(9000, relay.clock)
    leg = dial.factory.buildProtocol(transport.peer)
    assert leg is not None
    transport.connect(leg)
    transport.shake_hands()
    assert relay.session.connected_at is None
    dial.deferred.callback(leg)
    assert relay.session.connected_at == 0
    relay.factory.abort_all()
    transport.turn()
    assert not transport.connected


def test_a_client_that_leaves_ends_the_servers_handshake() -> None:
    relay = Relay()
    client, server = secret_server(relay)
    client.lose()
    assert server.log == ["nodelay=True", "abort"]
    relay.over("opened", "dialing server:80", "closed client_left")


def test_a_server_that_shows_no_certificate() -> None:
    """The connection asks for a name, so there must be one."""
    relay = Relay()
    client, server = secret_server(relay)
    server.connection.name = b"example.com"
    server.shake_hands()
    assert relay.session.detail == "the server has shown no certificate"
    assert server.dataBuffer == b""
    assert not client.connected
    assert not server.connected
    relay.over("opened", "dialing server:80", "closed connect_failed")


def test_a_check_of_the_endpoints_own_that_failed_is_heeded() -> None:
    """Twisted 24 closes the connection, and says that the handshake is done."""
    relay = Relay()
    _, server = secret_server(relay)
    server.disconnecting = True
    server.shake_hands()
    assert relay.session.connected_at is None
    server.lose(ValueError("not\nyou"))
    assert relay.session.detail == "TLS handshake: not you"
    relay.over("opened", "dialing server:80", "closed connect_failed")


@pytest.mark.parametrize("transport", [FakeTransport, FakeTLSTransport])
def test_a_name_that_can_not_be_checked_is_not_good(
    transport: type[FakeTransport],
) -> None:
    """Of a server without TLS, or behind a wrapper: closed, whatever it is."""
    relay = Relay()
    [upstream] = relay.factory.pool.upstreams
    upstream.identity = ServerIdentity("example.com")
    client = relay.client()
    dial = relay.server.dial
    leg: Any = dial.factory.buildProtocol(None)
    made = transport(9000, relay.clock)
    made.connect(ProtocolWrapper(WrappingFactory(relay.factory), leg))
    dial.deferred.callback(leg)
    made.turn()
    assert relay.session.detail == "the endpoint's TLS, if any, can't be checked"
    assert not client.connected
    assert not made.connected
    relay.over("opened", "dialing server:80", "closed connect_failed")


def test_a_socket_of_ours_has_no_certificate_to_show() -> None:
    endpoint = SocketEndpoint(None, socket.AF_INET, ("127.0.0.1", 80))
    assert Upstream(endpoint, "here").dials
    assert not Upstream(endpoint, "here", ServerIdentity("localhost")).dials


@pytest.mark.parametrize("certificate", [None, object()])
def test_tls_below_a_wrapper_is_looked_at_when_its_time_is_over(
    certificate: object,
) -> None:
    """Nobody tells of its handshake: it counts as connected until then."""
    relay = Relay()
    relay.client()
    dial = relay.server.dial
    leg: Any = dial.factory.buildProtocol(None)
    transport = FakeTLSTransport(9000, relay.clock)
    transport.connect(ProtocolWrapper(WrappingFactory(relay.factory), leg))
    dial.deferred.callback(leg)
    assert relay.witness.heard[-1] == "connected 192.0.2.1:9000"
    transport.connection.certificate = certificate
    relay.clock.pump([0.5] * 24)
    assert transport.connected is (certificate is not None)
    if certificate is None:
        assert relay.witness.heard[-1] == "closed connect_timeout"
    relay.factory.abort_all()


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
    assert relay.factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1)) is None


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
        assert factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1)) is None
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
