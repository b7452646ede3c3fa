"""--half-close off: the first end of data closes both connections, and costs nothing.

Neither what was read before it, nor what its other side is sent, is lost by that.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from relayd.preludes.socks4 import Command, write_request
from tests.live.test_tls import pem, root, tls_client, tls_relay
from tests.support.certificates import Authority
from tests.support.live_relays import NEVER, in_thread
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
)

__all__ = ["pem", "root"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

OFF = ("--half-close", "off")

#: More than a kernel's buffers hold.
BULK = random.Random(9).randbytes(12 << 20)

Ends = tuple[RelayProcess, socket.socket, socket.socket]


@contextmanager
def session(path: Path | None, *options: str) -> Iterator[Ends]:
    """A relay, a client of it, and its server's end; over UNIX sockets or TCP."""
    family = socket.AF_INET if path is None else socket.AF_UNIX
    listen, address = "127.0.0.1:0", None
    if path is not None:
        listen, address = f"unix:{path}.r", str(path)
    with (
        Server(family, address) as server,
        relay("-l", listen, "-d", server.address, *OFF, *options) as running,
        socket.socket(family) as client,
    ):
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", running.port) if path is None else f"{path}.r")
        with server.accept() as upstream:
            yield running, client, upstream


@pytest.fixture(params=["tcp", "unix"])
def path(request: pytest.FixtureRequest, tmp_socket: Path) -> Path | None:
    """Where UNIX sockets are to be."""
    return None if request.param == "tcp" else tmp_socket


@pytest.mark.parametrize("first", ["client", "server"])
def test_the_first_end_is_that_of_both(path: Path | None, first: str) -> None:
    with session(path, "--half-close-timeout", NEVER) as (running, client, server):
        one, other = (client, server) if first == "client" else (server, client)
        other.sendall(b"so far")
        assert read_exactly(one, 6) == b"so far"
        one.sendall(b"all")
        one.shutdown(socket.SHUT_WR)
        assert read_all(one) == b""
        assert read_all(other) == b"all"
        # It is not reset, whatever it still says.
        for _ in range(3):
            other.sendall(b"more")
            time.sleep(0.01)
        other.close()
        [line] = running.ended("done")
        assert line["down" if first == "client" else "up"] == "6"
        running.wait_for(rf"12 bytes from the \w+ dropped after the {first} ended'")


@pytest.mark.parametrize("first", ["client", "server"])
def test_much_that_was_sent_arrives_before_the_end(
    path: Path | None, first: str
) -> None:
    """To a reader that is slower; the other one, which sends all the time, too."""
    with session(path, "--half-close-timeout", NEVER) as (running, client, server):
        one, other = (client, server) if first == "client" else (server, client)

        def pour() -> None:
            # All of it: who is not read any more, or is reset, fails.
            other.sendall(BULK)

        def upload() -> None:
            one.sendall(BULK)
            one.shutdown(socket.SHUT_WR)

        threads = [in_thread(pour), in_thread(upload)]
        got = bytearray()
        while part := other.recv(1 << 18):
            got += part
        threads[1].join()
        assert got == BULK
        received = bytearray()
        with suppress(ConnectionResetError):
            # Of a UNIX socket that is closed with something unread.
            while part := one.recv(1 << 18):
                received += part
        assert BULK.startswith(received)
        threads[0].join()
        other.close()
        [line] = running.ended("done")
        assert int(line["up" if first == "client" else "down"]) == len(BULK)


def test_an_answer_that_was_read_is_delivered_to_a_slow_client(
    path: Path | None,
) -> None:
    """All that the server has sent before its end, as ever."""
    with session(path) as (running, client, server):
        sender = in_thread(lambda: (server.sendall(BULK), server.close()))
        got = bytearray()
        while part := client.recv(1 << 18):
            got += part
            time.sleep(0.0005)
        sender.join()
        assert got == BULK
        client.close()
        [line] = running.ended("done")
        assert "detail" not in line


def test_a_server_that_goes_on_is_closed_in_time() -> None:
    """It has everything by then."""
    with session(None, "--half-close-timeout", "0.3") as (running, client, server):
        client.sendall(b"the last words")
        client.close()
        assert read_all(server) == b"the last words"
        with pytest.raises(OSError, match=r"reset|pipe"):
            for _ in range(int(PATIENCE / 0.01)):
                server.sendall(bytes(1000))
                time.sleep(0.01)
        [line] = running.ended("done")
        assert line["down"] == "0"
        running.wait_for(r"\d+ bytes from the server dropped after the client ended'")


def test_a_limited_session(path: Path | None) -> None:
    limits = ("--bandwidth-per-session", "1MB", "--half-close-timeout", "0.3")
    with session(path, *limits) as (running, client, server):
        pouring = in_thread(lambda: suppressed(server, BULK))
        got = read_exactly(client, 100_000)
        client.sendall(b"enough")
        client.shutdown(socket.SHUT_WR)
        got += read_all(client)
        assert BULK.startswith(got)
        assert read_exactly(server, 6) == b"enough"
        [line] = running.ended("done")
        assert int(line["down"]) == len(got)
        pouring.join()


def suppressed(sock: socket.socket, data: bytes) -> None:
    """Send to one that may go away."""
    with suppress(OSError):
        sock.sendall(data)


def test_one_that_takes_nothing_more_stalls() -> None:
    limits = ("--stall-timeout", "1", "--half-close-timeout", NEVER)
    with session(None, *limits) as (running, client, server):
        client.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.send(BULK)
                time.sleep(0.02)
        client.setblocking(True)
        client.shutdown(socket.SHUT_WR)
        running.ended("upstream_stalled")
        server.close()


def test_tls_ends_first(pem: Path, root: Authority) -> None:
    with Server() as server, tls_relay(pem, server, *OFF) as running:
        client = tls_client(running, root)
        client.sendall(b"question")
        upstream = server.accept()
        assert read_exactly(upstream, 8) == b"question"
        client.settimeout(0.2)
        with suppress(OSError):
            client.unwrap()
        client.close()
        upstream.sendall(b"dropped")
        assert read_all(upstream) == b""
        upstream.close()
        running.ended("done")


def test_tls_is_told_of_the_end(pem: Path, root: Authority) -> None:
    """And what it says until it has heard of that is dropped."""
    with Server() as server, tls_relay(pem, server, *OFF) as running:
        with tls_client(running, root) as client:
            client.sendall(b"question")
            with server.accept() as upstream:
                assert read_exactly(upstream, 8) == b"question"
                upstream.sendall(b"answer")
            assert read_all(client) == b"answer"
            client.sendall(b"thanks")
        running.ended("done")


def test_tls_that_does_not_answer_the_end(pem: Path, root: Authority) -> None:
    with Server() as server:
        limits = ("--half-close-timeout", "0.3")
        with tls_relay(pem, server, *OFF, *limits) as running:
            with tls_client(running, root) as client:
                client.sendall(b"?")
                with server.accept() as upstream:
                    assert read_exactly(upstream, 1) == b"?"
                assert client.recv(1) == b""
                # It stays.
                running.ended("done")


def test_a_socks4_client(server: Server) -> None:
    options = ("--listen", "127.0.0.1:0", "--allow-dest", "127.0.0.0/8", *OFF)
    with relay(*options, plugin="socks4") as running, connect(running.port) as client:
        host, port = server.socket.getsockname()
        client.sendall(write_request(Command.CONNECT, host, port))
        assert read_exactly(client, 8)[1] == 90
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        with server.accept() as upstream:
            assert read_all(upstream) == b"question"
            assert read_all(client) == b""
        running.ended("done")


def test_in_a_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "relayd.toml"
    path.write_text(
        f"[tcp.a]\nlisten = '127.0.0.1:0'\ndest = '{server.address}'\n"
        "half_close = false\n"
    )
    with relay("--config", str(path)) as running, connect(running.port) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        with server.accept() as upstream:
            assert read_all(upstream) == b"question"
        running.ended("done")
