"""Faults on real connections, by the options of Toxiproxy.

Nothing comes too soon, and nothing is lost that is not meant to be.  How exact they are
is in `tests/filters`, on a clock that stands still.
"""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support.live_relays import in_thread
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
    reset,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

#: More than a relay may hold, and than the kernel's buffers of one connection at first.
BULK = random.Random(3).randbytes(2_000_000)

Ends = tuple[RelayProcess, socket.socket, socket.socket]


@contextmanager
def session(*filters: str) -> Iterator[Ends]:
    """A relay with these filters, a client of it, and its server's end."""
    options = [word for each in filters for word in ("--filter", each)]
    with (
        Server() as server,
        relay("-l", "127.0.0.1:0", "-d", server.address, *options) as running,
        connect(running.port) as client,
        server.accept() as upstream,
    ):
        yield running, client, upstream


@contextmanager
def takes(seconds: float) -> Iterator[None]:
    """It takes so long at least."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= seconds


def bulk(source: socket.socket, sink: socket.socket, data: bytes = BULK) -> None:
    """Send it, and then the end; it arrives whole."""

    def send() -> None:
        source.sendall(data)
        source.shutdown(socket.SHUT_WR)

    sending = in_thread(send)
    assert read_all(sink) == data
    sending.join()


def test_latency_is_that_of_its_direction() -> None:
    with session("latency:150") as (_, client, server):
        client.sendall(b"question")
        assert read_exactly(server, 8) == b"question"
        with takes(0.15):
            server.sendall(b"answer")
            assert read_exactly(client, 6) == b"answer"


def test_latencies_add_up() -> None:
    with (
        session("latency:100", "latency:100,direction=up") as (_, client, server),
        takes(0.2),
    ):
        client.sendall(b"question")
        server.sendall(read_exactly(server, 8))
        assert read_exactly(client, 8) == b"question"


def test_each_direction_ends_by_itself_behind_its_latency() -> None:
    with session("latency:100", "latency:50,direction=up") as (running, client, server):
        bulk(client, server, BULK[:300_000])
        bulk(server, client)
        [line] = running.ended("done")
        assert (line["up"], line["down"]) == ("300000", "2000000")


def test_what_is_under_way_arrives_before_a_reset() -> None:
    with session("latency:100") as (running, client, server):
        server.sendall(b"last words")
        # The relay has read them: the other direction has no latency.
        client.sendall(b"x")
        read_exactly(server, 1)
        reset(server)
        assert read_exactly(client, 10) == b"last words"
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        running.ended("upstream_reset")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_bandwidth_of_either_direction(direction: str) -> None:
    with session(f"bandwidth:1000,direction={direction}") as (_, client, server):
        ends = (client, server) if direction == "up" else (server, client)
        with takes(0.3):
            bulk(*ends, BULK[:300_000])
        bulk(*reversed(ends))


@pytest.mark.parametrize("slow_first", [False, True])
def test_faults_behind_each_other_hold_no_more_than_one(slow_first: bool) -> None:
    """What one passes on at once is not too much for the next, which is slow."""
    filters = ["latency:50", "latency:80", "bandwidth:1000", "slicer:1024"]
    if slow_first:
        filters.reverse()
    with session(*filters) as (_, client, server), takes(0.6):
        bulk(server, client, BULK[:600_000])


def test_a_client_that_reads_late_gets_all() -> None:
    with session("latency:20", "slicer:4KiB") as (_, client, server):
        sending = in_thread(lambda: server.sendall(BULK))
        time.sleep(0.2)
        assert read_exactly(client, len(BULK)) == BULK
        sending.join()


def test_slices_are_all_there_is() -> None:
    words = "slicer:average_size=1000,size_variation=999,delay=10,seed=1"
    with session(words) as (_, client, server):
        bulk(server, client, BULK[:100_000])


def test_slices_reach_a_reader_one_by_one() -> None:
    with session("slicer:4,delay=500ms") as (_, client, server):
        server.sendall(b"hello world")
        assert client.recv(100) == b"hell"
        assert client.recv(100) == b"o wo"
        assert client.recv(100) == b"rld"


def test_slow_close_delays_the_end_alone() -> None:
    with session("slow_close:200") as (_, client, server):
        with takes(0.2):
            server.sendall(b"last")
            server.shutdown(socket.SHUT_WR)
            assert read_exactly(client, 4) == b"last"
            # The other direction goes on.
            client.sendall(b"x")
            assert read_exactly(server, 1) == b"x"
            assert read_all(client) == b""
        client.sendall(b"y")
        assert read_exactly(server, 1) == b"y"


def test_timeout_lets_nothing_pass_and_closes_both() -> None:
    with session("timeout:200") as (running, client, server):
        server.sendall(b"lost")
        client.sendall(b"question")
        assert read_exactly(server, 8) == b"question"
        assert read_all(client) == b""
        assert read_all(server) == b""
        [line] = running.ended("filtered")
        assert "timeout" in line["detail"]
        assert float(line["duration"].removesuffix("s")) >= 0.2


def test_reset_peer_resets_both() -> None:
    with session("reset_peer:100") as (running, client, server):
        server.sendall(b"lost")
        for end in client, server:
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        running.ended("filtered")


def test_reset_peer_at_once() -> None:
    """Without a byte of either side."""
    with (
        Server() as server,
        relay("-l", "127.0.0.1:0", "-d", server.address, "--filter", "reset_peer") as r,
        # It may be reset before its connect() has returned, which would raise that.
        socket.socket() as client,
    ):
        client.settimeout(PATIENCE)
        problem = client.connect_ex(("127.0.0.1", r.port))
        with server.accept() as upstream, pytest.raises(ConnectionResetError):
            upstream.recv(1)
        if not problem:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert problem in (0, errno.ECONNRESET)


def test_limit_data_delivers_so_many_and_closes() -> None:
    with session("limit_data:1000000") as (running, client, server):
        sending = in_thread(lambda: _send_what_it_takes(server))
        assert read_all(client) == BULK[:1_000_000]
        client.close()
        sending.join()
        running.ended("filtered")


def _send_what_it_takes(source: socket.socket) -> None:
    with suppress(ConnectionError):
        source.sendall(BULK)


def test_a_limit_behind_a_latency_waits_for_it() -> None:
    with session("latency:100", "limit_data:5") as (_, client, server), takes(0.1):
        server.sendall(b"hello world")
        assert read_all(client) == b"hello"


def test_a_latency_behind_a_limit_passes_what_it_holds() -> None:
    with session("limit_data:5", "latency:100") as (_, client, server), takes(0.1):
        server.sendall(b"hello world")
        assert read_all(client) == b"hello"


def test_toxicity_and_seed_choose_sessions() -> None:
    """The same ones in each run: those of a seed with 0.5."""

    def run() -> list[bool]:
        ended = []
        words = "limit_data:0,toxicity=0.5,seed=7"
        with (
            Server() as server,
            relay(
                *("-l", "127.0.0.1:0", "-d", server.address, "--filter", words)
            ) as running,
        ):
            for _ in range(12):
                with connect(running.port) as client, server.accept() as upstream:
                    upstream.sendall(b"x")
                    upstream.shutdown(socket.SHUT_WR)
                    ended.append(read_all(client) == b"")
        return ended

    first = run()
    assert 0 < sum(first) < 12
    assert run() == first
