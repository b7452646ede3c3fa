"""The times of captured packets: microseconds since the epoch.

The machine's clock is read once for a session.  From then on its packets go by the
clock of its relay, which nobody can set: none is earlier than the one before.
"""

from __future__ import annotations

import time

from twisted.internet.interfaces import IReactorTime


class PacketTimes:
    """The times of the packets of one session.

    :param clock: seconds, whose differences count.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._began = clock.seconds()
        self._epoch = time.time_ns() // 1000

    def now(self) -> int:
        """The time now."""
        return self.of(self._clock.seconds())

    def of(self, when: float) -> int:
        """The time of a moment on the clock."""
        return self._epoch + int((when - self._began) * 1e6)
