"""Whoever looks at rules is told when they may have changed."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Any

import pytest
from twisted.python.failure import Failure

from relayd.net import rule_watch
from relayd.net.rule_watch import GROUPS, MOST, PAUSE, RETRY, WAIT, RuleWatch
from tests.conftest import descriptors
from tests.support.steered import Standing


class Kernel:
    """Has the other ends of the sockets."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.asked: list[tuple[int, int]] = []
        self.refuses = False

    def joined(self, protocol: int, groups: int) -> socket.socket:
        if self.refuses:
            raise OSError(errno.EPERM, "Operation not permitted")
        self.asked.append((protocol, groups))
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        return ours


class Watched:
    """A watch, and how often somebody was asked to look."""

    def __init__(self) -> None:
        self.reactor: Any = Standing()
        self.looks = 0
        self.watch = RuleWatch(self.reactor, self.look)

    def look(self) -> None:
        # What changes from now on is told of.
        assert self.watch.is_on
        self.looks += 1

    def told(self) -> None:
        """One of the sockets has something to read."""
        next(iter(self.reactor.readers)).doRead()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Kernel()
    monkeypatch.setattr(rule_watch, "joined", made.joined)
    yield made
    for each in made.ends:
        each.close()


@pytest.fixture
def watched(kernel: Kernel) -> Any:
    made = Watched()
    yield made
    made.watch.stop()
    assert not made.watch.is_on
    assert not made.reactor.readers
    assert made.reactor.getDelayedCalls() == []


def test_a_change_is_looked_at_a_little_later(watched: Watched, kernel: Kernel) -> None:
    watched.watch.start()
    watched.watch.start()
    assert kernel.asked == [*GROUPS]
    assert len(watched.reactor.readers) == len(GROUPS)
    watched.told()
    # Nothing more is read meanwhile.
    assert not watched.reactor.readers
    watched.watch.start()
    assert len(kernel.asked) == len(GROUPS)
    watched.reactor.advance(WAIT - 0.01)
    assert watched.looks == 0
    watched.reactor.advance(0.01)
    assert watched.looks == 1
    assert len(watched.reactor.readers) == len(GROUPS)


def test_looks_have_a_pause_between_them(watched: Watched) -> None:
    watched.watch.start()
    watched.told()
    watched.reactor.advance(WAIT)
    watched.reactor.advance(PAUSE / 4)
    watched.told()
    # What is left of it.
    watched.reactor.advance(PAUSE * 3 / 4 - 0.01)
    assert watched.looks == 1
    watched.reactor.advance(0.01)
    assert watched.looks == 2
    watched.reactor.advance(PAUSE)
    watched.told()
    watched.reactor.advance(WAIT)
    assert watched.looks == 3


def test_who_removes_them_again_and_again_has_longer_pauses(watched: Watched) -> None:
    watched.watch.start()
    took = []
    for _ in range(9):
        watched.told()
        began, looks = watched.reactor.seconds(), watched.looks
        while watched.looks == looks:
            watched.reactor.advance(0.25)
        took.append(watched.reactor.seconds() - began)
        watched.watch.missed()
    assert took == [WAIT, PAUSE, PAUSE, 4, 8, 16, 32, MOST, MOST]
    # It has stopped.
    watched.reactor.advance(2 * MOST + 1)
    watched.told()
    watched.reactor.advance(WAIT)
    assert watched.looks == 10
    watched.watch.missed()
    watched.told()
    watched.reactor.advance(PAUSE)
    assert watched.looks == 11


def test_no_more_after_it_was_stopped(watched: Watched) -> None:
    watched.watch.start()
    watched.told()
    watched.watch.stop()
    watched.reactor.advance(PAUSE)
    assert watched.looks == 0


def test_a_socket_that_is_lost_counts_as_a_change(watched: Watched) -> None:
    watched.watch.start()
    next(iter(watched.reactor.readers)).connectionLost(Failure(OSError("lost")))
    watched.reactor.advance(WAIT)
    assert watched.looks == 1


def test_a_system_that_does_not_tell(watched: Watched, kernel: Kernel) -> None:
    """Whoever starts it again has it tried again."""
    kernel.refuses = True
    for _ in range(3):
        watched.watch.start()
        assert not watched.watch.is_on
        assert watched.watch.why_not == "Operation not permitted"
    kernel.refuses = False
    watched.watch.start()
    assert watched.watch.is_on
    assert watched.watch.why_not == ""


def test_no_descriptor_is_left_later(watched: Watched, kernel: Kernel) -> None:
    """It is tried again, and looked at each time: nobody knows what was missed."""
    watched.watch.start()
    watched.told()
    kernel.refuses = True
    watched.reactor.advance(WAIT)
    assert watched.looks == 1
    assert watched.watch.why_not
    watched.reactor.advance(RETRY)
    assert watched.looks == 2
    kernel.refuses = False
    watched.reactor.advance(RETRY)
    assert watched.looks == 3
    assert watched.watch.why_not == ""
    assert len(watched.reactor.readers) == len(GROUPS)
    kernel.refuses = True
    watched.told()
    watched.reactor.advance(PAUSE)
    assert watched.watch.why_not
    watched.watch.stop()
    assert watched.watch.why_not == ""


def test_a_system_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_watch, "_NETLINK", None)
    watched = Watched()
    watched.watch.start()
    assert watched.watch.why_not == "this system has no netlink"


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_what_cannot_be_joined_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    before = descriptors()
    monkeypatch.setattr(socket.socket, "bind", refuse)
    for protocol, groups in GROUPS:
        with pytest.raises(OSError, match="not permitted"):
            rule_watch.joined(protocol, groups)
    assert descriptors() == before
