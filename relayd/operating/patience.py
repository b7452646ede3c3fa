"""Waiting for something that may never come: for a time at most."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime


class Wait:
    """Waits for something, and for a time at most.

    :ivar over: fires with whether it came in time.
    """

    def __init__(self, clock: IReactorTime, seconds: float) -> None:
        self.over: Deferred[bool] = Deferred()
        self._limit = clock.callLater(seconds, self.over.callback, False)

    def end(self) -> None:
        """It has come."""
        if self._limit.active():
            self._limit.cancel()
            self.over.callback(True)

    def shorten(self, seconds: float) -> None:
        """Wait for no more than so long from now."""
        if self._limit.active():
            self._limit.reset(seconds)
