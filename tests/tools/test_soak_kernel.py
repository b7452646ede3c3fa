"""What the soak reads of the kernel: dropped segments, and bytes that it holds back."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from soak.ends import End
from soak.kernel import Drops, read_drops, undelivered
from soak.scripts import draw_session
from soak.stops import Stops
from soak.traffic import is_held_back

NETSTAT = """\
TcpExt: SyncookiesSent TCPRcvQDrop TCPTimeouts TCPOFODrop
TcpExt: 1 20 300 4000
IpExt: InNoRoutes InOctets
IpExt: 50000 600000
"""


def test_the_kernels_counters_are_read() -> None:
    assert read_drops(NETSTAT) == 4020
    assert read_drops() >= 0


def test_drops_have_the_time_of_the_check() -> None:
    counted = [7]
    drops = Drops(lambda: counted[-1])
    drops.check(100.0)
    assert not drops.since(0.0)
    counted.append(7 + drops.MANY)
    drops.check(200.0)
    drops.check(300.0)
    assert drops.since(200.0)
    assert not drops.since(200.1)
    assert drops.count == drops.MANY
    # Whoever asks looks first; a few are none.
    counted.append(counted[-1] + drops.MANY - 1)
    assert not drops.since(200.1)
    assert drops.count == 2 * drops.MANY - 1
    counted.append(counted[-1] + 1)
    assert drops.since(200.1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection, of which the second has not read what came."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with closing(ours), closing(theirs):
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        yield ours, theirs


def test_bytes_are_undelivered_until_the_peers_kernel_has_them(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    assert undelivered(ours) > 0
    assert undelivered(theirs) == 0
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    assert undelivered(ours) > 0


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(
    ("dropped", "sends"),
    [(Drops.MANY, True), (Drops.MANY - 1, True), (Drops.MANY, False)],
)
def test_a_session_is_held_back_if_the_kernel_dropped_segments(
    dropped: int, sends: bool, closed: bool, pair: tuple[socket.socket, socket.socket]
) -> None:
    """One that is not, is judged as ever: so are all where nothing is dropped."""

    async def run() -> bool:
        session = draw_session(1, 1)
        sock, theirs = pair if sends else pair[::-1]
        drops = Drops(iter([5, 5 + dropped, 5 + dropped]).__next__)
        session.client = End(sock, session, True, Stops())
        if closed:
            session.client.reset()
            theirs.close()
        return is_held_back(session, drops)

    assert asyncio.run(run()) is (sends and dropped == Drops.MANY)


@pytest.mark.parametrize("received", [99, 100])
def test_bytes_missing_beyond_the_relay_may_be_held_back(
    received: int, pair: tuple[socket.socket, socket.socket]
) -> None:
    async def run() -> bool:
        session = draw_session(1, 1)
        _, reads = pair
        client = session.client = End(reads, session, True, Stops())
        server = session.server = End(reads, session, False, Stops())
        client.sent, server.received = 100, received
        return is_held_back(session, Drops(itertools.count(0, Drops.MANY).__next__))

    assert asyncio.run(run()) is (received < 100)
