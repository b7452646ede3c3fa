"""The Bridge on fakes: bytes, half-close, and each order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from relayd.core.session import Ending
from relayd.net.tcp_info import TcpInfo
from relayd.stream import bridge, legs
from relayd.stream.bridge import Leg, unsent
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.pairs import SHUT, Pair, joined, no_kernel, said

__all__ = ["no_kernel", "said"]

# -- bytes


def test_bytes_go_both_ways_and_are_counted() -> None:
    pair = joined()
    pair.down.receive(b"question")
    pair.up.receive(b"the answer")
    assert pair.up.dataBuffer == b"question"
    assert pair.down.dataBuffer == b"the answer"
    up, down = pair.session.up, pair.session.down
    assert (up.read, up.written) == (8, 8)
    assert (down.read, down.written) == (10, 10)


def test_what_is_held_is_read_and_not_written_yet() -> None:
    pair = Pair()
    pair.down.receive(b"early ")
    assert (pair.session.up.read, pair.session.up.written) == (6, 0)
    pair.start()
    assert (pair.session.up.read, pair.session.up.written) == (6, 6)


class Doubling(Leg):
    """Changes what it reads on its way: twice as much is written."""

    def flow(self) -> None:
        super().flow()
        write = self.sink

        def twice(data: bytes) -> None:
            self.direction.written += len(data)
            write(data * 2)  # type: ignore[misc]

        self.sink = twice


@pytest.mark.parametrize("reads", [True, False])
def test_a_peer_is_judged_by_what_was_written_to_it(
    reads: bool, said: dict[Any, TcpInfo]
) -> None:
    """And not by what was read for it, where the bytes change on their way."""
    pair = Pair(stall=10)
    pair.upstream = pair.bridge.upstream = Doubling(pair.session.down)
    pair.up.connect(pair.upstream)
    pair.start()
    said[pair.down] = SHUT
    pair.up.receive(b"x" * 100)
    assert (pair.session.down.read, pair.session.down.written) == (100, 200)
    assert unsent(pair.down) == 200
    for _ in range(12):
        pair.wait(1)
        if reads:
            pair.down.take(10)
    if reads:
        pair.alive()
        delivery = pair.downstream.delivery
        assert delivery is not None
        assert delivery.taken == 110
    else:
        pair.ended(Ending.DOWNSTREAM_STALLED)


def test_what_is_sent_to_one_that_left_is_not_written() -> None:
    pair = joined()
    pair.down.receive(b"an upload")
    pair.down.lose(ConnectionDone())
    pair.up.receive(b"meanwhile")
    assert (pair.session.down.read, pair.session.down.written) == (9, 0)


def test_what_was_held_before_the_join_comes_first() -> None:
    pair = Pair()
    pair.down.receive(b"early ")
    pair.up.receive(b"banner ")
    pair.start()
    pair.down.receive(b"late")
    pair.up.receive(b"more")
    assert pair.up.dataBuffer == b"early late"
    assert pair.down.dataBuffer == b"banner more"


def test_a_leg_holds_no_more_than_the_limit_and_one_read() -> None:
    pair = Pair()
    pair.down.receive(bytes(bridge.HOLD_LIMIT - 1))
    assert pair.down.reading
    pair.down.receive(bytes(65536))
    assert not pair.down.reading
    pair.start()
    assert len(pair.up.dataBuffer) == bridge.HOLD_LIMIT - 1 + 65536
    # The server's buffer is full now, so the client stays paused.
    assert not pair.down.reading
    pair.up.take()
    assert pair.down.reading


def test_a_held_leg_reads_on_when_what_it_held_fits() -> None:
    pair = Pair()
    pair.down.receive(bytes(bridge.HOLD_LIMIT))
    assert not pair.down.reading
    pair.start()
    assert pair.down.reading


@pytest.mark.parametrize("source", ["down", "up"])
def test_a_full_buffer_stops_reading_from_the_other_side(source: str) -> None:
    pair = joined()
    reader: FakeTransport = getattr(pair, source)
    writer = pair.up if source == "down" else pair.down
    while reader.reading:
        reader.receive(bytes(65536))
    assert len(writer.dataBuffer) <= 2 * 65536
    assert writer.reading, "the opposite direction goes on"
    writer.take(len(writer.dataBuffer) - 1)
    assert not reader.reading
    writer.take()
    assert reader.reading
    pair.alive()


# -- half-close and the end


@pytest.mark.parametrize("first", ["down", "up"])
def test_eof_is_passed_on_after_the_data_and_the_other_way_goes_on(first: str) -> None:
    pair = joined()
    one: FakeTransport = getattr(pair, first)
    other = pair.up if first == "down" else pair.down
    one.receive(b"all I have to say")
    one.receive_eof()
    assert not other.write_shut
    other.take()
    assert other.write_shut
    other.receive(b"an answer to it")
    assert one.dataBuffer == b"an answer to it"
    pair.alive()
    other.receive_eof()
    pair.up.take()
    pair.down.take()
    assert one.taken == b"an answer to it"
    pair.ended(Ending.DONE)
    assert "abort" not in pair.up.log + pair.down.log


def test_eof_behind_a_full_buffer_is_passed_on() -> None:
    # Twisted resumes a paused producer instead of shutting down, so the
    # producer must be gone by then.
    pair = joined()
    while pair.down.reading:
        pair.down.receive(bytes(65536))
    pair.downstream.readConnectionLost()
    pair.up.take()
    assert pair.up.write_shut


def test_both_ends_at_once_wait_for_what_is_buffered() -> None:
    pair = joined()
    pair.down.receive(b"up")
    pair.up.receive(b"down")
    pair.down.receive_eof()
    pair.up.receive_eof()
    assert not pair.over
    pair.up.take()
    assert not pair.over
    pair.down.take()
    assert (pair.up.taken, pair.down.taken) == (b"up", b"down")
    pair.ended(Ending.DONE)


def test_a_leg_past_its_eof_is_not_told_to_read_again() -> None:
    pair = joined()
    pair.down.receive_eof()
    pair.down.log.clear()
    pair.downstream.resumeProducing()
    assert pair.down.log == []


def test_eof_before_the_join_is_passed_on_by_it() -> None:
    pair = Pair()
    pair.down.receive(b"request")
    pair.down.receive_eof()
    pair.start()
    pair.up.take()
    assert pair.up.taken == b"request"
    assert pair.up.write_shut
    pair.alive()


def test_both_eofs_before_the_join_end_the_session() -> None:
    pair = Pair()
    pair.up.receive(b"banner")
    pair.down.receive_eof()
    pair.up.receive_eof()
    pair.start()
    pair.down.take()
    assert pair.down.taken == b"banner"
    pair.ended(Ending.DONE)


# -- a transport that can't half-close


def test_eof_is_kept_from_a_transport_that_cannot_half_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = joined()
    monkeypatch.setattr(legs.IHalfCloseableDescriptor, "providedBy", lambda _: False)
    pair.down.receive_eof()
    assert not pair.up.disconnecting
    pair.up.receive(b"the response is not lost")
    pair.down.take()
    assert pair.down.taken == b"the response is not lost"
    pair.alive()


def test_a_clean_loss_is_passed_on_as_the_end_of_data() -> None:
    # TLS and wrapped connections end like this: there is no half of them.
    pair = joined()
    pair.up.receive(b"goodbye")
    pair.up.lose(ConnectionDone())
    pair.down.take()
    assert pair.down.taken == b"goodbye"
    assert pair.down.write_shut
    assert "close" not in pair.down.log, "it may have sent what nobody read yet"
    pair.down.receive_eof()
    pair.ended(Ending.DONE)


def test_what_is_sent_to_one_that_left_cleanly_waits_for_delivery() -> None:
    pair = joined()
    pair.down.receive(b"an upload")
    pair.down.lose(ConnectionDone())
    pair.up.receive(b"meanwhile")
    assert pair.up.connected
    pair.up.take()
    assert pair.up.taken == b"an upload"
    pair.up.receive(b"and on")
    pair.ended(Ending.DOWNSTREAM_WRITE_FAILED)


def test_a_server_that_waits_for_one_that_left_cleanly_is_read_again() -> None:
    pair = joined()
    while pair.up.reading:
        pair.up.receive(bytes(65536))
    pair.down.lose(ConnectionDone())
    assert pair.up.reading
    assert pair.up.write_shut
    pair.up.receive_eof()
    pair.ended(Ending.DONE)


def test_a_server_that_left_cleanly_is_written_to_in_vain() -> None:
    pair = joined()
    pair.up.lose(ConnectionDone())
    pair.down.receive(b"hello?")
    pair.ended(Ending.UPSTREAM_WRITE_FAILED)


def test_a_clean_loss_after_the_other_end_closes() -> None:
    pair = joined()
    pair.down.receive(b"all")
    pair.down.receive_eof()
    pair.up.take()
    pair.up.receive(b"answer")
    pair.up.lose(ConnectionDone())
    pair.down.take()
    assert pair.down.taken == b"answer"
    pair.ended(Ending.DONE)


def test_a_kernel_that_still_delivers_is_not_idle(no_kernel: dict[Any, int]) -> None:
    pair = joined(idle=10, half_close=10)
    pair.up.receive_eof()
    for queued in range(1000, 900, -10):
        no_kernel[pair.down] = queued
        pair.wait(9)
    pair.alive()
    no_kernel[pair.down] = 0
    pair.wait(12)
    pair.ended(Ending.HALF_CLOSED)


def test_a_wrapped_connection_is_relayed_and_watched() -> None:
    wrapped: list[Any] = []

    class Keep(Protocol):
        def connectionMade(self) -> None:
            wrapped.append(self.transport)

    transport = FakeTransport()
    factory: Any = WrappingFactory(_Factory(Keep))
    transport.connect(ProtocolWrapper(factory, Keep()))
    transport.write(b"12345")
    assert unsent(wrapped[0]) == 5


class _Factory:
    def __init__(self, protocol: type[Protocol]) -> None:
        self.protocol = protocol


def test_a_transport_that_cannot_be_asked_counts_as_empty() -> None:
    assert unsent(object()) == 0


# -- whatever the order


def test_an_aborted_session_has_the_first_reason() -> None:
    pair = joined()
    pair.abort()
    pair.ended(Ending.DRAINED)


def test_an_abort_while_last_words_wait_keeps_the_reset() -> None:
    pair = joined()
    pair.down.receive(b"x")
    pair.down.lose(ConnectionLost())
    pair.abort()
    pair.ended(Ending.DOWNSTREAM_RESET)


SIDES = st.sampled_from(["down", "up"])


EVENTS = st.one_of(
    st.tuples(st.just("receive"), SIDES),
    st.tuples(st.just("take"), SIDES),
    st.tuples(st.just("eof"), SIDES),
    st.tuples(st.just("reset"), SIDES),
    st.tuples(st.just("wait"), SIDES),
)


@given(st.lists(EVENTS, max_size=40))
def test_every_order_of_events_ends_once_and_loses_nothing(
    events: list[tuple[str, str]],
) -> None:
    pair = Pair(idle=100, half_close=50)
    pair.start()
    sent = {"down": b"", "up": b""}
    eof = {"down": False, "up": False}
    reset = False
    for number, (what, side) in enumerate(events):
        one: FakeTransport = getattr(pair, side)
        if what == "receive" and one.reading and one.connected:
            piece = bytes([number % 251]) * 30000
            one.receive(piece)
            sent[side] += piece
        elif what == "take":
            one.take()
        elif what == "eof" and one.connected and one.reading:
            one.receive_eof()
            eof[side] = True
        elif what == "reset":
            reset = reset or one.connected
            one.lose(ConnectionLost())
        elif what == "wait":
            pair.wait(1)
    # Whatever arrived is what was sent, from its beginning.
    for source, sink in (("down", pair.up), ("up", pair.down)):
        assert sent[source].startswith(sink.taken)
    assert pair.over <= 1
    # Left alone, with peers that read, every session ends within its deadlines.
    for _ in range(150):
        pair.down.take()
        pair.up.take()
        pair.wait(1)
    assert pair.over == 1
    assert pair.session.ending is not None
    assert not pair.clock.getDelayedCalls()
    if pair.session.ending is Ending.DONE:
        assert pair.up.taken == sent["down"]
        assert pair.down.taken == sent["up"]
        assert eof == {"down": True, "up": True}
        assert not reset


def test_a_transport_that_raises_as_it_is_aborted_does_not_keep_the_session(
    logged_failures: LoggedFailures,
) -> None:
    """The session ends when the other connection is lost, too."""
    pair = joined()

    def fail() -> None:
        raise RuntimeError("this transport fails")

    pair.up.abortConnection = fail  # type: ignore[method-assign]
    pair.down.receive_eof()
    pair.down.lose()
    logged_failures.take("this transport fails")
    assert not pair.over
    pair.up.lose()
    pair.ended(Ending.DOWNSTREAM_WRITE_FAILED)
