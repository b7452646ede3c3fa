"""How sessions of a real TCP relay end: resets, timeouts, dials that fail.

Each test runs on each kind of connections that relayd has (`process`), but for those
marked `once`: what they look at does not depend on it.
"""

from __future__ import annotations

import fcntl
import random
import socket
import sys
import termios
import time
from contextlib import ExitStack, suppress

import pytest

from tests.support.live_relays import (
    NEVER,
    chain,
    echo_once,
    full_backlog,
    in_thread,
    once,
    refused_address,
)
from tests.support.process import (
    PATIENCE,
    TRANSPORTS,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    reset,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")


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


def unsent_by(connection: socket.socket) -> int:
    """Bytes that the other end's kernel does not have yet."""
    queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(queued, sys.byteorder)


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
        with relay(*options, "-v") as running:
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
        with relay(*options, "-v") as running:
            before = running.descriptors
            connect(running.port).close()
            running.ended("client_left")
            eventually(lambda: running.descriptors == before)
