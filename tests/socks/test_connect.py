"""CONNECT on fakes: what is said, in which order, and what is no request."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IStreamClientEndpoint

from relayd.core.session import Ending
from relayd.net.happy_eyeballs import Dialer
from relayd.net.resolving import SocketAddress
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.proxies import (
    BIND,
    BIND_BY_NAME,
    CONNECT,
    CONNECT_BY_NAME,
    GRANTED,
    SERVER,
    Proxy,
    refused,
)
from tests.support.steered import Standing

# -- CONNECT


def test_connect_from_accept_to_end() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT)
    assert client.dataBuffer == b"", "the reply waits for the connection"
    proxy.clock.advance(0.5)
    server = proxy.server.dial.connect()
    client.take()
    assert client.taken == GRANTED
    client.receive(b"question")
    server.take()
    assert server.taken == b"question"
    server.receive(b"an answer")
    client.take()
    assert client.taken == GRANTED + b"an answer"
    client.receive_eof()
    assert server.write_shut
    assert client.connected
    server.receive_eof()
    session = proxy.session
    assert session.connected_at == 0.5
    assert (session.up.read, session.down.read) == (8, 9)
    assert session.reply == 90
    assert proxy.dialled == [[(socket.AF_INET, (SERVER, 80))]]
    assert proxy.policy.users == [b"joe"]
    assert proxy.policy.asked == [(SERVER, 80, "")]
    assert proxy.witness.heard == [
        f"dialing {SERVER}:80",
        "connected 192.0.2.1:9000",
        "closed done",
    ]
    proxy.over(Ending.DONE)


@pytest.mark.parametrize("request_", [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME])
def test_a_request_in_single_bytes_with_data_behind_it(request_: bytes) -> None:
    proxy = Proxy()
    client = proxy.client()
    for byte in request_:
        assert not proxy.dialled
        assert not proxy.listeners
        client.receive(bytes([byte]))
    for byte in b"more":
        client.receive(bytes([byte]))
    if request_ in (CONNECT_BY_NAME, BIND_BY_NAME):
        proxy.resolver.answer(SERVER)
    if request_ in (CONNECT, CONNECT_BY_NAME):
        server = proxy.server.dial.connect()
    else:
        server = proxy.port.accept(SERVER)
    server.take()
    assert server.taken == b"more"
    assert proxy.session.up.read == 4
    client.lose()


def test_data_with_the_request_after_it_and_after_the_reply_keeps_its_order() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT + b"one ")
    client.receive(b"two ")
    server = proxy.server.dial.connect()
    client.receive(b"three")
    server.take()
    assert server.taken == b"one two three"
    assert proxy.session.up.read == 13
    client.lose()


def test_a_server_that_speaks_first_is_heard_behind_the_reply() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT)
    server = proxy.server.dial.connect()
    server.receive(b"220 ready")
    client.take()
    assert client.taken == GRANTED + b"220 ready"
    assert proxy.session.down.read == 9
    client.lose()


def test_what_looks_like_a_request_is_data_after_the_first() -> None:
    proxy = Proxy()
    client, server = proxy.joined()
    client.receive(CONNECT)
    server.take()
    assert server.taken == CONNECT
    client.lose()


def test_the_reply_carries_the_address_that_was_asked_for() -> None:
    # Also where the connection itself says another, as behind a NAT of its own.
    proxy = Proxy()
    client = proxy.client(CONNECT)
    proxy.server.dial.connect(IPv4Address("TCP", "203.0.113.1", 8080))
    client.take()
    assert client.taken == GRANTED
    client.lose()


def test_a_name_is_looked_up_once_and_its_address_is_in_the_reply() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    assert proxy.resolver.asked == [("example.com", 80)]
    proxy.resolver.answer(SERVER)
    assert proxy.dialled == [[(socket.AF_INET, (SERVER, 80))]]
    proxy.server.dial.connect(IPv4Address("TCP", SERVER, 80))
    client.take()
    assert client.taken == GRANTED
    assert proxy.policy.asked == [(SERVER, 80, "example.com")]
    assert proxy.session.upstream == f"{SERVER}:80"
    assert len(proxy.resolver.asked) == 1
    client.lose()


@pytest.mark.parametrize(
    "peer",
    [
        IPv6Address("TCP", "2001:db8::7", 80, 0, 0),
        # As the kernel writes one that nothing but its notation is IPv4.
        IPv6Address("TCP", "::198.51.100.7", 80, 0, 0),
        IPv6Address("TCP", "::ffff:c633:6407", 80, 0, 0),
    ],
)
def test_a_reply_can_not_name_an_ipv6_address(peer: IPv6Address) -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, peer.host, 80))
    assert proxy.resolver.asked == [], "it is no name"
    assert proxy.dialled == [[(socket.AF_INET6, (peer.host, 80, 0, 0))]]
    assert proxy.policy.asked == [(peer.host, 80, "")]
    server = proxy.server.dial.connect(peer)
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "0.0.0.0", 80)
    client.receive(b"goes through")
    server.take()
    assert server.taken == b"goes through"
    client.lose()


def test_a_mapped_address_is_named_by_what_it_stands_for() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, f"::ffff:{SERVER}", 80))
    proxy.server.dial.connect(IPv6Address("TCP", f"::ffff:{SERVER}", 80, 0, 0))
    client.take()
    assert client.taken == GRANTED
    client.lose()


def test_an_address_as_a_name_is_not_looked_up() -> None:
    proxy = Proxy()
    client = proxy.client(b"\4\1\0\x50\0\0\0\1joe\0" + SERVER.encode() + b"\0")
    assert proxy.resolver.asked == []
    assert proxy.policy.asked == [(SERVER, 80, "")]
    assert proxy.dialled == [[(socket.AF_INET, (SERVER, 80))]]
    client.lose()


def test_every_address_of_a_name_is_asked_about_and_those_permitted_are_dialled() -> (
    None
):
    proxy = Proxy()
    proxy.policy.against = {"2001:db8::1", "192.0.2.66"}
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer("2001:db8::1", SERVER, "192.0.2.66", "2001:db8::2")
    assert [address for address, *_ in proxy.policy.asked] == [
        *("2001:db8::1", SERVER, "192.0.2.66", "2001:db8::2")
    ]
    proxy.servers[-1].dial.fail(error.ConnectionRefusedError())
    assert proxy.dialled == [
        [(socket.AF_INET, (SERVER, 80))],
        [(socket.AF_INET6, ("2001:db8::2", 80, 0, 0))],
    ]
    client.lose()


def test_a_name_whose_addresses_are_all_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {"192.0.2.66", "192.0.2.67"}
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer("192.0.2.66", "192.0.2.67")
    assert proxy.dialled == []
    refused(client)
    assert proxy.session.detail == "192.0.2.66 is out of bounds"
    proxy.over(Ending.DENIED)


def test_an_address_that_is_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {SERVER}
    client = proxy.client(CONNECT)
    assert proxy.dialled == []
    refused(client)
    assert proxy.session.detail == f"{SERVER} is out of bounds"
    proxy.over(Ending.DENIED)


def test_a_user_who_is_not_admitted() -> None:
    proxy = Proxy()
    proxy.policy.unwanted = {b"joe"}
    client = proxy.client(CONNECT)
    assert proxy.policy.asked == []
    refused(client)
    assert proxy.session.detail == "an unwanted user"
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("request_", [CONNECT_BY_NAME, BIND_BY_NAME])
@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.DNSLookupError("example.com: no such name"), Ending.UNRESOLVED),
        # A resolver that gives up by itself; nobody has asked it to.
        (CancelledError(), Ending.CONNECT_FAILED),
    ],
)
def test_a_name_that_does_not_resolve(
    request_: bytes, problem: Exception, ending: Ending
) -> None:
    proxy = Proxy()
    client = proxy.client(request_)
    proxy.resolver.fail(problem)
    refused(client)
    assert proxy.session.detail
    proxy.over(ending)


@pytest.mark.parametrize("request_", [CONNECT_BY_NAME, BIND_BY_NAME])
def test_a_resolver_with_a_bug_ends_its_session_only(
    request_: bytes, logged_failures: LoggedFailures
) -> None:
    proxy = Proxy()
    client = proxy.client(request_)
    proxy.resolver.fail(ZeroDivisionError("in the resolver"))
    client.take()
    assert not client.connected
    logged_failures.take("in the resolver")
    proxy.over(Ending.FAILED)


@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.ConnectionRefusedError("no"), Ending.CONNECT_REFUSED),
        (error.TCPTimedOutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.NoRouteError("where"), Ending.CONNECT_FAILED),
        (error.getConnectError((104, "reset")), Ending.UPSTREAM_RESET),
    ],
)
def test_a_dial_that_fails(problem: Exception, ending: Ending) -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT + b"data")
    proxy.server.dial.fail(problem)
    refused(client)
    assert proxy.session.reply == 91
    proxy.over(ending)


def test_a_server_lost_as_soon_as_it_was_connected() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT)
    dial = proxy.server.dial
    leg: Any = dial.factory.buildProtocol(IPv4Address("TCP", SERVER, 80))
    FakeTransport().connect(leg).lose()
    dial.deferred.callback(leg)
    refused(client)
    proxy.over(Ending.CONNECT_FAILED)


def test_a_dialer_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    def broken(addresses: Sequence[SocketAddress]) -> IStreamClientEndpoint:
        raise ZeroDivisionError("in the dialer")

    proxy = Proxy(dialer=broken)
    client = proxy.client(CONNECT)
    assert not client.connected
    logged_failures.take("in the dialer")
    proxy.over(Ending.FAILED)


# -- what is no request


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\5\1\0", "SOCKS5"),
        (b"\6", "version 6"),
        (b"\4\3", "command 3"),
        (b"\4\1\0\0", "port 0"),
        (b"\4\1\0\x50\0\0\0\1\0\0", "empty host name"),
        (b"\4\1\0\x50\0\0\0\1\0\xc3\xa9.example\0", "not ASCII"),
        (b"\4\1\0\x50\1\2\3\4" + b"u" * 256, "user id of more than 255"),
        (b"\4\1\0\x50\0\0\0\1\0" + b"h" * 256, "host name of more than 255"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
def test_a_bad_request_is_rejected_and_named(
    data: bytes, why: str, whole: bool
) -> None:
    proxy = Proxy()
    client = proxy.client()
    for piece in [data] if whole else [bytes([byte]) for byte in data]:
        # It may be refused before it is complete.
        if client.reading:
            client.receive(piece)
    refused(client)
    session = proxy.session
    assert why in session.detail
    assert (session.up.read, session.reply) == (0, 91)
    assert (session.command, session.requested) == ("-", "-")
    proxy.over(Ending.BAD_REQUEST)


def test_nothing_is_read_behind_a_refusal() -> None:
    proxy = Proxy()
    client = proxy.client(b"\5")
    # What had been read before the transport stopped.
    client.protocol.dataReceived(CONNECT)
    assert proxy.dialled == []
    refused(client)


def test_the_longest_request_is_served() -> None:
    name = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, name, 65535, b"u" * 255))
    assert proxy.resolver.asked == [(name, 65535)]
    client.lose()


def test_a_destination_that_is_asked_for_again() -> None:
    """It is known; another dialer than ours is asked each time, as it may choose."""

    class Own(Dialer):
        """A program's, which does something else."""

    known = {kind: Proxy(dialer=kind(Standing())).factory for kind in (Dialer, Own)}
    fake = Proxy()
    for kind, factory in (*known.items(), (None, fake.factory)):
        first = factory.upstream_at(SERVER, 80, f"{SERVER}:80")
        again = factory.upstream_at(SERVER, 80, f"{SERVER}:80")
        other = factory.upstream_at(SERVER, 81, f"{SERVER}:81")
        assert (first is again) == (kind is Dialer)
        assert other is not first
        assert first.name == f"{SERVER}:80"
    asked = [(socket.AF_INET, (SERVER, port)) for port in (80, 80, 81)]
    assert fake.dialled == [[each] for each in asked]
