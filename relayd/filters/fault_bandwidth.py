"""Bandwidth: what is read is passed on at a limited rate, as on a slow line.

A byte is due when the line would have carried it and all before it, so a chunk takes
its length divided by the rate, as in Toxiproxy.  Long ones are passed on in pieces of
20 ms (100 ms in Toxiproxy).  A timer that is late passes on what is due by then.
"""

from __future__ import annotations

import random
from typing import Annotated

import attrs

from relayd.core.filtering import Answer, Filter, Way
from relayd.filters.faults import HoldingFilter, StreamFault, take
from relayd.filters.option_types import Kilobytes

#: The longest piece: seconds, and bytes.  Of bytes so few that some are still held when
#: the source is read again, and the line is never idle.
STEP = 0.02
PIECE = 32 << 10

#: The lowest rate, in kilobytes a second: a byte.
SLOWEST = 0.001


@attrs.frozen
class Bandwidth(StreamFault):
    """Limits the rate of one direction of each session.

    It is a line of its own for each session, for tests; the settings `bandwidth…` of a
    relay share one among its clients, and cost less.

    :ivar rate: in kilobytes (of 1,000 bytes) a second.
    """

    rate: Annotated[float, Kilobytes()]

    name = "bandwidth"

    def __attrs_post_init__(self) -> None:
        if not self.rate >= SLOWEST:
            raise ValueError(
                f"rate must be {SLOWEST} or more; timeout lets nothing pass"
            )

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        return BandwidthFilter(way, self.rate * 1e3)


class BandwidthFilter(HoldingFilter):
    """Passes on so many bytes a second.

    :param rate: in bytes a second.
    """

    def __init__(self, way: Way, rate: float) -> None:
        HoldingFilter.__init__(self, way)
        self._rate = rate
        self._longest = max(min(int(rate * STEP), PIECE), 1)
        self._buffer = bytearray()
        #: Since when the line is busy, and how many bytes it has carried since.
        self._since = 0.0
        self._carried = 0
        #: How many are due when the timer is.
        self._planned = 0
        #: By how much the timer was late for the last byte; the next chunk makes up for
        #: it.
        self._late = 0.0

    def data(self, data: bytes) -> bytes | Answer:
        now = self._way.clock.seconds()
        if not self._buffer:
            self._since, self._late = now - self._late, 0.0
            self._carried = 0
        self._buffer += data
        self.held = len(self._buffer)
        self._plan(now)
        return b""

    def _plan(self, now: float) -> None:
        if not self.is_waiting:
            self._planned = min(self._longest, self.held)
            self.wait(self._free_at(self._planned) - now)

    def _free_at(self, count: int) -> float:
        """When the line will have carried so many bytes more."""
        return self._since + (self._carried + count) / self._rate

    def pass_due(self) -> None:
        now = self._way.clock.seconds()
        # A float may be a little less than the whole number that it stands for.
        due = int((now - self._since) * self._rate + 0.001) - self._carried
        data = take(self._buffer, max(due, self._planned))
        self.held = len(self._buffer)
        self._carried += len(data)
        if self.held:
            self._plan(now)
        else:
            self._late = min(max(now - self._free_at(0), 0.0), STEP)
        self._way.pass_on(data)

    def take_all(self) -> bytes:
        self.held = 0
        return take(self._buffer, len(self._buffer))
