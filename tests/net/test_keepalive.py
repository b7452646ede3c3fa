"""Keepalive: what each kind of connection gets, and when."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.configuring.address_grammar import parse_destination, parse_listener
from relayd.net import keepalive
from relayd.net.dial_options import DialOptions
from relayd.net.foreign_transports import keep_alive, lent_socket
from relayd.net.keepalive import (
    Keepalive,
    set_keepalive,
    set_user_timeout,
    watch_peer,
)
from relayd.operating.endpoints import dialing_endpoint, listening_endpoint
from relayd.socks.bind import _PeerLeg
from relayd.stream.bridge import Timeouts
from relayd.tcp import RelayFactory
from tests.conftest import pause
from tests.support.fakes import FakeTransport
from tests.support.process import TRANSPORTS, Server, connect

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems have other names and inherit nothing"
)

#: A minute of silence, four probes, one in fifteen seconds: two minutes in all.
OURS = (1, 60, 15, 4)


def keepalive_of(sock: Any) -> tuple[int, ...]:
    """On or off, seconds of silence, seconds between probes, how many."""
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    )


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_keepalive_figures(family: int) -> None:
    """They come before the idle timeout, which the kernel's own don't."""
    with socket.socket(family) as sock:
        before = keepalive_of(sock)
        assert before[0] == 0
        set_keepalive(sock)
        on, idle, interval, count = keepalive_of(sock)
    assert (on, idle, interval, count) == OURS
    assert idle + interval * count < Timeouts().idle / 10


def test_a_system_that_refuses_one_of_them_gets_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sandbox, or a kernel with other bounds: keepalive itself still helps."""
    too_many = Keepalive()
    object.__setattr__(too_many, "count", 1 << 20)
    with socket.socket() as sock:
        set_keepalive(sock, too_many)
        assert keepalive_of(sock)[:3] == OURS[:3]
    monkeypatch.setattr(keepalive, "_IDLE", None)
    with socket.socket() as sock:
        set_keepalive(sock)
        assert keepalive_of(sock)[0] == 1


def test_a_unix_socket_gets_nothing() -> None:
    one, other = socket.socketpair()
    with one, other:
        set_keepalive(one)
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_transports_of_any_kind() -> None:
    """By their descriptor; without one, by what they offer; or not at all."""

    class Wrapper:
        def __init__(self, sock: socket.socket) -> None:
            self.fileno = sock.fileno

    with socket.socket() as sock:
        keep_alive(Wrapper(sock))
        assert keepalive_of(sock) == OURS
    keep_alive(Wrapper(sock))  # closed
    fake = FakeTransport()
    keep_alive(fake)
    assert fake.getTcpKeepAlive()
    keep_alive(object())


@pytest.mark.parametrize("listener", [*TRANSPORTS, "foreign"])
@pytest.mark.parametrize("dialer", [*TRANSPORTS, "foreign"])
@pytest_twisted.ensureDeferred
async def test_both_sides_of_a_session(listener: str, dialer: str) -> None:
    """The client's from the listener; the server's at the wheel's first look."""
    with Server() as server:
        port = server.socket.getsockname()[1]
        foreign = f"tcp:host=127.0.0.1:port={port}"
        address = parse_destination(foreign if dialer == "foreign" else server.address)
        kind: Any = "auto" if dialer == "foreign" else dialer
        factory = RelayFactory(
            dialing_endpoint(address, reactor, kind),
            stall_timeout=0.4,
            clock=reactor,
        )
        where = "tcp:0:interface=127.0.0.1" if listener == "foreign" else "127.0.0.1:0"
        kind = "auto" if listener == "foreign" else listener
        endpoint = listening_endpoint(parse_listener(where), reactor, transport=kind)
        listening = await endpoint.listen(factory)
        with connect(listening.getHost().port):
            while not (factory.sessions and is_joined(factory)):
                await pause(0.001)
            [session] = factory.sessions.values()
            down, up = session.transport, session.bridge.upstream.transport
            with lent_socket(up) as sock:
                early = keepalive_of(sock)
            assert early[0] == 0 or session.bridge.was_checked
            with lent_socket(down) as sock:
                inherited = keepalive_of(sock)
            if listener != "foreign":
                assert inherited == OURS
            while not session.bridge.was_checked:
                await pause(0.01)
            for transport in (down, up):
                with lent_socket(transport) as sock:
                    assert keepalive_of(sock) == OURS
        server.accept().close()
        await listening.stopListening()
        await factory.drain(0)


def is_joined(factory: RelayFactory) -> bool:
    [session] = factory.sessions.values()
    return session.bridge is not None


@pytest_twisted.ensureDeferred
async def test_a_unix_relay_sets_no_keepalive(tmp_socket: Path) -> None:
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        address = parse_destination(f"unix:{tmp_socket}")
        factory = RelayFactory(
            dialing_endpoint(address, reactor),
            stall_timeout=0.4,
            clock=reactor,
        )
        endpoint = listening_endpoint(parse_listener("127.0.0.1:0"), reactor)
        listening = await endpoint.listen(factory)
        with connect(listening.getHost().port):
            while not (factory.sessions and is_joined(factory)):
                await pause(0.001)
            [session] = factory.sessions.values()
            while not session.bridge.was_checked:
                await pause(0.01)
            with lent_socket(session.bridge.upstream.transport) as sock:
                assert sock is not None
                assert sock.family == socket.AF_UNIX
                assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        server.accept().close()
        await listening.stopListening()
        await factory.drain(0)


# -- of a relay, or of one server


def user_timeout_of(sock: Any) -> int:
    """In milliseconds; 0: it has none."""
    return int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))


@pytest.mark.parametrize("listener", [*TRANSPORTS, "foreign"])
@pytest.mark.parametrize("dialer", [*TRANSPORTS, "foreign"])
@pytest_twisted.ensureDeferred
async def test_a_relay_s_own_are_on_both_sides(listener: str, dialer: str) -> None:
    """Of whatever kind they are; a listener has passed the usual ones on."""
    with Server() as server:
        address: Any = server.address
        if dialer == "foreign":
            address = f"tcp:host=127.0.0.1:port={server.socket.getsockname()[1]}"
        endpoint = dialing_endpoint(parse_destination(address), reactor, chosen(dialer))
        factory = RelayFactory(
            endpoint,
            stall_timeout=0.4,
            clock=reactor,
            keepalive=Keepalive(7, 8, 9),
            user_timeout=30.5,
        )
        where = "tcp:0:interface=127.0.0.1" if listener == "foreign" else "127.0.0.1:0"
        both = await checked(factory, where, chosen(listener), server)
        assert both == [((1, 7, 8, 9), 30_500)] * 2


@pytest.mark.parametrize("dialer", TRANSPORTS)
@pytest_twisted.ensureDeferred
async def test_what_an_endpoint_has_set_stays(dialer: Any) -> None:
    """The server's own go before the relay's, which the client has."""
    options = DialOptions(keepalive=Keepalive(1, 2, 3), user_timeout=20.0)
    with Server() as server:
        address: Any = parse_destination(server.address)
        endpoint = dialing_endpoint(address, reactor, dialer, options)
        factory = RelayFactory(
            endpoint,
            stall_timeout=0.4,
            clock=reactor,
            keepalive=Keepalive(7, 8, 9),
            user_timeout=30.5,
        )
        down, up = await checked(factory, "127.0.0.1:0", dialer, server)
        assert down == ((1, 7, 8, 9), 30_500)
        assert up == ((1, 1, 2, 3), 20_000)


@pytest_twisted.ensureDeferred
async def test_without_a_user_timeout_none_is_set() -> None:
    with Server() as server:
        endpoint = dialing_endpoint(parse_destination(server.address), reactor)
        factory = RelayFactory(endpoint, stall_timeout=0.4, clock=reactor)
        assert await checked(factory, "127.0.0.1:0", "auto", server) == [(OURS, 0)] * 2


def test_the_peer_of_a_bind_has_the_relay_s() -> None:
    """It has inherited the usual ones from its listener."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        set_keepalive(listening)
        with socket.create_connection(listening.getsockname()) as peer:
            accepted, _ = listening.accept()
            with accepted, peer:
                assert not _PeerLeg.was_dialled
                dialled = _PeerLeg.was_dialled
                watch_peer(accepted, Keepalive(7, 8, 9), 30.0, dialled=dialled)
                assert keepalive_of(accepted) == (1, 7, 8, 9)
                assert user_timeout_of(accepted) == 30_000


def test_a_user_timeout_beyond_the_kernel_s_is_its_longest() -> None:
    with socket.socket() as sock:
        set_user_timeout(sock, 1e8)
        assert user_timeout_of(sock) == (1 << 31) - 1
        set_user_timeout(sock, 0.0001)
        assert user_timeout_of(sock) == 1
    one, other = socket.socketpair()
    with one, other:
        set_user_timeout(one, 5)
        watch_peer(one, Keepalive(), 5, dialled=True)


def test_a_system_without_a_user_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "_USER_TIMEOUT", None)
    with socket.socket() as sock:
        set_user_timeout(sock, 5)
        watch_peer(sock, Keepalive(), 5, dialled=True)
        assert user_timeout_of(sock) == 0
        assert keepalive_of(sock) == OURS


def chosen(kind: str) -> Any:
    return "auto" if kind == "foreign" else kind


async def checked(
    factory: RelayFactory, where: str, kind: Any, server: Server
) -> list[tuple[tuple[int, ...], int]]:
    """What both sides of a session have after its first check: client, server."""
    endpoint = listening_endpoint(parse_listener(where), reactor, transport=kind)
    listening = await endpoint.listen(factory)
    found = []
    with connect(listening.getHost().port):
        while not (factory.sessions and is_joined(factory)):
            await pause(0.001)
        [session] = factory.sessions.values()
        while not session.bridge.was_checked:
            await pause(0.01)
        for transport in (session.transport, session.bridge.upstream.transport):
            with lent_socket(transport) as sock:
                found.append((keepalive_of(sock), user_timeout_of(sock)))
    server.accept().close()
    await listening.stopListening()
    await factory.drain(0)
    return found
