"""The TCP relay over real sockets: a `twistd` process, and plain clients and servers.

The first part is the nine behaviours that any TCP proxy must show; the rest is what
relayd promises beyond them.  Timeouts are short and set by options.

Each test runs on each kind of connections that relayd has (`process`), but for those
marked `once`: what they look at does not depend on it.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest

from tests.support.live_relays import NEVER, chain, echo_once, in_thread, seldom
from tests.support.process import (
    PATIENCE,
    Server,
    connect,
    fill,
    read_all,
    read_exactly,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

#: A buffer that is not to grow, and what is more than that, in bytes.
FEW, FLOOD = 1 << 16, 5_000_000


# -- the nine behaviours


@pytest.mark.parametrize("connections", [1, 2, 20])
def test_echo_over_chained_connections(server: Server, connections: int) -> None:
    with chain(server, connections) as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(upstream) == b""
        upstream.close()
        assert read_all(client) == b""
        assert len(running.ended("done", connections)) == connections


def test_2_mb_through_a_chain_of_20(server: Server) -> None:
    data = random.Random(1).randbytes(2_000_000)
    with chain(server, 20) as running, connect(running.port) as client:
        sender = in_thread(lambda: (client.sendall(data), client.shutdown(1)))
        upstream = server.accept()
        assert read_all(upstream) == data
        answer = in_thread(lambda: (upstream.sendall(data), upstream.close()))
        assert read_all(client) == data
        sender.join()
        answer.join()


def test_2_mb_through_a_chain_of_20_beside_a_blocked_connection(
    server: Server,
) -> None:
    data = random.Random(2).randbytes(2_000_000)
    with chain(server, 20, "--stall-timeout", NEVER) as running:
        with connect(running.port) as blocked, connect(running.port) as client:
            held = server.accept()
            fill(blocked)
            upstream = server.accept()
            sender = in_thread(lambda: (client.sendall(data), client.shutdown(1)))
            assert read_all(upstream) == data
            sender.join()
            upstream.close()
            assert read_all(client) == b""
            held.close()


def test_the_client_ends_its_side_and_still_gets_the_answer(server: Server) -> None:
    with chain(server, 2) as running, connect(running.port) as client:
        client.sendall(b"a request, whole")
        client.shutdown(socket.SHUT_WR)
        upstream = server.accept()
        assert read_all(upstream) == b"a request, whole"
        upstream.sendall(b"an answer")
        assert read_exactly(client, 9) == b"an answer"
        upstream.close()
        assert read_all(client) == b""
        running.ended("done", 2)


def test_the_server_ends_its_side_and_still_hears_the_client(server: Server) -> None:
    with chain(server, 2) as running, connect(running.port) as client:
        upstream = server.accept()
        upstream.sendall(b"that is all from me")
        upstream.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"that is all from me"
        client.sendall(b"but I have more")
        assert read_exactly(upstream, 15) == b"but I have more"
        client.close()
        assert read_all(upstream) == b""
        upstream.close()
        running.ended("done", 2)


def test_a_client_that_writes_to_a_server_that_left_is_told(server: Server) -> None:
    with chain(server, 1) as running, connect(running.port) as client:
        upstream = server.accept()
        upstream.close()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionError):
            for _ in range(100):
                client.sendall(b"is there anybody")
                time.sleep(0.01)
        running.ended("upstream_write_failed")


@seldom
def test_an_active_client_with_long_pauses_is_left_alone(server: Server) -> None:
    with chain(server, 1, "--stall-timeout", "0.2") as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"0")
            for number in range(1, 4):
                time.sleep(0.5)
                client.sendall(b"%d" % number)
                assert upstream.recv(1) == b"%d" % number
            upstream.close()


def test_a_lazy_server_is_aborted_after_the_stall_timeout(server: Server) -> None:
    with chain(server, 1, "--stall-timeout", "0.9") as running:
        with connect(running.port) as client:
            upstream = server.accept()
            fill(client)
            with pytest.raises(ConnectionError):
                client.recv(1)
            [line] = running.ended("upstream_stalled")
            assert line["code"] == "sD"
            # Its end was reset, behind what the kernel has for it to read.
            with pytest.raises(ConnectionError):
                read_all(upstream)
            upstream.close()


def test_a_lazy_client_is_aborted_after_the_stall_timeout(server: Server) -> None:
    with chain(server, 1, "--stall-timeout", "0.9") as running:
        with connect(running.port) as client:
            upstream = server.accept()
            fill(upstream)
            with pytest.raises(ConnectionError):
                upstream.recv(1)
            running.ended("downstream_stalled")
            with pytest.raises(ConnectionError):
                read_all(client)
            upstream.close()


# -- every byte, whatever the readers do


def test_50_mb_to_a_reader_that_pauses_after_half_closing(server: Server) -> None:
    size, pieces = 50_000_000, 50
    piece = random.Random(3).randbytes(size // pieces)
    with chain(server, 1) as running, connect(running.port) as client:
        client.sendall(b"all of it, please")
        client.shutdown(socket.SHUT_WR)
        upstream = server.accept()
        assert read_all(upstream) == b"all of it, please"

        def answer() -> None:
            for _ in range(pieces):
                upstream.sendall(piece)
            upstream.close()

        sender = in_thread(answer)
        time.sleep(0.5)
        digest, count = hashlib.sha256(), 0
        while data := client.recv(1 << 20):
            digest.update(data)
            count += len(data)
        sender.join()
        assert count == size
        assert digest.digest() == hashlib.sha256(piece * pieces).digest()
        [line] = running.ended("done")
        assert (line["up"], line["down"]) == ("17", str(size))


@seldom
def test_a_slow_reader_is_not_stalled(server: Server) -> None:
    # The kernel wakes a writer only when a third of its queue is free; what the
    # reader's kernel takes meanwhile must count.
    with chain(server, 1, "--stall-timeout", "0.6") as running:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.connect(("127.0.0.1", running.port))
        client.settimeout(PATIENCE)
        upstream = server.accept()

        def send() -> None:
            with suppress(ConnectionError):
                upstream.sendall(bytes(50_000_000))

        sender = in_thread(send)
        for _ in range(20):
            time.sleep(0.1)
            assert client.recv(16384)
        assert sender.is_alive(), "the reader must be slower than the writer"
        assert not any("ending=" in line for line in running.lines)
        client.close()
        sender.join()
        upstream.close()


def test_memory_is_bounded_while_100_floods_are_blocked(server: Server) -> None:
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FEW)
    options = ("--stall-timeout", NEVER)
    started = chain(server, 1, *options, fresh=True)
    with started as running, ExitStack() as held:
        warm = held.enter_context(connect(running.port))
        echo_once(server, warm, b"x" * 100_000).close()
        before = running.rss
        clients = []
        for _ in range(100):
            clients.append(held.enter_context(connect(running.port)))
            clients[-1].setblocking(False)
            held.enter_context(server.accept())
        # More than the relay may hold, and than the kernel gives to its end that
        # sends.  Not until nobody takes any more: that would be a third of the
        # machine's memory for TCP, which is everybody's.
        left, chunk = dict.fromkeys(clients, FLOOD), bytes(1 << 18)
        quiet = 0
        while quiet < 5:
            quiet += 1
            for client in clients:
                with suppress(BlockingIOError):
                    while left[client]:
                        left[client] -= client.send(chunk[: left[client]])
                        quiet = 0
            time.sleep(0.05)
        assert max(left.values()) < FLOOD - 1_000_000
        assert (running.rss - before) / 100 <= 300_000


# -- many at once


def test_many_clients_at_once(server: Server) -> None:
    data = os.urandom(200_000)

    def serve() -> None:
        def echo(upstream: socket.socket) -> None:
            with upstream:
                upstream.sendall(read_all(upstream))

        with ThreadPoolExecutor(50) as pool:
            for _ in range(50):
                pool.submit(echo, server.accept())

    def ask(port: int) -> bytes:
        with connect(port) as client:
            sender = in_thread(lambda: (client.sendall(data), client.shutdown(1)))
            answer = read_all(client)
            sender.join()
            return answer

    with chain(server, 1) as running:
        serving = in_thread(serve)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(ask, [running.port] * 50))
        serving.join()
        assert all(answer == data for answer in answers)
        assert len(running.ended("done", 50)) == 50
