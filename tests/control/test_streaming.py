"""Answers that go on: what a slow client misses, and how they end; on fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.control.site import MAX_CLIENTS, TIMEOUT
from relayd.control.steering import Conflict
from relayd.control.streaming import MOST_STREAMS, MOST_WAITING, PATIENCE
from tests.conftest import LoggedFailures
from tests.control.bench import Answer, Bench, Client, request
from tests.control.fake_steering import FakeStream

CAPTURE = "/v1/sessions/7/capture"


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.steering.streams = []
    yield made
    made.over()


class Capture:
    """One that goes on.

    :ivar lines: of the log, without who it is about.
    """

    def __init__(self, bench: Bench, **headers: str) -> None:
        self.bench = bench
        self.client: Client = bench.client()
        self.client.send(request("GET", CAPTURE, **headers))
        assert bench.steering.streams
        self.stream: FakeStream = bench.steering.streams[-1]

    def give(self, block: bytes) -> bool:
        assert self.stream.sink is not None
        return self.stream.sink.give(block)

    def end(self, why: str = "the session has ended") -> None:
        assert self.stream.sink is not None
        self.stream.sink.end(why, b"its last")

    def pause(self) -> None:
        self.client.channel.transport.producer.pauseProducing()

    def resume(self) -> None:
        self.client.channel.transport.producer.resumeProducing()

    def ends_its_side(self) -> None:
        self.client.channel.readConnectionLost()

    def leave(self) -> None:
        self.bench.clients.remove(self.client)
        self.client.leave()

    @property
    def answer(self) -> Answer:
        return Answer(self.client.said)


def lines(events: list[Any]) -> list[str]:
    who = f"uid 500, pid 4711: GET {CAPTURE}: "
    return [formatEvent(each).removeprefix(who) for each in events]


def streams(bench: Bench) -> Any:
    return bench.site.exchanges.streams


def test_blocks_are_sent_as_they_come(bench: Bench) -> None:
    """The head is there before the first."""
    with capturedLogs() as logged:
        capture = Capture(bench)
        head = capture.client.said
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert head.endswith(b"\r\n\r\n")
        for each in (b"one", b"two"):
            assert capture.give(each)
            assert capture.client.said.endswith(each + b"\r\n")
        capture.end()
    assert capture.answer.body == b"onetwoits last"
    assert capture.answer.headers["content-type"] == "application/octet-stream"
    assert not capture.stream.stopped
    assert lines(list(logged)) == [
        "begun",
        "ended: the session has ended, 14 bytes",
    ]
    # The connection serves the next request.
    capture.client.transport.clear()
    capture.client.send(request("GET", "/v1/status"))
    assert capture.answer.status == 200


def test_it_is_no_answer_that_takes_too_long(bench: Bench) -> None:
    """Neither to be made nor to be taken, as long as something is."""
    capture = Capture(bench)
    for _ in range(3):
        bench.clock.advance(10 * TIMEOUT)
        capture.pause()
        assert capture.give(b"x")
        bench.clock.advance(PATIENCE - 1)
        capture.resume()
    assert not capture.client.gone
    capture.end()
    assert capture.answer.body == b"xxxits last"


def test_a_slow_client_misses_blocks_and_no_memory_grows(bench: Bench) -> None:
    with capturedLogs() as logged:
        capture = Capture(bench)
        capture.pause()
        block = b"x" * (MOST_WAITING // 4)
        assert [capture.give(block) for _ in range(6)] == [True] * 4 + [False] * 2
        before = len(capture.client.said)
        # It goes on once there is room.
        capture.resume()
        assert len(capture.client.said) > before + MOST_WAITING
        assert capture.give(b"y")
        capture.end()
    body = capture.answer.body
    assert body == 4 * block + b"yits last"
    how = f"ended: the session has ended, {len(body)} bytes, 2 blocks refused"
    assert lines(list(logged)) == ["begun", how]


def test_no_more_is_sent_than_its_connection_takes(bench: Bench) -> None:
    """While what waits is sent, the connection may be full again."""
    capture = Capture(bench)
    capture.pause()
    for _ in range(3):
        capture.give(b"x" * 10)
    write = capture.client.transport.writeSequence

    def full(data: list[bytes]) -> None:
        write(data)
        capture.pause()

    capture.client.transport.writeSequence = full  # type: ignore[method-assign]
    before = len(capture.client.said)
    capture.resume()
    assert capture.client.said[before:].count(b"x") == 10
    del capture.client.transport.writeSequence
    capture.resume()
    assert capture.client.said[before:].count(b"x") == 30
    capture.end()


def test_the_last_block_comes_however_slow_a_client_is(bench: Bench) -> None:
    capture = Capture(bench)
    capture.pause()
    capture.give(b"x" * MOST_WAITING)
    capture.end()
    assert not capture.give(b"late")
    assert not capture.client.said.endswith(b"0\r\n\r\n")
    capture.resume()
    assert capture.answer.body.endswith(b"xits last")


@pytest.mark.parametrize("ended", [False, True])
def test_a_client_that_takes_nothing(bench: Bench, ended: bool) -> None:
    """It is reset, and what is made for it ends."""
    with capturedLogs() as logged:
        capture = Capture(bench)
        capture.pause()
        capture.give(b"x")
        if ended:
            capture.end()
        bench.clock.advance(PATIENCE - 0.1)
        assert not capture.client.gone
        bench.clock.advance(0.1)
    assert capture.client.transport.aborted
    why = "its client has taken nothing for 60 s"
    assert capture.stream.stopped == ([] if ended else [why])
    assert lines(list(logged)) == ["begun", f"ended: {why}, 0 bytes"]
    assert not streams(bench).under_way
    limits = bench.ask("GET", "/v1/limits").json["limits"]
    assert limits[-1]["hits"] == 1


@pytest.mark.parametrize("paused", [False, True])
def test_a_client_that_leaves(bench: Bench, paused: bool) -> None:
    with capturedLogs() as logged:
        capture = Capture(bench)
        if paused:
            capture.pause()
        capture.leave()
    assert capture.stream.stopped == ["its client has left"]
    assert not capture.give(b"x")
    assert lines(list(logged)) == ["begun", "ended: its client has left, 0 bytes"]


def test_a_client_that_ends_its_side_gets_the_end(bench: Bench) -> None:
    """It reads on: what waits, and the last; then the connection is closed."""
    capture = Capture(bench)
    capture.pause()
    capture.give(b"x")
    capture.ends_its_side()
    assert capture.stream.stopped == ["its client has ended it"]
    assert not capture.client.gone
    capture.resume()
    assert capture.answer.body == b"xits last"
    assert capture.client.transport.disconnecting
    assert not streams(bench).under_way


def test_a_client_without_a_capture_that_ends_its_side_has_left(bench: Bench) -> None:
    client = bench.client()
    lost: list[Any] = []
    client.transport.connectionLost = lost.append  # type: ignore[attr-defined]
    client.channel.readConnectionLost()
    assert len(lost) == 1


@pytest.mark.parametrize("paused", [False, True])
def test_relayd_stops(bench: Bench, paused: bool) -> None:
    """What waits is given to the connection, which is closed once it is sent."""
    capture = Capture(bench)
    if paused:
        capture.pause()
    capture.give(b"x")
    bench.site.close()
    assert capture.stream.stopped == ["relayd stops"]
    assert capture.answer.body == b"xits last"
    assert capture.client.transport.disconnecting


def test_there_are_only_so_many(bench: Bench) -> None:
    """Fewer than clients: one more is told so, and nothing is asked for."""
    assert MOST_STREAMS < MAX_CLIENTS
    captures = [Capture(bench) for _ in range(MOST_STREAMS)]
    refused = bench.ask("GET", CAPTURE)
    assert refused.status == 503
    assert refused.problem.startswith(f"there are {MOST_STREAMS} captures already")
    assert len(bench.steering.calls) == MOST_STREAMS
    limits = bench.ask("GET", "/v1/limits").json["limits"]
    [own] = [each for each in limits if each["what"] == "control_captures"]
    assert (own["limit"], own["now"], own["hits"]) == (MOST_STREAMS, MOST_STREAMS, 1)
    captures[0].leave()
    Capture(bench)


def test_one_that_can_not_begin(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused as any request is; nothing of it is sent."""

    def begin(self: FakeStream, sink: Any) -> None:
        sink.give(b"x")
        raise Conflict("session 7 is being closed")

    monkeypatch.setattr(FakeStream, "begin", begin)
    with capturedLogs() as logged:
        answer = bench.ask("GET", CAPTURE)
    assert (answer.status, answer.problem) == (409, "session 7 is being closed")
    assert answer.headers["content-type"] == "application/json"
    assert lines(list(logged)) == ["refused, 409: session 7 is being closed"]


def test_one_that_can_not_be_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """A defect, which keeps nothing."""

    def stop(self: FakeStream, why: str) -> None:
        raise RuntimeError(why)

    monkeypatch.setattr(FakeStream, "stop", stop)
    Capture(bench).leave()
    logged_failures.take("could not be ended")
    closing = Capture(bench)
    bench.site.close()
    logged_failures.take("could not be ended")
    assert closing.answer.body == b""


def test_the_head_alone(bench: Bench) -> None:
    """Nothing is captured for it."""
    answer = bench.ask("HEAD", CAPTURE)
    assert (answer.status, answer.body) == (200, b"")
    [stream] = bench.steering.streams or []
    assert stream.sink is None


def test_a_client_of_old_gets_bytes_and_an_end(bench: Bench) -> None:
    """HTTP/1.0 has no chunks: the connection is closed."""
    client = bench.client()
    client.send(f"GET {CAPTURE} HTTP/1.0\r\n\r\n".encode())
    [stream] = bench.steering.streams or []
    assert stream.sink is not None
    stream.sink.give(b"x")
    stream.sink.end("the session has ended")
    assert Answer(client.said).body == b"x"
    assert client.transport.disconnecting


def test_it_waits_for_the_answer_before_it(bench: Bench) -> None:
    """Of a connection that is full already, nothing more is asked."""
    client = bench.client()
    client.channel.pauseProducing()
    client.channel.dataReceived(request("GET", CAPTURE))
    [stream] = bench.steering.streams or []
    assert stream.sink is not None
    stream.sink.give(b"block")
    assert b"block" not in client.said
    client.channel.resumeProducing()
    assert b"block" in client.said
