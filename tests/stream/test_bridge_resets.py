"""The Bridge on fakes: resets, failed writes, and what is delivered before them."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionLost
from zope.interface.verify import verifyObject

from relayd.core.interfaces import IResetListener
from relayd.core.session import Direction, Ending
from relayd.net.transports import PeerReset, PeerVanished
from relayd.stream.bridge import Leg
from tests.support.fakes import FakeTransport
from tests.support.pairs import joined, no_kernel

__all__ = ["no_kernel"]


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
