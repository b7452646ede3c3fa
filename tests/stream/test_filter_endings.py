"""Sessions that end already, or are ended by one filter, and then by another."""

from __future__ import annotations

import pytest
from twisted.internet.error import ConnectionLost

from relayd.core.filtering import EndSession
from relayd.core.session import Ending
from tests.stream.test_filtered_bridge import SIDES, Filtered
from tests.support.own_filters import Ends, Keeps, Makes


class Asks(Ends):
    """Ends its session at a question mark."""

    def data(self, data: bytes) -> bytes:
        before, mark, _ = data.partition(b"?")
        if mark:
            raise EndSession("it was asked", before, reset=self.reset)
        return data


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
    relay.ended(Ending.FILTERED)


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
    relay.ended(Ending.FILTERED)


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
    relay.ended(Ending.FILTERED)
