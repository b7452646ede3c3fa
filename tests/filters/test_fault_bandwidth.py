"""Bandwidth: `rate` kilobytes of a thousand bytes a second, and nothing at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.filtering import LATER
from relayd.filters.fault_bandwidth import PIECE, STEP, Bandwidth
from tests.support.faults import CLOSE, Line


def test_a_chunk_takes_its_length_by_the_rate() -> None:
    line = Line(Bandwidth(100))
    line.read(bytes(1000), at=5)
    line.run(15 - CLOSE)
    assert line.arrived == []
    line.run(15 + CLOSE)
    assert line.arrived == [(pytest.approx(15), bytes(1000))]
    # The line is free: another takes as long.
    line.read(bytes(1500), at=1000)
    line.run(1015 + CLOSE)
    assert line.arrived[1:] == [(pytest.approx(1015), bytes(1500))]


def test_chunks_wait_for_each_other() -> None:
    line = Line(Bandwidth(100))
    for _ in range(3):
        line.read(bytes(1000), at=0)
    line.run_all()
    assert line.arrived[0] == (pytest.approx(10), bytes(1000))
    assert line.arrived[-1] == (pytest.approx(30), bytes(2000))


def test_a_long_chunk_is_passed_on_in_pieces() -> None:
    line = Line(Bandwidth(10))
    line.read(bytes(10_000))
    line.run_all()
    assert len(line.arrived) == 50
    for number, (at, data) in enumerate(line.arrived, 1):
        assert (at, len(data)) == (pytest.approx(number * STEP * 1000), 200)


@pytest.mark.parametrize("rate", [1, 1000, 123_456, 1_000_000, 100_000_000])
def test_the_rate_is_exact_for_a_source_that_is_never_idle(rate: int) -> None:
    """Within what is passed on at once: of a million bytes, or for ten seconds."""
    line = Line(Bandwidth(rate / 1000))
    chunk = random.Random(1).randbytes(16 << 10)
    half = line.filter.most_held // 2
    while len(line.data) < 3_000_000 and line.now < 10_000:
        # Its source is read again some time after it may be.
        while line.filter.held <= half:
            line.read(chunk)
        line.run(line.now + 0.5)
    expected = rate * line.now / 1000
    assert len(line.data) <= expected + 1
    assert len(line.data) >= expected - min(rate * STEP, 32 << 10) - 1
    assert line.most_timers == 1


def test_pieces_are_whole_on_a_clock_that_has_run_for_long() -> None:
    """Its floats are rounded to a tenth of a microsecond, say."""
    for day in range(1, 30):
        line = Line(Bandwidth(1_000_000))
        line.clock.rightNow = day * 86_400_000.1
        line.read(bytes(PIECE))
        line.run_all()
        assert [len(data) for _, data in line.arrived] == [PIECE]


def test_a_late_timer_makes_up_for_it() -> None:
    line = Line(Bandwidth(100))
    line.read(bytes(100_000))
    line.late(500)
    assert line.arrived == [(500, bytes(50_000))]
    line.run(1000 + CLOSE)
    assert len(line.data) == 100_000


def test_so_does_the_next_chunk() -> None:
    """It is as if the timer had not been late; but no more than a piece is made up."""
    line = Line(Bandwidth(100))
    line.read(bytes(1000))
    line.late(15)
    assert line.arrived == [(15, bytes(1000))]
    line.read(bytes(1000))
    line.run(20 + CLOSE)
    assert line.arrived[1:] == [(pytest.approx(20), bytes(1000))]
    line.read(bytes(1000))
    line.late(10_000)
    line.read(bytes(3000))
    line.run(10_010 - CLOSE)
    assert len(line.data) == 5000
    line.run(10_010 + CLOSE)
    assert len(line.data) == 6000


def test_the_end_follows_the_last_byte() -> None:
    line = Line(Bandwidth(1))
    line.read(bytes(100), at=0)
    line.read_end(at=20)
    line.run(100 - CLOSE)
    assert line.end_arrived is None
    line.run(100 + CLOSE)
    assert line.end_arrived == pytest.approx(100)
    assert len(line.data) == 100
    assert line.timers == 0


def test_the_end_alone_passes_at_once() -> None:
    line = Line(Bandwidth(1))
    line.read_end(at=20)
    assert line.end_arrived == 20


@given(st.lists(st.integers(1, 300), max_size=30), st.sampled_from((0.0, 1.0, 37.0)))
def test_any_split_has_the_same_rate(lengths: list[int], pause: float) -> None:
    line = Line(Bandwidth(10))
    total, sent = sum(lengths), b""
    for length in lengths:
        data = random.Random(length).randbytes(length)
        sent += data
        line.run(line.now + pause)
        line.read(data)
    began = pause
    line.read_end()
    line.run_all()
    assert line.data == sent
    so_far = 0
    for at, data in line.arrived:
        so_far += len(data)
        assert at >= began + so_far / 10 - CLOSE
    assert line.end_arrived is not None
    latest = max(pause * len(lengths), began) + total / 10
    assert line.end_arrived <= latest + CLOSE


def test_small_chunks_make_no_objects_nor_timers() -> None:
    line = Line(Bandwidth(10))
    for _ in range(100_000):
        line.read(b"x", at=0)
    assert line.filter.held == 100_000
    line.run_all()
    # One piece every 20 ms, in ten seconds; the first byte was due by itself.
    assert len(line.arrived) == 501
    assert line.most_timers == 1


def test_what_is_held_is_passed_on_when_it_is_taken_off() -> None:
    line = Line(Bandwidth(1))
    line.read(b"0123456789" * 10)
    line.run(50)
    assert line.data == b"0123456789" * 4
    line.remove()
    assert line.data == b"0123456789" * 10
    assert (line.filter.held, line.timers) == (0, 0)


def test_it_is_closed_with_bytes_and_an_end_under_way() -> None:
    line = Line(Bandwidth(1))
    line.read(bytes(100))
    assert line.filter.end() is LATER
    line.filter.close()
    line.run(1000)
    assert (line.arrived, line.end_arrived) == ([], None)
    assert (line.filter.held, line.timers) == (0, 0)


def test_it_is_closed_by_what_it_has_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(Bandwidth(1))
    line.read(bytes(100))
    line.read_end()
    monkeypatch.setattr(line.way, "pass_on", lambda data: line.filter.close())
    line.run(1000)
    assert line.end_arrived is None
    assert (line.filter.held, line.timers) == (0, 0)
