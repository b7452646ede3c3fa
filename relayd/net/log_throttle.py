"""A log throttle: one line a second at most, for what may happen at any rate.

A flood must not fill the disk.  The caller counts how often a limit was reached, and
writes the count when :meth:`LogThrottle.is_due`.
"""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.net.monotonic import monotonic

#: Seconds between two lines.
INTERVAL = 1.0


class LogThrottle:
    """Allows a line at most every :data:`INTERVAL` seconds, the first one at once.

    :param clock: seconds.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock: IReactorTime = monotonic(clock)
        self._last: float | None = None

    def is_due(self) -> bool:
        """Whether to write a line now; if so, the next is due a second later."""
        now = self._clock.seconds()
        if self._last is not None and now - self._last < INTERVAL:
            return False
        self._last = now
        return True


class FailureLog:
    """Logs errors of which a stranger may cause any number: a traceback a second.

    :param log: where they go.
    :param clock: seconds.

    :ivar count: how many there were.
    """

    def __init__(self, log: Logger, clock: IReactorTime) -> None:
        self._log = log
        self._throttle = LogThrottle(clock)
        self.count = 0

    def add(self, what: str, reason: Failure | None = None) -> None:
        """Log one; unless given, the exception that is being handled."""
        self.count += 1
        if self._throttle.is_due():
            self._log.failure(
                "{what} ({count} failures so far)",
                reason,
                what=what,
                count=self.count,
            )
