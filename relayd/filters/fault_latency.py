"""Latency: what is read is passed on later, as on a long line.

Each chunk has its own due time, from when it was read: chunks do not wait for each
other, but keep their order.  What may be held limits how much is under way, and so the
throughput: 128 KiB at least, which is 1.3 MB/s at 100 ms.  Toxiproxy holds 1,024 chunks
of up to 32 KiB.

Chunks that are due at nearly the same time share an entry of the queue, so that it has
a thousand entries at most, whatever a peer sends.  None is passed on early; how late
one may be by this is a millisecond, or a thousandth of the latency, if that is more.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Annotated, Any

import attrs

from relayd.core.filtering import Answer, DatagramWay, Filter, Way
from relayd.filters.datagram_faults import late_datagrams
from relayd.filters.faults import HoldingFilter, StreamFault
from relayd.filters.option_types import Milliseconds

#: How much later than the first of an entry the others may be due: seconds, or a part
#: of the longest delay.
GRAIN = 0.001

#: Timers are due, and floats equal, within a nanosecond.
_CLOSE = 1e-9


@attrs.frozen
class Latency(StreamFault):
    """Adds a delay to all data: `latency`, give or take `jitter`.

    A delay is drawn for each chunk, evenly, from `latency - jitter` to `latency +
    jitter`, and is 0 if that is less.  The end of data follows the last byte; it has no
    delay of its own, as in Toxiproxy.

    :ivar latency: in milliseconds.
    :ivar jitter: in milliseconds.
    """

    latency: Annotated[float, Milliseconds()]
    jitter: Annotated[float, Milliseconds()] = 0.0

    name = "latency"

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        return LatencyFilter(way, self.latency / 1e3, self.jitter / 1e3, numbers)

    def build_datagram_filter(self, way: DatagramWay) -> Any:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_datagram_filter`."""
        return late_datagrams(way, self, self.latency / 1e3, self.jitter / 1e3)


@attrs.define(eq=False)
class _Entry:
    """Bytes of the queue.

    :ivar first_due: when its first byte is due.
    :ivar due: when its last is, and all are passed on.
    """

    first_due: float
    due: float
    data: bytearray


class LatencyFilter(HoldingFilter):
    """Holds each chunk for a while.

    :param latency: in seconds.
    :param jitter: in seconds.
    """

    def __init__(
        self, way: Way, latency: float, jitter: float, numbers: random.Random
    ) -> None:
        HoldingFilter.__init__(self, way)
        self._latency = latency
        self._jitter = jitter
        self._numbers = numbers
        self._grain = GRAIN * max(1.0, latency + jitter)
        self._queue: deque[_Entry] = deque()

    def _draw_delay(self) -> float:
        jitter = self._jitter
        if not jitter:
            return self._latency
        return max(self._latency + self._numbers.uniform(-jitter, jitter), 0.0)

    def data(self, data: bytes) -> bytes | Answer:
        now = self._way.clock.seconds()
        due = now + self._draw_delay()
        queue = self._queue
        if not queue and due <= now:
            return data
        self.held += len(data)
        last = queue[-1] if queue else None
        if last is not None:
            due = max(due, last.due)
            if due <= last.first_due + self._grain:
                last.due = due
                last.data += data
                return b""
        queue.append(_Entry(due, due, bytearray(data)))
        self.wait(queue[0].due - now)
        return b""

    def pass_due(self) -> None:
        queue = self._queue
        now = self._way.clock.seconds()
        while queue and queue[0].due <= now + _CLOSE:
            data = bytes(queue.popleft().data)
            self.held -= len(data)
            self._way.pass_on(data)
        if queue:
            self.wait(queue[0].due - now)

    def take_all(self) -> bytes:
        data = b"".join(entry.data for entry in self._queue)
        self._queue.clear()
        self.held = 0
        return data
