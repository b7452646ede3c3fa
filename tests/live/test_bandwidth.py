"""Limits of bandwidth over real sockets: never faster, and nothing lost.

How exact, smooth and fair they are is in `tests/system`: that takes time.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
import time
from pathlib import Path
from threading import Thread

import pytest

from relayd.preludes.socks4 import Command, write_reply, write_request
from tests.support.live_udp import balanced
from tests.support.process import (
    PATIENCE,
    Server,
    UdpServer,
    connect,
    eventually,
    read_exactly,
    relay,
    reset,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

LISTEN = ("--listen", "127.0.0.1:0", "--dest")

#: Bytes per second, and what may come at once: two quanta.
RATE, BURST = 500_000, 2 * 50_000

#: Takes half a second at the least.
SENT = bytes(range(250)) * 1400


def in_flight(sock: socket.socket) -> int:
    """Bytes that its peer's kernel does not have yet."""
    told = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(told, sys.byteorder)


def in_time(source: socket.socket, sink: socket.socket) -> None:
    """Send it; it arrives whole, and not too soon."""
    began = time.monotonic()
    sending = Thread(target=source.sendall, args=(SENT,))
    sending.start()
    got = read_exactly(sink, len(SENT))
    took = time.monotonic() - began
    sending.join()
    assert got == SENT
    assert took >= (len(SENT) - BURST) / RATE


@pytest.mark.parametrize(
    "option", ["--bandwidth", "--bandwidth-per-client", "--bandwidth-per-session"]
)
def test_a_stream_has_its_rate(option: str) -> None:
    """Up with one relay; down, of which both ways are limited, with it as well."""
    with (
        Server() as server,
        relay(*LISTEN, server.address, option, str(RATE)) as running,
        connect(running.port) as client,
        server.accept() as upstream,
    ):
        in_time(client, upstream)
        in_time(upstream, client)


def test_the_sessions_of_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--listen", f"unix:{path}", "--bandwidth", f"up={RATE}")
    with Server() as server, relay(*options, "--dest", server.address) as running:
        running.listening()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            with server.accept() as upstream:
                in_time(client, upstream)
                Thread(target=upstream.sendall, args=(SENT,)).start()
                assert read_exactly(client, len(SENT)) == SENT


def test_a_proxys_sessions() -> None:
    options = ("--listen", "127.0.0.1:0", "--allow-dest", "127.0.0.0/8")
    limits = ("--bandwidth-per-session", f"up={RATE},down={RATE}")
    with (
        Server() as server,
        relay(*options, *limits, plugin="socks4") as running,
        connect(running.port) as client,
    ):
        port = server.socket.getsockname()[1]
        client.sendall(write_request(Command.CONNECT, "127.0.0.1", port))
        with server.accept() as upstream:
            assert read_exactly(client, 8) == write_reply(90, "127.0.0.1", port)
            in_time(client, upstream)
            in_time(upstream, client)


def test_what_is_unread_as_a_client_resets_arrives_at_once() -> None:
    """At its rate it would take a minute; and then the reset comes.

    It is less than the window that a connection begins with: whether that grows depends
    on how the bytes come.
    """
    with (
        Server() as server,
        relay(
            *(*LISTEN, server.address, "--bandwidth", "1kB"),
            *("--stall-timeout", "1"),
        ) as running,
        connect(running.port) as client,
        server.accept() as upstream,
    ):
        client.sendall(bytes(60_000))
        eventually(lambda: not in_flight(client), "the relay's kernel has it")
        reset(client)
        assert read_exactly(upstream, 60_000) == bytes(60_000)
        with pytest.raises(ConnectionResetError):
            upstream.recv(1)
        running.ended("downstream_reset")


def test_an_end_comes_after_what_was_slow() -> None:
    with (
        Server() as server,
        relay(*LISTEN, server.address, "--bandwidth", "100kB") as running,
        connect(running.port) as client,
        server.accept() as upstream,
    ):
        client.sendall(bytes(60_000))
        client.shutdown(socket.SHUT_WR)
        assert read_exactly(upstream, 60_000) == bytes(60_000)
        assert upstream.recv(1) == b""
        upstream.sendall(b"answer")
        assert read_exactly(client, 6) == b"answer"
        upstream.close()
        running.ended("done")


def test_datagrams_that_come_too_fast_are_dropped() -> None:
    """And counted, for each way."""
    listen = ("--listen", "udp:127.0.0.1:0", "--bandwidth-per-session", "1kB")
    with (
        UdpServer() as server,
        balanced(*listen, "--dest", server.address) as running,
        udp_client(running.port) as client,
    ):
        # 250 bytes: one, and a debt, of eight seconds.
        for number, size in enumerate((200, 8000, 200, 200, 200)):
            client.send(b"%d" % number + bytes(size - 1))
        data, peer = server.receive()
        assert data[:1] == b"0"
        second, _ = server.receive()
        assert second[:1] == b"1"
        for size in (200, 8000, 200, 200, 200):
            server.send(bytes(size), peer)
        assert len(client.recv(9000)) == 200
        assert len(client.recv(9000)) == 8000
        running.signal()
        [line] = running.wait_for(r"(datagrams relay=.*)")
    told = dict(word.split("=", 1) for word in line[1].split()[1:])
    assert told["dropped"] == "bandwidth:3"
    assert told["replies_dropped"] == "bandwidth:3"
