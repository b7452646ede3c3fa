"""How a lost connection is read: every reason, in every state of the leg."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from relayd.core.pauses import ALLOWANCE, ASKED, HOLDING, PEER_FULL, RESET_PENDING
from relayd.core.session import Ending
from relayd.net.transports import PeerReset, PeerVanished
from relayd.stream.losses import (
    ABORT,
    END,
    NOTHING,
    RESET_WHEN_DELIVERED,
    judge,
    reset_ending,
)
from relayd.testing import FakeTransport
from tests.support.fakes import FakeTLSTransport
from tests.support.pairs import Pair, no_kernel

__all__ = ["no_kernel"]

DONE, LOST = ConnectionDone(), ConnectionLost()

SIDES = pytest.mark.parametrize("is_client", [True, False])


def ending(is_client: bool, word: str) -> Ending:
    side = "downstream" if is_client else "upstream"
    return Ending[f"{side}_{word}".upper()]


def loss_of(
    error: BaseException,
    is_client: bool,
    *,
    closing: bool = False,
    tls: bool = False,
    paused: int = 0,
    full: bool = False,
    eof: bool = False,
    peer_eof: bool = False,
) -> Any:
    """What the loss of one leg's connection means.

    :param full: something waits in the other transport.
    """
    pair = Pair().start()
    leg = pair.downstream if is_client else pair.upstream
    if tls:
        leg.transport = FakeTLSTransport()
    leg.paused = paused
    leg.direction.eof = eof
    leg.peer.direction.eof = peer_eof
    transport: FakeTransport = leg.peer.transport
    if full:
        transport.dataBuffer = b"x"
    return judge(leg, Failure(error), is_client=is_client, closing=closing)


@SIDES
def test_a_clean_loss_is_an_end_of_data(is_client: bool) -> None:
    loss = loss_of(DONE, is_client)
    assert (loss.then, loss.ending) == (END, None)


@SIDES
def test_one_that_vanished_is_lost(is_client: bool) -> None:
    loss = loss_of(PeerVanished("no route"), is_client, eof=True, paused=PEER_FULL)
    assert loss.then == RESET_WHEN_DELIVERED
    assert loss.ending is ending(is_client, "lost")
    assert loss.detail == "no route"


@SIDES
@pytest.mark.parametrize("undelivered", [0, 1])
def test_a_reset_that_the_kernel_told_of_is_named_by_what_it_cost(
    undelivered: int, is_client: bool
) -> None:
    loss = loss_of(PeerReset(undelivered), is_client, eof=True)
    assert loss.then == RESET_WHEN_DELIVERED
    assert loss.ending is ending(is_client, "write_failed" if undelivered else "reset")
    assert loss.ending is reset_ending(is_client, undelivered)


@SIDES
@pytest.mark.parametrize(
    "paused", [0, HOLDING, RESET_PENDING, ALLOWANCE, ASKED, ALLOWANCE | ASKED]
)
@pytest.mark.parametrize("full", [True, False])
def test_one_that_was_read_or_paused_by_somebody_else_was_reset(
    full: bool, paused: int, is_client: bool
) -> None:
    loss = loss_of(LOST, is_client, paused=paused, full=full)
    assert loss.then == RESET_WHEN_DELIVERED
    assert loss.ending is ending(is_client, "reset")
    assert not loss.detail


@SIDES
@pytest.mark.parametrize("besides", [0, ALLOWANCE, ASKED])
def test_one_whose_peer_was_full_has_failed_to_write(
    besides: int, is_client: bool
) -> None:
    loss = loss_of(LOST, is_client, paused=PEER_FULL | besides, full=True)
    assert loss.then == ABORT
    assert loss.ending is ending(is_client, "write_failed")


@SIDES
def test_a_peer_that_holds_nothing_is_not_full_whoever_says_so(
    is_client: bool,
) -> None:
    loss = loss_of(LOST, is_client, paused=PEER_FULL)
    assert loss.ending is ending(is_client, "reset")


@SIDES
@pytest.mark.parametrize("state", ["eof", "closing"])
def test_one_that_had_ended_has_failed_to_write(state: str, is_client: bool) -> None:
    loss = loss_of(LOST, is_client, **{state: True})
    assert loss.then == ABORT
    assert loss.ending is ending(is_client, "write_failed")


@SIDES
def test_tls_without_a_goodbye_behind_the_other_sides_end(is_client: bool) -> None:
    loss = loss_of(LOST, is_client, tls=True, peer_eof=True)
    assert (loss.then, loss.ending) == (END, None)
    loss = loss_of(LOST, is_client, tls=True, peer_eof=True, closing=True)
    assert (loss.then, loss.ending) == (NOTHING, None)


@SIDES
def test_tls_without_a_goodbye_is_a_reset_that_says_so(is_client: bool) -> None:
    loss = loss_of(LOST, is_client, tls=True)
    assert loss.ending is ending(is_client, "reset")
    assert loss.detail == "TLS without close_notify"


@SIDES
def test_what_is_no_loss_is_a_failure(is_client: bool) -> None:
    loss = loss_of(ZeroDivisionError("ours"), is_client, peer_eof=True)
    assert (loss.then, loss.ending) == (ABORT, Ending.FAILED)
    assert "ours" in loss.detail
