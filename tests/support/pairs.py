"""A client and a server on fakes, joined by a Bridge."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.session import Ending, Session
from relayd.net.tcp_info import TcpInfo
from relayd.stream import deadlines, legs
from relayd.stream.bridge import Bridge, Leg, Timeouts
from tests.support.fakes import FakeTransport


class Pair:
    """A client and a server, joined by a Bridge.

    :ivar bridge: what joins them, of the class `joins`.
    """

    joins: type[Bridge] = Bridge

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
        self.bridge = self.joins(
            self.session,
            self.downstream,
            self.upstream,
            Timeouts(**timeouts),
            self.clock,
        )
        self.downstream.over = self._count_over  # type: ignore[method-assign]

    def _count_over(self) -> None:
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


class NoHalfClose(FakeTransport):
    """As FakeTransport, without a way to shut one side."""

    loseWriteConnection: Any = None
