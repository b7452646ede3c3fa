"""Slicer: slices of about `average_size` bytes, with a delay behind each."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.filtering import LATER
from relayd.filters.fault_slicer import Slicer
from tests.support.faults import Line


def test_slices_are_of_the_average_size() -> None:
    line = Line(Slicer(4))
    line.read(b"hello world")
    line.run_all()
    assert [data for _, data in line.arrived] == [b"hell", b"o wo", b"rld"]


def test_the_first_is_passed_on_at_once_and_the_others_by_turns() -> None:
    """One in a turn, so that a transport does not write them together."""
    line = Line(Slicer(4))
    line.read(b"hello world")
    assert line.data == b"hell"
    line.clock.advance(0)
    line.run(0)
    assert line.data == b"hello world"
    assert line.most_timers == 1


def test_the_delay_is_behind_each_slice() -> None:
    line = Line(Slicer(4, delay=500))
    line.read(b"hello world", at=10)
    line.run_all()
    assert line.arrived == [(10, b"hell"), (10.5, b"o wo"), (11, b"rld")]


def test_the_delay_is_behind_the_last_slice_as_well() -> None:
    line = Line(Slicer(4, delay=10_000))
    line.read(b"one", at=0)
    line.read(b"two", at=5)
    line.run_all()
    line.read(b"three", at=100)
    assert line.arrived == [(0, b"one"), (10, b"two"), (100, b"thre")]


def test_sizes_vary_within_their_bounds() -> None:
    line = Line(Slicer(1024, 512))
    sent = b"hello world " * 40_000
    line.filter.most_held = len(sent)
    line.read(sent)
    line.run_all()
    sizes = [len(data) for _, data in line.arrived]
    assert line.data == sent
    # As Toxiproxy's own test: about 480 of them.
    assert 440 < len(sizes) < 520
    assert 512 <= min(sizes[:-1]) < 600
    assert 1450 < max(sizes) <= 1536


def test_one_size_without_a_variation() -> None:
    line = Line(Slicer(7))
    line.read(bytes(700))
    line.run_all()
    assert {len(data) for _, data in line.arrived} == {7}


@pytest.mark.parametrize("variation", [4, 5])
def test_a_slice_has_at_least_a_byte(variation: int) -> None:
    with pytest.raises(
        ValueError, match="size_variation must be less than average_size"
    ):
        Slicer(4, variation)


def test_slices_of_a_byte_cost_one_timer_and_one_object_at_a_time() -> None:
    line = Line(Slicer(1, delay=10))
    sent = random.Random(1).randbytes(65_536)
    line.read(sent)
    for expected in range(65_535, 0, -1):
        assert line.filter.held == expected
        assert line.timers == 1
        line.clock.advance(0.00001001)
    line.run_all()
    assert line.data == sent


def test_the_end_follows_the_last_slice() -> None:
    line = Line(Slicer(4, delay=10_000))
    line.read(b"hello world", at=0)
    line.read_end(at=1)
    line.run_all()
    assert (line.data, line.end_arrived) == (b"hello world", 20)


def test_the_end_alone_passes_at_once() -> None:
    line = Line(Slicer(4, delay=10_000))
    line.read(b"one", at=0)
    line.read_end(at=1)
    assert (line.data, line.end_arrived) == (b"one", 1)


@given(
    st.lists(st.binary(min_size=1, max_size=50)),
    st.integers(1, 20),
    st.data(),
)
def test_any_split_gives_the_same_bytes(
    chunks: list[bytes], average: int, data: st.DataObject
) -> None:
    variation = data.draw(st.integers(0, average - 1))
    line = Line(Slicer(average, variation, 1000, seed=1))
    for chunk in chunks:
        line.run(line.now + 3)
        line.read(chunk)
    line.read_end()
    line.run_all()
    assert line.data == b"".join(chunks)
    assert line.end_arrived is not None
    assert all(len(piece) <= average + variation for _, piece in line.arrived)
    assert line.most_timers <= 1


def test_a_seed_cuts_the_same_slices() -> None:
    def run(seed: int | None) -> list[tuple[float, bytes]]:
        line = Line(Slicer(100, 50, seed=seed))
        line.read(bytes(10_000))
        line.run_all()
        return line.arrived

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_what_is_held_is_passed_on_when_it_is_taken_off() -> None:
    line = Line(Slicer(4, delay=10_000))
    line.read(b"hello world")
    line.remove()
    assert line.arrived == [(0, b"hell"), (0, b"o world")]
    assert (line.filter.held, line.timers) == (0, 0)


def test_it_is_closed_with_bytes_and_an_end_under_way() -> None:
    line = Line(Slicer(4, delay=10_000))
    line.read(b"hello world")
    assert line.filter.end() is LATER
    line.filter.close()
    line.run(1000)
    assert (line.data, line.end_arrived) == (b"hell", None)
    assert (line.filter.held, line.timers) == (0, 0)


def test_it_is_closed_by_what_it_has_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(Slicer(4, delay=10_000))
    line.read(b"hello world")
    line.read_end()
    monkeypatch.setattr(line.way, "pass_on", lambda data: line.filter.close())
    line.run(1000)
    assert line.end_arrived is None
    assert (line.filter.held, line.timers) == (0, 0)
