"""Sessions that a filter closes; that end already, or are ended by another one then."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHalfCloseableDescriptor

from relayd.core.filtering import EndSession
from relayd.core.session import Ending
from tests.stream.test_filtered_bridge import SIDES, Filtered
from tests.support.own_filters import Ends, Keeps, Makes
from tests.support.pairs import no_kernel

__all__ = ["no_kernel"]


class Asks(Ends):
    """Ends its session at a question mark."""

    def data(self, data: bytes) -> bytes:
        before, mark, _ = data.partition(b"?")
        if mark:
            raise EndSession("it was asked", before, reset=self.reset)
        return data


@pytest.mark.parametrize("course", SIDES)
def test_a_filter_closes_its_session(course: str) -> None:
    relay = Filtered(Makes(Ends, False, course=course))
    source, sink = relay.way(course)
    sink.receive(b"the other direction")
    source.receive(b"shouted! And more")
    assert relay.passed(course) == b"shouted"
    source.take()
    assert bytes(source.taken) == b"the other direction"
    assert not source.aborted
    assert not sink.aborted
    relay.closed()


def test_what_others_hold_behind_it_comes_before_its_end() -> None:
    """And what they hold before it does not."""
    before, behind = Makes(Keeps, course="up"), Makes(Keeps, course="up")
    relay = Filtered(before, Makes(Ends, False, course="up"), behind)
    relay.down.receive(b"one two! three")
    before.of("up").let_go(4)
    before.of("up").let_go(4)
    assert relay.session.ending is Ending.FILTERED
    assert relay.up.connected
    behind.of("up").let_go()
    assert relay.passed("up") == b"one two"
    relay.closed()


def test_a_peer_that_takes_its_time_gets_all_before_the_close() -> None:
    relay = Filtered(Makes(Ends, False, course="up"))
    relay.down.receive(b"x" * 1000 + b"!")
    relay.clock.advance(60)
    assert relay.up.connected
    assert relay.passed("up") == b"x" * 1000
    relay.closed()


# -- one that is closed while its peers send


@pytest.mark.parametrize("course", SIDES)
@pytest.mark.parametrize("half_close", [True, False])
def test_what_comes_behind_it_is_read_and_dropped(
    course: str, half_close: bool
) -> None:
    """A close with something unread would be a reset, which destroys what was sent."""
    relay = Filtered(Makes(Ends, False, course=course), half_close=half_close)
    source, sink = relay.way(course)
    sink.receive(b"the other direction")
    source.receive(b"shouted!")
    for each in source, sink:
        each.receive(b"and more of it")
    assert relay.passed(course) == b"shouted"
    source.take()
    assert bytes(source.taken) == b"the other direction"
    for each in source, sink:
        assert each.connected
        each.receive(b"and on")
    counts = relay.session.up.read + relay.session.down.read
    assert counts == len(b"shouted!the other direction")
    relay.closed()
    assert not source.aborted
    assert not sink.aborted


@pytest.mark.parametrize("half_close", [5.0, 2.0])
def test_one_that_goes_on_is_reset_in_time(
    half_close: float, no_kernel: dict[Any, int]
) -> None:
    """From when its kernel has everything; the other one does not wait for that."""
    ends = Makes(Ends, False, course="up")
    relay = Filtered(ends, half_close_timeout=half_close)
    no_kernel[relay.up] = 1000
    relay.down.receive(b"shouted!")
    relay.passed("up")
    for _ in range(8):
        for each in relay.down, relay.up:
            if each.reading:
                each.receive(b"tick")
        relay.clock.advance(1)
    assert relay.down.aborted
    assert relay.up.connected
    no_kernel[relay.up] = 0
    for _ in range(int(half_close)):
        assert not relay.up.aborted
        relay.up.receive(b"tick")
        relay.clock.pump([0.5, 0.5])
    relay.clock.advance(1)
    assert relay.up.aborted
    relay.ended(Ending.FILTERED)


def test_one_that_takes_nothing_stalls() -> None:
    """Whatever it sends meanwhile."""
    relay = Filtered(Makes(Ends, False, course="up"), stall_timeout=10)
    relay.down.receive(b"shouted!")
    relay.down.receive_eof()
    for _ in range(9):
        relay.up.receive(b"tick")
        relay.clock.advance(1)
    assert relay.up.connected
    relay.clock.pump([1.0] * 3)
    assert relay.up.aborted
    relay.ended(Ending.FILTERED)


def test_one_that_was_not_read_is_read_on() -> None:
    """It was full, or its peer had been."""
    keeps = Makes(Keeps, course="down")
    relay = Filtered(Makes(Ends, False, course="up"), keeps)
    while relay.up.reading:
        relay.up.receive(bytes(65536))
    relay.down.receive(b"!")
    assert relay.up.reading
    assert relay.down.reading
    relay.closed()


def test_one_that_has_ended_is_closed_at_once() -> None:
    relay = Filtered(Makes(Ends, False, course="down"))
    relay.down.receive_eof()
    relay.up.receive(b"shouted!")
    assert relay.passed("down") == b"shouted"
    assert not relay.down.connected
    assert relay.up.connected
    relay.closed()


def test_one_that_is_closed_as_it_is_joined() -> None:
    relay = Filtered(Makes(Ends, False, course="up"), early=b"shouted! And more")
    relay.down.receive(b"and on")
    assert relay.passed("up") == b"shouted"
    assert relay.session.up.read == len(b"shouted! And more")
    relay.closed()


def test_one_that_is_killed_meanwhile() -> None:
    relay = Filtered(Makes(Ends, False, course="down"))
    relay.up.receive(b"shouted!")
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.FILTERED)


def test_one_that_can_not_half_close_is_closed_as_it_has_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To close it is its end of data."""
    monkeypatch.setattr(IHalfCloseableDescriptor, "providedBy", lambda _: False)
    relay = Filtered(Makes(Ends, False, course="up"))
    relay.down.receive(b"shouted!")
    relay.clock.advance(1)
    assert not relay.down.connected
    relay.up.receive(b"meanwhile")
    assert relay.up.connected
    assert relay.passed("up") == b"shouted"
    assert relay.up.connected
    relay.clock.advance(1)
    assert not relay.down.aborted
    assert not relay.up.aborted
    relay.ended(Ending.FILTERED)


# -- one that ends already


@pytest.mark.parametrize("course", SIDES)
@pytest.mark.parametrize("reset", [False, True])
def test_the_source_was_reset_before(course: str, reset: bool) -> None:
    """As with reset_peer and a timeout: the other side is not left alone."""
    keeps = Makes(Keeps, course=course)
    relay = Filtered(keeps)
    source, sink = relay.way(course)
    source.receive(b"held")
    source.lose(ConnectionLost())
    keeps.of(course).way.end_session("its time was over", reset=reset)
    assert relay.passed(course) == b""
    relay.clock.advance(1)
    assert sink.aborted
    relay.ended(Ending.DOWNSTREAM_RESET if course == "up" else Ending.UPSTREAM_RESET)


@pytest.mark.parametrize("reset", [False, True])
def test_another_one_behind_it_closes_it_before(reset: bool) -> None:
    """The first has the last word."""
    keeps = Makes(Keeps, course="down")
    asks = Makes(Asks, reset, course="down")
    relay = Filtered(Makes(Ends, False, course="down", name="first"), keeps, asks)
    relay.up.receive(b"one? two! three")
    assert relay.down.connected
    keeps.of("down").let_go()
    assert relay.passed("down") == b"one"
    assert relay.session.detail == "first: it was shouted"
    relay.closed()


def test_one_of_the_other_direction_has_its_end_as_well() -> None:
    """What it is given last does not cut off what is still to be delivered."""
    keeps = Makes(Keeps, course="down")
    asked, asks = Makes(Keeps, course="up"), Makes(Asks, course="up")
    relay = Filtered(Makes(Ends, False, course="down"), keeps, asked, asks)
    relay.down.receive(b"where?")
    relay.up.receive(b"here!")
    assert relay.down.connected
    keeps.of("down").let_go()
    assert relay.passed("down") == b"here"
    assert relay.passed("up") == b"where"
    relay.closed()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_one_of_the_other_direction_as_the_first_end_closes_both(
    reset: bool, both: bool
) -> None:
    """Which may have come to an end itself."""
    keeps, asks = Makes(Keeps, course="up"), Makes(Asks, reset, course="up")
    relay = Filtered(keeps, asks, half_close=False)
    relay.down.receive(b"?")
    if both:
        relay.down.receive_eof()
    relay.up.receive_eof()
    relay.clock.advance(1)
    assert relay.session.detail == "own: it was asked"
    if reset:
        relay.ended(Ending.FILTERED)
    else:
        relay.closed()
