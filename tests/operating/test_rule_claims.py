"""One process of a network namespace has the rules of a name."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

from relayd.core.errors import NetfilterError
from relayd.operating import rule_claims
from relayd.operating.rule_claims import _BACKLOG, PREFIX, RuleClaims
from tests.support.steered import Standing

#: No other test run claims it.
NAME = f"c{os.getpid()}-web"


@pytest.fixture
def reactor() -> Standing:
    return Standing()


@pytest.fixture
def ours(reactor: Standing) -> Iterator[RuleClaims]:
    claims = RuleClaims(reactor)
    yield claims
    claims.release(NAME)
    assert reactor.readers == set()


def test_a_name_is_claimed_once(ours: RuleClaims) -> None:
    ours.take(NAME)
    ours.take(NAME)
    assert NAME in ours
    other = RuleClaims(Standing())
    with pytest.raises(NetfilterError, match="another process manages the rules"):
        other.take(NAME)
    assert NAME not in other
    # Whatever is not ours stays.
    other.release(NAME)
    with pytest.raises(NetfilterError):
        other.take(NAME)
    ours.release(NAME)
    assert NAME not in ours


def test_who_is_asked_each_time_has_a_queue_that_ends(ours: RuleClaims) -> None:
    """A name that was somebody else's is tried, and nobody is asked whose it is."""
    ours.take(NAME)
    other = RuleClaims(Standing())
    for _ in range(1000):
        with pytest.raises(NetfilterError):
            other.take(NAME)
    ours.release(NAME)
    other.ask_again()
    other.take(NAME)
    other.release(NAME)


def test_who_has_asked_is_let_go_of(ours: RuleClaims, reactor: Standing) -> None:
    """Whoever asks, and however often, the claim stands."""
    ours.take(NAME)
    [claim] = reactor.readers
    for _ in range(3 * _BACKLOG):
        with pytest.raises(NetfilterError):
            RuleClaims(Standing()).take(NAME)
        claim.doRead()
    claim.connectionLost(Failure(CONNECTION_LOST))
    with pytest.raises(NetfilterError):
        RuleClaims(Standing()).take(NAME)


def test_it_stands_while_nobody_gets_to_ask(ours: RuleClaims) -> None:
    """Others fill its queue, and its process is busy."""
    ours.take(NAME)
    for _ in range(2 * _BACKLOG):
        with pytest.raises(NetfilterError):
            RuleClaims(Standing()).take(NAME)


def test_one_that_is_free_by_now_is_had(ours: RuleClaims) -> None:
    ours.take(NAME)
    other = RuleClaims(Standing())
    with pytest.raises(NetfilterError):
        other.take(NAME)
    ours.release(NAME)
    other.take(NAME)
    assert NAME in other
    other.release(NAME)


def test_a_user_who_may_not_change_rules_claims_nothing(
    ours: RuleClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody of this machine keeps a relay from its rules."""
    theirs = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with closing(theirs):
        theirs.bind(PREFIX + NAME)
        # Nobody listens.
        ours.take(NAME)
        ours.release(NAME)
        theirs.listen()
        theirs.setblocking(False)
        stranger = struct.Struct("3i")
        monkeypatch.setattr(rule_claims, "_CREDENTIALS", Stranger(stranger))
        ours.take(NAME)
        assert NAME in ours


class Stranger:
    """Reads credentials as those of another user than root, and than this one."""

    def __init__(self, real: struct.Struct) -> None:
        self.size = real.size

    def unpack(self, found: bytes) -> tuple[int, int, int]:
        return 1, 64999, 64999
