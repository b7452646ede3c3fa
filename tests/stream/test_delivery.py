"""How far bytes have got: peers that take slowly, take nothing, or are lost."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.session import Direction
from relayd.net.tcp_info import TcpInfo
from relayd.stream.attempt import UpstreamLeg
from relayd.stream.delivery import (
    LARGEST_WINDOW,
    REOPENS_AT,
    SLOWEST_READER,
    Delivery,
    unanswered,
)
from relayd.stream.legs import Leg

#: A peer that has acknowledged everything, a moment ago.
FINE = TcpInfo(
    window=65536, retransmits=0, probes=0, since_sent=0.01, since_heard=0.009
)
SHUT = attrs.evolve(FINE, window=0)

KB, MB = 1000, 1_000_000


class LinuxReader:
    """A peer's kernel, with an application that reads as fast as the test says.

    Its window begins with 64 KiB, grows by twice what arrives, never moves backwards,
    and opens again when a sixteenth of its buffer is free.

    :ivar taken: bytes that it has acknowledged.
    :ivar read: bytes that its application has read.
    """

    def __init__(self, buffer: int) -> None:
        self.buffer = buffer
        self.taken = 0
        self.read = 0.0
        self.window = min(65536, buffer)

    def arrive(self, count: int) -> None:
        """As much of it as the window allows."""
        count = min(count, self.window)
        self.taken += count
        self.window -= count
        self._update()

    def let_read(self, count: float) -> None:
        self.read = min(self.taken, self.read + count)
        self._update()

    def _update(self) -> None:
        free = int(self.buffer - (self.taken - self.read))
        if free >= self.buffer * REOPENS_AT:
            grown = 65536 + 2 * self.taken
            self.window = max(self.window, min(free, grown))

    def look(self, delivery: Delivery, now: float, waiting: int = MB) -> None:
        """As the relay does, which holds more than this peer takes."""
        info = attrs.evolve(FINE, window=self.window)
        delivery.update(now, now, self.taken, waiting, 100 * KB, info)


def pieces(total: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, max(total // 3, 1)), min_size=1, max_size=60)


# -- takes nothing


@given(st.integers(4 * KB, int(1.5 * LARGEST_WINDOW)), st.data())
def test_one_that_reads_nothing_has_no_allowance(
    buffer: int, data: st.DataObject
) -> None:
    """However its buffer is filled, and whenever it is looked at."""
    peer, delivery = LinuxReader(buffer), Delivery()
    for number, piece in enumerate(data.draw(pieces(buffer))):
        peer.arrive(piece)
        if data.draw(st.booleans()):
            peer.look(delivery, float(number))
            assert delivery.allowance == 0
    while peer.window:
        peer.arrive(peer.window)
    for later in (100.0, 109.0, 110.0):
        peer.look(delivery, later)
        assert delivery.allowance == 0
    assert delivery.idleness(110.0) >= 10
    assert peer.taken <= buffer


@pytest.mark.parametrize("looks", [1, 2, 3, 7, 100, 1000])
def test_nor_has_it_when_it_fills_evenly(looks: int) -> None:
    """Then it never shows more of its buffer than two thirds at once."""
    buffer = 5 * MB
    peer, delivery = LinuxReader(buffer), Delivery()
    while peer.taken < buffer and peer.window:
        peer.arrive(buffer // looks + 1)
        peer.look(delivery, float(peer.taken))
    peer.arrive(peer.window)
    peer.look(delivery, 1e9)
    assert peer.taken > 0.9 * buffer
    assert delivery.allowance == 0


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 32), st.integers(0, 1 << 40))
def test_an_allowance_is_bounded(taken: int, window: int, more: int) -> None:
    delivery = Delivery()
    info = attrs.evolve(FINE, window=window)
    delivery.update(1.0, 1.0, taken, 1, 1, info)
    delivery.update(2.0, 2.0, taken + more, 1, 1, info)
    most = LARGEST_WINDOW * REOPENS_AT / SLOWEST_READER
    assert 0 <= delivery.allowance <= most
    assert delivery.allowance <= (taken + more) * REOPENS_AT / SLOWEST_READER


def test_without_a_word_of_the_kernel_there_is_no_allowance() -> None:
    delivery = Delivery()
    for number in range(100):
        delivery.update(float(number), 0.0, number * MB, 1, 0)
    assert delivery.allowance == 0
    assert delivery.silence(1000.0) == 0
    assert delivery.idleness(109.0) == 10


# -- takes slowly


def slow_phase(peer: LinuxReader, now: float, seconds: int) -> Iterator[float]:
    """It reads 16 kB/s, and the network brings all that fits; the time, each second."""
    for second in range(seconds):
        peer.let_read(SLOWEST_READER)
        peer.arrive(peer.window)
        yield now + second


@given(
    st.integers(64 * KB, LARGEST_WINDOW),
    st.integers(4, 20),
    st.integers(4, 20),
    st.floats(2.0, 20),
)
def test_a_reader_of_16_kb_a_second_lives_once_it_has_taken_some(
    buffer: int, buffers: int, looks: int, stall: float
) -> None:
    """Four times its buffer, fast, while it was looked at four times."""
    peer, delivery = LinuxReader(buffer), Delivery()
    for number in range(looks):
        while peer.taken < buffer * buffers * (number + 1) / looks:
            peer.arrive(buffer)
            peer.let_read(buffer)
        peer.look(delivery, float(number))
    peer.arrive(peer.window)
    longest = 0.0
    for now in slow_phase(peer, float(looks), 120):
        peer.look(delivery, now)
        longest = max(longest, delivery.idleness(now))
        assert delivery.idleness(now) <= stall + delivery.allowance
    needed = buffer * REOPENS_AT / SLOWEST_READER
    assert longest <= needed + 2


def test_the_window_of_the_issue_needs_24_seconds() -> None:
    """6 MiB at 16 kB/s: without the allowance it is cut after ten."""
    peer, delivery = LinuxReader(LARGEST_WINDOW), Delivery()
    for number in range(10):
        peer.arrive(LARGEST_WINDOW)
        peer.let_read(LARGEST_WINDOW)
        peer.look(delivery, float(number))
    peer.arrive(peer.window)
    longest = 0.0
    for now in slow_phase(peer, 10.0, 120):
        peer.look(delivery, now)
        longest = max(longest, delivery.idleness(now))
    assert 23 <= longest <= 25
    assert delivery.allowance == pytest.approx(24.576)


def test_a_window_that_opens_again_is_a_sign_of_life() -> None:
    """Before a byte is acknowledged; but not one that has been open all along."""
    delivery = Delivery()
    delivery.update(0.0, 0.0, 1000, 1, 1, SHUT)
    delivery.update(9.0, 9.0, 1000, 1, 1, SHUT)
    assert delivery.idleness(9.0) == 9
    delivery.update(9.5, 9.5, 1000, 1, 1, FINE)
    assert delivery.idleness(9.5) == 0
    delivery.update(10.5, 10.5, 1000, 1, 1, FINE)
    assert delivery.idleness(10.5) == 1


def test_idleness_begins_when_our_buffer_fills() -> None:
    """What waits in the kernel's queue alone is no stall."""
    delivery = Delivery()
    delivery.update(5.0, 0.0, 1000, 0, 10, SHUT)
    assert delivery.idleness(100.0) == 0
    delivery.update(6.0, 6.0, 1000, 1, 10, SHUT)
    assert delivery.idleness(7.0) == 1
    delivery.update(8.0, 8.0, 1000, 0, 10, SHUT)
    assert delivery.idleness(100.0) == 0


# -- lost


def test_what_is_sent_again_and_again_is_unanswered() -> None:
    tries = attrs.evolve(FINE, retransmits=3, since_sent=0.4, since_heard=9.0)
    assert unanswered(tries)
    assert unanswered(attrs.evolve(tries, window=0))
    # Its window was shut under what was sent, and it says so each time.
    answered = attrs.evolve(tries, window=0, since_sent=0.4, since_heard=0.3)
    assert not unanswered(answered)
    assert not unanswered(attrs.evolve(FINE, since_heard=1000.0))


@pytest.mark.parametrize(
    "trouble",
    [{"retransmits": 1}, {"window": 0, "probes": 2}, {"window": 0, "retransmits": 5}],
)
def test_a_peer_that_does_not_answer_is_silent(trouble: dict[str, int]) -> None:
    delivery = Delivery()
    for now in range(1, 20):
        info = attrs.evolve(FINE, since_heard=now + 0.2, since_sent=0.1, **trouble)
        delivery.update(float(now), 1.0, 0, 0, 100, info)
        assert delivery.silence(float(now)) == now - 1
    # And is heard again.
    delivery.update(20.0, 1.0, 0, 0, 100, FINE)
    assert delivery.silence(20.0) == 0


def test_quiet_before_something_was_sent_is_not_silence() -> None:
    """A connection that nobody has used for an hour, and a packet that is lost."""
    delivery = Delivery()
    info = attrs.evolve(FINE, retransmits=1, since_sent=0.2, since_heard=3600.0)
    delivery.update(5000.0, 4999.0, 0, 0, 100, info)
    assert delivery.silence(5000.0) == 1
    delivery.update(5001.0, 4999.0, 100, 0, 0, FINE)
    assert delivery.silence(5001.0) == 0


def test_an_answer_between_two_looks_counts() -> None:
    """Of one that answers late: each look finds it just being asked."""
    delivery = Delivery()
    for now in range(1, 100):
        info = attrs.evolve(FINE, retransmits=1, since_sent=0.1, since_heard=0.5)
        delivery.update(float(now), 1.0, 0, 0, 100, info)
        assert delivery.silence(float(now)) <= 1


@given(
    st.floats(0.01, 3.0), st.floats(0.0, 0.4), st.floats(0.3, 1.0), st.integers(0, 9)
)
def test_a_shut_window_that_answers_probes_is_never_lost(
    timeout: float, way: float, tick: float, ignored: int
) -> None:
    """For ten minutes of probes, which double their pauses up to two minutes.

    One of them is not answered, since a kernel limits its answers; and each is under
    way for a moment.
    """
    sent, pause, at = [], timeout, 0.0
    while at < 600:
        at += pause
        sent.append(at)
        pause = min(2 * pause, 120.0)
    heard = [at + way for number, at in enumerate(sent) if number != ignored]
    delivery, now = Delivery(), tick
    while now < 600:
        last = max([0.0, *(at for at in heard if at <= now)])
        out = sum(1 for at in sent if last < at <= now)
        delivery.update(now, tick, 0, 0, 1, TcpInfo(0, 0, out, now, now - last))
        assert delivery.silence(now) < 1
        now += tick


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=50))
def test_whatever_the_looks_see_times_are_sane(steps: list[tuple[int, int]]) -> None:
    delivery, taken = Delivery(), 0
    for now, (held, moved) in enumerate(steps, 1):
        taken += moved
        delivery.update(float(now), float(now), taken, held, moved, None)
        assert 0 <= delivery.idleness(float(now)) < now
        assert delivery.waits == bool(held or moved)
        if not held:
            assert delivery.idleness(float(now)) == 0


@pytest.mark.cost
@pytest.mark.parametrize("kind", [Leg, UpstreamLeg])
def test_a_check_of_an_idle_leg_takes_no_memory(kind: type[Leg]) -> None:
    """Of legs that were made before any was checked, as after a restart.

    An attribute that no leg had when these were made would give each a dictionary.
    """

    class Idle(kind):  # type: ignore[misc, valid-type]
        pass

    legs: Any = [Idle(Direction()) for _ in range(100)]
    for leg in legs:
        # There is room for one that comes later, which others take.
        leg.later = None
    # What is made once, by whatever watches the lines of a test as well.
    warm = Idle(Direction())
    assert warm.check_delivery(1.0, 0.0, 0, 0, False) == 0
    tracemalloc.start()
    try:
        for leg in legs:
            assert leg.check_delivery(1.0, 0.0, 0, 0, False) == 0
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 10_000
