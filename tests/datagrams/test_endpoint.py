"""Listening for datagrams, over real sockets."""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import ExitStack, closing
from typing import Any
from unittest.mock import patch

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import Clock

from relayd.core.errors import ListenError
from relayd.core.process_settings import Transport
from relayd.datagrams.endpoint import AdoptedUdpListener, UdpListener, UdpPort
from relayd.datagrams.sockets import (
    bound_socket,
)
from relayd.operating.endpoints import watcher
from relayd.udp_nat import Server, UdpNat
from tests.datagrams.support import (
    SERVER,
    FakeResolver,
    FakeSocket,
    FakeWatcher,
    Observer,
    arrived,
    problem,
)
from tests.support.contracts import until
from tests.support.dials import problem_of


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("host", ["127.0.0.1", None])
@pytest_twisted.ensureDeferred
async def test_over_real_sockets(transport: Transport, host: str | None) -> None:
    """There and back; a server that refuses and comes back finds the same flow."""
    live: Any = reactor
    observer = Observer()
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as server:
        server.bind(("127.0.0.1", 0))
        where = server.getsockname()
        nat = UdpNat(
            live,
            [Server(*where)],
            watcher=watcher(live, transport),
            observer=observer,
        )
        port = await UdpListener(host, 0).listen(nat)
        with closing(socket.socket(type=socket.SOCK_DGRAM)) as client:
            client.connect(("127.0.0.1", port.getHost().port))
            client.setblocking(False)
            server.setblocking(False)
            for data in (b"", b"x", bytes(65507)):
                client.send(data)
                received: list[Any] = []
                await until(lambda got=received: arrived(server, got), "a request")
                assert received[0][0] == data
                server.sendto(data[::-1], received[0][1])
                received.clear()
                await until(lambda got=received: arrived(client, got), "a reply")
                assert received[0][0] == data
            server.close()
            client.send(b"nobody")
            await until(lambda: nat.counters.icmp_errors, "ICMP")
            with closing(socket.socket(type=socket.SOCK_DGRAM)) as again:
                again.bind(where)
                again.setblocking(False)
                client.send(b"back")
                received = []
                await until(lambda: arrived(again, received), "the server is back")
                assert received[0][0] == b"back"
                again.sendto(b"yes", received[0][1])
                received.clear()
                await until(lambda: arrived(client, received), "its reply")
            assert len(nat.table.flows) == 1
            assert not observer.facts
            with pytest.raises(BlockingIOError):
                client.recv(1)
        await port.stopListening()
    counters = nat.counters
    assert counters.received == counters.sent == 5
    assert counters.replies_received == counters.replies_sent == 4
    assert observer.endings == ["drained"]


@pytest_twisted.ensureDeferred
async def test_a_broadcast_address_is_no_listener() -> None:
    """It would hear only what is sent to all, and answer from another address."""
    live: Any = reactor
    nat = UdpNat(live, [Server(*SERVER)])
    with pytest.raises(ListenError, match="udp:127.255.255.255:0: it is a broadcast"):
        await UdpListener("127.255.255.255", 0).listen(nat)
    assert not nat.listeners


def test_where_a_link_local_listener_is_has_its_interface() -> None:
    """In every line of the log: where it listens, and what its clients spoke to."""
    index, interface = socket.if_nameindex()[0]
    packed = socket.inet_pton(socket.AF_INET6, "fe80::5")
    listener, servers = FakeSocket("fe80::5"), [Server(*SERVER)]
    address = ("fe80::5", 53, 0, index)
    with patch.object(listener, "getsockname", return_value=address):
        nat = UdpNat(None, servers, watcher=FakeWatcher(batches=False), clock=Clock())
        nat.listen([listener])
        assert nat.listeners[0].name(None) == f"[fe80::5%{interface}]:53"
        assert UdpPort(nat, nat.listeners[0]).getHost().host == f"fe80::5%{interface}"
        nat.close()
    wildcard = FakeSocket("::")
    with patch.object(wildcard, "getsockname", return_value=("::", 53, 0, 0)):
        nat = UdpNat(None, servers, watcher=FakeWatcher(batches=False), clock=Clock())
        nat.listen([wildcard])
        told = packed + index.to_bytes(4, sys.byteorder)
        key = (("fe80::9", 4000, 0, index), told)
        assert nat.listeners[0].name(key) == f"[fe80::5%{interface}]:53"
        key = (("2001:db8::9", 4000, 0, 0), socket.inet_pton(socket.AF_INET6, "::1"))
        assert nat.listeners[0].name(key) == "[::1]:53"
        nat.close()


@pytest_twisted.ensureDeferred
async def test_an_address_in_use() -> None:
    """Is one line, and the other sockets are closed."""
    live: Any = reactor
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        nat = UdpNat(live, [Server(*SERVER)])
        with pytest.raises(ListenError, match=f"can't listen on udp:.*:{port}: Addr"):
            await UdpListener("127.0.0.1", port).listen(nat)
        with pytest.raises(ListenError, match="can't listen on udp:"):
            await UdpListener(None, port).listen(nat)
    assert not nat.listeners


def failing_v6(
    monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1000
) -> list[int]:
    """Let IPv6 sockets fail to bind `times` times; the ports that were tried."""
    tried: list[int] = []

    def bind(host: str, port: int) -> Any:
        if ":" in host:
            tried.append(port)
            if len(tried) <= times:
                raise problem(number)
        return bound_socket(host, port)

    monkeypatch.setattr("relayd.datagrams.endpoint.bound_socket", bind)
    return tried


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize("host", [None, "both.test"])
@pytest_twisted.ensureDeferred
async def test_a_family_that_the_machine_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, number: int, host: str | None
) -> None:
    """As of a TCP listener; what is asked for by its address must be there."""
    found = [
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 0)),
    ]
    real = socket.getaddrinfo

    def look_up(name: Any, *more: Any, **kinds: Any) -> Any:
        return found if name == "both.test" else real(name, *more, **kinds)

    monkeypatch.setattr("relayd.net.binding.socket.getaddrinfo", look_up)
    failing_v6(monkeypatch, number)
    live: Any = reactor
    nat = UdpNat(live, [Server(*SERVER)])
    port: Any = await UdpListener(host, 0).listen(nat)
    assert [each.sock.family for each in nat.listeners] == [socket.AF_INET]
    assert port.getHost().host == ("127.0.0.1" if host else "0.0.0.0")
    await port.stopListening()
    with pytest.raises(ListenError, match="can't listen on udp:.::1.:0: "):
        await UdpListener("::1", 0).listen(nat)
    assert not nat.listeners


@pytest_twisted.ensureDeferred
async def test_a_free_port_must_be_free_in_both_families(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's choice for one family may be taken in the other: choose again."""
    tried = failing_v6(monkeypatch, errno.EADDRINUSE, 3)
    live: Any = reactor
    nat = UdpNat(live, [Server(*SERVER)])
    port: Any = await UdpListener(None, 0).listen(nat)
    assert len(tried) == 4
    assert len({each.address[1] for each in nat.listeners}) == 1
    await port.stopListening()


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("first", ["::1", "127.0.0.9"])
@pytest_twisted.ensureDeferred
async def test_a_name_whose_first_address_refuses(
    transport: Transport, first: str
) -> None:
    """Every client is answered, by what it sent first."""
    live: Any = reactor
    resolver: Any = FakeResolver()
    with ExitStack() as held:
        server = held.enter_context(closing(socket.socket(type=socket.SOCK_DGRAM)))
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        port = server.getsockname()[1]
        nat = UdpNat(
            live,
            [Server("name.example", port)],
            watcher=watcher(live, transport),
            resolver=resolver,
        )
        listening: Any = await UdpListener("127.0.0.1", 0).listen(nat)
        family = socket.AF_INET6 if ":" in first else socket.AF_INET
        dead = (first, port, 0, 0) if ":" in first else (first, port)
        there = (socket.AF_INET, ("127.0.0.1", port))
        resolver.last.callback([(family, dead), there])
        for number in range(15):
            client = held.enter_context(closing(socket.socket(type=socket.SOCK_DGRAM)))
            client.connect(("127.0.0.1", listening.getHost().port))
            client.setblocking(False)
            client.send(b"%d" % number)
            received: list[Any] = []
            await until(lambda got=received: arrived(server, got), "a request")
            assert received[0][0] == b"%d" % number
            server.sendto(b"yes", received[0][1])
            await until(lambda: arrived(client, received), "a reply")  # noqa: B023
        assert nat.counters.resent == 1
        await listening.stopListening()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest_twisted.ensureDeferred
async def test_sockets_that_are_bound_already(family: int) -> None:
    """They stay their owner's; one that takes IPv4 and IPv6 serves both.

    The address that a client sent to answers it.
    """
    live: Any = reactor
    with ExitStack() as opened:

        def made(family: int, where: Any = None) -> socket.socket:
            sock = opened.enter_context(closing(socket.socket(family, type=2)))
            if where:
                sock.bind(where)
            sock.setblocking(False)
            return sock

        server = made(socket.AF_INET, ("127.0.0.1", 0))
        passed = socket.socket(family, socket.SOCK_DGRAM)
        opened.enter_context(closing(passed))
        if family == socket.AF_INET6:
            passed.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        passed.bind(("", 0))
        port = passed.getsockname()[1]
        clients = [(socket.AF_INET, "127.0.0.2")]
        if family == socket.AF_INET6:
            clients.append((socket.AF_INET6, "::1"))
        for _ in range(2):
            nat = UdpNat(
                live,
                [Server(*server.getsockname())],
                watcher=watcher(live, "auto"),
                observer=Observer(),
            )
            listener = AdoptedUdpListener([passed.fileno()], "udp:systemd:dns")
            listening = await listener.listen(nat)
            assert listening.getHost().port == port
            for kind, host in clients:
                client = made(kind)
                client.connect((host, port))
                client.send(b"question")
                received: list[Any] = []
                await until(lambda got=received: arrived(server, got), "a request")
                server.sendto(b"answer", received[0][1])
                received.clear()
                await until(
                    lambda sock=client, got=received: arrived(sock, got), "a reply"
                )
                assert received[0][0] == b"answer"
            listening.stopListening()


@pytest_twisted.ensureDeferred
async def test_what_is_no_socket_is_no_listener() -> None:
    """The others are given back."""
    nat: Any = None
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as sock, open(__file__) as file:
        numbers = [sock.fileno(), file.fileno()]
        says = problem_of(AdoptedUdpListener(numbers, "udp:systemd:dns").listen(nat))
        assert isinstance(says, ListenError)
        assert str(says).startswith("can't listen on udp:systemd:dns: Socket operation")
