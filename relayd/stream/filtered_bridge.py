"""Two connections joined through filters: one more way of the Bridge.

A relay with filters makes a :class:`FilteredBridge` for each session, and a relay
without them a plain one, which knows nothing of this.  Each direction goes its own way:

- *filtered*: through the legs, and the filters of its chain
  (:mod:`relayd.stream.chain`);
- *spliced one way*: it has no filter, or none any more, and its transport can move
  bytes by itself, while the other direction is filtered;
- when neither has a filter the bridge becomes a plain one, which splices both.

A living session is given filters, and loses them, in the same way: its bridge becomes
the one class or the other (:mod:`relayd.stream.filtering`).  They have the same layout.

What differs in the rules: an end of data, and a reset, pass on behind what the filters
hold.  A session that a filter ends (EndSession) is reset, or closed, behind what the
filter has passed on.

A filter may close a session while both peers send.  To close their connections then
would be a reset (see :mod:`relayd.stream.closing_bridge`), so both get an end of data
and are read on.  What they still say is dropped, and does not count as read.  Each is
closed when it ends, too, and reset if it does not within CLOSE_GRACE seconds, or the
half-close timeout if that is shorter, from when its kernel has everything.  Until then
the stall timeout bounds the wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.logger import Logger

from relayd.core.filtering import IFilterFactory
from relayd.core.pauses import (
    FILTERS,
    PEER_FULL,
    RESET_PENDING,
)
from relayd.core.session import Direction, Ending
from relayd.stream.bridge import RESET_POLL_FIRST, RESET_POLL_LAST, way_between
from relayd.stream.deadlines import CLOSE_GRACE
from relayd.stream.laid_bridge import LaidBridge, dropping, flow
from relayd.stream.legs import Leg

log = Logger(namespace="relayd.filters")

#: Seconds.  While filters hold something a session is not idle, but no longer than so.
LONGEST_HELD = 3600.0


class FilteredBridge(LaidBridge):
    """A Bridge with filters; made as that."""

    __slots__ = ()

    #: Filters have seen what was refused, and may have changed it.
    resends = False
    # -- joining

    def start(self, ask: bool = True) -> None:
        """See :meth:`Bridge.start`."""
        down, up = self.legs
        down.bridge = up.bridge = self
        self._way = way_between(down, up, type(up), ask)
        if not (
            self._add(down.factory.filters, self.legs)
            and self._add(down.own_filters, self.legs, own=True)
        ):
            return
        if down.chain is None and up.chain is None:
            self.__class__ = self.plain  # type: ignore[assignment]
            self.start(ask)
            return
        # The last filter may leave meanwhile: it is a plain bridge then.
        legs = self.legs
        for leg in legs:
            self._lay(leg)
        for leg in legs:
            flow(leg)
        for leg in legs:
            if leg.direction.eof and self.session.ending is None:
                self.eof(leg)

    # -- what the legs, or their transports, report

    def eof(self, leg: Leg) -> None:
        """`leg` has read its last byte."""
        if self.session.ending is not None or self.closing:
            if self.closing and leg.alive and not leg.paused & RESET_PENDING:
                # It was read for that alone.
                leg.close()
            return
        chain = leg.chain
        if chain is not None:
            if leg is self.upstream and not self.session.up.eof:
                self.session.server_first = True
            chain.end()
        elif leg.peer.chain is None:
            super().eof(leg)
        else:
            if leg is self.upstream and not self.session.up.eof:
                self.session.server_first = True
            leg.peer.shut_write()

    def ended(self, direction: Direction, sink: Any) -> None:
        """See :meth:`ISplicer.ended`."""
        direction.eof = True
        down = self.downstream
        self.eof(down if direction is down.direction else self.upstream)

    def end_passed(self, leg: Leg) -> None:
        """The chain of `leg` has passed on all that came before an end, or a loss."""
        leg.chain = None
        if self.session.ending is not None:
            if self.closing:
                self._close_ended()
            else:
                self._reset_behind(leg.peer)
        elif leg.alive:
            self.eof(leg)
        else:
            self._left(leg)

    def _close_both(self) -> None:
        self.closing = True
        for leg in self.legs:
            self._unlay(leg)
            if leg.alive:
                leg.close()

    def _left(self, leg: Leg) -> None:
        """See :meth:`Bridge._left`; what the filters hold comes before that."""
        if self.first is not None:
            super()._left(leg)
            return
        self._drop_chain(leg.peer)
        leg.peer.sink = None
        chain = leg.chain
        if chain is None:
            super()._left(leg)
        else:
            leg.direction.eof = True
            chain.end()

    def _reset_behind(self, survivor: Leg) -> None:
        """See :meth:`Bridge._reset_behind`; the filters pass on what they hold."""
        self._drop_chain(survivor)
        chain = survivor.peer.chain
        if chain is None:
            super()._reset_behind(survivor)
        elif survivor.alive:
            survivor.pause(RESET_PENDING)
            chain.end()
        else:
            self._drop_chain(survivor.peer)

    def unwanted(self, survivor: Leg) -> None:
        """See :meth:`Bridge.unwanted`."""
        if survivor.peer.chain is None:
            super().unwanted(survivor)

    # -- what the chains report

    def unfiltered(self, leg: Leg) -> None:
        """The last filter of `leg` has left: splice."""
        self._lift(leg)
        leg.chain = None
        if self.session.ending is not None or self.closing:
            leg.sink = leg.peer.transport.write
        elif leg.peer.chain is None:
            self._become_plain()
        else:
            self._lay(leg)
            leg.resume(PEER_FULL)

    def end_by_filter(self, source: Leg, why: str, reset: bool) -> None:
        """A filter has ended the session; what it has passed on is delivered.

        :param source: the leg whose bytes it has seen.
        """
        if self.session.ending is not None:
            # It ends already, behind what is passed on here: no more is.
            if source.chain is not None:
                source.chain.end()
            return
        if reset:
            self.give_up(source, Ending.FILTERED, why)
            return
        self._decide(Ending.FILTERED, why)
        self.closing = True
        other: Leg = source.peer
        if other.chain is not None:
            other.chain.flush()
            other.chain = None
        for leg in self.legs:
            # Nothing more is read.
            leg.pause(RESET_PENDING)
        if source.chain is not None:
            source.chain.end()
        else:
            self._close_ended()

    def _close_ended(self) -> None:
        """What a filter has passed on is written: end both, and read on."""
        legs = self.legs
        for leg in legs:
            self._unlay(leg)
        for leg in legs:
            if leg.alive and leg.direction.eof:
                leg.close()
            elif leg.alive:
                leg.sink = dropping(leg)
                leg.shut_write()
                # Nobody waits for what was full.
                leg.resume(RESET_PENDING | PEER_FULL | FILTERS)
        if self._poll is None and (self.downstream.alive or self.upstream.alive):
            first = RESET_POLL_FIRST
            self._poll = self._clock.callLater(first, self._close_late, first, {})

    def _close_late(self, pause: float, until: dict[Leg, float]) -> None:
        """Reset who has everything, and has not ended in time.

        TLS waits for its peer's goodbye, which may never come.

        :param pause: seconds since this was last asked.
        :param until: of each leg that has everything, when it is reset.
        """
        self._poll = None
        now, half_close = self._clock.seconds(), self._timeouts.half_close
        for leg in self.legs:
            if leg not in until and leg.alive and not leg.undelivered():
                until[leg] = now + min(CLOSE_GRACE, half_close or CLOSE_GRACE)
                if not leg.can_say_end:
                    leg.close()
            elif now >= until.get(leg, now + 1):
                leg.abort()
        if self.downstream.alive or self.upstream.alive:
            pause = min(pause * 2, RESET_POLL_LAST)
            self._poll = self._clock.callLater(pause, self._close_late, pause, until)

    # -- the filters of a living session

    @property
    def filtered(self) -> Sequence[str]:
        """The filters that see its bytes."""
        names = [
            name
            for leg in self.legs
            if leg.chain is not None
            for name in leg.chain.names
        ]
        return list(dict.fromkeys(names))

    def take_off(self, gone: Sequence[IFilterFactory]) -> None:
        """Take filters off that are not of its session alone.

        It may be a plain bridge after that.
        """
        for leg in self.legs:
            if leg.chain is not None:
                leg.chain.remove(gone)

    def put_on(self, new: Sequence[IFilterFactory]) -> None:
        """Put filters on, behind those that there are."""
        before = [leg.chain for leg in self.legs]
        open_ = [leg for leg in self.legs if leg.peer.alive and not leg.direction.eof]
        if not self._add(new, open_):
            return
        for leg, chain in zip(self.legs, before, strict=True):
            goes_on = chain is not None or (leg.chain is None and leg.spliced)
            if not (goes_on or leg.direction.eof):
                self._lift(leg)
                self._lay(leg)
                leg.resume(PEER_FULL)
        if self.downstream.chain is None and self.upstream.chain is None:
            self._become_plain()

    def unjoin(self) -> None:
        """It was a plain bridge: have both directions go through the legs."""
        down, up = self.legs
        if down.spliced:
            down.transport.unsplice()
            down.spliced = up.spliced = False
            for leg in self.legs:
                self._lay_plainly(leg)

    # -- endings

    def check(self, now: float) -> None:
        """See :meth:`Watch.check`."""
        plain = self.plain
        for leg in self.legs:
            if leg.chain is not None:
                leg.chain.check()
        # By now it may be that.
        plain.check(self, now)

    def idle_since(self) -> float | None:
        """See :meth:`Watch.idle_since`: not while filters hold something."""
        return None if self._has_more else super().idle_since()

    @property
    def _has_more(self) -> bool:
        return any(leg.chain is not None and leg.chain.has_more for leg in self.legs)

    def _is_paced(self) -> bool:
        """See :meth:`Watch._is_paced`: its filters have something to say, too."""
        if super()._is_paced():
            return True
        if self._clock.seconds() - self._active_at >= LONGEST_HELD:
            return False
        return self._has_more

    def abort(self, ending: Ending, detail: str = "") -> None:
        """See :meth:`Bridge.abort`."""
        if self.session.ending is None:
            # Before the filters are closed, some of which write it down.
            self._decide(ending, detail)
        for leg in self.legs:
            self._drop_chain(leg)
        super().abort(ending, detail)

    def part(self) -> None:
        """See :meth:`Bridge.part`."""
        for leg in self.legs:
            self._unlay(leg)
        super().part()
        self.downstream.resume(FILTERS)

    def _over(self) -> None:
        for leg in self.legs:
            self._drop_chain(leg)
            leg.sink = None
        super()._over()
