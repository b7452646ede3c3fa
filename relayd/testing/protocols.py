"""Protocols and producers that record a transport's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.stream.legs import unsent


class Plain(Protocol):
    """Records a transport's calls; can't half-close.

    :ivar events: made, eof, shut and lost, in order; deliveries are only counted.
    :ivar on: callbacks by name of the event, or "data".
    :ivar nested: events that came within another.
    """

    transport: Any

    def __init__(self, **on: Callable[[], object]) -> None:
        self.data = bytearray()
        self.deliveries = 0
        self.events: list[str] = []
        self.reason: Failure | None = None
        self.on = on
        self.nested: list[str] = []
        self._within: list[str] = []

    def _record(self, event: str) -> None:
        self.nested += [f"{event} within {outer}" for outer in self._within[-1:]]
        self._within.append(event)
        try:
            if event in self.on:
                self.on[event]()
        finally:
            self._within.pop()

    def connectionMade(self) -> None:
        self.events.append("made")
        self._record("made")

    def dataReceived(self, data: bytes) -> None:
        assert type(data) is bytes
        assert data
        self.deliveries += 1
        self.data += data
        self._record("data")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.events.append("lost")
        self.reason = reason
        self._record("lost")

    @property
    def lost(self) -> bool:
        return "lost" in self.events


@implementer(IHalfCloseableProtocol)
class Recorder(Plain):
    """A protocol that can half-close."""

    def readConnectionLost(self) -> None:
        self.events.append("eof")
        self._record("eof")

    def writeConnectionLost(self) -> None:
        self.events.append("shut")
        self._record("shut")


@implementer(IPushProducer)
class Producer:
    """Records a consumer's calls.

    :ivar asked: pause, resume and stop, in order.
    :ivar on: callbacks by name of the call.
    """

    def __init__(self, **on: Callable[[], object]) -> None:
        self.asked: list[str] = []
        self.on = on

    def _record(self, what: str) -> None:
        self.asked.append(what)
        if what in self.on:
            self.on[what]()

    def pauseProducing(self) -> None:
        self._record("pause")

    def resumeProducing(self) -> None:
        self._record("resume")

    def stopProducing(self) -> None:
        self._record("stop")


class Pieces(Producer):
    """A pull producer: writes a piece each time it is resumed, then unregisters."""

    def __init__(self, transport: Any, pieces: list[bytes]) -> None:
        super().__init__(resume=self._resume)
        self._transport = transport
        self._pieces = pieces
        self._writing = False

    def _resume(self) -> None:
        assert not self._writing, "asked from within a write"
        assert not unsent(self._transport), "asked before the last was written"
        self._writing = True
        if self._pieces:
            self._transport.write(self._pieces.pop(0))
        else:
            self._transport.unregisterProducer()
        self._writing = False


def fail() -> None:
    """Raise, like a protocol with a bug."""
    raise ZeroDivisionError("of the test")
