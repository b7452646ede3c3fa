"""Peers that lose their power: a cable is pulled, and nobody answers any more.

A client, the relay and a server are machines of their own (`namespaces`).  A peer on
this machine can't vanish: its kernel answers for it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support.process import (
    PATIENCE,
    RelayProcess,
    read_all,
    read_exactly,
    relay,
)
from tests.system.namespaces import CLIENT, PROXY, SERVER, Machines, machines

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("connections_of")]

#: Sides of a session: the address there, and the cable's name.
SIDES = {"downstream": (CLIENT, "inside"), "upstream": (SERVER, "outside")}


@pytest.fixture
def network() -> Iterator[Machines]:
    with machines() as three:
        yield three


@contextmanager
def session(
    network: Machines, *options: str, rcvbuf: int = 0
) -> Iterator[tuple[RelayProcess, dict[str, socket.socket]]]:
    """A relay, and the two ends of a session through it."""
    with network.server.inside():
        listener = socket.create_server((SERVER, 0))
    with listener:
        listener.settimeout(PATIENCE)
        where = f"{SERVER}:{listener.getsockname()[1]}"
        args = (*options, "-l", f"{PROXY}:0", "-d", where)
        with relay(*args, twistd=network.proxy.twistd) as running:
            with network.client.inside():
                client = socket.socket()
            with client:
                if rcvbuf:
                    force = 33  # SO_RCVBUFFORCE, socket(7)
                    client.setsockopt(socket.SOL_SOCKET, force, rcvbuf)
                client.settimeout(PATIENCE)
                client.connect((PROXY, running.port))
                upstream, _ = listener.accept()
                with upstream:
                    upstream.settimeout(PATIENCE)
                    client.sendall(b"hello")
                    assert read_exactly(upstream, 5) == b"hello"
                    upstream.sendall(b"hello")
                    assert read_exactly(client, 5) == b"hello"
                    yield running, {"downstream": client, "upstream": upstream}


def pull(network: Machines, side: str) -> None:
    machine = network.client if side == "downstream" else network.server
    machine.cable(SIDES[side][1], "down")


def other(side: str) -> str:
    return "upstream" if side == "downstream" else "downstream"


@pytest.mark.parametrize("side", SIDES)
def test_100_bytes_under_way_to_one_that_lost_its_power(
    network: Machines, side: str
) -> None:
    """Noticed after the stall timeout, and said so; the other side is reset."""
    with session(network, "--stall-timeout", "1") as (running, ends):
        survivor = ends[other(side)]
        pull(network, side)
        survivor.sendall(bytes(100))
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            survivor.recv(1)
        assert 1 <= time.monotonic() - began < 4
        [line] = running.ended(f"{side}_lost")
        assert line["code"] == ("cD" if side == "downstream" else "sD")
        running.wait_for(r"detail='100 bytes unacknowledged for \d\.\d s'")


def test_more_than_the_kernel_takes(network: Machines) -> None:
    """What waits with us is not a stall: nobody answers."""
    with session(network, "--stall-timeout", "1") as (running, ends):
        client, upstream = ends["downstream"], ends["upstream"]
        client.settimeout(None)
        pull(network, "upstream")
        with pytest.raises(ConnectionResetError):
            client.sendall(bytes(50_000_000))
        running.ended("upstream_lost")
        upstream.close()


def test_a_ticker_to_one_that_lost_its_power(network: Machines) -> None:
    """The session moves: the server says a little all the time."""
    with session(network, "--stall-timeout", "1") as (running, ends):
        upstream = ends["upstream"]
        pull(network, "downstream")
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - began < PATIENCE:
                upstream.sendall(b"tick")
                time.sleep(0.05)
        running.ended("downstream_lost")


def test_a_short_break_ends_nothing(network: Machines) -> None:
    """Packets that are lost for less than the stall timeout are sent again."""
    with session(network, "--stall-timeout", "3") as (running, ends):
        client, upstream = ends["downstream"], ends["upstream"]
        network.server.cable("outside", "down")
        client.sendall(bytes(100))
        time.sleep(1)
        network.server.cable("outside", "up")
        assert read_exactly(upstream, 100) == bytes(100)
        time.sleep(3)
        assert not any("ending=" in line for line in running.lines)
        client.close()
        assert read_all(upstream) == b""


@pytest.mark.parametrize("side", SIDES)
def test_one_that_is_silent_and_lost_its_power(network: Machines, side: str) -> None:
    """Nothing is under way: keepalive finds it."""
    # The shortest timeout says when the wheel looks first.
    often = ("--connect-timeout", "0.8", "--keepalive", "1,1,2")
    with session(network, *often) as (running, ends):
        time.sleep(0.3)
        pull(network, side)
        with pytest.raises(ConnectionResetError):
            ends[other(side)].recv(1)
        [line] = running.ended(rf"{side}_lost")
        assert line["upstream"].startswith(SERVER)


def test_a_slow_reader_of_a_buffer_of_megabytes(network: Machines) -> None:
    """Larger than a program may ask for without privileges; it has taken three times.

    It reads 250 kB/s: its window stays shut for a second and a half.
    """
    size = 3_000_000
    opened = session(network, "--stall-timeout", "0.8", rcvbuf=size)
    with opened as (running, ends):
        client, upstream = ends["downstream"], ends["upstream"]
        upstream.settimeout(0)
        client.settimeout(PATIENCE)

        def feed() -> None:
            with suppress(BlockingIOError):
                while True:
                    upstream.send(bytes(1 << 20))

        taken = 0
        while taken < 8 * size:
            feed()
            taken += len(client.recv(1 << 20))
            time.sleep(0.02)
        for _ in range(80):
            feed()
            read_exactly(client, 12_500)
            time.sleep(0.05)
        with pytest.raises(BlockingIOError):
            while True:
                upstream.send(bytes(1 << 20))
        assert not any("ending=" in line for line in running.lines)


def test_one_that_reads_nothing_has_no_allowance(network: Machines) -> None:
    """However many megabytes its buffer has."""
    opened = session(network, "--stall-timeout", "0.8", rcvbuf=3_000_000)
    with opened as (running, ends):
        upstream = ends["upstream"]
        upstream.settimeout(None)
        with pytest.raises(ConnectionError):
            upstream.sendall(bytes(100_000_000))
        running.ended("downstream_stalled")
        running.wait_for(r"detail='\d+ bytes waited 0\.8 s'")
