"""The TCP relay under each reactor that can serve it, on each kind of connections.

What only the reactor or the transports could break, over a real process: the rest
of the relay's behaviour is in test_live.py.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import (
    TRANSPORTS,
    RelayProcess,
    Server,
    command,
    connect,
    fill,
    read_all,
    read_exactly,
    relay,
    reset,
    transport,
)

#: By `twistd --reactor`'s names: the class that the log shows, and how many epolls
#: it watches its descriptors with.
REACTORS = {
    "epoll": ("EPollReactor", 1),
    "poll": ("PollReactor", 0),
    "select": ("SelectReactor", 0),
    "asyncio": ("AsyncioSelectorReactor", 1),
}

DATA = random.Random(1).randbytes(3_000_000)

pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux's reactors"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as listening:
        yield listening


@pytest.fixture(
    scope="module",
    params=[(name, kind) for name in REACTORS for kind in TRANSPORTS],
    ids="-".join,
)
def running(request: pytest.FixtureRequest, server: Server) -> Iterator[RelayProcess]:
    """A relay with short timeouts."""
    name, kind = request.param
    options = ("--stall-timeout", "1", "--idle-timeout", "2")
    addresses = ("-l", "127.0.0.1:0", "-d", server.address)
    with transport(kind):
        with relay(*options, *addresses, twistd=command(name)) as started:
            yield started


@pytest.fixture
def ends(
    running: RelayProcess, server: Server
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a session: the client's, and the server's."""
    with connect(running.port) as client, server.accept() as upstream:
        yield client, upstream


Ends = tuple[socket.socket, socket.socket]


def test_it_is_what_was_asked_for(
    running: RelayProcess, request: pytest.FixtureRequest
) -> None:
    name, kind = request.node.callspec.params["running"]
    shown, epolls = REACTORS[name]
    running.wait_for(rf"reactor class: \S+\.{shown}\b")
    # The plane brings an epoll of its own.
    watched = [
        os.readlink(each)
        for each in Path(f"/proc/{running.process.pid}/fd").iterdir()
        if each.is_symlink()
    ]
    expected = epolls + (kind == "plane")
    assert watched.count("anon_inode:[eventpoll]") == expected


def test_an_echo(ends: Ends) -> None:
    client, upstream = ends
    for number in range(100):
        client.sendall(b"%d" % number)
        upstream.sendall(upstream.recv(10))
        assert client.recv(10) == b"%d" % number


def test_3_mb_both_ways_at_once(ends: Ends) -> None:
    client, upstream = ends

    def send(connection: socket.socket) -> None:
        connection.sendall(DATA)
        connection.shutdown(socket.SHUT_WR)

    senders = [threading.Thread(target=send, args=(each,)) for each in ends]
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_all(upstream)))
    for thread in (*senders, reader):
        thread.start()
    received.append(read_all(client))
    for thread in (*senders, reader):
        thread.join()
    assert received == [DATA, DATA]


def test_an_answer_after_a_half_close(ends: Ends) -> None:
    client, upstream = ends
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert read_all(upstream) == b"question"
    upstream.sendall(b"answer")
    upstream.close()
    assert read_all(client) == b"answer"


def test_a_reset_follows_the_data(ends: Ends) -> None:
    client, upstream = ends
    client.sendall(b"hello")
    assert read_exactly(upstream, 5) == b"hello"
    upstream.sendall(b"last words")
    reset(upstream)
    assert read_exactly(client, 10) == b"last words"
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_the_stalled_and_the_idle_are_cut(
    running: RelayProcess, server: Server, ends: Ends
) -> None:
    client, upstream = ends
    with connect(running.port) as quiet, server.accept() as silent:
        quiet.sendall(b"x")
        assert silent.recv(1) == b"x"
        with pytest.raises(ConnectionError):
            # Again, where the relay only had to wait for its turn.
            for _ in range(20):
                fill(client)
        with pytest.raises(ConnectionResetError):
            quiet.recv(1)
        with pytest.raises(ConnectionResetError):
            read_all(upstream)
    running.ended("upstream_stalled")
    running.ended("idle")
