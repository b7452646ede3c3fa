"""Latency: `latency` give or take `jitter` for each chunk, in order, and bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.filtering import LATER
from relayd.filters.fault_latency import Latency, LatencyFilter
from tests.support.faults import Line


def test_all_data_has_the_latency() -> None:
    line = Line(Latency(100))
    line.read(b"hello", at=10)
    line.read(b"world", at=50)
    line.run(109.999)
    assert line.arrived == []
    line.run(149.999)
    assert line.arrived == [(110, b"hello")]
    line.run(1000)
    assert line.arrived == [(110, b"hello"), (150, b"world")]


def test_delays_do_not_add_up() -> None:
    """Chunks are under way at once: a thousand take no longer than the last."""
    line = Line(Latency(100))
    for at in range(0, 2000, 2):
        line.read(b"%04d" % at, at=at)
    line.run(5000)
    assert line.arrived == [(at + 100, b"%04d" % at) for at in range(0, 2000, 2)]


def test_latencies_of_two_faults_add_up() -> None:
    first, second = Line(Latency(50)), Line(Latency(30))
    first.read(b"data", at=0)
    first.run(1000)
    for at, data in first.arrived:
        second.read(data, at=at)
    second.run(1000)
    assert second.arrived == [(80, b"data")]


def test_the_jitter_is_in_its_bounds_and_goes_both_ways() -> None:
    line = Line(Latency(100, 20))
    for number in range(200):
        line.read(bytes([number]), at=number * 100)
    line.run_all()
    delays = [at - number * 100 for number, (at, _) in enumerate(line.arrived)]
    assert len(delays) == 200
    assert 80 <= min(delays) < 90
    assert 110 < max(delays) <= 120


def test_jitter_keeps_the_order() -> None:
    line = Line(Latency(100, 100, seed=1))
    for number in range(250):
        line.read(bytes([number]), at=number * 2)
    line.run_all()
    assert line.data == bytes(range(250))
    assert [at for at, _ in line.arrived] == sorted(at for at, _ in line.arrived)


class Drawn(random.Random):
    """Draws these numbers."""

    def __init__(self, *numbers: float) -> None:
        random.Random.__init__(self)
        self._left = list(numbers)

    def uniform(self, a: float, b: float) -> float:
        return self._left.pop(0)


def test_one_with_a_shorter_delay_waits_for_those_before() -> None:
    line = Line(Latency(100, 100))
    delays = Drawn(0.0, 0.09, -0.05, -0.1, 0.05)
    line.filter = LatencyFilter(line.way, 0.1, 0.1, delays)
    for at, data in (0, b"0"), (10, b"1"), (20, b"2"), (30, b"3"), (150, b"4"):
        line.read(data, at=at)
    line.run_all()
    assert line.arrived == [(100, b"0"), (200, b"123"), (300, b"4")]


def test_a_jitter_that_is_more_than_the_latency_is_no_delay_at_times() -> None:
    line = Line(Latency(1, 100, seed=1))
    at_once = 0
    for number in range(100):
        line.read(b"x", at=number * 1000)
        at_once += len(line.arrived) > number
    assert 30 < at_once < 70


def test_no_latency_passes_at_once_and_holds_nothing() -> None:
    line = Line(Latency(0))
    line.read(b"hello")
    assert line.arrived == [(0, b"hello")]
    assert line.timers == 0


def test_the_end_follows_the_last_byte() -> None:
    line = Line(Latency(100))
    line.read(b"last", at=0)
    line.read_end(at=20)
    line.run(99.999)
    assert line.end_arrived is None
    line.run(100)
    assert (line.data, line.end_arrived) == (b"last", 100)
    assert line.timers == 0


def test_the_end_has_no_delay_of_its_own() -> None:
    line = Line(Latency(100))
    line.read_end(at=20)
    assert line.end_arrived == 20


@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=40), st.sampled_from((0, 0.3, 1.7, 30, 200))
        ),
        max_size=60,
    ),
    st.integers(0, 5),
)
def test_any_split_gives_the_same_bytes_and_none_is_early(
    chunks: list[tuple[bytes, float]], seed: int
) -> None:
    line = Line(Latency(50, 10, seed=seed))
    sent: list[float] = []
    for data, pause in chunks:
        line.run(line.now + pause)
        sent += [line.now] * len(data)
        line.read(data)
    line.read_end()
    line.run_all()
    assert line.data == b"".join(data for data, _ in chunks)
    assert line.end_arrived is not None
    arrived = [at for at, data in line.arrived for _ in data]
    for began, came, so_far in zip(sent, arrived, range(1, len(sent) + 1), strict=True):
        assert came >= began + 40 - 1e-6
        # Not later than the latest of those before, and the grain.
        assert came <= max(sent[:so_far]) + 60 + 1 + 1e-6
    assert line.most_timers <= 1


@pytest.mark.parametrize("latency", [50, 1000, 3_600_000])
def test_small_chunks_make_no_large_queue(latency: int) -> None:
    """Nor many timers; and none is early, or late by more than a thousandth."""
    line = Line(Latency(latency))
    step = latency / 20_000
    for number in range(20_000):
        line.read(b"xy", at=number * step)
    # Nothing has arrived yet: all of them are under way.
    assert line.filter.held == 40_000
    assert len(line.filter._queue) <= 1001  # type: ignore[attr-defined]
    line.run_all()
    arrived = [at for at, data in line.arrived for _ in range(len(data) // 2)]
    late = [at - number * step - latency for number, at in enumerate(arrived)]
    assert min(late) >= -1e-3
    assert max(late) <= max(1, latency / 1000) + 1e-3
    assert line.most_timers == 1


def test_what_is_held_is_passed_on_when_it_is_taken_off() -> None:
    line = Line(Latency(100))
    line.read(b"hello ", at=0)
    line.read(b"world", at=50)
    assert line.filter.held == 11
    line.remove()
    assert line.arrived == [(50, b"hello world")]
    assert (line.filter.held, line.timers) == (0, 0)


def test_it_is_closed_with_bytes_and_an_end_under_way() -> None:
    line = Line(Latency(100))
    line.read(b"hello", at=0)
    assert line.filter.end() is LATER
    line.filter.close()
    assert (line.filter.held, line.timers) == (0, 0)
    line.run(1000)
    assert (line.arrived, line.end_arrived) == ([], None)


def test_it_is_closed_by_what_it_has_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sink fails, or a filter behind ends the session."""
    line = Line(Latency(100))
    line.read(b"hello", at=0)
    line.read(b"world", at=0.0001)
    line.read(b"later", at=50)
    line.read_end()
    monkeypatch.setattr(line.way, "pass_on", lambda data: line.filter.close())
    line.run(1000)
    assert line.end_arrived is None
    assert (line.filter.held, line.timers) == (0, 0)


def test_a_seed_makes_the_same_delays() -> None:
    def run(seed: int, ordinal: int) -> list[tuple[float, bytes]]:
        line = Line(Latency(100, 50, seed=seed), ordinal)
        for number in range(50):
            line.read(bytes([number]), at=number * 200)
        line.run_all()
        return line.arrived

    assert run(1, 0) == run(1, 0)
    assert run(1, 0) != run(1, 1)
    assert run(1, 0) != run(2, 0)


def test_bulk_is_limited_by_what_is_held_alone() -> None:
    """A source that is read whenever half of the bound is free: 1.3 MB/s at least."""
    line = Line(Latency(100))
    chunk = random.Random(1).randbytes(16 << 10)
    while line.now < 2000:
        if line.filter.held <= line.filter.most_held // 2:
            line.read(chunk)
        else:
            line.run(line.now + 1)
    assert len(line.data) >= 1.3e6 * 1.9
