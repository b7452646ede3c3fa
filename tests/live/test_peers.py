"""Slow and broken peers over real sockets: who takes slowly, and who is gone.

The receive buffers are those that any program may ask for, so that what takes a slow
reader of 16 kB/s a minute takes seconds here; `tests/system/test_lost_peers.py` has the
peers that lose their power.
"""

from __future__ import annotations

import random
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from relayd.net.tcp_info import unacknowledged
from relayd.preludes.socks4 import Code, Command, write_request
from tests.support.live_relays import (
    NEVER,
    chain,
    echo_once,
    full_backlog,
    in_thread,
    seldom,
)
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    reset,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

#: What a program without privileges may ask for nearly everywhere (net.core.rmem_max);
#: the kernel doubles it.  Its window opens again when a sixteenth is free.
RCVBUF = 200_000
SIXTEENTH = 2 * RCVBUF // 16


def large_reader(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RCVBUF)
    client.settimeout(PATIENCE)
    client.connect(("127.0.0.1", port))
    return client


def ended(running: RelayProcess) -> bool:
    return any("ending=" in line for line in running.lines)


# -- takes slowly, takes nothing


@seldom
def test_a_slow_reader_with_a_large_buffer_is_not_stalled(server: Server) -> None:
    """Its window stays shut for two stall timeouts, again and again."""
    with chain(server, 1, "--stall-timeout", "0.4") as running:
        with large_reader(running.port) as client:
            upstream = server.accept()

            def send() -> None:
                with suppress(ConnectionError):
                    upstream.sendall(bytes(50_000_000))

            sender = in_thread(send)
            # It has really taken something, while it was looked at.
            began = time.monotonic()
            while time.monotonic() - began < 0.4:
                read_exactly(client, 50_000)
                time.sleep(0.005)
            pause = 0.05
            for _ in range(round(2.4 / pause)):
                read_exactly(client, int(SIXTEENTH / 0.8 * pause))
                time.sleep(pause)
            assert not ended(running)
            assert sender.is_alive(), "the reader must be slower than the writer"
        sender.join()
        upstream.close()


def test_one_that_reads_nothing_has_no_more_than_the_stall_timeout(
    server: Server,
) -> None:
    """However large its buffer is."""
    with chain(server, 1, "--stall-timeout", "0.4") as running:
        with large_reader(running.port) as client:
            upstream = server.accept()
            with pytest.raises(ConnectionError):
                upstream.sendall(bytes(50_000_000))
            [line] = running.ended("downstream_stalled")
            running.wait_for(r"detail='\d+ bytes waited 0\.4 s'")
            assert line["code"] == "cD"
            with pytest.raises(ConnectionError):
                read_all(client)
            upstream.close()


@seldom
def test_a_peer_that_answers_probes_is_not_lost(server: Server) -> None:
    """It takes nothing, but only the kernel's queue has something for it."""
    with chain(server, 1, "--stall-timeout", "0.4") as running:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", running.port))
        upstream = server.accept()
        upstream.sendall(bytes(40_000))
        time.sleep(2.2)
        assert not ended(running)
        upstream.sendall(b"!")
        assert read_exactly(client, 40_001)[-1:] == b"!"
        upstream.close()
        assert read_all(client) == b""
        client.close()
        running.ended("done")


# -- resets that nobody hears of


@pytest.mark.parametrize("side", ["downstream", "upstream"])
def test_one_that_ends_its_side_and_resets_is_noticed(
    server: Server, side: str
) -> None:
    options = ("--half-close-timeout", NEVER, "--stall-timeout", "0.4")
    with chain(server, 1, *options) as running:
        client = connect(running.port)
        upstream = echo_once(server, client, b"hello")
        one, other = client, upstream
        if side == "upstream":
            one, other = upstream, client
        one.sendall(b"last words")
        one.shutdown(socket.SHUT_WR)
        assert read_exactly(other, 10) == b"last words"
        assert other.recv(1) == b""
        reset(one)
        # Nothing was written to it in vain.
        [line] = running.ended(f"{side}_reset")
        assert line["code"] == ("CD" if side == "downstream" else "SD")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                other.sendall(b"to nobody")
                time.sleep(0.01)
        other.close()


@pytest.mark.parametrize("side", ["downstream", "upstream"])
def test_one_that_resets_with_an_answer_on_its_way_was_written_to(
    server: Server, side: str
) -> None:
    """Its kernel does not have all of it; what it sent before is delivered."""
    options = ("--half-close-timeout", NEVER, "--stall-timeout", NEVER)
    with chain(server, 1, *options) as running:
        client = connect(running.port)
        upstream = echo_once(server, client, b"hello")
        one, other = client, upstream
        if side == "upstream":
            one, other = upstream, client
        one.sendall(b"last words")
        one.shutdown(socket.SHUT_WR)
        assert read_exactly(other, 10) == b"last words"
        assert other.recv(1) == b""
        other.setblocking(False)
        # Until the relay holds some.
        for _ in range(20):
            with suppress(BlockingIOError):
                while True:
                    other.send(bytes(1 << 20))
            time.sleep(0.01)
        other.settimeout(PATIENCE)
        reset(one)
        running.ended(f"{side}_write_failed")
        other.close()


@pytest.mark.parametrize("sends", ["much", "some, and its end"])
def test_a_client_that_is_not_read_and_resets_cancels_the_dial(sends: str) -> None:
    with full_backlog() as where:
        options = ("--connect-timeout", NEVER, "--stall-timeout", "0.4")
        with relay(*options, "-l", "127.0.0.1:0", "-d", where) as running:
            before = running.descriptors
            client = connect(running.port)
            if sends == "much":
                client.sendall(bytes(100_000))
            else:
                client.sendall(b"request")
                client.shutdown(socket.SHUT_WR)
            eventually(lambda: running.descriptors == before + 2)
            time.sleep(0.1)
            assert not ended(running)
            reset(client)
            [line] = running.ended("client_left")
            assert line["code"] == "CC"
            eventually(lambda: running.descriptors == before)


@pytest.mark.parametrize("command", [Command.CONNECT, Command.BIND])
def test_nor_does_a_proxy_wait_for_it(command: Command) -> None:
    """Neither its dial nor its listener."""
    with full_backlog() as where:
        options = ("--connect-timeout", NEVER, "--stall-timeout", "0.4")
        with relay(*options, "-l", "127.0.0.1:0", plugin="socks4") as running:
            client = connect(running.port)
            host, _, port = where.rpartition(":")
            client.sendall(write_request(command, host, int(port)))
            client.sendall(bytes(100_000))
            if command is Command.BIND:
                assert read_exactly(client, 8)[1] == Code.GRANTED
            time.sleep(0.2)
            assert not ended(running)
            reset(client)
            [line] = running.ended("client_left")
            assert line["code"] == "CC"


def test_over_ipv6() -> None:
    with full_backlog() as where:
        options = ("--connect-timeout", NEVER, "--stall-timeout", "0.4")
        with relay(*options, "-l", "[::1]:0", "-d", where) as running:
            client = connect(running.port, "::1")
            client.sendall(bytes(100_000))
            reset(client)
            running.ended("client_left")


def test_a_unix_client_that_closes_has_sent_what_it_sent(
    tmp_socket: Path, server: Server
) -> None:
    """A UNIX socket that was closed looks dead, but knows no reset."""
    with relay(
        *("-l", f"unix:{tmp_socket}", "-d", server.address),
        *("--stall-timeout", "0.4", "--half-close-timeout", NEVER),
    ) as running:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_socket))
            client.sendall(b"request")
        upstream = server.accept()
        assert read_all(upstream) == b"request"
        time.sleep(0.2)
        assert not ended(running)
        upstream.close()
        running.ended("done")


def test_what_a_paused_client_sent_before_its_reset_is_delivered(
    server: Server,
) -> None:
    """All of it, though the relay reads on only as the server takes it."""
    piece = random.Random(6).randbytes(1 << 20)
    # The shortest timeout says how often sessions are looked at.
    often = ("--stall-timeout", NEVER, "--connect-timeout", "0.8")
    with chain(server, 1, *often) as running:
        client = connect(running.port)
        upstream = server.accept()
        client.setblocking(False)
        sent, waiting = 0, 0
        while not waiting or unacknowledged(client) != waiting:
            waiting = unacknowledged(client)
            with suppress(BlockingIOError):
                while True:
                    sent += client.send(memoryview(piece)[sent % len(piece) :])
            time.sleep(0.1)
        # What has arrived; a reset takes the rest with it.
        arrived = sent - waiting
        reset(client)
        time.sleep(0.3)  # three looks
        received = 0
        with pytest.raises(ConnectionResetError):
            while part := upstream.recv(1 << 18):
                place = received % len(piece)
                assert part == (piece + piece)[place : place + len(part)]
                received += len(part)
                time.sleep(0.001)
        assert received == arrived
        upstream.close()
        running.ended("downstream_reset")
