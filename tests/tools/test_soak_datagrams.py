"""One UDP flow in the soak: what it proves, and what the log may say of it."""

from __future__ import annotations

import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soak.datagrams import (
    HEADER,
    LARGEST,
    LOUD,
    MAX_STRAYS,
    PROVEN,
    SHORT,
    SILENT,
    UDP_STEP,
    UDP_TIMEOUT,
    UDP_UNREPLIED,
    Flow,
    datagram,
    draw_size,
)
from soak.stops import Stops
from soak.timeouts import SLACK
from tests.tools.sessions import OTHER, PORT, SAID


@given(
    number=st.integers(min_value=0, max_value=(1 << 31) - 1),
    sequence=st.integers(min_value=0, max_value=(1 << 32) - 1),
    size=st.integers(min_value=0, max_value=LARGEST),
)
def test_a_datagram_has_its_size_and_its_numbers(
    number: int, sequence: int, size: int
) -> None:
    data = datagram(number, sequence, size)
    assert len(data) == size
    assert data[:1] not in (LOUD, SILENT)
    if size >= HEADER.size:
        assert HEADER.unpack_from(data) == (number, sequence)


def test_no_two_datagrams_are_equal_after_their_headers() -> None:
    bodies = {
        datagram(number, sequence, 40)[HEADER.size :]
        for number in range(1, 60)
        for sequence in range(60)
    }
    assert len(bodies) == 59 * 60


def test_sizes_are_drawn_from_nothing_to_the_largest() -> None:
    dice = random.Random(1)
    sizes = [draw_size(dice, named=False) for _ in range(2000)]
    assert (min(sizes), max(sizes)) == (0, LARGEST)
    assert min(draw_size(dice, named=True) for _ in range(2000)) == HEADER.size


def round_trip(flow: Flow, now: float, port: str = PORT, size: int = 100) -> str:
    """A datagram that is answered at once; what is wrong."""
    data = flow.ask(size, now, answered=True)
    flow.asked(now + 0.001)
    wrong = flow.arrive(len(flow.up) - 1, data, port)
    return wrong or flow.receive(data, now + 0.01)


def in_use() -> Flow:
    """A flow that is proven to be in use at 1003 s."""
    flow = Flow(7)
    for second in range(4):
        assert round_trip(flow, 1000.0 + second) == ""
        assert flow.in_use is (second == 3)
    return flow


def test_a_flow_counts_as_in_use_when_that_is_certain() -> None:
    flow = Flow(7)
    assert round_trip(flow, 1000.0) == ""
    assert round_trip(flow, 1000.0 + PROVEN) == ""
    assert not flow.in_use
    assert round_trip(flow, 1000.1 + PROVEN) == ""
    assert flow.in_use


@pytest.mark.parametrize(("quiet", "wrong"), [(0.9, True), (1.1, False)])
def test_a_flow_in_use_keeps_its_port_until_it_is_idle(
    quiet: float, wrong: bool
) -> None:
    flow = in_use()
    said = round_trip(flow, 1003.0 + quiet * UDP_TIMEOUT, OTHER)
    assert ("its port was 127.0.0.1:4000 and is 127.0.0.1:5000" in said) is wrong
    assert not flow.in_use


def test_a_flow_that_is_not_in_use_may_lose_its_port_and_begins_anew() -> None:
    flow = Flow(7)
    for second, port in enumerate((PORT, PORT, OTHER, OTHER, OTHER)):
        assert round_trip(flow, 1000.0 + second, port) == ""
    assert not flow.in_use


def test_a_datagram_without_a_header_proves_nothing() -> None:
    flow = Flow(7)
    for second in range(5):
        data = flow.ask(3, 1000.0 + second, answered=True)
        assert flow.receive(data, 1000.0 + second) == ""
    assert not flow.in_use
    assert flow.unreached == flow.unanswered == []


def test_a_stream_proves_that_a_flow_is_in_use() -> None:
    flow = Flow(7)
    data = flow.ask(100, 1000.0, answered=False)
    flow.asked(1000.0)
    assert flow.arrive(0, data, PORT) == ""
    for second in range(4):
        assert flow.receive(flow.stream(50, 1000.0 + second), 1000.1 + second) == ""
    assert flow.in_use
    assert flow.lost == 0
    flow.stream(50, 1005.0)
    assert flow.lost == 1


def test_wrong_datagrams_are_detected() -> None:
    flow = Flow(7)
    data = flow.ask(100, 1.0, answered=True)
    flow.asked(1.0)
    assert flow.receive(datagram(8, 0, 100), 1.0) == ""
    assert flow.receive(data[:-1], 1.0) == ""
    assert flow.strays == [datagram(8, 0, 100), data[:-1]]
    assert "not its own" in flow.arrive(0, data[:-1] + b"x", PORT)
    assert "not sent" in flow.arrive(1, data, PORT)
    assert flow.arrive(0, data, PORT) == ""
    assert "second time" in flow.arrive(0, data, PORT)
    assert flow.receive(data, 1.0) == ""
    for _ in range(MAX_STRAYS - 2):
        assert flow.receive(data, 1.0) == ""
    assert "100 bytes that are not owed to it" in flow.receive(data, 1.0)


def test_a_datagram_of_another_flow() -> None:
    flow = Flow(7)
    assert flow.is_foreign(LOUD)
    assert flow.is_foreign(datagram(8, 0, HEADER.size))
    assert not flow.is_foreign(datagram(7, 0, 100))
    assert not flow.is_foreign(datagram(8, 0, 3))
    assert not flow.is_foreign(b"")


def test_losses_are_counted_where_the_port_was_certainly_open() -> None:
    flow = Flow(7)
    young = flow.ask(100, 1000.0, answered=True)
    flow.asked(1000.0)
    assert (flow.lost, len(flow.unreached), len(flow.unanswered)) == (1, 1, 0)
    assert flow.arrive(0, young, PORT) == ""
    assert (flow.lost, len(flow.unreached), len(flow.unanswered)) == (0, 0, 1)
    flow = in_use()
    old = flow.ask(100, 1004.0, answered=True)
    assert flow.arrive(4, old, PORT) == ""
    assert (flow.lost, len(flow.unreached), len(flow.unanswered)) == (1, 0, 1)
    assert flow.receive(old, 1005.0) == ""
    assert flow.lost == len(flow.unanswered) == 0


#: When the relay ends a flow that was last heard at 1003.01 s.
ENDS = 1003.01 + UDP_TIMEOUT


@pytest.mark.parametrize(
    ("changes", "now", "wrong"),
    [
        ({}, ENDS, ""),
        ({"ending": "evicted"}, ENDS, "of a flow in use"),
        ({"ending": "failed"}, ENDS, "ending=failed"),
        ({"age": -3576.9}, ENDS, "age=-3576.900 in the log"),
        ({"age": 3600.0}, ENDS, "age=3600.000 in the log"),
        ({"age": 12.0}, ENDS - 1, "of a flow in use, 9.0 s at most"),
        ({}, ENDS + UDP_STEP + SLACK + 0.1, "expected 17.0 at most"),
        ({"up": (3, 300)}, ENDS, "expected 4/400 and 4/400"),
        ({"down": (4, 401)}, ENDS, "expected 4/400 and 4/400"),
        # Of another port that the client had.
        ({"port": OTHER, "ending": "evicted"}, ENDS, ""),
    ],
)
def test_the_log_line_of_a_flow_in_use(
    changes: dict[str, object], now: float, wrong: str
) -> None:
    line = attrs.evolve(SAID, **changes)  # type: ignore[arg-type]
    said = in_use().judge(line, now, Stops())
    assert wrong in said
    assert bool(said) is bool(wrong)


def test_a_flow_may_end_late_if_the_relay_was_stopped() -> None:
    stops = Stops()
    stops.begin(1004.0)
    stops.end(1014.0)
    assert in_use().judge(SAID, ENDS + 10, stops) == ""


def test_a_flow_whose_end_is_in_the_log_begins_anew() -> None:
    flow = in_use()
    assert flow.judge(SAID, ENDS, Stops()) == ""
    assert not flow.in_use
    assert round_trip(flow, ENDS + 1, OTHER) == ""
    assert flow.ports == 2


@pytest.mark.parametrize(
    ("late", "wrong"), [(UDP_STEP + SLACK - 0.1, ""), (UDP_STEP + SLACK + 0.1, "9.1 s")]
)
def test_a_flow_that_was_answered_once_expires_like_one_that_was_not(
    late: float, wrong: str
) -> None:
    flow = Flow(7)
    round_trip(flow, 1000.0)
    now = 1000.0 + 0.01 + UDP_UNREPLIED + late
    line = attrs.evolve(SAID, age=1.0, up=(1, 100), down=(1, 100))
    said = flow.judge(line, now, Stops())
    assert wrong in said
    assert bool(said) is bool(wrong)


def test_such_a_flow_may_be_evicted_and_a_longer_one_lives_longer() -> None:
    flow = Flow(7)
    round_trip(flow, 1000.0)
    line = attrs.evolve(SAID, age=1.0, up=(1, 100), down=(1, 100))
    assert flow.judge(attrs.evolve(line, ending="evicted"), 1030.0, Stops()) == ""
    flow = Flow(7)
    round_trip(flow, 1000.0)
    round_trip(flow, 1000.0 + SHORT)
    line = attrs.evolve(line, age=11.0, up=(2, 200), down=(2, 200))
    assert flow.judge(line, 1001.0 + UDP_TIMEOUT, Stops()) == ""


def sends_only() -> Flow:
    """A flow whose server is silent: two datagrams, the last at 1003 s."""
    flow = Flow(7)
    for sequence, now in enumerate((1000.0, 1003.0)):
        data = flow.ask(100, now, answered=False)
        flow.asked(now)
        assert flow.arrive(sequence, data, PORT) == ""
    return flow


@pytest.mark.parametrize("stray", [False, True])
def test_a_stray_answer_makes_a_flow_live_longer(stray: bool) -> None:
    """To the relay it is an answer: it keeps the flow, and counts."""
    flow = sends_only()
    if stray:
        assert flow.receive(LOUD, 1003.0) == ""
    line = attrs.evolve(SAID, age=3.0, up=(2, 200), down=(1, 1))
    said = flow.judge(line, 1003.0 + UDP_TIMEOUT, Stops())
    assert bool(said) is not stray
