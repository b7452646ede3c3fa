"""Token buckets for bytes, which several sessions may share, and one timer for all.

A :class:`Bucket` is one limit, of one direction: tokens, a byte each, come at its rate,
and are counted when it is asked for some; two quanta at most.  A *quantum* is what a
tenth of a second brings, 16 KiB at least, but no more than a quarter of a second
brings.  A bucket may be in debt, as some reads bring more than was granted; so its
average is exact.

Whose bucket is short waits, and nobody comes before those who wait.  When there is a
quantum again, all who wait get an equal *part* of it (a few bytes are no part: of very
many, some wait for the next quantum), and nobody gets anything without one before there
is another quantum.  Who needs less than its part gives back the rest, which is the
others': shares are fair (max-min).

A :class:`Pacer` has one timer, for all buckets of a relay in which somebody waits.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from relayd.core.counts import Tally

log = Logger(namespace="relayd.limits")

#: How long a quantum takes, in seconds, but for low rates,
PERIOD = 0.1

#: of which a quantum is so many bytes,
SMALLEST = 16384

#: unless that takes longer than so many seconds.
LONGEST = 0.25

#: Bytes that are worth waking somebody; or, if that is less, this of a quantum.
SMALLEST_PART, _SMALL = 512, 1 / 16

#: Seconds after which a part that was not used is over: its bytes are for others.
PART_LASTS = 0.5

#: Buckets that are due within so many seconds are served together.
TOGETHER = 0.01

#: Without a part, a bucket with less than this of its quantum is empty: reads of a
#: few bytes each would be no good.
_LOW = 1 / 8


class Waiting(Protocol):
    """Who waits in a bucket."""

    def wake(self) -> None:
        """It has a part."""


class Bucket:
    """One limit, of one direction.

    :param rate: bytes per second.
    :param now: seconds on the relay's clock.
    :param shared: several sessions may be in it.

    :ivar tokens: bytes that may be read, without those of parts; may be negative.
    :ivar waiting: who waits, in order.
    :ivar due: when its pacer serves it; None: nobody waits.
    """

    __slots__ = (
        "_at",
        "_expires",
        "_in_parts",
        "_low",
        "_parts",
        "due",
        "quantum",
        "rate",
        "shared",
        "tokens",
        "waiting",
    )

    def __init__(self, rate: float, now: float, *, shared: bool = True) -> None:
        self.rate = rate
        self.shared = shared
        self.quantum = max(1.0, min(max(rate * PERIOD, SMALLEST), rate * LONGEST))
        self.tokens = self.quantum
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()
        self.due: float | None = None
        self._low = max(1.0, self.quantum * _LOW)
        #: Parts were made, and there has been no quantum since.
        self._in_parts = False
        self._at = now
        #: What is left of each part, and until when.
        self._parts: dict[Waiting, tuple[float, float]] = {}
        self._expires = 0.0

    @property
    def is_full(self) -> bool:
        """Whether a new one would have no more tokens."""
        return self.tokens >= self.quantum and not self.waiting and not self._parts

    def refill(self, now: float) -> None:
        """Count the tokens that have come."""
        if self._parts and now >= self._expires:
            self._end_parts(now)
        tokens = self.tokens + (now - self._at) * self.rate
        self._at = now
        most = 2 * self.quantum
        self.tokens = min(most, tokens)
        if self.tokens >= self.quantum:
            self._in_parts = False

    def _end_parts(self, now: float) -> None:
        """Take back what was not used in time."""
        over = [each for each, (_, until) in self._parts.items() if until <= now]
        for each in over:
            self.give_back(each)
        self._expires = min((end for _, end in self._parts.values()), default=0.0)

    def left_for(self, who: Waiting) -> float:
        """Bytes that one may read, after :meth:`refill`; less than 1: none."""
        part = self._parts.get(who)
        if part is not None:
            return part[0]
        least = self.quantum if self._in_parts else self._low
        return 0.0 if self.waiting or self.tokens < least else self.tokens

    def reserve(self, who: Waiting, count: int, now: float) -> None:
        """Make what one may read its part, unless it has one."""
        if who not in self._parts:
            self._make_part(who, count, now + PART_LASTS)

    def _make_part(self, who: Waiting, count: float, until: float) -> None:
        if not self._parts:
            self._expires = until
        self._parts[who] = count, until
        self.tokens -= count

    def spend(self, who: Waiting, count: int) -> None:
        """One has read so many bytes: of its part, and then of what all have."""
        part = self._parts.get(who)
        if part is None:
            self.tokens -= count
            return
        left, until = part
        left -= count
        if left < 1:
            del self._parts[who]
            self.tokens += left
        else:
            self._parts[who] = left, until

    def give_back(self, who: Waiting) -> bool:
        """One needs its part no longer; whether it had one."""
        part = self._parts.pop(who, None)
        if part is not None:
            self.tokens += part[0]
        return part is not None

    def due_in(self) -> float:
        """Seconds until there is a quantum; 0.0 or less: there is one."""
        return (self.quantum - self.tokens) / self.rate

    def hand_out(self, now: float) -> list[Waiting]:
        """Make parts for those who wait; who has one is to be woken."""
        waiting, tokens = self.waiting, self.tokens
        smallest = max(1.0, min(SMALLEST_PART, self.quantum * _SMALL))
        count = min(len(waiting), max(1, int(tokens / smallest)))
        each = max(smallest, tokens / count)
        woken = [waiting.popitem(last=False)[0] for _ in range(count)]
        for who in woken:
            # Who waited in another one may have a part here.
            self.give_back(who)
            self._make_part(who, each, now + PART_LASTS)
        self._in_parts = True
        return woken


class Pacer:
    """Serves the buckets of a relay in which somebody waits.

    :param clock: monotonic seconds, and a timer while somebody waits.

    :ivar tally: how often somebody had to wait; others may count with it.
    """

    def __init__(self, clock: Any) -> None:
        self.now: Callable[[], float] = clock.seconds
        self._call_later: Callable[..., IDelayedCall] = clock.callLater
        self.tally = Tally()
        #: When buckets are due, and a number that keeps the order.  An entry is
        #: outdated if its bucket is due at another time.
        self._due: list[tuple[float, int, Bucket]] = []
        self._numbers = itertools.count()
        #: The buckets in which somebody waits.
        self._busy = 0
        self._timer: IDelayedCall | None = None
        self._timer_at = 0.0

    def wait(self, who: Waiting, bucket: Bucket) -> None:
        """One waits in a bucket, until it is woken."""
        self.tally.count += 1
        if not bucket.waiting:
            self._busy += 1
        bucket.waiting[who] = None
        if bucket.due is None:
            self._list(bucket, self.now())
            self._set_timer()

    def rest(self, who: Waiting, bucket: Bucket) -> None:
        """One has nothing more to read: the rest of its part is for who waits."""
        if bucket.give_back(who) and bucket.due is not None:
            now = self.now()
            if now + bucket.due_in() < bucket.due - TOGETHER:
                # The entry that it has is outdated.
                self._list(bucket, now)
                self._set_timer()

    def leave(self, who: Waiting, bucket: Bucket) -> None:
        """One waits no longer."""
        if who not in bucket.waiting:
            # It has its part already, and is woken next.
            return
        del bucket.waiting[who]
        if not bucket.waiting:
            self._busy -= 1
            if not self._busy:
                self._forget_all()

    def _forget_all(self) -> None:
        """Nobody waits: there is nothing to be done."""
        for _, _, bucket in self._due:
            bucket.due = None
        self._due.clear()
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _list(self, bucket: Bucket, now: float) -> None:
        due = bucket.due = now + max(bucket.due_in(), 0.0)
        heapq.heappush(self._due, (due, next(self._numbers), bucket))

    def _set_timer(self) -> None:
        """The timer is for the first that is due."""
        if not self._due:
            return
        first = self._due[0][0]
        if self._timer is not None:
            if self._timer_at <= first:
                return
            self._timer.cancel()
        self._timer_at = first
        delay = max(first - self.now(), 0.0)
        self._timer = self._call_later(delay, self._serve_due)

    def _serve_due(self) -> None:
        self._timer = None
        now = self.now()
        due, served = self._due, []
        while due and due[0][0] <= now + TOGETHER:
            at, _, bucket = heapq.heappop(due)
            if at == bucket.due:
                bucket.due = None
                served.append(bucket)
        woken: list[Waiting] = []
        for bucket in served:
            if bucket.waiting:
                woken += self._serve(bucket, now)
        for who in woken:
            try:
                who.wake()
            except Exception:
                # The others wait for theirs.
                log.failure("a session could not be resumed")
        self._set_timer()

    def _serve(self, bucket: Bucket, now: float) -> list[Waiting]:
        bucket.refill(now)
        woken: list[Waiting] = []
        # It is less where somebody has read more than was granted meanwhile.
        if bucket.tokens >= 1 and bucket.due_in() <= 2 * TOGETHER:
            woken = bucket.hand_out(now)
        if bucket.waiting:
            self._list(bucket, now)
        else:
            self._busy -= 1
        return woken
