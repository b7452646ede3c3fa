"""A log throttle: one line a second at most, for what may happen at any rate.

A flood must not fill the disk.  The caller counts how often a limit was reached, and
writes the count when :meth:`LogThrottle.is_due`.
"""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

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
