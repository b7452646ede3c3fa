"""RelayFactory on fakes: TLS, of the client and of the server."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from OpenSSL import SSL
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from relayd.core.errors import Refused
from relayd.core.session import Ending
from relayd.net.dialing import SocketEndpoint
from relayd.net.tls import ServerIdentity
from relayd.net.upstream import Upstream
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTLSTransport, FakeTransport
from tests.support.relays import Relay, secret_client

# -- TLS, of the client


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
    assert relay.session.connected_at == relay.session.connect_seconds == 9
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
