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
from relayd.net.foreign_transports import keep_alive, lent_socket
from relayd.net.keepalive import Keepalive, set_keepalive
from relayd.operating.endpoints import dialing_endpoint, listening_endpoint
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
