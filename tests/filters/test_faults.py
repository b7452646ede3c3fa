"""What all faults of streams have: direction, toxicity, seed; they join sessions."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.filter_settings import parse_filter
from relayd.core.errors import ConfigError
from relayd.core.filtering import Course, EndSession
from relayd.filters.fault_bandwidth import Bandwidth
from relayd.filters.fault_endings import LimitData, ResetPeer, SlowClose, Timeout
from relayd.filters.fault_latency import Latency
from relayd.filters.fault_slicer import Slicer
from relayd.filters.faults import StreamFault
from relayd.filters.loading import filter_of
from tests.support.faults import Line
from tests.support.filtering import FakeWay

#: One of each, by the name that Toxiproxy has for it.
EACH: dict[str, Callable[..., StreamFault]] = {
    "latency": lambda **common: Latency(100, 50, **common),
    "bandwidth": lambda **common: Bandwidth(1, **common),
    "slow_close": lambda **common: SlowClose(100, **common),
    "timeout": lambda **common: Timeout(100, **common),
    "reset_peer": lambda **common: ResetPeer(100, **common),
    "slicer": lambda **common: Slicer(10, 5, 1000, **common),
    "limit_data": lambda **common: LimitData(10, **common),
}

each = pytest.mark.parametrize("name", EACH)


def has_fault(fault: StreamFault, course: Course, ordinal: int = 0) -> bool:
    """Whether a session has it, on one of its directions."""
    way = FakeWay(course=course, session=SimpleNamespace(ordinal=ordinal))
    built = fault.build_filter(way)
    if built is not None:
        built.close()
    return built is not None


@each
def test_it_has_the_name_of_its_toxic(name: str) -> None:
    assert EACH[name]().name == name


@each
def test_it_is_on_what_the_server_says_unless_told(name: str) -> None:
    assert has_fault(EACH[name](), "down")
    assert not has_fault(EACH[name](), "up")
    assert has_fault(EACH[name](direction="up"), "up")
    assert not has_fault(EACH[name](direction="up"), "down")


@each
def test_toxicity_is_how_many_of_the_sessions_have_it(name: str) -> None:
    def count(**common: object) -> int:
        fault = EACH[name](**common)
        return sum(has_fault(fault, "down", ordinal) for ordinal in range(1000))

    assert count(toxicity=0.0) == 0
    assert count(toxicity=1.0) == 1000
    # Five times the standard deviation.
    assert abs(count(toxicity=0.5) - 500) < 80
    assert abs(count(toxicity=0.5, seed=1) - 500) < 80
    assert abs(count(toxicity=0.1, seed=1) - 100) < 48


@each
def test_a_seed_chooses_the_same_sessions(name: str) -> None:
    def chosen(seed: int | None) -> list[int]:
        fault = EACH[name](toxicity=0.5, seed=seed)
        return [ordinal for ordinal in range(100) if has_fault(fault, "down", ordinal)]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert chosen(None) != chosen(None)


def test_the_sessions_of_a_seed_stay_what_they_are() -> None:
    """A run is repeated with a later version as well."""
    fault = Latency(100, toxicity=0.5, seed=7)
    chosen = [ordinal for ordinal in range(20) if has_fault(fault, "down", ordinal)]
    assert chosen == [1, 2, 4, 6, 9, 11, 12, 14, 16, 17, 19]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("latency:100", Latency(100)),
        ("latency:1s,jitter=10", Latency(1000, 10)),
        ("bandwidth:rate=64", Bandwidth(64)),
        ("slow_close:250ms", SlowClose(250)),
        ("timeout", Timeout(0)),
        ("timeout:5s", Timeout(5000)),
        ("reset_peer:timeout=2000,direction=up", ResetPeer(2000, direction="up")),
        ("slicer:64,size_variation=32,delay=10", Slicer(64, 32, 10)),
        ("slicer:1KiB,delay=1ms", Slicer(1024, 0, 1000)),
        ("limit_data:bytes=1000,toxicity=0.5", LimitData(1000, toxicity=0.5)),
        ("latency:1,toxicity=0.25,seed=7", Latency(1, toxicity=0.25, seed=7)),
    ],
)
def test_it_is_made_of_words(words: str, fault: StreamFault) -> None:
    assert filter_of(parse_filter(words), "tcp") == fault


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("latency", "it needs a value"),
        ("bandwidth:0", "rate must be 0.001 or more"),
        ("slicer:0", "bad average_size '0'"),
        ("slicer:10,size_variation=10", "size_variation must be less than"),
        ("latency:1,toxicity=2", "bad toxicity '2'"),
        ("latency:1,direction=downstream", "bad direction 'downstream'"),
        ("limit_data:1,seed=x", "bad seed 'x'"),
        ("slow_close:1,dealy=2", "did you mean delay?"),
    ],
)
def test_words_that_are_refused(words: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        filter_of(parse_filter(words), "tcp")


@each
def test_it_may_join_a_session_and_is_the_same_if_its_options_are(name: str) -> None:
    assert EACH[name]().joins
    assert EACH[name]() == EACH[name]()
    assert hash(EACH[name]()) == hash(EACH[name]())
    assert EACH[name]() != EACH[name](seed=1)
    assert EACH[name]() != EACH[name](direction="up")


@each
def test_no_timer_is_left(name: str) -> None:
    line = Line(EACH[name]())
    line.read(b"123456789")
    line.filter.end()
    line.filter.close()
    assert (line.timers, line.filter.held) == (0, 0)


@each
def test_what_it_holds_is_passed_on_as_it_is_taken_off(name: str) -> None:
    line = Line(EACH[name]())
    line.read(b"123456789")
    line.remove()
    assert line.data == (b"" if name in ("timeout", "reset_peer") else b"123456789")
    assert (line.timers, line.filter.held) == (0, 0)


@given(
    st.sampled_from([name for name in EACH if name not in ("timeout", "reset_peer")]),
    st.lists(st.tuples(st.binary(min_size=1, max_size=60), st.integers(0, 40))),
    st.integers(0, 3),
)
def test_any_split_of_the_bytes_gives_the_same(
    name: str, chunks: list[tuple[bytes, int]], seed: int
) -> None:
    line = Line(EACH[name](seed=seed))
    sent = b"".join(data for data, _ in chunks)
    try:
        for data, pause in chunks:
            line.run(line.now + pause)
            line.read(data)
    except EndSession as ended:
        assert name == "limit_data"
        assert line.data + ended.last == sent[:10]
        assert len(sent) >= 10
        return
    line.read_end()
    line.run_all()
    assert line.data == sent
    assert line.end_arrived is not None
    assert line.most_timers <= 1
    assert line.way.ended is None


@given(
    st.sampled_from(["timeout", "reset_peer"]),
    st.lists(st.tuples(st.binary(min_size=1, max_size=60), st.integers(0, 40))),
)
def test_nothing_passes_those_that_end_a_session_by_themselves(
    name: str, chunks: list[tuple[bytes, int]]
) -> None:
    line = Line(EACH[name]())
    for data, pause in chunks:
        line.run(line.now + pause)
        if line.way.ended is None:
            line.read(data)
    line.run_all()
    assert line.data == b""
    assert (line.way.ended, line.way.reset) == ("after 100 ms", name == "reset_peer")
