"""The handshake's last segment, and a client's first bytes, between machines.

Over a cable without delay and over a long one.  The relay stands still (SIGSTOP) until
a client's request has arrived, so that it is there when the server is dialled.
"""

from __future__ import annotations

import fcntl
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.support.process import (
    PATIENCE,
    RelayProcess,
    eventually,
    read_all,
    read_exactly,
    relay,
)
from tests.support.segments import segments
from tests.system.long_cable import long_cable
from tests.system.namespaces import PROXY, SERVER, Machine, Machines, machines

pytestmark = pytest.mark.system

#: Cables to the server: its address on each, the proxy's, and the seconds that a packet
#: takes.
CABLES = {"short": (SERVER, "", 0.0), "long": ("10.231.10.2", "10.231.10.1", 0.03)}

#: Seconds: no ACK has waited to travel with bytes, which it does for 200 ms.
NOT_HELD_BACK = 0.1

#: Tries, of which the quickest counts: the machine may be busy.
TRIES = 3


@pytest.fixture(scope="module")
def network() -> Iterator[Machines]:
    with machines() as three:
        yield three


@pytest.fixture(scope="module", params=CABLES)
def cable(
    request: pytest.FixtureRequest, network: Machines
) -> Iterator[tuple[str, float]]:
    """The server's address, and how long a packet to it takes."""
    there, here, delay = CABLES[request.param]
    laid = (
        long_cable((network.proxy, here), (network.server, there), delay)
        if delay
        else nullcontext()
    )
    with laid:
        yield there, delay


@pytest.fixture(scope="module")
def listener(cable: tuple[str, float], network: Machines) -> Iterator[socket.socket]:
    with network.server.inside():
        listening = socket.create_server((cable[0], 0))
    with listening:
        listening.settimeout(PATIENCE)
        yield listening


@pytest.fixture(scope="module")
def running(listener: socket.socket, network: Machines) -> Iterator[RelayProcess]:
    host, port = listener.getsockname()
    args = ("-l", f"{PROXY}:0", "-d", f"{host}:{port}")
    with relay(*args, twistd=network.proxy.twistd) as process:
        yield process


@contextmanager
def connected(machine: Machine, to: tuple[str, int]) -> Iterator[socket.socket]:
    """A client on a machine."""
    with machine.inside():
        client = socket.socket()
    with closing(client):
        client.settimeout(PATIENCE)
        client.connect(to)
        yield client


def accept(listener: socket.socket) -> socket.socket:
    peer, _ = listener.accept()
    peer.settimeout(PATIENCE)
    return peer


def taken(client: socket.socket) -> bool:
    """Whether the other kernel has all that a client has sent."""
    answer = fcntl.ioctl(client.fileno(), termios.TIOCOUTQ, bytes(4))
    return struct.unpack("i", answer) == (0,)


def delayed_acks(machine: Machine) -> int:
    """How many ACKs of a machine have waited for bytes to travel with, in vain."""
    with machine.inside():
        text = Path("/proc/thread-self/net/netstat").read_text()
    names, values = (
        line.split() for line in text.splitlines() if line.startswith("TcpExt:")
    )
    return int(values[names.index("DelayedACKs")])


@contextmanager
def session(
    network: Machines, running: RelayProcess, listener: socket.socket
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a session whose request was there before it began."""
    running.signal(signal.SIGSTOP)
    try:
        with connected(network.client, (PROXY, running.port)) as client:
            client.sendall(b"request")
            eventually(lambda: taken(client), "the request is at the relay")
            running.signal(signal.SIGCONT)
            with accept(listener) as peer:
                assert read_exactly(peer, 7) == b"request"
                yield client, peer
    finally:
        running.signal(signal.SIGCONT)


def test_a_request_comes_with_the_handshakes_ack(
    network: Machines, running: RelayProcess, listener: socket.socket
) -> None:
    """One segment less than of a client on the relay's machine."""
    with connected(network.proxy, listener.getsockname()) as client:
        with accept(listener) as peer:
            client.sendall(b"request")
            assert read_exactly(peer, 7) == b"request"
            plain = segments(peer)

    def attempt() -> int:
        with session(network, running, listener) as (client, peer):
            found = segments(peer)
            peer.sendall(b"response")
            peer.close()
            assert read_all(client) == b"response"
        return found

    # A relay that does not run for 200 ms has its kernel send the ACK alone.
    assert min(attempt() for _ in range(TRIES)) == plain - 1


def test_a_server_that_speaks_first_is_not_kept_waiting(
    network: Machines,
    running: RelayProcess,
    listener: socket.socket,
    cable: tuple[str, float],
) -> None:
    def attempt() -> float:
        began = time.monotonic()
        with connected(network.client, (PROXY, running.port)) as client:
            with accept(listener) as peer:
                took = time.monotonic() - began
                peer.sendall(b"banner")
                assert read_exactly(client, 6) == b"banner"
        return took

    # The handshake is three packets.
    assert min(attempt() for _ in range(TRIES)) < 3 * cable[1] + NOT_HELD_BACK


def test_a_server_that_answers_in_two_writes_is_not_kept_waiting(
    network: Machines, running: RelayProcess, listener: socket.socket
) -> None:
    """With Nagle's algorithm its second write waits for the ACK of the first."""

    def attempt() -> int:
        before = delayed_acks(network.proxy)
        with session(network, running, listener) as (client, peer):
            peer.send(b"head")
            peer.send(b"body")
            assert read_exactly(client, 8) == b"headbody"
        return delayed_acks(network.proxy) - before

    # An ACK of a session before this may be counted with the first.
    assert min(attempt() for _ in range(TRIES)) == 0
