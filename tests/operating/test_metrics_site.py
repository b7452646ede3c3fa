"""What is served by HTTP, and who can't disturb it: on fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.exposition import choose_encoder
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs
from twisted.python.failure import Failure

from relayd.net.http_answers import SLICE
from relayd.operating.metrics_site import (
    IDLE,
    MAX_CONNECTIONS,
    MAX_SCRAPES,
    SCRAPE_TIMEOUT,
    MetricsSite,
)
from tests.conftest import LoggedFailures


class Health:
    """Stands in for the health of two relays."""

    def __init__(self) -> None:
        self.why = ""
        self.each = {"web": "", "a b": "dials to all of its servers have failed"}

    def why_not(self) -> str:
        return self.why

    def why_not_each(self) -> dict[str, str]:
        return self.each


class Transport(StringTransport):
    """Keeps what it is told."""

    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True
        self.disconnected = True


class Bench:
    """A site with a text of some pieces, each of which takes a slice."""

    def __init__(self, pieces: int = 3) -> None:
        self.clock = Clock()
        self.health: Any = Health()
        self.pieces = pieces
        self.made = 0
        self.accepts: list[str] = []
        self.site = MetricsSite(self.expose, self.health, self.clock)

    def expose(self, accept: str) -> tuple[str, Iterator[bytes]]:
        self.accepts.append(accept)
        # Which raises errors of its own about versions.
        choose_encoder(accept)
        return "text/plain; version=0.0.4", self._text()

    def _text(self) -> Iterator[bytes]:
        for number in range(self.pieces):
            self.made += 1
            # Like a busy clock.
            self.clock.rightNow += SLICE
            yield b"piece %d\n" % number

    def client(self) -> Any:
        """A connection; `said` sends and returns what has come."""
        channel = self.site.buildProtocol(None)
        if channel is None:
            return None
        channel.transport_ = transport = Transport()
        channel.makeConnection(transport)
        return channel

    def get(self, path: str, method: str = "GET", *headers: str) -> tuple[int, str]:
        """A request of a new connection: status and body, once it is whole."""
        channel = self.client()
        lines = [f"{method} {path} HTTP/1.0", *headers, "", ""]
        channel.dataReceived("\r\n".join(lines).encode("latin-1"))
        self.turns()
        head, _, body = channel.transport_.value().decode().partition("\r\n\r\n")
        self.lose(channel)
        self.head = head
        return int(head.split()[1]), body

    def turn(self) -> None:
        """What is due is called, but not what is asked for meanwhile."""
        now = self.clock.seconds()
        for call in [each for each in self.clock.calls if each.getTime() <= now]:
            if call.active():
                self.clock.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)

    def turns(self, count: int = 50) -> None:
        for _ in range(count):
            self.turn()

    def lose(self, channel: Any) -> None:
        channel.connectionLost(Failure(CONNECTION_DONE))

    def over(self) -> None:
        """Nothing is left."""
        self.site.close()
        for each in list(self.site.channels):
            self.lose(each)
        assert not self.site.scrapes.under_way
        assert not self.clock.getDelayedCalls()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.over()


ASK = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_the_metrics(bench: Bench) -> None:
    said = bench.get("/metrics", "GET", "Accept: text/x")
    assert said == (200, "piece 0\npiece 1\npiece 2\n")
    assert bench.accepts == ["text/x"]
    assert "Content-Type: text/plain; version=0.0.4" in bench.head
    assert bench.get("/metrics", "HEAD") == (200, "")
    assert bench.made == 3


def test_a_format_that_can_not_be_read_is_none(bench: Bench) -> None:
    # The last two are no UTF-8.
    for accept in (
        "text/plain;version=",
        "text/plain;version=x",
        "text/plain;version=1.x",
        "text/plain;version=\xb2",
        "a\xff",
    ):
        status, body = bench.get("/metrics", "GET", f"Accept: {accept}")
        assert (status, body.count("piece")) == (200, 3), accept


def test_health(bench: Bench) -> None:
    assert bench.get("/livez") == (200, "ok\n")
    assert bench.get("/readyz") == (200, "ok\n")
    listed = "[+] web: ok\n[-] a b: dials to all of its servers have failed\n"
    for verbose in ("?verbose", "?verbose=1", "?x=y&verbose"):
        assert bench.get(f"/readyz{verbose}") == (200, f"{listed}ok\n")
    assert bench.get("/readyz/web") == (200, "ok\n")
    status, body = bench.get("/readyz/a%20b")
    assert (status, body) == (503, "dials to all of its servers have failed\n")


def test_only_the_head(bench: Bench) -> None:
    with capturedLogs() as logged:
        assert bench.get("/livez", "HEAD") == (200, "")
        assert "Content-Length: 3" in bench.head
        assert bench.get("/no", "HEAD") == (404, "")
    assert not logged


def test_one_that_is_not_ready_lives(bench: Bench) -> None:
    bench.health.why = "stopping"
    assert bench.get("/readyz") == (503, "stopping\n")
    assert bench.get("/readyz?verbose")[1].endswith("\nstopping\n")
    assert bench.get("/livez") == (200, "ok\n")


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/readyz/", "/readyz/no", "/%ff", "/%00", "//x"]
)
def test_there_is_nothing_else(bench: Bench, path: str) -> None:
    assert bench.get(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X"])
def test_other_methods_are_not_served(bench: Bench, method: str) -> None:
    status, body = bench.get("/metrics", method)
    assert (status, body) == (405, "only GET and HEAD are served\n")
    assert "Allow: GET, HEAD" in bench.head


@pytest.mark.parametrize(
    "header", ["Content-Length: 1000000000000", "Transfer-Encoding: chunked"]
)
def test_a_body_is_not_read(bench: Bench, header: str) -> None:
    """Twisted would keep it in a file, however much it is."""
    channel = bench.client()
    request = f"POST /livez HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n"
    channel.dataReceived(request.encode() + b"5\r\nhello\r\n")
    assert channel.transport_.aborted


@pytest.mark.parametrize(
    "said",
    [
        b"\0" * 100 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * 5000,
        b"GET /" + b"x" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /livez HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_garbage_is_refused_or_forgotten(bench: Bench, said: bytes) -> None:
    """Nothing is kept of it for long, and nothing of ours answers it."""
    channel = bench.client()
    channel.dataReceived(said)
    answer = channel.transport_.value()
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")
    bench.clock.advance(IDLE)
    assert channel.transport_.aborted or channel.transport_.disconnecting


def test_an_idle_connection_is_closed(bench: Bench) -> None:
    channel = bench.client()
    bench.clock.advance(IDLE - 1)
    channel.dataReceived(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert channel.transport_.value().endswith(b"ok\n\r\n0\r\n\r\n") or (
        channel.transport_.value().endswith(b"ok\n")
    )
    bench.clock.advance(IDLE - 1)
    assert not channel.transport_.aborted
    bench.clock.advance(1)
    assert channel.transport_.aborted


def test_the_last_bytes_of_a_connection_have_to_be_taken(bench: Bench) -> None:
    """Of one that is to be closed after its answer."""
    channel = bench.client()
    channel.dataReceived(b"GET /livez HTTP/1.0\r\n\r\n")
    assert channel.transport_.disconnecting
    bench.clock.advance(IDLE)
    assert channel.transport_.aborted


def test_one_connection_more_takes_the_place_of_the_oldest(bench: Bench) -> None:
    """But not of one whose scrape is under way."""
    first, *others = (bench.client() for _ in range(MAX_CONNECTIONS))
    first.dataReceived(ASK)
    assert bench.client() is not None
    assert not first.transport_.aborted
    assert others[0].transport_.aborted
    bench.lose(others[0])
    assert not others[1].transport_.aborted
    assert len(bench.site.channels) == MAX_CONNECTIONS
    [row] = bench.site.limits()
    assert (row["limit"], row["now"]) == (MAX_CONNECTIONS, MAX_CONNECTIONS)
    assert row["hits"] == bench.site.refused > 0
    bench.turns()
    assert b"piece 2" in first.transport_.value()


def test_a_scrape_is_made_in_slices(bench: Bench) -> None:
    """One in each turn of the reactor, of all scrapes together."""
    one, other = bench.client(), bench.client()
    one.dataReceived(ASK)
    other.dataReceived(ASK)
    assert bench.made == 0
    for turn in range(1, 7):
        bench.turn()
        assert bench.made == turn
    bench.turns(3)
    for each in (one, other):
        assert each.transport_.value().endswith(b"piece 2\n\r\n0\r\n\r\n")
    assert not bench.site.scrapes.under_way


def test_a_reader_that_does_not_read_is_given_no_more(bench: Bench) -> None:
    """And after some time, it is reset."""
    slow, other = bench.client(), bench.client()
    slow.dataReceived(ASK)
    bench.turn()
    slow.transport_.producer.pauseProducing()
    bench.turns()
    assert bench.made == 1
    other.dataReceived(ASK)
    bench.turns()
    assert bench.made == 4
    slow.transport_.producer.resumeProducing()
    bench.turn()
    assert bench.made == 5
    slow.transport_.producer.pauseProducing()
    bench.clock.advance(SCRAPE_TIMEOUT)
    assert slow.transport_.aborted
    assert not bench.site.scrapes.under_way


def test_there_are_only_so_many_scrapes_at_once(bench: Bench) -> None:
    for _ in range(MAX_SCRAPES):
        bench.client().dataReceived(ASK)
    one_more = bench.client()
    one_more.dataReceived(ASK)
    assert one_more.transport_.value().startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1" in one_more.transport_.value()
    bench.turns()
    assert bench.get("/metrics")[0] == 200


def test_a_reader_that_leaves(bench: Bench) -> None:
    """In the middle, paused or not: nothing more is made for it."""
    for paused in (False, True):
        bench.made = 0
        channel = bench.client()
        channel.dataReceived(ASK)
        bench.turn()
        if paused:
            channel.transport_.producer.pauseProducing()
        bench.lose(channel)
        bench.turns()
        assert bench.made == 1


def test_requests_that_follow_each_other(bench: Bench) -> None:
    """Without waiting for the answers: they come in order."""
    channel = bench.client()
    channel.dataReceived(ASK + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    bench.turns()
    _, first, second = channel.transport_.value().split(b"HTTP/1.1 200 OK\r\n")
    assert b"piece 2" in first
    assert b"ok\n" in second


def test_a_scrape_that_fails_is_reset(
    bench: Bench, logged_failures: LoggedFailures
) -> None:
    """What its reader has had so far must not pass for all."""
    channel = bench.client()
    channel.dataReceived(ASK)
    bench.turn()

    def fails() -> bytes:
        raise RuntimeError("a defect")

    [scrape] = bench.site.scrapes.under_way
    scrape._pieces = iter(fails, b"")
    bench.turns()
    assert channel.transport_.aborted
    logged_failures.take("a scrape failed")


def test_closing_ends_what_is_under_way() -> None:
    bench = Bench()
    scraping, idle = bench.client(), bench.client()
    scraping.dataReceived(ASK)
    bench.turn()
    bench.site.close()
    assert scraping.transport_.aborted
    assert idle.transport_.disconnecting
    bench.over()
