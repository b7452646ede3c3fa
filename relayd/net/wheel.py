"""One coarse timer for the deadlines of every session.

A timer per connection, moved at every chunk, costs more than relaying the
chunk.  Instead each session is checked once in a tick: it is in a bucket of a
timing wheel, one reactor timer goes from bucket to bucket, and the session
compares its counters with those of the last check.  Relaying a chunk touches
no timer and reads no clock; a deadline is kept within one tick.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.net.monotonic import monotonic, poll_time

log = Logger(namespace="relayd.wheel")


class Watched(Protocol):
    """An item of the wheel."""

    #: The bucket that it is in, set by the wheel; None while it is in none.
    wheel_bucket: dict[Any, None] | None

    def check(self, now: float) -> None:
        """Check the deadlines.

        :param now: seconds on the wheel's clock; events from before have been handled.
        """

    def check_failed(self) -> None:
        """`check` raised, which has been logged: end the item."""


Item = TypeVar("Item", bound=Watched)


class DeadlineWheel(Generic[Item]):
    """Calls `check` of each of its items once every `tick` seconds.

    :param clock: provides `callLater` and `seconds`.
    :param tick: seconds between two checks of the same item, and so how late a
        deadline may be noticed.

    The wheel holds a timer only while it has items, or for one tick after;
    :meth:`settle` drops the timer of an empty wheel at once.  Iterating yields the
    items that it has now, in no particular order.
    """

    #: Items are spread over this many buckets in a tick, so that thousands of
    #: sessions are checked a few at a time instead of all in one turn.
    SPREAD = 8

    def __init__(self, clock: IReactorTime, tick: float) -> None:
        self._clock: IReactorTime = monotonic(clock)
        self._poll_time = poll_time(self._clock)
        self._step = tick / self.SPREAD
        self._buckets: list[dict[Item, None]] = [{} for _ in range(self.SPREAD)]
        self._hand = 0
        #: When the hand moves to the next bucket.
        self._due = 0.0
        self._timer: IDelayedCall | None = None
        self._settled = False
        #: Buckets are being checked; the timer is set after that.
        self._checking = False

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def __iter__(self) -> Iterator[Item]:
        return iter(list(chain.from_iterable(self._buckets)))

    def add(self, item: Item) -> None:
        """Check `item` every tick from now on; the first time in one tick.

        Does nothing if it is checked already: in two buckets, it would stay in one.
        """
        if item.wheel_bucket is not None:
            return
        bucket = item.wheel_bucket = self._buckets[self._hand]
        bucket[item] = None
        if self._timer is None and not self._checking:
            self._settled = False
            self._due = self._clock.seconds() + self._step
            self._timer = self._clock.callLater(self._step, self._advance)

    def discard(self, item: Item) -> None:
        """Remove `item`, if it is on the wheel."""
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

    def _advance(self) -> None:
        self._timer = None
        now = self._poll_time()
        # If the reactor was busy, several buckets are due; all of them once at most.
        self._checking = True
        for _ in range(self.SPREAD):
            if self._due > now:
                break
            self._due += self._step
            self._hand = (self._hand + 1) % self.SPREAD
            self._check_bucket(now)
        self._checking = False
        if len(self):
            if self._due <= now:
                self._due = now + self._step
            self._timer = self._clock.callLater(self._due - now, self._advance)

    def _check_bucket(self, now: float) -> None:
        for item in list(self._buckets[self._hand]):
            if item.wheel_bucket is None:
                continue  # an earlier item's check has ended this one
            try:
                item.check(now)
            except Exception:
                log.failure("a session's deadlines could not be checked; it is ended")
                self._end(item)

    def _end(self, item: Item) -> None:
        try:
            item.check_failed()
        except Exception:
            log.failure("it could not be ended either; it is not checked again")
            self.discard(item)
