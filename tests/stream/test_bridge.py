"""The Bridge on fakes: each ending, each deadline, each order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface.verify import verifyObject

from relayd.core.interfaces import IResetListener
from relayd.core.session import Direction, Ending, Session
from relayd.net.tcp_info import TcpInfo
from relayd.net.transports import PeerReset, PeerVanished
from relayd.stream import bridge, deadlines, legs
from relayd.stream.bridge import Bridge, Leg, Timeouts, unsent
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport


class Pair:
    """A client and a server, joined by a Bridge."""

    def __init__(self, **timeouts: float) -> None:
        self.clock = Clock()
        self.session = Session(1, "client", "listener", 0.0)
        self.over = 0
        self.down = FakeTransport(clock=self.clock)
        self.up = FakeTransport(clock=self.clock)
        self.downstream = Leg(self.session.up)
        self.upstream = Leg(self.session.down)
        self.down.connect(self.downstream)
        self.up.connect(self.upstream)
        self.bridge = Bridge(
            self.session,
            self.downstream,
            self.upstream,
            Timeouts(**timeouts),
            self.clock,
            self._over,
        )

    def _over(self) -> None:
        self.over += 1

    def abort(self) -> None:
        """Abort the session, and let the reactor tell of that."""
        self.bridge.abort(Ending.DRAINED)
        self.clock.advance(0)

    def start(self) -> Pair:
        self.bridge.start()
        return self

    def wait(self, seconds: float, tick: float = 1.0) -> None:
        """Let time pass, with a look at the deadlines at each tick."""
        for _ in range(round(seconds / tick)):
            self.clock.advance(tick)
            if not self.over:
                self.bridge.check(self.clock.seconds())
        self.clock.advance(0)

    def ended(self, ending: Ending) -> None:
        """The session ended this way, once, and nothing is left of it."""
        assert self.session.ending is ending
        assert self.over == 1
        assert not self.down.connected
        assert not self.up.connected
        assert not self.clock.getDelayedCalls()

    def alive(self) -> None:
        assert self.session.ending is None
        assert not self.over
        assert self.down.connected
        assert self.up.connected


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """Fakes have no kernel; a test may say what it still has to send."""
    queued: dict[Any, int] = {}
    monkeypatch.setattr(legs, "unacknowledged", lambda t: queued.get(t, 0))
    return queued


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[Any, TcpInfo]:
    """What the kernel says of each connection; a test may change it."""
    said: dict[Any, TcpInfo] = {}
    monkeypatch.setattr(legs, "tcp_info", said.get)
    return said


@pytest.fixture
def reset_unread(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """Connections that were reset, and the bytes in them that nobody has read."""
    found: dict[Any, int] = {}
    monkeypatch.setattr(deadlines, "was_reset", found.__contains__)
    monkeypatch.setattr(deadlines, "unread", lambda t: found.get(t, 0))
    return found


#: A connection with its window shut.
SHUT = TcpInfo(0, 0, 0, 0.1, 0.1)


def joined(**timeouts: float) -> Pair:
    return Pair(**timeouts).start()


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


class NoHalfClose(FakeTransport):
    """As FakeTransport, without a way to shut one side."""

    loseWriteConnection: Any = None


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


# -- resets and failed writes


@pytest.mark.parametrize(
    ("side", "ending"),
    [("down", Ending.DOWNSTREAM_RESET), ("up", Ending.UPSTREAM_RESET)],
)
def test_a_reset_is_passed_on_after_what_was_read(side: str, ending: Ending) -> None:
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"last words")
    one.lose(ConnectionLost())
    assert "abort" not in other.log
    assert not other.reading
    other.take(4)
    pair.wait(1, 0.1)
    assert "abort" not in other.log
    other.take()
    pair.wait(1, 0.1)
    assert other.taken == b"last words"
    assert other.log[-1] == "abort"
    pair.ended(ending)


def test_a_reset_waits_for_the_kernel_too(no_kernel: dict[Any, int]) -> None:
    pair = joined()
    pair.down.receive(b"x")
    pair.up.take()
    no_kernel[pair.up] = 1
    pair.down.lose(ConnectionLost())
    pair.wait(2, 0.1)
    assert not pair.over
    no_kernel.clear()
    pair.wait(1, 0.1)
    pair.ended(Ending.DOWNSTREAM_RESET)


def test_a_reset_with_nothing_to_deliver_is_passed_on_at_once() -> None:
    pair = joined()
    pair.up.lose(ConnectionLost())
    pair.ended(Ending.UPSTREAM_RESET)
    assert pair.down.log[-1] == "abort"


def test_a_reset_whose_last_words_nobody_takes_ends_by_the_stall_rule() -> None:
    pair = joined(stall=10)
    pair.down.receive(b"x")
    pair.down.lose(ConnectionLost())
    pair.wait(9)
    assert not pair.over
    pair.wait(3)
    pair.ended(Ending.DOWNSTREAM_RESET)


def test_a_reset_whose_last_words_stay_in_the_kernel_ends_by_the_stall_rule(
    no_kernel: dict[Any, int],
) -> None:
    pair = joined(stall=10)
    pair.down.receive(b"x")
    pair.up.take()
    no_kernel[pair.up] = 1
    pair.down.lose(ConnectionLost())
    pair.wait(9)
    assert not pair.over
    pair.wait(3)
    pair.ended(Ending.DOWNSTREAM_RESET)


def test_last_words_are_not_kept_for_ever_even_without_a_stall_timeout() -> None:
    pair = joined(stall=0, idle=20)
    pair.down.receive(b"x")
    pair.down.lose(ConnectionLost())
    pair.wait(25)
    pair.ended(Ending.DOWNSTREAM_RESET)


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_peer_that_vanished_is_no_end_of_data(side: str) -> None:
    """What was read from it is delivered, and then the other one is reset."""
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"last words")
    one.lose(PeerVanished("Connection timed out"))
    assert not pair.over
    other.take()
    pair.wait(1)
    assert (other.taken, other.log[-1]) == (b"last words", "abort")


def test_the_survivor_may_vanish_while_last_words_wait() -> None:
    pair = joined()
    pair.down.receive(b"x")
    pair.down.lose(ConnectionLost())
    pair.up.lose(ConnectionLost())
    pair.ended(Ending.DOWNSTREAM_RESET)


@pytest.mark.parametrize(
    ("side", "ending"),
    [
        ("down", Ending.DOWNSTREAM_WRITE_FAILED),
        ("up", Ending.UPSTREAM_WRITE_FAILED),
    ],
)
def test_a_failed_write_after_eof_ends_both_at_once(side: str, ending: Ending) -> None:
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"not delivered yet")
    one.receive_eof()
    other.receive(b"to one that left")
    one.lose(ConnectionLost())
    assert other.log[-1] == "abort"
    pair.ended(ending)


@pytest.mark.parametrize(
    ("side", "undelivered", "ending"),
    [
        ("down", 0, Ending.DOWNSTREAM_RESET),
        ("down", 1, Ending.DOWNSTREAM_WRITE_FAILED),
        ("up", 0, Ending.UPSTREAM_RESET),
        ("up", 1, Ending.UPSTREAM_WRITE_FAILED),
    ],
)
def test_what_was_read_before_a_reset_behind_eof_is_delivered(
    side: str, undelivered: int, ending: Ending
) -> None:
    """The kernel told of it, after a write in vain or without; the other is reset."""
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"not delivered yet")
    one.receive_eof()
    one.lose(PeerReset(undelivered))
    assert "abort" not in other.log
    other.take()
    pair.wait(1)
    assert other.taken == b"not delivered yet"
    assert other.log[-1] == "abort"
    pair.ended(ending)


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_reset_behind_both_ends_waits_for_delivery(side: str) -> None:
    """Both are closing, and the other one still has something to be written."""
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"not delivered yet")
    one.receive_eof()
    other.receive_eof()
    one.lose(PeerReset())
    other.take()
    pair.wait(1)
    assert other.taken == b"not delivered yet"
    assert pair.over == 1


def test_a_leg_hears_of_a_reset_until_it_is_joined() -> None:
    leg = Leg(Direction())
    assert verifyObject(IResetListener, leg)
    assert leg.wants_reset()
    leg.bridge = object()  # type: ignore[assignment]
    assert not leg.wants_reset()


def test_a_failed_write_to_a_paused_side_ends_both_at_once() -> None:
    pair = joined()
    while pair.down.reading:
        pair.down.receive(bytes(65536))
    pair.up.receive(b"x")
    pair.down.lose(ConnectionLost())
    pair.ended(Ending.DOWNSTREAM_WRITE_FAILED)


def test_a_failed_write_after_both_eofs_is_not_called_done() -> None:
    pair = joined()
    pair.down.receive(b"never taken")
    pair.down.receive_eof()
    pair.up.receive_eof()
    pair.up.lose(ConnectionLost())
    pair.ended(Ending.UPSTREAM_WRITE_FAILED)


def test_an_error_in_one_leg_ends_the_session_as_failed() -> None:
    pair = joined()
    pair.down.lose(ZeroDivisionError("ours"))
    pair.ended(Ending.FAILED)
    assert "ours" in pair.session.detail


def test_a_failed_tls_handshake_is_a_reset_that_says_why() -> None:
    ssl = pytest.importorskip("OpenSSL.SSL")
    pair = joined()
    pair.down.lose(ssl.Error([("SSL routines", "", "wrong version number")]))
    pair.ended(Ending.DOWNSTREAM_RESET)
    assert pair.session.detail == "TLS: wrong version number"


def test_a_server_that_shows_a_bad_certificate_is_not_connected_to() -> None:
    ssl = pytest.importorskip("OpenSSL.SSL")
    pair = joined()
    unknown = ("SSL routines", "", "certificate verify failed")
    pair.up.lose(ssl.Error([unknown, ("", "", "unknown ca")]))
    pair.ended(Ending.CONNECT_FAILED)
    assert pair.session.detail == "TLS: certificate verify failed; unknown ca"


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
