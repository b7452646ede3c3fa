"""What happens as often as somebody likes, and is logged once a second at most.

A flood is not to fill the disk: whoever logs that a bound was reached counts how often,
and says so when :meth:`Seldom.is_due`.
"""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from relayd.monotonic import monotonic

#: Seconds between two lines.
EVERY = 1.0


class Seldom:
    """Tells when there may be another line; the first may be at once.

    :param clock: seconds.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock: IReactorTime = monotonic(clock)
        self._last: float | None = None

    def is_due(self) -> bool:
        """Whether there may be a line now, in which case there is to be one."""
        now = self._clock.seconds()
        if self._last is not None and now - self._last < EVERY:
            return False
        self._last = now
        return True
