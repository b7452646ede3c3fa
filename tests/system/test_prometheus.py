"""Prometheus of Debian's packages scrapes a relay under load, and answers queries."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.ports import free_port
from tests.support.process import (
    PATIENCE,
    START,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_all,
    relay,
)
from tests.system.programs import program

pytestmark = pytest.mark.system

#: Sessions that go through the relay while it is scraped.
SESSIONS = 200

#: One target, scraped every second.
CONFIG = """
global:
  scrape_interval: 1s
  scrape_timeout: 1s
scrape_configs:
  - job_name: relayd
    static_configs:
      - targets: ["{target}"]
"""


class Prometheus:
    """A server of its own, for the length of a block."""

    def __init__(self, target: str, folder: Path) -> None:
        file = folder / "prometheus.yml"
        file.write_text(CONFIG.format(target=target))
        self._port = free_port()
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _get(self, path: str) -> Any:
        client = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            client.request("GET", path)
            return json.loads(client.getresponse().read())
        finally:
            client.close()

    def is_up(self) -> bool:
        """Whether it has scraped its target."""
        assert self._process.poll() is None, "it has ended"
        try:
            return self.query("up") == {"": 1.0}
        except (ConnectionError, ValueError):
            return False

    def query(self, text: str) -> dict[str, float]:
        """The present values of an expression, by the relay's name."""
        answer = self._get(f"/api/v1/query?query={quote(text)}")
        assert answer["status"] == "success", answer
        return {
            each["metric"].get("relay", ""): float(each["value"][1])
            for each in answer["data"]["result"]
        }

    def problems(self) -> list[str]:
        """What its last scrape has found wrong."""
        targets = self._get("/api/v1/targets")["data"]["activeTargets"]
        return [each["lastError"] for each in targets if each["lastError"]]

    def types(self) -> dict[str, str]:
        """The families that it knows by what was scraped, and their types."""
        found = self._get("/api/v1/metadata")["data"]
        return {name: each[0]["type"] for name, each in found.items()}

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(START)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextmanager
def prometheus(running: RelayProcess, folder: Path) -> Iterator[Prometheus]:
    """Prometheus, which scrapes a relay."""
    target = running.wait_for(r"metrics on (\S+)")[0][1]
    made = Prometheus(target, folder)
    try:
        eventually(made.is_up, "it has scraped the relay", START)
        yield made
    finally:
        made.stop()


def serve(server: Server, count: int) -> None:
    """Answer so many clients."""
    for _ in range(count):
        with server.accept() as upstream:
            read_all(upstream)
            upstream.sendall(b"answer")


def test_a_relay_under_load_is_scraped(server: Server, tmp_path: Path) -> None:
    """Each session, and each byte of it, is in what a query answers."""
    options = ("--metrics", "127.0.0.1:0", "--name", "web", "-l", "127.0.0.1:0")
    options += ("-d", server.address, "--name", "idle", "-l", "127.0.0.1:0", "-d", "9")
    answering = threading.Thread(target=serve, args=(server, SESSIONS + 1))
    with relay(*options) as running, prometheus(running, tmp_path) as scraper:
        answering.start()
        port = running.port
        for number in range(SESSIONS):
            with connect(port) as client:
                client.sendall(b"question %d" % number)
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"answer"
        sent = sum(len(b"question %d" % number) for number in range(SESSIONS))
        with connect(port) as last:
            # It lives while the rest is over.
            last.sendall(b"more")
            eventually(
                lambda: (
                    scraper.query('relayd_sessions_closed_total{ending="done"}')
                    == {"web": SESSIONS, "idle": 0}
                ),
                "it has scraped all sessions",
                START,
            )
            # A scrape may have come between the last of those and this one.
            eventually(
                lambda: (
                    scraper.query('relayd_relayed_bytes_total{direction="up"}')
                    == {"web": sent + 4, "idle": 0}
                ),
                "it has scraped what the last one has said",
            )
            assert scraper.query("relayd_sessions_active") == {"web": 1, "idle": 0}
            last.shutdown(socket.SHUT_WR)
            assert read_all(last) == b"answer"
        answering.join(PATIENCE)
        assert scraper.query("sum by (relay) (relayd_upstream_up)") == {
            "web": 1,
            "idle": 1,
        }
        slow = "histogram_quantile(0.99, relayd_session_duration_seconds_bucket)"
        assert 0 < scraper.query(slow)["web"] < START
        assert scraper.query("relayd_stopping") == {"": 0}
        types = scraper.types()
        # In OpenMetrics a counter's family is without the `_total` of its samples.
        for family, kind in (
            (r"relayd_sessions_opened(_total)?", "counter"),
            (r"relayd_upstream_connect_seconds", "histogram"),
            (r"relayd_sessions_active", "gauge"),
        ):
            [found] = [each for each in types if re.fullmatch(family, each)]
            assert types[found] == kind
        assert not scraper.problems()
