"""Clients behind a balancer: nothing is dialled before their PROXY header is read."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import IPv6Address
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.task import Clock

from relayd.net.proxy_header import behind_balancer, header_end
from relayd.net.upstream import Upstream
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.tcp import RelayFactory
from tests.support.fakes import FakeEndpoint, FakeServerEndpoint, FakeTransport
from tests.support.process import (
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
)

V1 = b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 80\r\n"
V1_UNKNOWN = b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V1_BARE = b"PROXY UNKNOWN\r\n"
V2 = SIGNATURE + struct.pack("!BBH4s4sHH", 0x21, 0x11, 12, bytes(4), bytes(4), 1234, 80)
V2_LOCAL = SIGNATURE + b"\x20\0\0\0"
HEADERS = [V1, V1_UNKNOWN, V1_BARE, V2, V2_LOCAL]


class Relay:
    """A relay behind a balancer, and a client of it, on fakes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.server = FakeEndpoint(self.clock)
        self.factory = RelayFactory(
            Upstream(self.server, "server:80"),
            handshake_timeout=2,
            clock=self.clock,  # type: ignore[arg-type]
        )
        listener = self.listener = FakeServerEndpoint("192.0.2.2", self.clock)
        factory: IProtocolFactory = self.factory
        behind_balancer(listener).listen(factory)
        self.client = FakeTransport(clock=self.clock)
        self.client.connect(listener.factory.buildProtocol(self.client.peer))
        [protocol] = self.factory.sessions.values()
        self.session = protocol.session

    def over(self) -> None:
        assert not self.factory.sessions
        self.factory.stopFactory()
        assert not self.clock.getDelayedCalls()


@pytest.mark.parametrize("header", HEADERS)
def test_where_a_header_ends(header: bytes) -> None:
    for length in range(len(header)):
        assert not 0 < header_end(header[:length]) <= length
    assert header_end(header) == header_end(header + b"more") == len(header)


@given(st.binary(max_size=40))
def test_the_header_end_of_any_bytes(start: bytes) -> None:
    assert header_end(start) >= 0
    assert header_end(SIGNATURE + start) >= 0


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("more", [b"", b"early"])
def test_the_server_is_dialled_when_the_header_is_read(
    header: bytes, more: bytes
) -> None:
    relay = Relay()
    for byte in header[:-1]:
        relay.client.receive(bytes([byte]))
    assert not relay.server.dials
    relay.client.receive(header[-1:] + more)
    server = relay.server.dial.connect()
    relay.client.receive(b" and late")
    server.take()
    assert server.taken == more + b" and late"
    server.receive(b"answer")
    relay.client.take()
    assert relay.client.taken == b"answer"
    assert relay.session.up.read == len(server.taken)
    relay.client.lose(ConnectionDone())
    server.lose(ConnectionDone())
    relay.over()


@pytest.mark.parametrize("start", [b"", V1[:10], V2[:20]])
def test_a_header_has_a_deadline(start: bytes) -> None:
    relay = Relay()
    if start:
        relay.client.receive(start)
    relay.clock.pump([0.25] * 16)
    assert not relay.client.connected
    assert not relay.server.dials
    assert relay.factory.endings == {"handshake_timeout": 1}
    assert relay.session.detail == "no PROXY header in 2 s"
    relay.over()


def test_a_header_read_late_is_not_timed_out() -> None:
    relay = Relay()
    for piece in (V1[:10], V1[10:20]):
        relay.client.receive(piece)
        relay.clock.advance(3)
    relay.client.receive(V1[20:])
    assert relay.server.dial
    relay.client.lose()
    relay.over()


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"PROXY TCP9 a\r\n",
        b"PROXY UNKNOWN " + b"x" * 93,
        b"PROXT",
        SIGNATURE[:11] + b"x",
        b"PROXY TCP4 a b c d\r\n",
        SIGNATURE + b"\x21\x2f\0\0",
        SIGNATURE + b"\x21\x11\0\1a",
    ],
)
def test_what_is_no_header(start: bytes) -> None:
    relay = Relay()
    relay.client.receive(start)
    assert not relay.client.connected
    assert not relay.server.dials
    assert relay.factory.endings == {"bad_request": 1}
    assert relay.session.detail == "it did not begin with a PROXY header"
    relay.over()


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP6 zz:yy ::1 1 2\r\n",
        b"PROXY TCP4 a.b 192.0.2.10 1234 80\r\n",
        b"PROXY TCP4  192.0.2.10 1234 80\r\n",
        b"PROXY TCP4 unix: 192.0.2.10 1234 80\r\n",
        b"PROXY TCP4 192.0.2.9 a..b 1234 80\r\n",
        b"PROXY TCP4 192.0.2.9 192.0.2.10 65536 80\r\n",
        b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 -80\r\n",
    ],
)
def test_a_header_that_names_no_address(header: bytes) -> None:
    """Twisted takes any word for one."""
    relay = Relay()
    relay.client.receive(header)
    assert not relay.client.connected
    assert not relay.server.dials
    assert relay.factory.endings == {"bad_request": 1}
    assert relay.session.detail == "its PROXY header names no address"
    assert relay.session.client == relay.session.peer
    relay.over()


def test_a_balancer_on_a_link_local_address() -> None:
    relay = Relay()
    relay.client.peer = IPv6Address("TCP", "fe80::1%eth0", 4711)
    relay.client.receive(V2_LOCAL)
    assert relay.server.dials
    relay.client.lose()
    relay.over()


def test_a_client_that_leaves_before_its_header() -> None:
    relay = Relay()
    relay.client.lose(ConnectionDone())
    assert not relay.server.dials
    assert relay.session.detail == "before its PROXY header"
    relay.over()


def test_a_client_that_comes_too_late_is_not_served() -> None:
    relay = Relay()
    drained = relay.factory.drain(0)
    relay.client.turn()
    assert drained.called
    assert relay.listener.factory.buildProtocol(relay.client.peer) is None
    relay.over()


# -- live


LISTENER = "haproxy:tcp:0:interface=127.0.0.1"


@pytest.mark.usefixtures("connections_of")
@pytest.mark.parametrize("header", HEADERS)
def test_a_server_that_speaks_first(header: bytes) -> None:
    with Server() as server, relay("-l", LISTENER, "-d", server.address) as running:
        with connect(running.port) as client:
            client.sendall(header)
            upstream = server.accept()
            upstream.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
            client.sendall(b"question")
            assert read_exactly(upstream, 8) == b"question"
            upstream.close()
        running.ended("done")


@pytest.mark.usefixtures("connections_of")
def test_a_client_without_a_header_gets_no_server() -> None:
    options: Any = ("-l", LISTENER, "--handshake-timeout", "0.3")
    with Server() as server, relay(*options, "-d", server.address) as running:
        with connect(running.port) as client:
            assert read_all(client) == b""
        [line] = running.ended("handshake_timeout")
        running.wait_for("detail='no PROXY header in 0.3 s'")
        assert line["upstream"] == "-"


@pytest.mark.usefixtures("connections_of")
def test_socks4_behind_a_balancer() -> None:
    """The refusal of a request that came with the header is said, too."""
    refused = write_request(Command.CONNECT, "224.0.0.1", 80, b"joe")
    with relay("-l", LISTENER, "--open", plugin="socks4") as running:
        with connect(running.port) as client:
            client.sendall(V1 + refused)
            assert read_all(client) == write_reply(Code.REJECTED)
