"""One coarse timer for the deadlines of every session.

A timer per connection, moved at every chunk, costs more than relaying the
chunk.  Instead each session asks to be looked at every now and then: it stands
in the bucket of a coarse tick, one reactor timer walks the buckets, and the
session compares its counters with what it saw last time.  Relaying a chunk
touches no timer and reads no clock; a deadline is kept within one tick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.net.monotonic import looked_at, monotonic

log = Logger(namespace="relayd.wheel")


class Watched(Protocol):
    """What stands on the wheel."""

    #: The bucket it stands in; the wheel's own, None while it is off.
    wheel_bucket: dict[Any, None] | None

    def check(self, now: float) -> None:
        """Look at the deadlines.

        :param now: seconds on the wheel's clock; what arrived before was looked at.
        """

    def check_failed(self) -> None:
        """`check` raised, which has been logged: end what was being watched."""


Item = TypeVar("Item", bound=Watched)


class DeadlineWheel(Generic[Item]):
    """Calls `check` of everything that stands on it, once every `tick` seconds.

    :param clock: provides `callLater` and `seconds`.
    :param tick: seconds between two looks at the same item, and so how late a
        deadline may be noticed.

    The wheel holds a timer only while something stands on it, or for one tick
    after; :meth:`settle` drops the timer of an empty wheel at once.  To iterate over it
    is to see what stands on it now, in no particular order.
    """

    #: Items are spread over this many buckets in a tick, so that thousands of
    #: sessions are looked at a few at a time instead of all in one turn.
    SPREAD = 8

    def __init__(self, clock: IReactorTime, tick: float) -> None:
        self._clock: IReactorTime = monotonic(clock)
        self._looked_at = looked_at(self._clock)
        self._step = tick / self.SPREAD
        self._buckets: list[dict[Item, None]] = [{} for _ in range(self.SPREAD)]
        self._hand = 0
        #: When the hand moves to the next bucket.
        self._due = 0.0
        self._timer: IDelayedCall | None = None
        self._settled = False
        #: Buckets are being looked at; the timer is set after that.
        self._turning = False

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def __iter__(self) -> Iterator[Item]:
        return iter(list(chain.from_iterable(self._buckets)))

    def add(self, item: Item) -> None:
        """Look at `item` every tick from now on; the first look is one tick away."""
        bucket = item.wheel_bucket = self._buckets[self._hand]
        bucket[item] = None
        if self._timer is None and not self._turning:
            self._settled = False
            self._due = self._clock.seconds() + self._step
            self._timer = self._clock.callLater(self._step, self._turn)

    def discard(self, item: Item) -> None:
        """Take `item` off, if it is on."""
        bucket = item.wheel_bucket
        if bucket is None:
            return
        item.wheel_bucket = None
        del bucket[item]
        if self._settled:
            self.settle()

    def settle(self) -> None:
        """Hold no timer once the wheel is empty (the relay has stopped listening)."""
        self._settled = True
        if self._timer is not None and not len(self):
            self._timer.cancel()
            self._timer = None

    def _turn(self) -> None:
        self._timer = None
        now = self._looked_at()
        # A reactor that was busy is late by several buckets; a whole round of
        # them is all there is to catch up with.
        self._turning = True
        for _ in range(self.SPREAD):
            if self._due > now:
                break
            self._due += self._step
            self._hand = (self._hand + 1) % self.SPREAD
            self._look(now)
        self._turning = False
        if len(self):
            if self._due <= now:
                self._due = now + self._step
            self._timer = self._clock.callLater(self._due - now, self._turn)

    def _look(self, now: float) -> None:
        for item in list(self._buckets[self._hand]):
            if item.wheel_bucket is None:
                continue  # an earlier item's check has ended this one
            self._guarded(item.check, now, item)

    def _guarded(self, check: Callable[[float], None], now: float, item: Item) -> None:
        try:
            check(now)
        except Exception:
            log.failure("a session's deadlines could not be checked; it is ended")
            try:
                item.check_failed()
            except Exception:
                log.failure("it could not be ended either; it is looked at no more")
                self.discard(item)
