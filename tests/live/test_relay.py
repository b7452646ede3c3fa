"""The TCP relay over real sockets: a `twistd` process, and plain clients and servers.

The first part is the nine behaviours that any TCP proxy must show; the rest is
what relayd promises beyond them.  Timeouts are short and set by options.

Each test runs on each kind of connections that relayd has (`process`), but
for those marked `once`: what they look at does not depend on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import resource
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from relayd.core.addresses import host_port
from tests.support.process import (
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    Server,
    command,
    connect,
    eventually,
    fill,
    own_host,
    read_all,
    read_exactly,
    relay,
    reset,
)

#: Long enough never to be reached by a test that does not mean to.
NEVER = "1000"

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

#: For a test that need not run on each kind of connections.
once = pytest.mark.parametrize("connections_of", TRANSPORTS[:1], indirect=True)


@contextmanager
def chain(
    server: Server, length: int, *options: str, **how: Any
) -> Iterator[RelayProcess]:
    """Relays in one process, each in front of the next; the last one of `server`."""
    with ExitStack() as held:
        # Ports that are free now: each relay's is the one before's destination.
        free = [held.enter_context(socket.socket()) for _ in range(length - 1)]
        for sock in free:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((own_host(), 0))
        hops = [host_port(*sock.getsockname()) for sock in free]
    listeners = ["127.0.0.1:0", *hops]
    args = []
    for listener, destination in zip(listeners, [*hops, server.address], strict=True):
        args += ["--listen", listener, "--dest", destination]
    with relay(*options, *args, **how) as running:
        running.listening(length)
        yield running


def echo_once(server: Server, client: socket.socket, data: bytes) -> socket.socket:
    """Send through the relay, echo at the server, and return the server's end."""
    client.sendall(data)
    upstream = server.accept()
    upstream.sendall(read_exactly(upstream, len(data)))
    assert read_exactly(client, len(data)) == data
    return upstream


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


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
    options = ("--stall-timeout", NEVER)
    started = chain(server, 1, *options, twistd=command())
    with started as running, ExitStack() as held:
        warm = held.enter_context(connect(running.port))
        echo_once(server, warm, b"x" * 100_000).close()
        before = running.rss
        clients = []
        for _ in range(100):
            clients.append(held.enter_context(connect(running.port)))
            clients[-1].setblocking(False)
            held.enter_context(server.accept())
        sent, chunk = dict.fromkeys(clients, 0), bytes(1 << 18)
        quiet = 0
        while quiet < 5:
            quiet += 1
            for client in clients:
                with suppress(BlockingIOError):
                    while True:
                        sent[client] += client.send(chunk)
                        quiet = 0
            time.sleep(0.05)
        # Each flood fills the kernel's buffers on both sides of the relay.
        assert min(sent.values()) > 1_000_000
        assert (running.rss - before) / 100 <= 300_000


# -- endings


def test_a_reset_by_the_client_reaches_the_server_after_the_data(
    server: Server,
) -> None:
    with chain(server, 1) as running:
        client = connect(running.port)
        upstream = echo_once(server, client, b"hello")
        client.sendall(b"last words")
        assert read_exactly(upstream, 10) == b"last words"
        reset(client)
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
        upstream.close()
        [line] = running.ended("downstream_reset")
        assert line["code"] == "CD"


def test_a_reset_by_the_server_reaches_the_client_after_the_data(
    server: Server,
) -> None:
    data = random.Random(4).randbytes(3_000_000)
    with chain(server, 1) as running, connect(running.port) as client:
        upstream = server.accept()
        sender = in_thread(lambda: upstream.sendall(data))
        received = bytearray()
        while len(received) < len(data):
            if sender.is_alive():
                time.sleep(0.001)
            received += client.recv(65536)
        sender.join()
        reset(upstream)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert received == data
        running.ended("upstream_reset")


def test_what_was_read_is_delivered_to_a_slow_reader_before_the_reset(
    server: Server,
) -> None:
    with chain(server, 1) as running:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.settimeout(PATIENCE)
        upstream = server.accept()
        data = random.Random(5).randbytes(60_000)
        upstream.sendall(data)
        time.sleep(0.2)  # the relay reads all of it; the client takes little
        reset(upstream)
        received = bytearray()
        with pytest.raises(ConnectionResetError):
            while part := client.recv(1000):
                received += part
                time.sleep(0.002)
        assert received == data
        client.close()
        running.ended("upstream_reset")


@pytest.mark.parametrize("resets", ["upstream", "client"])
def test_a_reset_that_a_write_meets_first_is_no_end_of_data(
    server: Server, resets: str
) -> None:
    # The relay is stopped meanwhile, so that it finds data on one side and the
    # reset on the other in the same turn: its write takes the error away.
    import signal

    with chain(server, 1) as running:
        for _ in range(5):
            client = connect(running.port)
            upstream = echo_once(server, client, b"hello")
            sender, receiver = client, upstream
            if resets == "client":
                sender, receiver = upstream, client
            running.signal(signal.SIGSTOP)
            sender.sendall(b"more")
            reset(receiver)
            running.signal(signal.SIGCONT)
            with pytest.raises(ConnectionResetError):
                sender.recv(1)
            sender.close()


def test_both_sides_reset_at_once(server: Server) -> None:
    # The relay stops reading from the second while it delivers to it, and its
    # kernel never gets rid of what the second did not acknowledge.
    with chain(server, 1, "--stall-timeout", "0") as running:
        for _ in range(300):
            client = connect(running.port)
            upstream = server.accept()
            client.sendall(b"hello")
            reset(client)
            reset(upstream)
        running.sessions(300)


def test_a_server_that_speaks_first(server: Server) -> None:
    with chain(server, 1) as running, connect(running.port) as client:
        upstream = server.accept()
        upstream.sendall(b"220 ready\r\n")
        assert read_exactly(client, 11) == b"220 ready\r\n"
        upstream.close()


def test_an_idle_session_is_ended(server: Server) -> None:
    with chain(server, 1, "--idle-timeout", "0.5") as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            upstream.close()
            running.ended("idle")


def test_a_half_closed_session_without_progress_is_ended(server: Server) -> None:
    with chain(server, 1, "--half-close-timeout", "0.5") as running:
        with connect(running.port) as client:
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            upstream = server.accept()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            upstream.close()
            running.ended("half_closed")


def test_a_quiet_half_closed_session_is_not_stalled(server: Server) -> None:
    with chain(server, 1, "--stall-timeout", "0.2") as running:
        with connect(running.port) as client:
            client.sendall(b"think about it")
            client.shutdown(socket.SHUT_WR)
            upstream = server.accept()
            assert read_all(upstream) == b"think about it"
            time.sleep(0.5)
            upstream.sendall(b"an answer")
            upstream.close()
            assert read_all(client) == b"an answer"
            running.ended("done")


def test_a_slow_loris_does_not_hold_its_neighbours(server: Server) -> None:
    with chain(server, 1) as running, ExitStack() as held:
        for _ in range(200):
            loris = held.enter_context(connect(running.port))
            loris.sendall(b"G")
            held.enter_context(server.accept())
        started = time.monotonic()
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"good client")
            client.close()
            assert read_all(upstream) == b""
            upstream.close()
        assert time.monotonic() - started < 2, "the good client waited"
        [line] = running.ended("done")
        assert line["up"] == "11"


# -- dials


@contextmanager
def full_backlog() -> Iterator[str]:
    """An address that neither accepts nor refuses: its backlog is full."""
    with ExitStack() as held:
        listening = held.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        where = listening.getsockname()
        for _ in range(4):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(where)
        yield f"127.0.0.1:{where[1]}"


def unsent_by(connection: socket.socket) -> int:
    """Bytes that the other end's kernel does not have yet."""
    queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(queued, sys.byteorder)


def refused_address() -> str:
    """An address that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((own_host(), 0))
        return host_port(*sock.getsockname())


def test_a_server_that_refuses() -> None:
    where = refused_address()
    with relay("-l", "127.0.0.1:0", "-d", where) as running:
        with connect(running.port) as client:
            assert client.recv(1) == b""
        [line] = running.ended("connect_refused")
        assert line["upstream"] == where
        assert line["code"] == "SC"


def test_a_server_that_does_not_answer() -> None:
    with full_backlog() as where:
        options = ("--connect-timeout", "0.5", "-l", "127.0.0.1:0", "-d", where)
        with relay(*options) as running, connect(running.port) as client:
            assert client.recv(1) == b""
            [line] = running.ended("connect_timeout")
            assert line["code"] == "sC"


@once
def test_a_name_without_an_address() -> None:
    where = "no-such-host.invalid:80"
    with relay("-l", "127.0.0.1:0", "-d", where) as running:
        with connect(running.port) as client:
            assert client.recv(1) == b""
        [line] = running.ended("unresolved")
        assert line["upstream"] == where


@once
def test_a_name_is_looked_up_and_dialled(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    options = ("-l", "localhost:0", "-d", f"localhost:{port}")
    with relay(*options) as running, connect(running.port) as client:
        echo_once(server, client, b"by name").close()


def test_a_client_that_resets_during_the_dial_cancels_it() -> None:
    with full_backlog() as where:
        options = ("--connect-timeout", NEVER, "-l", "127.0.0.1:0", "-d", where)
        with relay(*options) as running:
            before = running.descriptors
            client = connect(running.port)
            eventually(lambda: running.descriptors == before + 2)
            reset(client)
            [line] = running.ended("client_left")
            assert line["code"] == "CC"
            eventually(lambda: running.descriptors == before)


#: For what only the plane can do.
plane = pytest.mark.parametrize(
    "connections_of", [name for name in TRANSPORTS if name == "plane"], indirect=True
)


@plane
def test_a_client_that_resets_with_more_than_is_held_cancels_the_dial() -> None:
    """It is not read any more by then, so its event has to tell."""
    with full_backlog() as where:
        options = ("--connect-timeout", NEVER, "-l", "127.0.0.1:0", "-d", where)
        with relay(*options) as running:
            before = running.descriptors
            for number, waits in enumerate((True, False), 1):
                client = connect(running.port)
                client.sendall(bytes(100_000))
                if waits:
                    eventually(lambda: running.descriptors == before + 2)
                    time.sleep(0.1)
                reset(client)
                line = running.ended("client_left", number)[-1]
                assert float(line["duration"]) < 1
                eventually(lambda: running.descriptors == before)


@plane
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_a_client_that_resets_behind_its_end_ends_the_session(
    size: int, server: Server
) -> None:
    """At once, and not at the half-close timeout; what it has sent is delivered."""
    data = random.Random(6).randbytes(size)
    with chain(server, 1, "--half-close-timeout", NEVER) as running:
        client = connect(running.port)
        sender = in_thread(lambda: (client.sendall(data), client.shutdown(1)))
        upstream = server.accept()
        # Some is in the relay's hands by then.
        first = read_exactly(upstream, 5)
        sender.join()
        eventually(lambda: not unsent_by(client))
        time.sleep(0.1)
        reset(client)
        if size < 100:
            running.ended("downstream_reset")
        got = bytearray(first)
        with suppress(ConnectionError):
            while part := upstream.recv(1 << 20):
                got += part
        assert got == data
        with pytest.raises(ConnectionError):
            for _ in range(100):
                upstream.sendall(b"is there anybody")
                time.sleep(0.01)
        running.ended("downstream_reset")
        upstream.close()


@once
def test_a_client_that_closes_during_the_dial_cancels_it() -> None:
    with full_backlog() as where:
        options = ("--connect-timeout", NEVER, "-l", "127.0.0.1:0", "-d", where)
        with relay(*options) as running:
            before = running.descriptors
            connect(running.port).close()
            running.ended("client_left")
            eventually(lambda: running.descriptors == before)


# -- urgent data


@pytest.mark.parametrize("listen", ["[::1]:0", "tcp:0:interface=127.0.0.1"])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_an_urgent_byte_arrives_in_its_place(
    size: int, way: str, listen: str, server: Server
) -> None:
    """Telnet's interrupt: among what came before and after, spliced or not."""
    data = random.Random(5).randbytes(size)
    with relay("-l", listen, "-d", server.address) as running:
        host = "::1" if listen.startswith("[") else "127.0.0.1"
        with connect(running.port, host) as client, server.accept() as upstream:
            ends = [client, upstream]
            near, far = ends if way == "up" else ends[::-1]

            def send() -> None:
                for _ in range(3):
                    near.sendall(data)
                    near.send(b"!", socket.MSG_OOB)
                near.sendall(data)
                near.shutdown(socket.SHUT_WR)

            sender = in_thread(send)
            assert read_all(far) == b"!".join([data] * 4)
            sender.join()


def test_an_urgent_byte_alone_is_not_kept_back(server: Server) -> None:
    with chain(server, 2) as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        for near, far in ((client, upstream), (upstream, client)):
            near.send(b"!", socket.MSG_OOB)
            assert far.recv(10) == b"!"
        upstream.close()


def test_an_urgent_byte_may_be_the_first(server: Server) -> None:
    """It is there before the server's connection is."""
    with chain(server, 2) as running, connect(running.port) as client:
        client.send(b"!", socket.MSG_OOB)
        client.send(b"and more")
        upstream = server.accept()
        assert read_exactly(upstream, 9) == b"!and more"
        upstream.close()


@pytest.fixture(scope="module")
def urgent_unix_bytes() -> None:
    """For tests that need a kernel that has MSG_OOB for UNIX sockets."""
    one, other = socket.socketpair()
    with one, other:
        try:
            one.send(b"!", socket.MSG_OOB)
        except OSError:
            pytest.skip("this kernel has no MSG_OOB for UNIX sockets")


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("size", [10, 3_000_000])
@pytest.mark.usefixtures("urgent_unix_bytes")
def test_an_urgent_byte_arrives_in_its_place_on_unix_sockets(
    size: int, way: str, tmp_path: Path
) -> None:
    data = random.Random(5).randbytes(size)
    listen, there = str(tmp_path / "listen"), str(tmp_path / "server")
    with (
        Server(socket.AF_UNIX, there) as server,
        relay("-l", f"unix:{listen}", "-d", server.address),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(PATIENCE)
        client.connect(listen)
        # Before there is anybody to relay it to.
        client.send(b"!", socket.MSG_OOB)
        with server.accept() as upstream:
            assert upstream.recv(10) == b"!"
            ends = [client, upstream]
            near, far = ends if way == "up" else ends[::-1]

            def send() -> None:
                for _ in range(3):
                    near.sendall(data)
                    near.send(b"!", socket.MSG_OOB)
                near.sendall(data)
                near.shutdown(socket.SHUT_WR)

            sender = in_thread(send)
            assert read_all(far) == b"!".join([data] * 4)
            sender.join()


# -- kinds of addresses


def test_ipv6() -> None:
    with Server(socket.AF_INET6) as server:
        options = ("-l", "[::1]:0", "-d", server.address)
        with relay(*options) as running, connect(running.port, "::1") as client:
            echo_once(server, client, b"six").close()
            client.close()
            [line] = running.sessions()
            assert line["client"].startswith("[::1]:")
            assert line["upstream"] == server.address


@once
def test_a_listener_without_a_host_takes_both_families(server: Server) -> None:
    with relay("-l", "0", "-d", server.address) as running:
        four, six = running.listening(2)
        assert four == f"0.0.0.0:{running.port}"
        assert six == f"[::]:{running.port}"
        for host in ("127.0.0.1", "::1"):
            with connect(running.port, host) as client:
                echo_once(server, client, b"hello").close()
        lines = running.sessions(2)
        assert {line["listener"].rpartition(":")[0] for line in lines} == {
            "127.0.0.1",
            "[::1]",
        }


def test_unix_to_unix(tmp_path: Path) -> None:
    listener, destination = tmp_path / "listener", tmp_path / "destination"
    with Server(socket.AF_UNIX, str(destination)) as server:
        options = ("-l", f"unix:{listener}", "-d", f"unix:{destination}")
        with relay(*options) as running:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(PATIENCE)
            client.connect(str(listener))
            upstream = echo_once(server, client, b"no network at all")
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b""
            upstream.sendall(b"an answer")
            upstream.close()
            assert read_all(client) == b"an answer"
            client.close()
            [line] = running.ended("done")
            assert line["upstream"] == f"unix:{destination}"
            running.signal()
            assert running.wait() == 0
            assert not listener.exists()


@once
def test_twisted_endpoint_strings(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    options = (
        *("-l", "tcp:0:interface=127.0.0.1"),
        *("-d", f"tcp:host=127.0.0.1:port={port}"),
    )
    with relay(*options) as running, connect(running.port) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        upstream = server.accept()
        assert read_all(upstream) == b"question"
        upstream.sendall(b"answer")
        upstream.close()
        assert read_all(client) == b"answer"
        running.ended("done")


@once
def test_several_servers_take_turns() -> None:
    with Server() as one, Server() as two:
        options = ("-l", "127.0.0.1:0", "-d", one.address, "-d", two.address)
        with relay(*options) as running:
            for server in (one, two, one):
                with connect(running.port) as client:
                    echo_once(server, client, b"x").close()


# -- descriptors


def test_nothing_is_left_after_1000_sessions_of_every_ending(server: Server) -> None:
    """Two plain sockets part in every order; servers refuse, hang, have no address."""
    timeouts = (
        *("--stall-timeout", "0.3", "--idle-timeout", "1.5"),
        *("--half-close-timeout", "0.4", "--connect-timeout", "0.5"),
    )

    def client_first(client: socket.socket, upstream: socket.socket) -> None:
        client.close()
        read_all(upstream)
        upstream.close()

    def server_first(client: socket.socket, upstream: socket.socket) -> None:
        upstream.close()
        read_all(client)
        client.close()

    def both_at_once(client: socket.socket, upstream: socket.socket) -> None:
        client.close()
        upstream.close()

    def half_then_answer(client: socket.socket, upstream: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        read_all(upstream)
        upstream.sendall(b"answer")
        upstream.close()
        read_all(client)
        client.close()

    def client_resets(client: socket.socket, upstream: socket.socket) -> None:
        reset(client)
        upstream.close()

    def server_resets(client: socket.socket, upstream: socket.socket) -> None:
        reset(upstream)
        client.close()

    def client_resets_first(client: socket.socket, upstream: socket.socket) -> None:
        reset(client)
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
        upstream.close()

    def server_resets_first(client: socket.socket, upstream: socket.socket) -> None:
        reset(upstream)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()

    def both_reset(client: socket.socket, upstream: socket.socket) -> None:
        reset(client)
        reset(upstream)

    def reset_after_half(client: socket.socket, upstream: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        read_all(upstream)
        reset(client)
        with suppress(ConnectionError):
            upstream.sendall(b"to nobody")
        upstream.close()

    def leaves_unread(client: socket.socket, upstream: socket.socket) -> None:
        upstream.sendall(bytes(100_000))
        client.close()
        upstream.close()

    def writes_to_the_dead(client: socket.socket, upstream: socket.socket) -> None:
        upstream.close()
        with suppress(ConnectionError):
            client.sendall(bytes(100_000))
        client.close()

    def hears_the_end_and_writes(
        client: socket.socket, upstream: socket.socket
    ) -> None:
        upstream.close()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"is there anybody")
        client.close()

    held: list[socket.socket] = []
    flood, floods = bytes(1 << 26), []

    def until_it_is_cut(sender: socket.socket) -> None:
        with suppress(ConnectionError):
            sender.sendall(flood)

    def server_never_reads(client: socket.socket, upstream: socket.socket) -> None:
        floods.append(in_thread(lambda: until_it_is_cut(client)))
        held.extend((client, upstream))

    def goes_silent(client: socket.socket, upstream: socket.socket) -> None:
        held.extend((client, upstream))

    def goes_silent_half(client: socket.socket, upstream: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        held.extend((client, upstream))

    def never_reads(client: socket.socket, upstream: socket.socket) -> None:
        floods.append(in_thread(lambda: until_it_is_cut(upstream)))
        held.extend((client, upstream))

    # Who parts without a look at the other end may be met in any order; each ending
    # is certain, too, where they wait for each other.
    certain = [client_resets_first, server_resets_first, hears_the_end_and_writes]
    ways = [
        *(client_first, server_first, both_at_once, half_then_answer),
        *(client_resets, server_resets, both_reset, reset_after_half),
        *(leaves_unread, writes_to_the_dead, goes_silent, goes_silent_half),
        *certain,
    ]
    with ExitStack() as stack:
        silent = stack.enter_context(full_backlog())
        nowhere = [refused_address(), silent, "no-such-host.invalid:80"]
        elsewhere = [
            word for each in nowhere for word in ("-l", "127.0.0.1:0", "-d", each)
        ]
        running = stack.enter_context(chain(server, 1, *timeouts, *elsewhere))
        # `chain` puts its own listener last.
        *unreachable, to_server = (
            int(where.rpartition(":")[2]) for where in running.listening(4)
        )
        before = running.descriptors
        for number in range(1000):
            if number % 20 == 0:
                client = connect(unreachable[number // 20 % 3])
                if number % 40:
                    reset(client)
                else:
                    held.append(client)
                continue
            client = connect(to_server)
            upstream = server.accept()
            if number % 100 == 1:
                never_reads(client, upstream)
                continue
            if number % 100 == 51:
                server_never_reads(client, upstream)
                continue
            client.sendall(b"hello")
            way = ways[number % len(ways)]
            if number % 3 or way in certain:
                assert read_exactly(upstream, 5) == b"hello"
            way(client, upstream)
        running.sessions(1000)
        eventually(lambda: running.descriptors == before, "all descriptors closed")
        endings = {line["ending"] for line in running.sessions(1000)}
        assert endings >= {
            *("done", "downstream_reset", "upstream_reset", "idle", "half_closed"),
            *("downstream_stalled", "upstream_stalled", "upstream_write_failed"),
            *("connect_refused", "connect_timeout", "unresolved", "client_left"),
        }
        assert not any("Traceback" in line for line in running.lines)
        for thread in floods:
            thread.join()
        for sock in held:
            sock.close()


def test_a_full_descriptor_table_is_survived(server: Server) -> None:
    limit = 60

    def low_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    options = ("-l", "127.0.0.1:0", "-d", server.address)
    with relay(*options, preexec_fn=low_limit) as running:
        with ExitStack() as held:
            began = time.monotonic()
            clients = [held.enter_context(connect(running.port)) for _ in range(100)]
            running.wait_for("hardly any file descriptor is left")
            served = []
            server.socket.settimeout(0.5)
            with suppress(TimeoutError):
                while True:
                    served.append(held.enter_context(server.accept()))
            server.socket.settimeout(PATIENCE)
            assert 10 <= len(served) < limit // 2
            time.sleep(1.5)
            assert running.process.poll() is None
            lines = [x for x in running.lines if "file descriptor" in x]
            took = time.monotonic() - began
            assert len(lines) <= 1 + took, "once a second at most"
            # Those who waited in the kernel's queue are served as others leave.
            waiting = len(clients) - len(served)
            for client in clients[: len(served)]:
                client.close()
            for upstream in served:
                assert read_all(upstream) == b""
                upstream.close()
            late = [held.enter_context(server.accept()) for _ in range(len(served))]
            assert late
            assert waiting >= len(late)
        with connect(running.port) as client:
            client.sendall(b"x")
        assert not any("Traceback" in line for line in running.lines)


# -- shutting down


def test_sigterm_lets_sessions_finish(server: Server) -> None:
    with chain(server, 1, "--drain-timeout", NEVER) as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            port = running.port
            running.signal()
            running.wait_for("1 sessions may finish")
            with pytest.raises(ConnectionRefusedError):
                connect(port)
            client.sendall(b"goodbye")
            assert read_exactly(upstream, 7) == b"goodbye"
            upstream.close()
            assert read_all(client) == b""
        assert running.wait() == 0
        running.ended("done")


@once
def test_sigterm_does_not_wait_for_ever(server: Server) -> None:
    with chain(server, 1, "--drain-timeout", "0.3") as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            running.signal()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            upstream.close()
        assert running.wait() == 0
        running.ended("drained")


@once
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(server: Server, second: str) -> None:
    import signal

    with chain(server, 1, "--drain-timeout", NEVER) as running:
        with connect(running.port) as client:
            upstream = echo_once(server, client, b"hello")
            running.signal()
            running.wait_for("may finish")
            running.signal(getattr(signal, second))
            assert running.wait() == 0
            upstream.close()
        running.ended("drained")
        assert not any("Traceback" in line for line in running.lines)


# -- the log


@once
def test_the_log_has_a_line_for_a_session_and_none_for_its_chunks(
    server: Server,
) -> None:
    with chain(server, 1) as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        for _ in range(50):
            upstream.sendall(b"chunk")
            assert read_exactly(client, 5) == b"chunk"
        upstream.close()
        assert read_all(client) == b""
        client.close()
        [line] = running.ended("done")
        assert line["listener"] == f"127.0.0.1:{running.port}"
        assert line["upstream"] == server.address
        assert (line["up"], line["down"]) == ("5", "255")
        assert float(line["duration"]) >= 0
        text = [x for x in running.lines if "twistd" not in x and "reactor" not in x]
        assert len(text) == 2, "one line for the listener, one for the session"


@once
def test_verbose_shows_opens_and_dials(server: Server) -> None:
    with chain(server, 1, "--verbose") as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        upstream.close()
        running.wait_for(r"opened session=1 relay=relay\d+ client=127.0.0.1:")
        to = f"upstream={re.escape(server.address)}"
        running.wait_for(rf"dialing session=1 relay=relay\d+ {to}")
        running.wait_for(rf"connected session=1 relay=relay\d+ {to}")


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
