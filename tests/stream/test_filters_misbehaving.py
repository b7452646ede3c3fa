"""Filters that do what they should not, or when nobody expects it: sessions end."""

from __future__ import annotations

import pytest
from twisted.internet.error import ConnectionLost

from relayd.core.filtering import EndSession
from relayd.core.session import Ending
from relayd.stream.chain import TURN
from tests.stream.test_filtered_bridge import SIDES, Filtered
from tests.support.own_filters import Makes, Own

# -- sessions that have an ending already


class EndsAtEnd(Own):
    """Ends its session at the end of data."""

    def end(self) -> bytes:
        raise EndSession("it ends here", b", the end")


@pytest.mark.parametrize("course", SIDES)
def test_a_filter_ends_a_session_that_was_reset(course: str) -> None:
    """The other side is reset all the same."""
    relay = Filtered(Makes(EndsAtEnd, course=course))
    source, sink = relay.way(course)
    source.receive(b"said")
    source.lose(ConnectionLost())
    assert relay.passed(course) == b"said, the end"
    relay.clock.advance(1)
    assert sink.aborted
    side = "DOWNSTREAM" if course == "up" else "UPSTREAM"
    relay.ended(Ending[f"{side}_RESET"])


def test_a_session_is_ended_while_others_have_their_turn() -> None:
    class Slow(Own):
        most_at_once = 1000

        def data(self, data: bytes) -> bytes:
            relay.clock.rightNow += TURN
            return data

    slow = Makes(Slow, course="up")
    relay = Filtered(slow)
    relay.protocol.dataReceived(b"x" * 2500)
    slow.made[0].way.end_session("enough")
    assert relay.passed("up") == b"x" * 1000
    relay.clock.advance(1)
    relay.ended(Ending.FILTERED)
