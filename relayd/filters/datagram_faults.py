"""Faults of datagrams, as a bad line has them: lost, doubled, late, in another order.

Their names and meanings are those of Linux's netem (tc-netem(8)); direction, toxicity
(of a flow) and seed are as those of streams have them (:mod:`relayd.filters.faults`).
Each datagram of a flow that has a fault is chosen by `probability`, for itself.

What a filter keeps back is bounded, and so is the number of its timers, which is one.
What it keeps when its flow ends, or when it is taken off, is dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Annotated, Any

import attrs
from twisted.internet.interfaces import IDelayedCall
from zope.interface import implementer

from relayd.core.filtering import DatagramWay, IDatagramFilter
from relayd.filters.faults import Fault
from relayd.filters.option_types import Probability

#: What latency keeps of one direction of a flow, at most; what is more is dropped.
MAX_KEPT, MAX_KEPT_BYTES = 1000, 256 << 10

#: Seconds after which a datagram goes out that another should have overtaken.
REORDER_WITHIN = 0.05

#: Timers are due, and floats equal, within a nanosecond.
_CLOSE = 1e-9


@attrs.frozen
class DatagramFault(Fault):
    """A fault that each datagram has by itself.

    :ivar probability: that a datagram has it.
    """

    probability: Annotated[float, Probability()] = attrs.field(
        validator=[attrs.validators.ge(0), attrs.validators.le(1)]
    )

    def build_datagram_filter(self, way: DatagramWay) -> Any:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_datagram_filter`."""
        numbers = self.draw(way.course, way.ordinal)
        if numbers is None:
            return None
        drawn, probability = numbers.random, self.probability
        return self.build_fault(way, numbers, lambda: drawn() < probability)

    def build_fault(
        self, way: DatagramWay, numbers: random.Random, chosen: Callable[[], bool]
    ) -> PassingDatagrams:
        """The filter of a direction that has the fault.

        :param chosen: tells whether the next datagram has it.
        """
        raise NotImplementedError


@implementer(IDatagramFilter)
class PassingDatagrams:
    """Passes every datagram on; subclasses do more.

    :ivar held: how many datagrams it keeps back.
    """

    held = 0

    def datagram(self, data: bytes) -> Sequence[bytes]:
        """See :meth:`relayd.core.filtering.IDatagramFilter.datagram`."""
        return (data,)

    def close(self) -> None:
        """See :meth:`relayd.core.filtering.IDatagramFilter.close`."""


class _Replacing(PassingDatagrams):
    """Has something else in place of the datagrams that are chosen."""

    def __init__(
        self, chosen: Callable[[], bool], instead: Callable[[bytes], Sequence[bytes]]
    ) -> None:
        self._chosen = chosen
        self._instead = instead

    def datagram(self, data: bytes) -> Sequence[bytes]:
        return self._instead(data) if self._chosen() else (data,)


@attrs.frozen
class Loss(DatagramFault):
    """Drops datagrams."""

    name = "loss"

    def build_fault(
        self, way: DatagramWay, numbers: random.Random, chosen: Callable[[], bool]
    ) -> PassingDatagrams:
        return _Replacing(chosen, lambda data: ())


@attrs.frozen
class Duplicate(DatagramFault):
    """Sends datagrams twice."""

    name = "duplicate"

    def build_fault(
        self, way: DatagramWay, numbers: random.Random, chosen: Callable[[], bool]
    ) -> PassingDatagrams:
        return _Replacing(chosen, lambda data: (data, data))


@attrs.frozen
class Corrupt(DatagramFault):
    """Changes one bit of a datagram, anywhere in it; one without a byte stays so."""

    name = "corrupt"

    def build_fault(
        self, way: DatagramWay, numbers: random.Random, chosen: Callable[[], bool]
    ) -> PassingDatagrams:
        def corrupted(data: bytes) -> Sequence[bytes]:
            if not data:
                return (data,)
            place = numbers.randrange(8 * len(data))
            changed = bytearray(data)
            changed[place >> 3] ^= 1 << (place & 7)
            return (bytes(changed),)

        return _Replacing(chosen, corrupted)


@attrs.frozen
class Reorder(DatagramFault):
    """Sends a datagram after the one that follows it.

    If none follows within 50 ms, it is sent then.  The one that follows is not chosen
    itself: one is kept back at a time.
    """

    name = "reorder"

    def build_fault(
        self, way: DatagramWay, numbers: random.Random, chosen: Callable[[], bool]
    ) -> PassingDatagrams:
        return _Overtaken(way, chosen)


class _TimedDatagrams(PassingDatagrams):
    """Keeps datagrams back, with one timer for them, which calls `due`."""

    def __init__(self, way: DatagramWay) -> None:
        self._way = way
        self._clock = way.clock
        self._timer: IDelayedCall | None = None

    def due(self) -> None:
        """The time of the timer has come."""
        raise NotImplementedError

    def wait(self, seconds: float) -> None:
        """Have the timer be due then, and not when it was to be."""
        if self._timer is None:
            self._timer = self._clock.callLater(max(seconds, 0.0), self._fire)
        else:
            self._timer.reset(max(seconds, 0.0))

    def wait_no_more(self) -> None:
        """Cancel the timer, if it is set."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _fire(self) -> None:
        self._timer = None
        self.due()

    def close(self) -> None:
        self.wait_no_more()


class _Overtaken(_TimedDatagrams):
    """Keeps a datagram until another has come."""

    def __init__(self, way: DatagramWay, chosen: Callable[[], bool]) -> None:
        _TimedDatagrams.__init__(self, way)
        self._chosen = chosen
        self._kept = b""

    def datagram(self, data: bytes) -> Sequence[bytes]:
        if self.held:
            self.wait_no_more()
            return (data, self._take())
        if not self._chosen():
            return (data,)
        self._kept, self.held = data, 1
        self.wait(REORDER_WITHIN)
        return ()

    def due(self) -> None:
        self._way.send(self._take())

    def _take(self) -> bytes:
        data, self._kept, self.held = self._kept, b"", 0
        return data


class LateDatagrams(_TimedDatagrams):
    """Latency of datagrams: each is passed on later, in the order of their due times.

    With jitter one may overtake another, as with netem.  What there is no room for
    (:data:`MAX_KEPT`, :data:`MAX_KEPT_BYTES`) is dropped, and counted.

    :param latency: in seconds.
    :param jitter: in seconds: a delay is `latency`, give or take so much, evenly.
    """

    def __init__(
        self, way: DatagramWay, latency: float, jitter: float, numbers: random.Random
    ) -> None:
        _TimedDatagrams.__init__(self, way)
        self._latency = latency
        self._jitter = jitter
        self._numbers = numbers
        #: When each is due, a number that keeps the order, and the datagram.
        self._queue: list[tuple[float, int, bytes]] = []
        self._order = count()
        self._size = 0
        #: When the timer is due, if it is set.
        self._awaited = 0.0

    def datagram(self, data: bytes) -> Sequence[bytes]:
        now = self._clock.seconds()
        out = []
        while self._is_due(now):
            out.append(self._take())
        delay = self._draw_delay()
        if not delay:
            out.append(data)
        elif self.held >= MAX_KEPT or self._size + len(data) > MAX_KEPT_BYTES:
            self._way.count_drop()
        else:
            heappush(self._queue, (now + delay, next(self._order), data))
            self._size += len(data)
            self.held += 1
        self._wait_for_first(now)
        return out

    def _draw_delay(self) -> float:
        jitter = self._jitter
        if not jitter:
            return self._latency
        return max(self._latency + self._numbers.uniform(-jitter, jitter), 0.0)

    def _is_due(self, now: float) -> bool:
        return self.held > 0 and self._queue[0][0] <= now + _CLOSE

    def _take(self) -> bytes:
        data = heappop(self._queue)[2]
        self._size -= len(data)
        self.held -= 1
        return data

    def due(self) -> None:
        now = self._clock.seconds()
        # The flow may be over after any of them: then nothing is left.
        while self._is_due(now):
            self._way.send(self._take())
        self._wait_for_first(now)

    def _wait_for_first(self, now: float) -> None:
        if not self.held:
            self.wait_no_more()
            return
        first = self._queue[0][0]
        if self._timer is None or first != self._awaited:
            self._awaited = first
            self.wait(first - now)

    def close(self) -> None:
        self.wait_no_more()
        self._queue.clear()
        self.held = self._size = 0


def late_datagrams(
    way: DatagramWay, fault: Fault, latency: float, jitter: float
) -> LateDatagrams | None:
    """The filter of one direction of a flow that has latency, if it has.

    :param latency: in seconds; `jitter` likewise.
    """
    numbers = fault.draw(way.course, way.ordinal)
    if numbers is None:
        return None
    return LateDatagrams(way, latency, jitter, numbers)
