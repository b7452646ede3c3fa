"""Two connections that are closed at the first end of data (`--half-close off`).

So do simple relays, and the kernel's.  Once one leg has read its end, the *first*:

- nothing more is passed on to it.  What was read for it is written, and it is closed;
- what was read from it is written to the *other* leg, then an end of data.

To close the other leg at once might destroy that: close(2) with something unread, or
something that arrives later, is a reset, at which the sender drops what is not
acknowledged and a peer what it has not read.  So the other leg is read on, and what it
still says is dropped, until it ends, too.  From the moment when its kernel has
everything it gets CLOSE_GRACE seconds for that, or the half-close timeout if that is
shorter; until then, the stall timeout bounds the wait.

A relay that half-closes has a plain Bridge, and pays nothing for this one.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import INegotiated, IReactorTime

from relayd.core.pauses import PEER_FULL
from relayd.core.session import Direction, Ending, Session
from relayd.stream.bridge import Bridge
from relayd.stream.deadlines import CLOSE_GRACE, Timeouts
from relayd.stream.legs import Leg
from relayd.stream.paced_reads import PacedReads


class ClosingBridge(Bridge):
    """A Bridge until the first end of data; made as that.

    :ivar first: the leg that has ended, once one has.
    :ivar dropped: bytes that the other one sent after that; they are not counted as
        read.
    """

    __slots__ = ("_until", "dropped", "first")

    half_closes = False

    first: Leg | None

    def __init__(
        self,
        session: Session,
        downstream: Leg,
        upstream: Leg,
        timeouts: Timeouts,
        clock: IReactorTime,
    ) -> None:
        Bridge.__init__(self, session, downstream, upstream, timeouts, clock)
        self.first = None
        self.dropped = 0
        #: When the other one is closed, on the relay's clock.
        self._until: float | None = None

    # -- what the legs, or their transports, report

    def eof(self, leg: Leg) -> None:
        """`leg` has read its last byte."""
        if self.session.ending is not None:
            return
        if self.first is None:
            self._end_with(leg)
        elif leg is not self.first and leg.alive:
            self.closing = True
            leg.close()

    def ended(self, direction: Direction, sink: Any) -> None:
        """See :meth:`ISplicer.ended`."""
        direction.eof = True
        down = self.downstream
        self.eof(down if direction is down.direction else self.upstream)

    def _left(self, leg: Leg) -> None:
        """A transport that can't half-close (TLS, a wrapper) was closed by its peer.

        Or by us.
        """
        if self.first is None:
            leg.direction.eof = True
            self._end_with(leg)

    def _end_with(self, first: Leg) -> None:
        """Close both; `first` has ended."""
        self.first = first
        other: Leg = first.peer
        if first is self.upstream and not other.direction.eof:
            self.session.server_first = True
        if first.spliced:
            first.transport.unsplice()
            first.spliced = other.spliced = False
        pace = other.direction.pace
        # What is dropped has come all the same.
        other.sink = self._drop if pace is None else PacedReads(other, pace, self._drop)
        if other.alive:
            # At once: the last bytes may wait for it.
            other.shut_write()
        if first.alive:
            first.close()
        # It was full, maybe.
        other.resume(PEER_FULL)

    def _drop(self, data: bytes) -> None:
        """The other leg has read something after the first one's end."""
        first, count = self.first, len(data)
        if first is not None:
            self.dropped += count
            first.peer.direction.read -= count

    # -- the end of the other leg

    def check(self, now: float) -> None:
        """See :meth:`Watch.check`."""
        first = self.first
        if (
            first is None
            or self.session.ending is not None
            or not self._close_in_time(first.peer, now)
        ):
            Bridge.check(self, now)

    def _close_in_time(self, other: Leg, now: float) -> bool:
        """Close the other leg if it has everything, and does not end in time.

        :return: whether it was closed now.
        """
        if self.closing or not other.alive or other.undelivered():
            return False
        if self._until is None:
            grace = 0.0
            if other.can_say_end:
                grace = min(CLOSE_GRACE, self._timeouts.half_close or CLOSE_GRACE)
            # Another kind was told nothing yet: to close it is the end of data.
            self._until = now + grace
            # This was the last to move: the half-close timeout is not earlier.
            self._active_at = now
        if now < self._until:
            return False
        self.closing = True
        if INegotiated.providedBy(other.transport):
            # It was asked to close, and waits for its peer's goodbye.
            self._decide(Ending.DONE, self._what_was_dropped())
            other.abort()
        else:
            other.close()
        return True

    def _over(self) -> None:
        if self.session.ending is None:
            self._decide(Ending.DONE, self._what_was_dropped())
        super()._over()

    def _what_was_dropped(self) -> str:
        if not self.dropped:
            return ""
        first, other = "client", "server"
        if self.first is self.upstream:
            first, other = other, first
        return f"{self.dropped} bytes from the {other} dropped after the {first} ended"
