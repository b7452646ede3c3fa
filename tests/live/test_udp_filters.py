"""Faults of datagrams in a real UDP relay, on both transports."""

from __future__ import annotations

import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.test_control_socket import ask
from tests.support.live_udp import LISTEN, balanced, exchange, nothing_came, server
from tests.support.process import (
    DATAGRAM,
    TRANSPORTS,
    UdpServer,
    relay,
    transport,
    udp_client,
)

__all__ = ["server"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

#: How many datagrams are sent at once: few enough for any socket's buffer.
MANY = 100


@pytest.fixture(autouse=True, params=TRANSPORTS)
def kind(request: pytest.FixtureRequest) -> Iterator[None]:
    with transport(request.param):
        yield


def faulty(*filters: str, server: UdpServer) -> tuple[str, ...]:
    given = [word for each in filters for word in ("--filter", each)]
    return (*LISTEN, "--dest", server.address, *given)


def numbered() -> list[bytes]:
    return [number.to_bytes(2, "big") for number in range(MANY)]


def answered(client: socket.socket, server: UdpServer, datagrams: list[bytes]) -> None:
    """A client asks once, and the server answers with all of these."""
    client.send(b"?")
    _, peer = server.receive()
    for data in datagrams:
        server.send(data, peer)


def drawn(name: str, probability: float, seed: int, ordinal: int = 0) -> list[bool]:
    """Which of the datagrams have a fault, in the flow of this number."""
    numbers = random.Random(f"{seed}:{ordinal}:down:{name}")
    numbers.random()  # its toxicity
    return [numbers.random() < probability for _ in range(MANY)]


def test_loss_is_what_the_seed_says(server: UdpServer) -> None:
    """Of each flow its own; and every datagram is accounted for."""
    with balanced(*faulty("loss:0.5,seed=7", server=server)) as running:
        for ordinal in range(2):
            lost = drawn("loss", 0.5, 7, ordinal)
            expected = [
                data for data, gone in zip(numbered(), lost, strict=True) if not gone
            ]
            assert 30 < len(expected) < 70
            with udp_client(running.port) as client:
                answered(client, server, numbered())
                assert [client.recv(DATAGRAM) for _ in expected] == expected
                nothing_came(client)
    dropped = 2 * MANY - sum(
        drawn("loss", 0.5, 7, ordinal).count(False) for ordinal in range(2)
    )
    running.wait_for(f"replies_dropped=filtered:{dropped} ")


def test_duplicates_of_what_clients_send(server: UdpServer) -> None:
    with (
        relay(
            *faulty("duplicate:1,direction=up", server=server), "--drain-timeout", "0.1"
        ) as running,
        udp_client(running.port) as client,
    ):
        for data in (b"", b"one", bytes(60_000)):
            client.send(data)
            assert [server.receive()[0] for _ in range(2)] == [data] * 2
        running.signal()
        [flow] = running.flows(1)
        assert flow["up"] == "6/120006"


def test_another_order(server: UdpServer) -> None:
    """Each overtakes another; the last, which none follows, comes all the same."""
    with (
        balanced(*faulty("reorder:1", server=server)) as running,
        udp_client(running.port) as client,
    ):
        client.send(b"?")
        _, peer = server.receive()
        # All have come before it reads the first: none is kept for too long (50 ms).
        running.signal(signal.SIGSTOP)
        for data in (b"1", b"2", b"3", b"4", b"5"):
            server.send(data, peer)
        running.signal(signal.SIGCONT)
        got = [client.recv(DATAGRAM) for _ in range(5)]
        assert got == [b"2", b"1", b"4", b"3", b"5"]


def test_wrong_bits(server: UdpServer) -> None:
    with (
        balanced(*faulty("corrupt:1", server=server)) as running,
        udp_client(running.port) as client,
    ):
        answered(client, server, [bytes(100)] * 20)
        for _ in range(20):
            data = client.recv(DATAGRAM)
            assert len(data) == 100
            assert int.from_bytes(data, "big").bit_count() == 1


def test_latency_of_both_directions(server: UdpServer) -> None:
    """At least what it is to be, and in order."""
    filters = "latency:100,direction=up", "latency:100ms"
    with (
        balanced(*faulty(*filters, server=server)) as running,
        udp_client(running.port) as client,
    ):
        begun = time.monotonic()
        for data in numbered():
            client.send(data)
        for data in numbered():
            got, peer = server.receive()
            assert got == data
            server.send(data, peer)
        halfway = time.monotonic() - begun
        assert [client.recv(DATAGRAM) for _ in range(MANY)] == numbered()
        assert halfway >= 0.1
        assert time.monotonic() - begun >= 0.2


def test_faults_join_flows_that_live_and_leave_them(
    server: UdpServer, tmp_path: Path
) -> None:
    control, file = tmp_path / "control", tmp_path / "relayd.toml"
    file.write_text(
        f'control = "unix:{control}"\ndrain_timeout = 0.1\n[udp.dns]\n'
        f'listen = "udp:127.0.0.1:0"\ndest = "{server.address}"\n'
    )

    def change(*filters: Any) -> None:
        settings = {"settings": {"filter": list(filters)}}
        status, answer = ask(control, "PATCH", "/v1/relays/dns", settings)
        assert status == 200, answer

    with (
        relay("--config", str(file)) as running,
        udp_client(running.port) as client,
    ):
        peer = exchange(client, server, b"1", b"!")
        change("loss:1", {"name": "duplicate", "probability": 1, "direction": "up"})
        client.send(b"2")
        for _ in range(2):
            # The flow is the same: so is its port.
            assert server.receive() == (b"2", peer)
        server.send(b"lost", peer)
        with udp_client(running.port) as other:
            other.send(b"new")
            assert [server.receive()[0] for _ in range(2)] == [b"new"] * 2
        nothing_came(client)
        change()
        assert exchange(client, server, b"3", b"!") == peer
        change("latency:10s")
        client.send(b"4")
        assert server.receive() == (b"4", peer)
        server.send(b"late", peer)
        # What is kept, and its timer, do not keep relayd from its end.
        running.signal()
        running.wait()
