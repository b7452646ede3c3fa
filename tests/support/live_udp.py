"""A real UDP relay with a listener of every sort, and the servers behind it.

One relay for each kind of connections serves the tests that set no option; the others
start their own.  On the loopback nothing is lost but what a full buffer can't take, so
every datagram is waited for, and must come.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import pytest

from tests.support.ports import free_port
from tests.support.process import (
    DATAGRAM,
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    UdpServer,
    relay,
    transport,
)

LISTEN = ("--listen", "udp:127.0.0.1:0")


#: One counter of the line that a relay ends with, or several by their reason.
_COUNTED = re.compile(r"(\w+)=(\S+)")


@contextmanager
def balanced(*args: str, **options: Any) -> Iterator[RelayProcess]:
    """A relay of which it is sure, when it has ended, that no datagram was lost.

    What it has received is what it sent and what it counted as dropped, either way.
    """
    with relay("--drain-timeout", "0.1", *args, **options) as running:
        yield running
        if running.process.poll() is None:
            running.signal()
        running.wait()
        # A quiet one that has dropped nothing says nothing.
        least = int("--quiet" not in args)
        totals = running.wait_for(r"\[relayd\.flow#info\] (datagrams .*)", least)
    for line in totals:
        told = dict(_COUNTED.findall(line[1]))
        for received, sent, dropped in (
            ("received", "sent", "dropped"),
            ("replies_received", "replies_sent", "replies_dropped"),
        ):
            reasons = re.findall(r":(\d+)", told[dropped])
            assert int(told[received]) == int(told[sent]) + sum(map(int, reasons))


@attrs.frozen
class Stage:
    """A relay with a listener of every sort, and the servers behind it.

    :ivar transport: what the relays use at this time.
    :ivar ports: of its listeners, by sort.
    """

    transport: str
    relay: RelayProcess
    ports: dict[str, int]
    ipv4: UdpServer
    ipv6: UdpServer
    both: UdpServer
    pool: tuple[UdpServer, UdpServer]


#: For a test that takes long: beside other relays only with the system tests.
seldom = pytest.mark.parametrize(
    "stage",
    [
        TRANSPORTS[0],
        *(pytest.param(each, marks=pytest.mark.system) for each in TRANSPORTS[1:]),
    ],
    indirect=True,
    scope="module",
)


@pytest.fixture(autouse=True, params=TRANSPORTS, scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """What the tests that set no option share; other relays get its transport."""
    with ExitStack() as held:
        # Who binds an address of its own, and the port that the kernel picks, would
        # be taken for a server if it were that one's (README, source_loops).
        ipv4, one, two = (
            held.enter_context(UdpServer(port=free_port())) for _ in range(3)
        )
        ipv6 = held.enter_context(UdpServer("::1", free_port()))
        both = held.enter_context(UdpServer(""))
        sorts = {
            "ipv4": ("udp:127.0.0.1:0", ipv4.address),
            "ipv6": ("udp:[::1]:0", ipv6.address),
            "6to4": ("udp:[::1]:0", ipv4.address),
            "4to6": ("udp:127.0.0.1:0", ipv6.address),
            "pool": ("udp:127.0.0.1:0", one.address, two.address),
            "name": ("udp:127.0.0.1:0", f"udp:localhost:{both.port}"),
            # Without a host: two sockets, two lines of the log.
            "wildcard": ("udp:0", ipv4.address),
        }
        args = []
        for listener, *servers in sorts.values():
            args += ["--listen", listener]
            args += [arg for server in servers for arg in ("--dest", server)]
        held.enter_context(transport(request.param))
        running = held.enter_context(balanced(*args))
        lines = running.listening(len(sorts) + 1)
        numbers = [int(line.rpartition(":")[2]) for line in lines]
        ports = dict(zip(sorts, numbers, strict=False))
        yield Stage(request.param, running, ports, ipv4, ipv6, both, (one, two))


@pytest.fixture
def server() -> Iterator[UdpServer]:
    with UdpServer(port=free_port()) as listening:
        yield listening


def exchange(
    client: socket.socket, server: UdpServer, request: bytes, *replies: bytes
) -> tuple[str, int]:
    """Ask and be answered; the relay's address that the server saw."""
    client.send(request)
    data, peer = server.receive()
    assert data == request
    for reply in replies:
        server.send(reply, peer)
    for reply in replies:
        assert client.recv(DATAGRAM) == reply
    return peer[0], peer[1]


def nothing_came(sock: socket.socket) -> None:
    """Nothing has arrived; what could have, arrived before what the caller got."""
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(DATAGRAM)
    sock.settimeout(PATIENCE)


def name(sock: socket.socket) -> str:
    """A client's address, as the log has it."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"
