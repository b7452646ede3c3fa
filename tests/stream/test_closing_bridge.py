"""The first end of data closes both connections: on fakes, in each order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableDescriptor, INegotiated
from zope.interface import implementer

from relayd.core.session import Ending
from relayd.net.tcp_info import TcpInfo
from relayd.stream.closing_bridge import ClosingBridge
from relayd.stream.deadlines import CLOSE_GRACE
from tests.support.fakes import FakeTransport
from tests.support.pairs import SHUT, Pair, no_kernel, said

__all__ = ["no_kernel", "said"]

SIDES = ["down", "up"]


class Closing(Pair):
    """A client and a server, which are closed at the first end of data."""

    joins = ClosingBridge
    bridge: ClosingBridge

    def ends(self, first: str) -> tuple[FakeTransport, FakeTransport]:
        """The one that is to end first, and the other one."""
        return (self.down, self.up) if first == "down" else (self.up, self.down)


def closing(**timeouts: float) -> Closing:
    pair = Closing(**timeouts)
    pair.start()
    return pair


@pytest.mark.parametrize("first", SIDES)
def test_what_was_read_is_delivered_both_ways_and_both_are_closed(first: str) -> None:
    pair = closing()
    one, other = pair.ends(first)
    one.receive(b"a question")
    other.receive(b"the answer so far")
    one.receive_eof()
    assert not pair.over
    # Nothing more is passed on.
    other.receive(b", and more of it")
    other.take()
    assert other.write_shut
    assert other.connected, "it may be sending still, and a close would be a reset"
    one.take()
    assert not one.connected
    other.receive_eof()
    assert (one.taken, other.taken) == (b"the answer so far", b"a question")
    pair.ended(Ending.DONE)
    names = ("client", "server")
    ended, dropped = names if first == "down" else names[::-1]
    assert pair.session.detail == (
        f"16 bytes from the {dropped} dropped after the {ended} ended"
    )
    # What was dropped was not read for anybody.
    told = pair.session.down if first == "down" else pair.session.up
    assert (told.read, told.written) == (17, 17)
    assert pair.session.server_first is (first == "up")
    assert "abort" not in one.log + other.log


@pytest.mark.parametrize("first", SIDES)
def test_an_end_that_is_answered_at_once_says_nothing_more(first: str) -> None:
    pair = closing()
    one, other = pair.ends(first)
    one.receive_eof()
    assert not one.connected
    assert other.write_shut
    other.receive_eof()
    pair.ended(Ending.DONE)
    assert pair.session.detail == ""


def test_both_ends_before_the_join() -> None:
    pair = Closing()
    pair.up.receive(b"banner")
    pair.down.receive(b"request")
    pair.down.receive_eof()
    pair.up.receive_eof()
    pair.start()
    pair.down.take()
    assert not pair.over
    pair.up.take()
    assert (pair.up.taken, pair.down.taken) == (b"request", b"banner")
    assert not pair.session.server_first
    pair.ended(Ending.DONE)


def test_a_request_that_ended_before_the_join_is_delivered() -> None:
    pair = Closing()
    pair.down.receive(b"request")
    pair.down.receive_eof()
    pair.start()
    assert not pair.down.connected
    pair.up.take()
    assert pair.up.taken == b"request"
    pair.up.receive(b"too late")
    pair.up.receive_eof()
    pair.ended(Ending.DONE)


@pytest.mark.parametrize("first", SIDES)
def test_one_that_was_not_read_is_read_on(first: str) -> None:
    """The other's buffer was full; it must not wait for that."""
    pair = closing()
    one, other = pair.ends(first)
    while other.reading:
        other.receive(bytes(65536))
    one.receive_eof()
    assert other.reading
    other.receive(b"and on")
    other.receive_eof()
    assert not other.connected
    assert not pair.over
    one.take()
    pair.ended(Ending.DONE)


def test_one_that_goes_on_is_closed_in_time(no_kernel: dict[Any, int]) -> None:
    """It gets its time once it has everything."""
    pair = closing(stall=30)
    no_kernel[pair.up] = 1000
    pair.down.receive_eof()
    for _ in range(int(CLOSE_GRACE) + 5):
        pair.up.receive(b"tick")
        pair.wait(1)
    assert pair.up.connected
    no_kernel[pair.up] = 0
    for _ in range(int(CLOSE_GRACE)):
        assert not pair.over
        pair.up.receive(b"tock")
        pair.wait(1)
    pair.wait(1)
    assert "abort" not in pair.up.log
    pair.ended(Ending.DONE)
    assert pair.session.detail.startswith("60 bytes from the server dropped")


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_shorter_half_close_timeout_is_the_limit(
    late: int, no_kernel: dict[Any, int]
) -> None:
    pair = closing(half_close=2)
    no_kernel[pair.up] = 1
    pair.down.receive_eof()
    pair.wait(late)
    no_kernel[pair.up] = 0
    pair.wait(2)
    assert pair.up.connected
    pair.wait(1)
    pair.ended(Ending.DONE)


@pytest.mark.parametrize("first", SIDES)
def test_one_that_takes_nothing_stalls(first: str, said: dict[Any, TcpInfo]) -> None:
    """Whether it has ended, or was told of the end."""
    for stalls in (0, 1):
        pair = closing(stall=10, half_close=0)
        ends = pair.ends(first)
        said[ends[stalls]] = SHUT
        ends[1 - stalls].receive(b"x" * 1000)
        ends[0].receive_eof()
        pair.wait(9)
        assert not pair.over
        pair.wait(5)
        server = ends[stalls] is pair.up
        pair.ended(Ending.UPSTREAM_STALLED if server else Ending.DOWNSTREAM_STALLED)


def test_what_the_kernel_still_has_must_be_taken_too(
    no_kernel: dict[Any, int], said: dict[Any, TcpInfo]
) -> None:
    pair = closing(stall=10, half_close=0)
    no_kernel[pair.up], said[pair.up] = 1000, SHUT
    pair.down.receive(b"x" * 1000)
    pair.up.take()
    pair.down.receive_eof()
    pair.wait(9)
    assert not pair.over
    pair.wait(5)
    pair.ended(Ending.UPSTREAM_STALLED)


@pytest.mark.parametrize("first", SIDES)
def test_a_reset_after_the_first_end(first: str) -> None:
    """It is passed on, once what was read is delivered."""
    pair = closing()
    one, other = pair.ends(first)
    other.receive(b"the answer so far")
    one.receive_eof()
    other.lose(ConnectionLost())
    assert not pair.over
    one.take()
    pair.wait(1)
    assert one.taken == b"the answer so far"
    pair.ended(Ending.UPSTREAM_RESET if other is pair.up else Ending.DOWNSTREAM_RESET)


def test_a_failed_write_ends_both() -> None:
    pair = closing()
    pair.up.receive(b"the answer so far")
    pair.down.receive_eof()
    pair.down.lose(ConnectionLost())
    pair.clock.advance(0)
    pair.ended(Ending.DOWNSTREAM_WRITE_FAILED)


@pytest.mark.parametrize("first", SIDES)
def test_tls_ends_by_the_loss_of_its_connection(first: str) -> None:
    pair = closing()
    one, other = pair.ends(first)
    one.receive(b"goodbye")
    one.lose(ConnectionDone())
    other.receive(b"dropped")
    other.take()
    assert other.taken == b"goodbye"
    assert other.write_shut
    other.receive_eof()
    pair.ended(Ending.DONE)


@implementer(INegotiated)
class Tls(FakeTransport):
    """Says goodbye, and reads on until its peer's."""

    negotiatedProtocol = None

    def loseConnection(self) -> None:
        self.log.append("goodbye")


@pytest.mark.parametrize("answer", [None, ConnectionDone(), ConnectionLost()])
def test_tls_is_told_goodbye_and_answers_or_not(answer: Exception | None) -> None:
    pair = Closing()
    pair.up.__class__ = Tls
    pair.start()
    pair.down.receive(b"the question")
    pair.down.receive_eof()
    assert pair.up.log[-1] == "goodbye"
    pair.up.take()
    pair.up.receive(b"dropped")
    if answer is not None:
        pair.up.lose(answer)
    else:
        pair.wait(CLOSE_GRACE)
        assert not pair.over
        pair.wait(1)
    assert ("abort" in pair.up.log) is (answer is None)
    pair.ended(Ending.DONE)
    assert pair.session.detail.startswith("7 bytes from the server dropped")


def test_one_that_cannot_half_close_is_closed_once_it_has_everything(
    no_kernel: dict[Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sends until then is read, so that the close is no reset."""
    monkeypatch.setattr(IHalfCloseableDescriptor, "providedBy", lambda _: False)
    pair = closing()
    pair.down.receive(b"the question")
    pair.down.receive_eof()
    no_kernel[pair.up] = 12
    pair.up.take()
    pair.up.receive(b"dropped")
    pair.wait(2)
    assert pair.up.connected
    no_kernel[pair.up] = 0
    pair.wait(1)
    assert pair.up.taken == b"the question"
    assert "abort" not in pair.up.log
    pair.ended(Ending.DONE)


EVENTS = st.one_of(
    *(
        st.tuples(st.just(what), st.sampled_from(SIDES))
        for what in ("receive", "take", "eof", "reset", "wait")
    )
)


@given(st.lists(EVENTS, max_size=40))
def test_every_order_of_events_ends_once(events: list[tuple[str, str]]) -> None:
    """What one had sent before the first end is delivered, to its last byte."""
    pair = closing(idle=100, half_close=50)
    before = {"down": b"", "up": b""}
    ended = reset = False
    for number, (what, side) in enumerate(events):
        one: FakeTransport = getattr(pair, side)
        if what == "receive" and one.reading and one.connected:
            piece = bytes([number % 251]) * 30000
            one.receive(piece)
            if not ended:
                before[side] += piece
        elif what == "take":
            one.take()
        elif what == "eof" and one.connected and one.reading:
            one.receive_eof()
            ended = True
        elif what == "reset":
            reset = reset or one.connected
            one.lose(ConnectionLost())
            ended = True
        elif what == "wait":
            pair.wait(1)
    for source, sink in (("down", pair.up), ("up", pair.down)):
        assert before[source].startswith(sink.taken)
    assert pair.over <= 1
    for _ in range(150):
        pair.down.take()
        pair.up.take()
        pair.wait(1)
    assert pair.over == 1
    assert pair.session.ending is not None
    assert not pair.clock.getDelayedCalls()
    if pair.session.ending is Ending.DONE:
        assert (pair.up.taken, pair.down.taken) == (before["down"], before["up"])
        assert not reset
