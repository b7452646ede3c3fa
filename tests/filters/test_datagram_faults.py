"""Faults of datagrams: loss, duplicates, another order, wrong bits, latency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.filtering import Course, IDatagramFilter
from relayd.filters.datagram_faults import (
    MAX_KEPT,
    MAX_KEPT_BYTES,
    REORDER_WITHIN,
    Corrupt,
    Duplicate,
    Loss,
    Reorder,
)
from relayd.filters.fault_latency import Latency
from relayd.filters.faults import Fault
from relayd.filters.loading import filter_of
from tests.datagrams.support import Bench

#: One of each; latency has no probability.
EACH: dict[str, Callable[..., Fault]] = {
    "loss": lambda p=1.0, **more: Loss(p, **more),
    "duplicate": lambda p=1.0, **more: Duplicate(p, **more),
    "reorder": lambda p=1.0, **more: Reorder(p, **more),
    "corrupt": lambda p=1.0, **more: Corrupt(p, **more),
    "latency": lambda p=1.0, **more: Latency(100, 50, **more),
}

each = pytest.mark.parametrize("name", EACH)


class Line:
    """A direction of a flow, with one filter.

    :ivar out: what has come out.
    :ivar full: what it had no room for.
    """

    def __init__(self, fault: Any, course: Course = "down", ordinal: int = 0) -> None:
        self.client = "192.0.2.1:4000"
        self.course = course
        self.ordinal = ordinal
        self.clock: Any = Clock()
        self.shared: dict[str, Any] = {}
        self.out: list[bytes] = []
        self.full = 0
        self.filter = fault.build_datagram_filter(self)
        assert self.filter is None or IDatagramFilter.providedBy(self.filter)

    def send(self, datagram: bytes) -> None:
        self.out.append(datagram)

    def count_drop(self) -> None:
        self.full += 1

    def arrive(self, *datagrams: bytes) -> list[bytes]:
        """What has come out by now."""
        for data in datagrams:
            self.out += self.filter.datagram(data)
            assert len(self.clock.getDelayedCalls()) == (self.filter.held > 0)
        return self.out

    def close(self) -> None:
        self.filter.close()
        assert not self.clock.getDelayedCalls()
        assert not self.filter.held


def numbered(count: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in range(count)]


@each
def test_which_flows_have_it(name: str) -> None:
    """By direction and toxicity; and the same ones with the same seed."""

    def having(course: Course = "down", **options: Any) -> list[int]:
        fault = EACH[name](**options)
        lines = [Line(fault, course, ordinal) for ordinal in range(200)]
        return [line.ordinal for line in lines if line.filter is not None]

    assert EACH[name]().name == name
    assert EACH[name]().joins
    assert len(having("down")) == len(having("up", direction="up")) == 200
    assert having("up") == having("down", direction="up") == having(toxicity=0.0) == []
    some = having(toxicity=0.5, seed=7)
    assert 60 < len(some) < 140
    assert some == having(toxicity=0.5, seed=7) != having(toxicity=0.5, seed=8)


@given(st.sampled_from(sorted(EACH)), st.integers(0, 99), st.integers(0, 9))
def test_a_seed_repeats_a_run(name: str, seed: int, ordinal: int) -> None:
    def run() -> list[bytes]:
        line = Line(EACH[name](0.5, seed=seed), ordinal=ordinal)
        for data in numbered(30):
            line.arrive(data)
            line.clock.advance(0.01)
        line.clock.advance(1)
        line.close()
        return line.out

    assert run() == run()


def test_runs_of_flows_and_of_seeds_are_different() -> None:
    def run(seed: int | None, ordinal: int) -> tuple[bytes, ...]:
        return tuple(Line(Loss(0.5, seed=seed), ordinal=ordinal).arrive(*numbered(64)))

    assert len({run(seed, number) for seed in (1, 2, None) for number in (0, 1)}) == 6
    assert len({run(None, 0) for _ in range(4)}) == 4


DATAGRAMS = st.lists(st.binary(max_size=4), max_size=40)
PROBABILITIES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(DATAGRAMS, PROBABILITIES, st.integers())
def test_loss(datagrams: list[bytes], probability: float, seed: int) -> None:
    out = Line(Loss(probability, seed=seed)).arrive(*datagrams)
    rest = iter(datagrams)
    assert all(data in rest for data in out)
    if probability in (0, 1):
        assert out == (datagrams if not probability else [])


@given(DATAGRAMS, PROBABILITIES, st.integers())
def test_duplicate(datagrams: list[bytes], probability: float, seed: int) -> None:
    """Once or twice each, in order."""
    line = Line(Duplicate(probability, seed=seed))
    for data in datagrams:
        before = len(line.out)
        line.arrive(data)
        copies = len(line.out) - before
        assert line.out[before:] == [data] * copies
        low, high = {0.0: (1, 1), 1.0: (2, 2)}.get(probability, (1, 2))
        assert low <= copies <= high


@given(DATAGRAMS, PROBABILITIES, st.integers())
def test_corrupt(datagrams: list[bytes], probability: float, seed: int) -> None:
    """One bit is another, if there is one."""
    out = Line(Corrupt(probability, seed=seed)).arrive(*datagrams)
    wrong = [
        (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count()
        for a, b in zip(datagrams, out, strict=True)
        if len(a) == len(b)
    ]
    assert len(wrong) == len(datagrams)
    assert set(wrong) <= {0, 1}
    if probability in (0, 1):
        assert sum(wrong) == probability * sum(map(bool, datagrams))


def test_any_bit_may_be_corrupted() -> None:
    line = Line(Corrupt(1.0, seed=1))
    assert len(set(line.arrive(*[bytes(4)] * 1000))) == 32


@given(DATAGRAMS, PROBABILITIES, st.integers(), st.sets(st.integers(0, 39)))
def test_reorder(
    datagrams: list[bytes], probability: float, seed: int, pauses: set[int]
) -> None:
    """The same datagrams; each at most one place later, or earlier."""
    line = Line(Reorder(probability, seed=seed))
    marked = [bytes([number]) + data for number, data in enumerate(datagrams)]
    for number, data in enumerate(marked):
        line.arrive(data)
        if number in pauses:
            line.clock.advance(REORDER_WITHIN)
            assert sorted(line.out) == marked[: number + 1]
    line.clock.advance(REORDER_WITHIN)
    line.close()
    assert sorted(line.out) == marked
    assert all(abs(data[0] - place) <= 1 for place, data in enumerate(line.out))
    if not probability:
        assert line.out == marked


def test_a_datagram_is_overtaken_by_the_next_one() -> None:
    line = Line(Reorder(1.0))
    assert line.arrive(b"1") == []
    line.clock.advance(REORDER_WITHIN * 0.9)
    assert line.arrive(b"2") == [b"2", b"1"]
    # Without a next one it is late, and no more.
    line.arrive(b"3")
    line.clock.advance(REORDER_WITHIN * 0.99)
    assert line.out == [b"2", b"1"]
    line.clock.advance(REORDER_WITHIN * 0.01)
    assert line.out == [b"2", b"1", b"3"]
    line.close()


@pytest.mark.parametrize("name", ["loss", "duplicate", "reorder", "corrupt"])
def test_the_part_that_has_it(name: str) -> None:
    """As many as `probability` says: within five times the standard deviation."""
    line = Line(EACH[name](0.1, seed=3))
    datagrams = numbered(10_000)
    out = Counter(line.arrive(*datagrams))
    moved = sum(a > b for a, b in zip(line.out, line.out[1:], strict=False))
    had = {
        "loss": 10_000 - out.total(),
        "duplicate": out.total() - 10_000,
        # The one that overtakes another is not asked.
        "reorder": moved * 1.1,
        "corrupt": (out - Counter(datagrams)).total(),
    }
    assert abs(had[name] - 1000) < 170
    line.close()


# -- latency


def test_latency() -> None:
    """Each by itself, in order; as long as it is to be."""
    line = Line(Latency(100))
    line.arrive(b"1", b"2")
    line.clock.advance(0.05)
    line.arrive(b"3")
    line.clock.advance(0.0499)
    assert line.out == []
    line.clock.advance(0.0002)
    assert line.out == [b"1", b"2"]
    line.clock.advance(0.05)
    assert line.out == [b"1", b"2", b"3"]
    assert not line.clock.getDelayedCalls()
    line.close()


@given(
    st.lists(st.tuples(st.binary(max_size=3), st.floats(0, 0.2)), max_size=30),
    st.integers(),
    st.sampled_from([(0, 0), (100, 0), (100, 50), (20, 100)]),
)
def test_latency_with_jitter(
    arrivals: list[tuple[bytes, float]], seed: int, times: tuple[int, int]
) -> None:
    """The same datagrams, each within its time."""
    latency, jitter = times
    line = Line(Latency(latency, jitter, seed=seed))
    came: dict[bytes, float] = {}
    left: dict[bytes, float] = {}

    def note() -> None:
        for data in line.out[len(left) :]:
            left[data] = line.clock.seconds()

    def step(seconds: float) -> None:
        """Pass time, from one timer to the next."""
        until = line.clock.seconds() + seconds
        while due := [t for c in line.clock.getDelayedCalls() if (t := c.time) < until]:
            line.clock.advance(max(min(due) - line.clock.seconds(), 0))
            note()
        line.clock.advance(max(until - line.clock.seconds(), 0))
        note()

    for number, (data, pause) in enumerate(arrivals):
        marked = bytes([number]) + data
        came[marked] = line.clock.seconds()
        line.arrive(marked)
        note()
        step(pause)
    step(1)
    line.close()
    assert left.keys() == came.keys()
    for data, when in came.items():
        low, high = max(latency - jitter, 0) / 1e3, (latency + jitter) / 1e3
        assert low - 1e-6 <= left[data] - when <= high + 1e-6
    if not jitter:
        assert line.out == list(came)


def test_latency_keeps_no_more_than_it_may() -> None:
    line = Line(Latency(100))
    line.arrive(*[b""] * (MAX_KEPT + 5))
    assert (line.filter.held, line.full) == (MAX_KEPT, 5)
    line.clock.advance(0.1)
    assert len(line.out) == MAX_KEPT
    # There is room again; of bytes, too.
    line.arrive(*[bytes(60_000)] * 6)
    assert (line.filter.held, line.full) == (MAX_KEPT_BYTES // 60_000, 7)
    # What still fits is kept.
    line.arrive(bytes(MAX_KEPT_BYTES % 60_000), b"")
    assert (line.filter.held, line.full) == (MAX_KEPT_BYTES // 60_000 + 2, 7)
    line.clock.advance(0.1)
    assert sum(map(len, line.out)) == MAX_KEPT_BYTES
    line.close()


def test_what_is_due_makes_room_although_the_timer_is_late() -> None:
    line = Line(Latency(100))
    line.arrive(*[b"1"] * MAX_KEPT)
    line.clock.rightNow += 0.1
    line.arrive(b"2")
    assert (line.out, line.full) == ([b"1"] * MAX_KEPT, 0)
    assert line.filter.held == 1
    line.close()


@pytest.mark.parametrize("name", ["latency", "reorder"])
def test_what_is_kept_when_a_flow_ends(name: str) -> None:
    bench = Bench(filters=[EACH[name](direction="up"), EACH[name]()])
    bench.arrive(b"q")
    bench.answer(b"a")
    bench.close()
    assert bench.sockets[0].sent == bench.listener.sent == []
    assert bench.nat.counters.dropped == {"filtered": 1}
    assert bench.nat.counters.replies_dropped == {"filtered": 1}
    assert bench.nat.counts.kept == bench.nat.counts.replies_kept == 0


def test_many_flows_with_latency_leave_no_timer() -> None:
    """One timer each while something is kept, and none when they are over."""
    bench = Bench(
        filters=[Latency(50, 20, direction="up"), Latency(50)],
        max_flows=500,
        max_flows_per_client=500,
    )
    for port in range(1, 501):
        for _ in range(3):
            bench.arrive(source=("192.0.2.1", port))
    assert len(bench.clock.getDelayedCalls()) == 501
    bench.clock.advance(0.07)
    assert bench.nat.counters.sent == 1500
    assert len(bench.clock.getDelayedCalls()) == 1
    for number in range(250):
        bench.answer(number=number)
    assert len(bench.clock.getDelayedCalls()) == 251
    bench.clock.advance(0.05)
    assert len(bench.listener.sent) == 250
    for number in range(500):
        bench.answer(number=number)
    bench.close()
    assert bench.nat.counters.replies_dropped == {"filtered": 500}


def test_full_filters_are_counted() -> None:
    bench = Bench(filters=[Latency(1000, direction="up")])
    for _ in range(MAX_KEPT + 7):
        bench.arrive(b"")
    assert bench.nat.counters.dropped == {"filter_full": 7}
    assert bench.nat.counts.kept == MAX_KEPT
    bench.clock.advance(1)
    assert bench.nat.counters.sent == MAX_KEPT
    bench.check()
    bench.close()


# -- options


@pytest.mark.parametrize("name", ["loss", "duplicate", "reorder", "corrupt"])
def test_how_they_are_written(name: str) -> None:
    made: Any = filter_of(FilterSpec(name, {"": "0.25", "seed": "3"}), "udp")
    assert made == EACH[name](0.25, seed=3)
    made = filter_of(FilterSpec(name, {"probability": 1, "direction": "up"}), "udp")
    assert made == EACH[name](1.0, direction="up")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "probability"),
        ({"": "1.5"}, "a number from 0 to 1"),
        ({"": "-1"}, "a number from 0 to 1"),
        ({"": "often"}, "a number from 0 to 1|no number|number"),
        ({"propability": "1"}, "probability"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        filter_of(FilterSpec("loss", options), "udp")


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_probabilities_that_are_none(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        Loss(probability)


def test_they_are_for_datagrams() -> None:
    for name in ("loss", "duplicate", "reorder", "corrupt"):
        with pytest.raises(ConfigError, match="it is for datagrams"):
            filter_of(FilterSpec(name, {"": "1"}), "tcp")
    kinds: Sequence[Any] = ("tcp", "udp")
    assert [filter_of(FilterSpec("latency", {"": "5"}), kind) for kind in kinds] == [
        Latency(5.0)
    ] * 2
