"""slow_close, timeout, reset_peer and limit_data: sessions that end otherwise."""

from __future__ import annotations

import pytest

from relayd.core.filtering import LATER
from relayd.filters.fault_endings import LimitData, ResetPeer, SlowClose, Timeout
from tests.support.faults import Line, read_until_ended

# -- slow_close


def test_slow_close_delays_the_end_and_no_data() -> None:
    line = Line(SlowClose(100))
    line.read(b"data", at=5)
    assert line.arrived == [(5, b"data")]
    line.read_end(at=20)
    line.run(119.999)
    assert line.end_arrived is None
    line.run(120)
    assert line.end_arrived == 120
    assert line.timers == 0


def test_a_slow_close_without_a_delay() -> None:
    line = Line(SlowClose(0))
    line.read_end(at=20)
    assert (line.end_arrived, line.timers) == (20, 0)


def test_a_slow_close_that_is_taken_off_or_closed() -> None:
    for end in (Line.remove, lambda line: line.filter.close()):
        line = Line(SlowClose(100))
        assert line.filter.end() is LATER
        end(line)
        assert line.timers == 0
        line.run(1000)
        assert not line.way.finished


# -- timeout


def test_timeout_drops_data_and_closes_the_session() -> None:
    line = Line(Timeout(100))
    line.read(b"lost", at=10)
    # It does not begin anew with each chunk.
    line.read(b"lost", at=90)
    line.run(99.999)
    assert line.way.ended is None
    line.run(100)
    assert (line.way.ended, line.way.reset) == ("after 100 ms", False)
    assert (line.arrived, line.timers) == ([], 0)


def test_timeout_0_drops_data_until_it_is_taken_off() -> None:
    line = Line(Timeout())
    line.read(b"lost", at=10)
    line.read(b"lost", at=1_000_000)
    assert (line.way.ended, line.timers) == (None, 0)
    # Nothing is left of what came meanwhile; the chain passes on what follows.
    line.remove()
    assert (line.arrived, line.way.ended) == ([], None)


@pytest.mark.parametrize("timeout", [0, 100])
def test_an_end_passes_a_timeout_at_once(timeout: int) -> None:
    line = Line(Timeout(timeout))
    line.read(b"lost", at=10)
    line.read_end(at=20)
    assert (line.arrived, line.end_arrived) == ([], 20)


def test_a_timeout_that_is_taken_off_ends_nothing() -> None:
    line = Line(Timeout(100))
    line.remove()
    assert line.timers == 0
    line.run(1000)
    assert line.way.ended is None


# -- reset_peer


def test_reset_peer_resets_at_once() -> None:
    line = Line(ResetPeer())
    # Not from within the call that makes it.
    assert line.way.ended is None
    line.run(0)
    assert (line.way.ended, line.way.reset) == ("at once", True)


def test_reset_peer_resets_after_a_timeout() -> None:
    line = Line(ResetPeer(100))
    line.read(b"lost", at=10)
    line.run(99.999)
    assert line.way.ended is None
    line.run(100)
    assert (line.way.ended, line.way.reset) == ("after 100 ms", True)
    assert (line.arrived, line.timers) == ([], 0)


def test_an_end_waits_for_the_reset() -> None:
    """Else the peer would see the end, and no reset."""
    line = Line(ResetPeer(100))
    line.read_end(at=10)
    line.run(1000)
    assert line.end_arrived is None
    assert (line.way.ended, line.way.reset) == ("after 100 ms", True)


def test_a_reset_that_is_taken_off() -> None:
    line = Line(ResetPeer(100))
    line.read(b"lost", at=10)
    line.remove()
    assert line.timers == 0
    line.run(1000)
    assert (line.way.ended, line.arrived) == (None, [])


# -- limit_data


@pytest.mark.parametrize(
    ("chunks", "passed", "last"),
    [
        # Those of Toxiproxy's own tests.
        ([100], 0, 100),
        ([150], 0, 100),
        ([25, 25, 25, 25], 75, 25),
        ([90, 20], 90, 10),
        ([99, 1], 99, 1),
    ],
)
def test_limit_data_closes_when_so_many_have_passed(
    chunks: list[int], passed: int, last: int
) -> None:
    line = Line(LimitData(100))
    *before, final = [bytes([length]) * length for length in chunks]
    for data in before:
        line.read(data)
    assert len(line.data) == passed
    ended = read_until_ended(line, final)
    assert ended.last == final[:last]
    assert not ended.reset
    # The line names the filter before that.
    assert ended.why == "100 bytes have passed"


def test_fewer_bytes_pass_and_end_as_they_do() -> None:
    line = Line(LimitData(100))
    line.read(bytes(50))
    line.read_end()
    assert len(line.data) == 50
    assert line.end_arrived == 0


def test_a_limit_of_0_lets_nothing_pass() -> None:
    line = Line(LimitData(0))
    assert read_until_ended(line, b"data").last == b""


def test_each_session_has_a_limit_of_its_own() -> None:
    fault = LimitData(100)
    for ordinal in range(3):
        line = Line(fault, ordinal)
        line.read(bytes(99))
        assert len(line.data) == 99
