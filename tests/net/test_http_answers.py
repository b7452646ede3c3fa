"""Answers that are made in slices: on fakes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import Logger

from relayd.net.http_answers import ENOUGH, SLICE, Answers


class Request:
    """Keeps what is written, and its producer."""

    def __init__(self) -> None:
        self.aborted = False
        transport = SimpleNamespace(abortConnection=self.abort)
        self.channel = SimpleNamespace(transport=transport, full=False)
        self.written: list[bytes] = []
        self.finished = False
        self.producer: Any = None
        self._over: Deferred[None] = Deferred()

    def abort(self) -> None:
        self.aborted = True

    def notifyFinish(self) -> Deferred[None]:
        return self._over

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def finish(self) -> None:
        self.finished = True
        self._over.callback(None)

    def leave(self) -> None:
        self._over.callback(None)


class Bench:
    """Answers, and a clock that each piece takes a slice of."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.answers = Answers(self.clock, 10.0, Logger(), "answer")
        self.closed = 0

    def begin(self, *pieces: bytes, slow: bool = True, full: bool = False) -> Request:
        request = Request()
        request.channel.full = full
        self.answers.begin(request, self._made(pieces, slow=slow))
        return request

    def _made(self, pieces: tuple[bytes, ...], *, slow: bool) -> Iterator[bytes]:
        try:
            for each in pieces:
                if slow:
                    self.clock.rightNow += SLICE
                yield each
        finally:
            self.closed += 1

    def turn(self) -> None:
        """What was asked for before is called."""
        for call in list(self.clock.calls):
            if call.active() and call.getTime() <= self.clock.seconds():
                self.clock.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    assert not made.answers.under_way
    assert not made.clock.getDelayedCalls()


def test_the_head_can_wait_for_what_is_said(bench: Bench) -> None:
    """Nothing is written until there is something."""
    request = bench.begin(b"", b"", b"x", b"y")
    for written in ([], [], [b"x"], [b"x", b"y"]):
        bench.turn()
        assert request.written == written
    bench.turn()
    assert request.finished


def test_an_answer_of_nothing_has_a_head_as_well(bench: Bench) -> None:
    request = bench.begin()
    bench.turn()
    assert request.finished
    assert request.written == [b""]


def test_a_slice_ends_by_its_bytes_as_well(bench: Bench) -> None:
    half = b"x" * (ENOUGH // 2)
    request = bench.begin(*[half] * 5, slow=False)
    for count in (2, 4, 5):
        bench.turn()
        assert sum(map(len, request.written)) == count * len(half)


def test_what_waits_before_it_is_taken_first(bench: Bench) -> None:
    """Of an answer that was before it on the connection."""
    request = bench.begin(b"x", full=True)
    bench.turn()
    assert not request.written
    request.producer.resumeProducing()
    bench.turn()
    bench.turn()
    assert request.finished


def test_a_reader_that_takes_too_long(bench: Bench) -> None:
    request = bench.begin(b"x", b"y")
    bench.turn()
    for _ in range(2):
        request.producer.pauseProducing()
        request.producer.pauseProducing()
        bench.clock.advance(4)
        request.producer.resumeProducing()
    bench.clock.rightNow += 100
    request.producer.pauseProducing()
    bench.clock.advance(1.9)
    assert not request.aborted
    bench.clock.advance(0.2)
    assert request.aborted
    assert bench.answers.slow == 1
    assert bench.closed == 1


def test_who_leaves_is_made_no_more_for(bench: Bench) -> None:
    request = bench.begin(b"x", b"y", b"z")
    bench.turn()
    request.leave()
    assert bench.closed == 1
    bench.turn()
    assert request.written == [b"x"]
