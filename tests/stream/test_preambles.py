"""What a server is told before a client's first byte, on fakes."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.internet.task import Clock

from relayd.core.session import Ending, Session
from relayd.net.upstream import Upstream
from relayd.preludes.proxy_protocol import preamble_of
from relayd.stream.attempt import Attempt
from relayd.tcp import RelayFactory, RelayProtocol
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.proxies import BIND, CONNECT, SERVER, Proxy
from tests.support.relays import Relay

#: Of the client at 192.0.2.1.
V1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 80\r\n"


def taken(server: FakeTransport) -> bytes:
    server.take()
    found, server.taken = server.taken, b""
    return found


def over(relay: Relay, client: FakeTransport, server: FakeTransport) -> None:
    client.lose(ConnectionDone())
    server.lose(ConnectionDone())
    relay.over(*relay.witness.heard)


@pytest.mark.parametrize("early", [b"", b"early"])
@pytest.mark.parametrize("server_first", [True, False])
def test_the_server_is_told_first_and_once(early: bytes, server_first: bool) -> None:
    relay = Relay(send_proxy="v1")
    client = relay.client()
    if early:
        client.receive(early)
    server = relay.server.dial.connect()
    if server_first:
        server.receive(b"hello")
        client.take()
        assert client.taken == b"hello"
    assert taken(server) == V1 + early
    client.receive(b"late")
    assert taken(server) == b"late"
    up = relay.session.up
    assert up.read == len(early) + 4, "it is not counted as the client's"
    assert up.written == up.read + len(V1)
    over(relay, client, server)


def test_early_data_goes_in_one_write_with_it() -> None:
    relay = Relay(send_proxy="v1")
    client = relay.client()
    client.receive(b"early")
    server = relay.server.dial.connect()
    assert server.log.count("write") <= 1
    assert taken(server) == V1 + b"early"
    over(relay, client, server)


def test_a_client_that_has_ended_its_side() -> None:
    relay = Relay(send_proxy="v1")
    client = relay.client()
    client.receive(b"all")
    client.receive_eof()
    server = relay.server.dial.connect()
    assert taken(server) == V1 + b"all"
    server.turn()
    assert server.write_shut
    server.lose(ConnectionDone())
    client.lose(ConnectionDone())
    relay.over(*relay.witness.heard)


def test_version_2_and_none() -> None:
    relay = Relay(send_proxy="v2")
    client = relay.client()
    server = relay.server.dial.connect()
    assert taken(server).startswith(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\1")
    over(relay, client, server)
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()
    assert taken(server) == b""
    over(relay, client, server)


def test_a_version_that_there_is_not() -> None:
    for version in ("v3", "v2-first", ""):
        with pytest.raises(ValueError, match="v1 or v2"):
            RelayFactory(FakeEndpoint(), clock=Clock(), send_proxy=version)  # type: ignore[arg-type]


def test_a_balancer_s_client_is_passed_on_with_the_address_that_it_reached() -> None:
    relay = Relay(send_proxy="v1", accept_proxy=["192.0.2.1"])
    client = relay.client()
    header = b"PROXY TCP6 2001:db8::9 2001:db8::1 1234 443\r\n"
    client.receive(header + b"early")
    server = relay.server.dial.connect()
    assert taken(server) == header + b"early"
    over(relay, client, server)


class Persistent(RelayProtocol):
    """Dials again when a dial has failed."""

    def attempt_failed(self, attempt: Attempt) -> None:
        self.pending = None
        if self.session.attempts < 2:
            self.dial(self.factory.pool.choose(self.session))
        else:
            super().attempt_failed(attempt)


def test_the_next_server_is_told_too() -> None:
    relay = Relay(send_proxy="v1")
    relay.factory.protocol = Persistent
    client = relay.client()
    client.receive(b"early")
    relay.server.dial.fail(ConnectionRefusedError())
    server = relay.server.dials[1].connect()
    assert taken(server) == V1 + b"early"
    over(relay, client, server)


def test_a_server_may_have_its_own() -> None:
    plain, told = FakeEndpoint(), FakeEndpoint()
    servers = Pool(
        [Upstream(plain, "one:80"), Upstream(told, "two:80", None, preamble_of("v1"))]
    )
    factory = RelayFactory(servers, clock=Clock())  # type: ignore[arg-type]
    clients = []
    for _ in range(2):
        transport = FakeTransport()
        clients.append(
            transport.connect(factory.buildProtocol(transport.peer))  # type: ignore[arg-type]
        )
    connected = [each.dial.connect() for each in (plain, told)]
    assert list(map(taken, connected)) == [b"", V1]
    for each in (*clients, *connected):
        each.lose()
    factory.stopFactory()


def test_a_preamble_that_fails_ends_its_session(
    logged_failures: LoggedFailures,
) -> None:
    def fails(session: Session) -> bytes:
        raise RuntimeError("no preamble")

    relay = Relay()
    relay.factory.preamble = fails
    client = relay.client()
    server = relay.server.dial.connect()
    client.turn()
    server.turn()
    assert client.aborted
    assert server.aborted
    assert relay.session.ending is Ending.FAILED
    logged_failures.take("RuntimeError: no preamble")
    relay.over(*relay.witness.heard)


def test_what_a_proxy_s_client_asks_for_is_told_first() -> None:
    proxy = Proxy(send_proxy="v1")
    client = proxy.client(CONNECT + b"early")
    server = proxy.server.dial.connect()
    assert taken(server) == V1 + b"early"
    client.lose()
    server.lose()


def test_the_peer_of_a_bind_is_told_nothing() -> None:
    """It has connected to us, and expects what the client says."""
    proxy = Proxy(send_proxy="v1")
    client = proxy.client(BIND + b"early")
    peer = proxy.port.accept(SERVER)
    assert taken(peer) == b"early"
    client.lose()
    peer.lose()


class Filter(RelayProtocol):
    """Sees what the client says."""

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data.upper())


def test_a_filter_does_not_see_it() -> None:
    relay = Relay(send_proxy="v1")
    relay.factory.protocol = Filter
    client: Any = relay.client()
    client.receive(b"early")
    server = relay.server.dial.connect()
    client.receive(b" late")
    assert taken(server) == V1 + b"EARLY LATE"
    over(relay, client, server)
