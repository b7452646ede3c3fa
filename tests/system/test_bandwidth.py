"""Bandwidth in real time: exact, smooth and fair over ten seconds.

All that is measured runs at the same time, so that it takes no longer than one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread

import attrs
import pytest

from tests.support.process import (
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    Server,
    connect,
    relay,
    transport,
)
from tests.system.programs import http_server, program, run

pytestmark = pytest.mark.system

#: How long is measured, and what comes before that, in seconds.
SECONDS, BEFORE = 10.0, 0.5

LISTEN = ("--listen", "127.0.0.1:0", "--dest")


class Meter:
    """Reads a connection for a while.

    :param way: whether the client or the server sends.
    :ivar rate: bytes per second.
    :ivar silence: the longest time in which nothing came, in seconds.
    """

    def __init__(self, running: RelayProcess, server: Server, way: str) -> None:
        client = connect(running.port)
        upstream = server.accept()
        self.sockets = client, upstream
        self._source, self._sink = client, upstream
        if way == "down":
            self._source, self._sink = upstream, client
        self.rate = self.silence = 0.0
        self._threads = [Thread(target=self._send), Thread(target=self._read)]
        for each in self._threads:
            each.start()

    def _send(self) -> None:
        # Until the reader has closed the connection.
        with suppress(OSError):
            while True:
                self._source.sendall(bytes(65536))

    def _read(self) -> None:
        begin = time.monotonic() + BEFORE
        last, got = begin, 0
        while (now := time.monotonic()) < begin + SECONDS:
            count = len(self._sink.recv(1 << 20))
            now = time.monotonic()
            if now >= begin:
                got += count
                self.silence = max(self.silence, now - last)
                last = now
        self.rate = got / (now - begin)
        for each in self.sockets:
            # The relay may have reset it by then, for the other one's end.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def done(self) -> None:
        """Wait for the end."""
        for each in self._threads:
            each.join(SECONDS + PATIENCE)
        for sock in self.sockets:
            sock.close()


@attrs.frozen
class Case:
    """A relay with one session, and its rate."""

    kind: str
    way: str
    rate: int
    option: str


CASES = [
    Case(kind, way, rate, option)
    for kind in TRANSPORTS
    for way, rate, option in (
        ("up", 20_000, "--bandwidth-per-session"),
        ("down", 100_000, "--bandwidth-per-client"),
        ("up", 2_000_000, "--bandwidth"),
        ("down", 20_000_000, "--bandwidth-per-session"),
    )
]


@contextmanager
def relayed(kind: str, *options: str) -> Iterator[tuple[RelayProcess, Server]]:
    with (
        transport(kind),
        Server() as server,
        relay(*LISTEN, server.address, *options) as running,
    ):
        yield running, server


def test_rates_are_exact_and_smooth() -> None:
    """Within 5 % over ten seconds (10 % below 100 kB/s), and no second of silence."""
    with ExitStack() as stack:
        meters = []
        for case in CASES:
            where = relayed(case.kind, case.option, str(case.rate))
            running, server = stack.enter_context(where)
            meters.append(Meter(running, server, case.way))
        for each in meters:
            each.done()
    for case, meter in zip(CASES, meters, strict=True):
        within = 0.1 if case.rate < 100_000 else 0.05
        assert meter.rate == pytest.approx(case.rate, rel=within), case
        assert meter.silence < 0.9, case


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_shares_are_fair(kind: str) -> None:
    """Of ten sessions, two of which are of a client with a limit of its own."""
    limits = ("--bandwidth", "1MB", "--bandwidth-per-session", "down=150kB")
    with relayed(kind, *limits) as (running, server):
        meters = [Meter(running, server, "down") for _ in range(10)]
        for each in meters:
            each.done()
    rates = [each.rate for each in meters]
    assert sum(rates) == pytest.approx(1e6, rel=0.05)
    assert all(rate == pytest.approx(1e5, rel=0.1) for rate in rates), rates


def test_a_download_by_curl_through_a_proxy(tmp_path: Path) -> None:
    curl = program("curl")
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    options = ("--listen", "127.0.0.1:0", "--allow-dest", "127.0.0.0/8")
    limits = ("--bandwidth-per-client", "up=1kB,down=250kB")
    with (
        http_server(tmp_path) as web,
        relay(*options, *limits, plugin="socks4") as running,
    ):
        said = run(
            *(curl, "--silent", "--output", str(tmp_path / "got")),
            *("--write-out", "%{speed_download}"),
            *("--socks4", f"127.0.0.1:{running.port}", f"http://{web.address}/file"),
        )
    assert (tmp_path / "got").read_bytes() == bytes(1_000_000)
    # What was left of a bucket comes at once: half a second less of four.
    assert 235_000 <= float(said) <= 300_000
