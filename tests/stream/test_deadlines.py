"""A Watch: stalls, lost peers, quiet sessions, resets of what is not read."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost

from relayd.core.pauses import ASKED
from relayd.core.session import Ending
from relayd.net.tcp_info import TcpInfo
from relayd.net.transports import PeerVanished
from relayd.stream import deadlines, legs
from relayd.stream.bridge import Bridge
from relayd.stream.deadlines import Timeouts
from relayd.testing import FakeTransport
from tests.support.dials import VANISHED
from tests.support.pairs import SHUT, Pair, joined, no_kernel, reset_unread, said

__all__ = ["no_kernel", "reset_unread", "said"]

#: A connection that answers.
FINE = TcpInfo(65536, 0, 0, 0.1, 0.1)


@pytest.fixture(autouse=True, params=["through the legs", "spliced"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spliced legs are checked in the same way as others, with fewer questions."""
    if request.param != "spliced":
        return
    monkeypatch.setattr(FakeTransport, "unsent", property(legs.unsent), raising=False)
    monkeypatch.setattr(FakeTransport, "clear", property(is_clear), raising=False)
    start = Bridge.start

    def spliced(bridge: Bridge, ask: bool = True) -> None:
        start(bridge, ask)
        down, up = bridge.downstream, bridge.upstream
        down.spliced = up.spliced = True
        sinks = {down.transport: up.transport, up.transport: down.transport}
        blocked = property(lambda source: legs.unsent(sinks[source]) > 0)
        monkeypatch.setattr(FakeTransport, "blocked", blocked, raising=False)

    monkeypatch.setattr(Bridge, "start", spliced)


def is_clear(transport: FakeTransport) -> bool:
    """See :class:`relayd.core.interfaces.ISpliceable`."""
    ends = transport.disconnecting or transport.aborted or transport.write_shut
    return transport.connected and not ends and not legs.unsent(transport)


def gone(seconds: float) -> TcpInfo:
    """One that has stopped answering."""
    return TcpInfo(65536, 4, 0, 0.1, seconds)


# -- stalls


def test_a_stalled_client_is_aborted() -> None:
    pair = joined(stall=10)
    pair.up.receive(b"x")
    pair.wait(10)
    pair.alive()
    pair.wait(2)
    pair.ended(Ending.DOWNSTREAM_STALLED)
    assert pair.down.log[-1] == pair.up.log[-1] == "abort"
    assert pair.session.detail == "1 bytes waited 10 s"


def test_a_stalled_server_is_aborted() -> None:
    pair = joined(stall=10)
    pair.down.receive(b"x")
    pair.wait(12)
    pair.ended(Ending.UPSTREAM_STALLED)


def test_a_slow_reader_is_left_alone() -> None:
    pair = joined(stall=10)
    while pair.up.reading:
        pair.up.receive(bytes(65536))
    for _ in range(40):
        pair.wait(9)
        pair.down.take(1)
    pair.alive()


def test_bytes_that_the_peers_kernel_takes_are_progress(
    no_kernel: dict[Any, int],
) -> None:
    pair = joined(stall=10)
    pair.up.receive(bytes(60000))
    for queued in range(100, 80, -1):
        no_kernel[pair.down] = queued
        pair.wait(9)
    pair.alive()
    pair.wait(12)
    pair.ended(Ending.DOWNSTREAM_STALLED)


def test_new_data_does_not_excuse_a_stall() -> None:
    pair = joined(stall=10)
    for _ in range(13):
        if pair.over:
            break
        pair.up.receive(b"more")
        pair.wait(1)
    pair.ended(Ending.DOWNSTREAM_STALLED)


def test_a_quiet_session_is_not_stalled() -> None:
    pair = joined(stall=10, idle=0)
    pair.up.receive(b"x")
    pair.down.take()
    pair.wait(10_000, 10)
    pair.alive()


def test_no_stall_timeout_means_never() -> None:
    pair = joined(stall=0, idle=0)
    pair.up.receive(b"x")
    pair.wait(10_000, 10)
    pair.alive()


def test_a_foreign_transport_that_stays_full_is_stalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(legs, "buffered_by", lambda _: None)
    pair = joined(stall=10)
    # It can't be spliced.
    pair.downstream.spliced = pair.upstream.spliced = False
    while pair.up.reading:
        pair.up.receive(bytes(65536))
    pair.wait(12)
    pair.ended(Ending.DOWNSTREAM_STALLED)


# -- takes slowly, takes nothing, is lost


def fill(pair: Pair, taken: int) -> None:
    """The client takes so many bytes at once, and no more of what the server sends."""
    for _ in range(taken // 65536):
        pair.up.receive(bytes(65536))
        pair.down.take()
        # Nobody looks at it, and it would be copied each time.
        pair.down.taken = b""
    while pair.up.reading:
        pair.up.receive(bytes(65536))


def test_a_slow_reader_has_the_time_that_its_kernel_needs(
    said: dict[Any, TcpInfo],
) -> None:
    pair = joined(stall=10)
    said[pair.down] = FINE
    for _ in range(10):
        fill(pair, 4 << 20)
        pair.wait(1)
        pair.down.take()
    fill(pair, 0)
    said[pair.down] = SHUT
    # 4 MiB and a bit: the window, too, counts as what its buffer may hold.
    allowance = (4 << 20) / 16 / 16000
    pair.wait(10 + int(allowance) - 1)
    pair.alive()
    pair.down.take(1)
    pair.wait(10 + int(allowance) - 1)
    pair.alive()
    pair.wait(5)
    pair.ended(Ending.DOWNSTREAM_STALLED)
    assert re.fullmatch(r"\d+ bytes waited 2[67](\.\d)? s", pair.session.detail)


def test_one_that_took_no_more_than_its_first_buffer_has_no_allowance(
    said: dict[Any, TcpInfo],
) -> None:
    pair = joined(stall=10)
    said[pair.down] = SHUT
    fill(pair, 6 << 20)
    pair.wait(10)
    pair.alive()
    pair.wait(2)
    pair.ended(Ending.DOWNSTREAM_STALLED)
    assert pair.session.detail.endswith("bytes waited 10 s")


@pytest.mark.parametrize(
    ("side", "ending"),
    [("down", Ending.DOWNSTREAM_LOST), ("up", Ending.UPSTREAM_LOST)],
)
def test_a_peer_that_does_not_answer_is_lost(
    side: str,
    ending: Ending,
    no_kernel: dict[Any, int],
    said: dict[Any, TcpInfo],
) -> None:
    """Though nothing waits here: it is all in the kernel's queue."""
    pair = joined(stall=10)
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    pair.wait(5)
    other.receive(bytes(100))
    one.take()
    no_kernel[one] = 100
    for silent in range(1, 11):
        said[one] = gone(silent)
        pair.wait(1)
        pair.alive()
    said[one] = gone(11)
    pair.wait(1)
    pair.ended(ending)
    assert pair.session.detail == "100 bytes unacknowledged for 10.0 s"
    assert one.log[-1] == other.log[-1] == "abort"


def test_what_a_lost_server_said_is_delivered_first(
    no_kernel: dict[Any, int], said: dict[Any, TcpInfo]
) -> None:
    pair = joined(stall=4)
    pair.up.receive(b"last words")
    pair.down.receive(b"x")
    pair.up.take()
    no_kernel[pair.up], said[pair.up], said[pair.down] = 1, gone(9), FINE
    pair.wait(3)
    pair.down.take(1)
    pair.wait(2)
    assert pair.session.ending is Ending.UPSTREAM_LOST
    assert not pair.up.connected
    assert pair.down.connected
    pair.down.take()
    pair.wait(1, 0.1)
    assert pair.down.taken == b"last words"
    pair.ended(Ending.UPSTREAM_LOST)


def test_a_peer_that_answers_probes_is_not_lost(
    no_kernel: dict[Any, int], said: dict[Any, TcpInfo]
) -> None:
    pair = joined(stall=10, idle=1000)
    pair.up.receive(bytes(100))
    pair.down.take()
    no_kernel[pair.down] = 100
    for silent in range(900):
        said[pair.down] = TcpInfo(0, 0, int(silent % 120 == 119), 1000.0, silent % 120)
        pair.wait(1)
    pair.alive()
    said[pair.down] = TcpInfo(0, 0, 2, 1000.0, 130.0)
    pair.wait(10)
    pair.alive()
    pair.wait(1)
    pair.ended(Ending.DOWNSTREAM_LOST)


def test_a_stalled_peer_that_does_not_answer_is_lost_without_an_allowance(
    said: dict[Any, TcpInfo],
) -> None:
    pair = joined(stall=10)
    said[pair.down] = FINE
    for _ in range(10):
        fill(pair, 4 << 20)
        pair.wait(1)
        pair.down.take()
    fill(pair, 0)
    for silent in range(1, 13):
        if not pair.over:
            said[pair.down] = gone(silent)
            pair.wait(1)
    pair.ended(Ending.DOWNSTREAM_LOST)
    assert pair.clock.seconds() <= 22


def test_a_lost_peer_is_noticed_while_others_move(
    no_kernel: dict[Any, int], said: dict[Any, TcpInfo]
) -> None:
    """A server that says a little each second, to a client that is no more."""
    pair = joined(stall=10)
    for silent in range(1, 20):
        if not pair.over:
            pair.up.receive(bytes(10))
            pair.down.take()
            no_kernel[pair.down] = 10 * silent
            said[pair.down] = gone(silent)
            pair.wait(1)
    pair.ended(Ending.DOWNSTREAM_LOST)
    assert pair.clock.seconds() <= 17


def test_without_a_stall_timeout_nobody_is_lost(
    no_kernel: dict[Any, int], said: dict[Any, TcpInfo]
) -> None:
    pair = joined(stall=0, idle=0)
    pair.up.receive(bytes(100))
    pair.down.take()
    no_kernel[pair.down] = 100
    for silent in range(1, 1000, 10):
        said[pair.down] = gone(silent)
        pair.wait(10)
    pair.alive()


def test_last_words_to_one_that_is_lost_do_not_wait(
    no_kernel: dict[Any, int], said: dict[Any, TcpInfo]
) -> None:
    """As long as its kernel may need; a reader that has taken much may need longer."""
    pair = joined(stall=10)
    said[pair.down] = FINE
    for _ in range(10):
        fill(pair, 4 << 20)
        pair.wait(1)
        pair.down.take()
    no_kernel[pair.down] = 100
    pair.up.lose(ConnectionLost())
    for silent in range(1, 13):
        if not pair.over:
            said[pair.down] = gone(silent)
            pair.wait(1)
    pair.ended(Ending.UPSTREAM_RESET)
    assert pair.clock.seconds() <= 22


@pytest.mark.parametrize(
    ("side", "ending"),
    [("down", Ending.DOWNSTREAM_LOST), ("up", Ending.UPSTREAM_LOST)],
)
@pytest.mark.parametrize("ended", [False, True])
def test_a_connection_that_the_kernel_gave_up_is_lost(
    side: str, ending: Ending, ended: bool
) -> None:
    """And not reset; the other one gets what was read, and then a reset."""
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"last words")
    if ended:
        one.receive_eof()
    one.lose(PeerVanished("Connection timed out"))
    assert other.connected
    other.take()
    pair.wait(1, 0.1)
    assert other.taken == b"last words"
    pair.ended(ending)
    assert pair.session.detail == "Connection timed out"


@pytest.mark.cost
def test_a_session_that_moves_or_is_quiet_asks_the_kernel_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A test of cost.

    But its queues once when it falls quiet, and once in half a stall timeout.
    """
    asked: list[str] = []
    monkeypatch.setattr(legs, "unacknowledged", lambda _: asked.append("queue") or 0)
    monkeypatch.setattr(legs, "tcp_info", lambda _: asked.append("info"))
    pair = joined(stall=10)
    pair.clock.advance(1000)
    pair.wait(1)
    asked.clear()
    for _ in range(20):
        pair.down.receive(b"question")
        pair.up.take()
        pair.up.receive(b"answer")
        pair.down.take()
        pair.wait(1)
    assert asked == ["queue"] * 2 * 4
    asked.clear()
    pair.wait(1000)
    assert asked == ["queue"] * 2
    pair.alive()


# -- resets that nobody hears of


@pytest.mark.parametrize(
    ("side", "ending"),
    [("down", Ending.DOWNSTREAM_RESET), ("up", Ending.UPSTREAM_RESET)],
)
def test_a_reset_past_the_end_of_data_is_noticed(
    side: str, ending: Ending, reset_unread: dict[Any, int]
) -> None:
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    one.receive(b"all of it")
    one.receive_eof()
    pair.wait(5)
    pair.alive()
    reset_unread[one] = 0
    pair.wait(1)
    assert other.connected
    other.take()
    pair.wait(1, 0.1)
    assert other.taken == b"all of it"
    pair.ended(ending)


def test_a_reset_by_one_that_had_something_to_get_is_a_failed_write(
    reset_unread: dict[Any, int],
) -> None:
    pair = joined()
    pair.down.receive(b"all of it")
    pair.down.receive_eof()
    pair.up.receive(b"an answer")
    reset_unread[pair.down] = 0
    pair.wait(1)
    # None the less what it had sent is the other one's.
    assert pair.up.connected
    pair.up.take()
    pair.wait(1, 0.1)
    assert pair.up.taken == b"all of it"
    pair.ended(Ending.DOWNSTREAM_WRITE_FAILED)


@pytest.mark.parametrize("number", VANISHED)
@pytest.mark.parametrize(
    ("side", "ending"),
    [("down", Ending.DOWNSTREAM_LOST), ("up", Ending.UPSTREAM_LOST)],
)
def test_a_peer_that_is_lost_while_it_is_not_read_is_told_as_such(
    side: str,
    ending: Ending,
    number: int,
    reset_unread: dict[Any, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the system's words.  What is still to be written to it makes no difference."""
    pair = joined()
    one: FakeTransport = getattr(pair, side)
    other = pair.up if side == "down" else pair.down
    other.receive(b"an answer")
    while one.reading:
        one.receive(bytes(65536))
    monkeypatch.setattr(deadlines, "take_error", {one: number}.get)
    reset_unread[one] = 0
    pair.wait(1)
    assert other.connected
    # Its error was taken: nothing but this ends it.
    assert not one.connected
    other.take()
    pair.wait(1, 0.1)
    assert len(other.taken) == 2 * 65536
    pair.ended(ending)
    assert pair.session.detail == os.strerror(number)


def test_a_reset_of_a_paused_side_waits_for_what_it_sent_before(
    reset_unread: dict[Any, int],
) -> None:
    """That is read as the other side takes it."""
    pair = joined(stall=10)
    while pair.down.reading:
        pair.down.receive(bytes(65536))
    reset_unread[pair.down] = 1
    pair.wait(5)
    pair.alive()
    reset_unread[pair.down] = 0
    pair.wait(1)
    assert pair.session.ending is Ending.DOWNSTREAM_RESET
    pair.up.take()
    pair.wait(1, 0.1)
    assert len(pair.up.taken) == 2 * 65536
    pair.ended(Ending.DOWNSTREAM_RESET)


def test_a_reset_of_a_side_that_somebody_paused_is_noticed(
    reset_unread: dict[Any, int],
) -> None:
    pair = joined()
    pair.downstream.pause(ASKED)
    reset_unread[pair.down] = 0
    pair.wait(1)
    pair.ended(Ending.DOWNSTREAM_RESET)


@pytest.mark.cost
def test_one_that_is_read_is_not_asked(reset_unread: dict[Any, int]) -> None:
    """A test of cost.  Its transport will tell, behind what it sent before."""
    pair = joined()
    reset_unread.update({pair.down: 0, pair.up: 0})
    pair.wait(5)
    pair.alive()


def test_a_transport_that_left_paused_does_not_look_full() -> None:
    """What it would have read next is of no interest to the one that it was for."""
    pair = joined(stall=10)
    while pair.down.reading:
        pair.down.receive(bytes(65536))
    pair.down.lose(ConnectionDone())
    pair.up.take()
    pair.wait(30)
    assert pair.session.ending is None
    pair.up.receive_eof()
    pair.ended(Ending.DONE)


def test_an_idle_session_is_aborted() -> None:
    pair = joined(idle=60)
    pair.wait(50)
    pair.down.receive(b"x")
    pair.up.take()
    pair.wait(59)
    pair.alive()
    pair.wait(3)
    pair.ended(Ending.IDLE)


def test_a_half_closed_session_is_aborted_when_nothing_moves() -> None:
    pair = joined(idle=3600, half_close=300)
    pair.wait(1000, 10)
    pair.down.receive_eof()
    pair.wait(290, 10)
    pair.up.receive(b"still here")
    pair.down.take()
    pair.wait(290, 10)
    pair.alive()
    pair.wait(30, 10)
    pair.ended(Ending.HALF_CLOSED)


@pytest.mark.parametrize("ended", [False, True])
def test_a_look_that_is_late_does_not_count_the_time_before_it(ended: bool) -> None:
    """The machine was paused, while the kernel delivered what we had given it."""
    pair = joined(idle=10, half_close=10)
    pair.wait(1)
    pair.down.receive(b"all of it")
    pair.up.take()
    if ended:
        pair.down.receive_eof()
    pair.wait(1)
    pair.wait(60, 60)
    pair.alive()
    pair.wait(8)
    pair.alive()
    pair.wait(2)
    pair.ended(Ending.HALF_CLOSED if ended else Ending.IDLE)


def test_no_half_close_timeout_means_never() -> None:
    pair = joined(idle=10, half_close=0)
    pair.down.receive_eof()
    pair.wait(10_000, 10)
    pair.alive()


def test_a_close_that_nobody_answers_is_bounded() -> None:
    pair = joined(half_close=30, stall=0)
    pair.down.receive(b"x")
    pair.down.receive_eof()
    pair.up.receive_eof()
    pair.wait(40)
    pair.ended(Ending.HALF_CLOSED)


@pytest.mark.parametrize("name", ["connect", "stall", "idle", "half_close"])
def test_a_negative_timeout_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: -1})


def test_the_tick_follows_the_shortest_timeout() -> None:
    assert Timeouts().tick == 1
    assert Timeouts(stall=0.4).tick == 0.05
    assert Timeouts(0, 0, 0, 0).tick == 1
    assert Timeouts(stall=0.001).tick == 0.01


def test_quiet_begins_when_the_kernels_queues_are_empty(
    no_kernel: dict[Any, int],
) -> None:
    """And not at the last byte that passed through here: a slow reader takes longer."""
    pair = joined(idle=4.0)
    pair.down.receive(b"x" * 1000)
    no_kernel[pair.up] = 1000
    for now in range(1, 4):
        no_kernel[pair.up] -= 300
        pair.bridge.check(float(now))
    no_kernel[pair.up] = 0
    pair.bridge.check(5.0)
    pair.bridge.check(8.5)
    assert pair.session.ending is None
    pair.bridge.check(9.0)
    assert pair.session.ending is Ending.IDLE
