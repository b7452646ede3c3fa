"""A log's writer: nothing waits, nothing is lost below the bound, and losses count."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.operating import log_writer
from relayd.operating.log_writer import (
    CHUNK,
    GIVE_UP,
    LIMIT,
    LOOK,
    RETRY,
    TIMES,
    LogWriter,
)
from relayd.operating.outlets import Outlet

LINE = b"a line of a log\n"

#: One of which a thousand fit into what may wait.
LONG = b"x" * 1023 + b"\n"


class Reactor(Clock):
    """Has threads, too: it is the one."""

    def callFromThread(self, call: Any) -> None:
        call()


class FakeOutlet(Outlet):
    """Takes as many bytes as there is room for.

    :ivar got: what it has taken.
    :ivar problem: what it raises without room.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__(-1)
        self.room = room
        self.got = bytearray()
        self.left = b""
        self.closed = False
        self.calls = 0
        self.problem = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.on_write: Any = lambda: None

    def write(self, data: bytes | memoryview) -> int:
        self.calls += 1
        assert len(data) <= CHUNK or len(data) < LIMIT
        taken = bytes(data[: self.room])
        if not taken:
            raise self.problem
        self.room -= len(taken)
        self.got += taken
        self.on_write()
        return len(taken)

    @property
    def unwritten(self) -> bytes:
        return self.left

    def close(self) -> None:
        self.closed = True


class Bench:
    """A writer, its outlet and what it tells."""

    def __init__(self, room: int = 0) -> None:
        self.reactor = Reactor()
        self.outlet = FakeOutlet(room)
        self.told: list[tuple[int, int]] = []
        self.writer = LogWriter(
            self.reactor, self.outlet, lambda *counts: self.told.append(counts)
        )


def test_a_line_is_written_at_once() -> None:
    """In one call, and nothing is left to be done."""
    bench = Bench(1000)
    for _ in range(3):
        bench.writer.write(LINE)
    assert bench.outlet.got == LINE * 3
    assert bench.outlet.calls == 3
    assert bench.reactor.getDelayedCalls() == []


def test_what_is_not_taken_waits_and_is_tried_again() -> None:
    """With the next line, and by itself; a part of a line as well."""
    bench = Bench(10)
    bench.writer.write(LINE)
    bench.writer.write(LINE)
    assert bench.outlet.got == LINE[:10]
    bench.outlet.room = 12
    bench.writer.write(LINE)
    assert bench.outlet.got == (LINE * 3)[:22]
    bench.outlet.room = 1000
    bench.reactor.advance(RETRY)
    assert bench.outlet.got == LINE * 3
    assert (bench.writer.lost, bench.told) == (0, [])
    assert bench.reactor.getDelayedCalls() == []


def test_beyond_the_bound_lines_are_lost_and_counted() -> None:
    """It is said when all that waited is written: once a second at most."""
    bench = Bench()
    fit = LIMIT // len(LONG)
    for _ in range(fit + 5):
        bench.writer.write(LONG)
    assert bench.writer.lost == 5
    bench.reactor.advance(60)
    assert bench.told == []
    bench.outlet.room = LIMIT * 2
    bench.reactor.advance(RETRY)
    assert bench.outlet.got == LONG * fit
    assert bench.told == [(5, 5)]
    # At once, again.
    bench.outlet.room = 0
    for _ in range(fit + 2):
        bench.writer.write(LONG)
    bench.outlet.room = LIMIT * 2
    bench.reactor.advance(RETRY)
    assert bench.outlet.got == LONG * 2 * fit
    assert bench.told == [(5, 5)]
    bench.reactor.pump([RETRY] * 10)
    assert bench.told == [(5, 5), (2, 7)]
    assert bench.reactor.getDelayedCalls() == []


def test_whatever_an_outlet_says_it_is_tried_again() -> None:
    """A full disk may have room later."""
    bench = Bench()
    bench.outlet.problem = OSError(errno.ENOSPC, "No space left on device")
    bench.writer.write(LINE)
    bench.reactor.advance(RETRY)
    bench.outlet.room = 100
    bench.reactor.advance(RETRY)
    assert bench.outlet.got == LINE


def test_a_line_that_is_begun_ends_in_its_own_file() -> None:
    """Or not at all, and is lost; the others go on in the new one."""
    bench = Bench(10)
    bench.writer.write(LINE)
    bench.writer.write(LINE)
    new = FakeOutlet(1000)
    bench.writer.replace_outlet(new)
    assert bench.outlet.closed
    assert bench.outlet.got == LINE[:10]
    assert new.got == LINE
    assert bench.writer.lost == 1
    bench.writer.write(LINE)
    assert new.got == LINE * 2
    bench.reactor.advance(RETRY)
    assert bench.told == [(1, 1)]
    # Nothing is begun, nothing is lost.
    bench.writer.replace_outlet(FakeOutlet(1000))
    assert bench.writer.lost == 1


def test_a_line_that_is_begun_goes_on_in_the_same_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A FIFO is the same one, when it is reopened by its name."""
    monkeypatch.setattr(FakeOutlet, "is_same_file", lambda self, other: True)
    bench = Bench(10)
    bench.writer.write(LINE)
    new = FakeOutlet(1000)
    bench.writer.replace_outlet(new)
    assert bench.outlet.got + new.got == LINE
    assert bench.writer.lost == 0


def test_what_a_thread_has_not_written_is_lost_with_its_outlet() -> None:
    bench = Bench(1000)
    bench.outlet.left = LINE * 3
    bench.writer.replace_outlet(FakeOutlet(1000))
    assert bench.writer.lost == 3


def test_at_the_end_a_reader_that_reads_gets_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that does not costs a moment."""
    waited: list[float] = []
    bench = Bench()
    for _ in range(5):
        bench.writer.write(LINE)
    bench.outlet.room = 20

    def wait(event: object, seconds: float) -> None:
        waited.append(seconds)
        bench.outlet.room += 20

    monkeypatch.setattr(threading.Event, "wait", wait)
    assert bench.writer.finish() == (0, 0)
    assert bench.outlet.got == LINE * 5
    assert len(waited) == 3

    waited.clear()
    stuck = Bench(10)
    for _ in range(LIMIT // len(LONG) + 3):
        stuck.writer.write(LONG)
    stuck.outlet.left = LONG
    lost = LIMIT // len(LONG) + 4
    assert stuck.writer.finish() == (lost, lost)
    assert waited == [LOOK] * GIVE_UP
    assert stuck.reactor.getDelayedCalls() == []
    # Nothing waits after that.
    stuck.writer.write(LINE)
    assert stuck.writer.lost == lost + 1
    assert stuck.reactor.getDelayedCalls() == []


def test_at_the_end_a_reader_may_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tenth of a second: the machine is busy."""
    late, waited = Bench(10), 0

    def wait(event: object, seconds: float) -> None:
        nonlocal waited
        waited += 1
        late.outlet.room = 10 * (waited % (GIVE_UP - 1) == 0)

    for _ in range(3):
        late.writer.write(LINE)
    monkeypatch.setattr(threading.Event, "wait", wait)
    assert late.writer.finish() == (0, 0)
    assert late.outlet.got == LINE * 3


def test_at_the_end_what_is_told_is_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the rest of one that was begun and is given up."""
    bench = Bench(10)
    bench.writer.write(LINE)
    waited = 0

    def wait(event: object, seconds: float) -> None:
        nonlocal waited
        waited += 1

    def refused() -> bytes:
        # Room comes when the writer has given up.
        bench.outlet.room = 100 * (waited == GIVE_UP)
        return b""

    monkeypatch.setattr(threading.Event, "wait", wait)
    monkeypatch.setattr(FakeOutlet, "unwritten", property(lambda outlet: refused()))
    assert bench.writer.finish() == (1, 1)
    bench.outlet.room = 100
    bench.writer.write(b"told\n")
    assert bench.outlet.got == LINE[:10] + b"\ntold\n"


def test_at_the_end_a_reader_that_is_slow_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For longer than a second."""
    slow, waited = Bench(1), 0.0
    for _ in range(1_000):
        slow.writer.write(LONG)

    def wait(event: object, seconds: float) -> None:
        nonlocal waited
        waited += seconds
        slow.outlet.room = len(LONG)

    monkeypatch.setattr(threading.Event, "wait", wait)
    lost, _ = slow.writer.finish()
    assert waited < 1.01
    assert lost == 1_000 - TIMES


def test_what_is_logged_from_within_is_in_its_turn() -> None:
    """By a destructor, say: behind the line that is being written, whole."""
    bench = Bench(10)
    bench.outlet.on_write = lambda: (
        setattr(bench.outlet, "on_write", lambda: None),
        bench.writer.write(b"within\n"),
    )
    bench.writer.write(LINE)
    bench.outlet.room = 1000
    bench.reactor.advance(RETRY)
    assert bench.outlet.got == LINE + b"within\n"


def test_several_threads_write_whole_lines() -> None:
    bench = Bench(10_000_000)

    def many(name: bytes) -> None:
        for _ in range(2_000):
            bench.writer.write(name * 20 + b"\n")

    threads = [threading.Thread(target=many, args=(name,)) for name in (b"a", b"b")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    lines = bytes(bench.outlet.got).splitlines()
    assert sorted(set(lines)) == [b"a" * 20, b"b" * 20]
    assert len(lines) == 4_000


@given(
    st.lists(
        st.one_of(
            st.integers(0, 60).map(lambda size: b"x" * size + b"\n"),
            st.integers(0, 200),
        ),
        max_size=60,
    )
)
def test_every_line_is_written_whole_or_counted(steps: list[Any]) -> None:
    """However the outlet takes them, in whatever pieces."""
    limit, log_writer.LIMIT = log_writer.LIMIT, 100
    try:
        bench, written = Bench(), []
        for step in steps:
            if isinstance(step, bytes):
                lost = bench.writer.lost
                bench.writer.write(step)
                if bench.writer.lost == lost:
                    written.append(step)
            else:
                bench.outlet.room += step
                bench.reactor.advance(RETRY)
        bench.outlet.room = 1 << 20
        bench.reactor.advance(RETRY)
        bench.reactor.pump([RETRY] * 12)
    finally:
        log_writer.LIMIT = limit
    assert bench.outlet.got == b"".join(written)
    assert bench.writer.lost == sum(map(bool, map(bytes_of, steps))) - len(written)
    assert sum(lost for lost, _ in bench.told) == bench.writer.lost
    assert bench.reactor.getDelayedCalls() == []


def bytes_of(step: Any) -> bytes:
    return step if isinstance(step, bytes) else b""
