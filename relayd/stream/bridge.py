"""Two connections joined: bytes, backpressure, half-close, and every way to end.

A session has two legs, the client's (downstream) and the server's (upstream).
What one leg reads, it writes to the other's transport.  The Bridge joins them
and is the only place that passes on an end of data, resets or closes.

The rules, by their numbers in ARCHITECTURE.md:

2. Each leg is the push producer of the other's transport: when that transport's
   buffer is full the leg stops reading.  Nothing else buffers.  Two transports
   that are ISpliceable do that between themselves, and the bytes don't pass
   through the legs at all.
3. Stall: both connections are aborted when a peer takes nothing of what waits for it.
   A peer that does not even answer is lost, which is read as a reset (6).
4. End of data (EOF) on one leg: the other's buffer is written, then its write
   side is shut; the opposite direction goes on.
5. The pair ends when both directions have ended and all is written, or at once
   when a write fails.
6. Reset on one leg: what was read from it is delivered, then the other leg is
   reset as well.  A server that resets at once is replaced by another, if there are
   several (:mod:`relayd.stream.redial`): the legs are parted.
8. A pair on which nothing moves ends after `idle` seconds, or `half_close`
   seconds once one direction has ended.

How a lost connection is read is in :mod:`relayd.stream.losses`; stalls and the other
deadlines are in :mod:`relayd.stream.deadlines`.

What it costs.  For each chunk: two additions, one call of the other transport's
`write`; nothing where it is spliced.  Activity is not timed; :meth:`Bridge.check`
compares the counters once a tick with what they were.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IDelayedCall, INegotiated, IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.hooks import Remembered, overrides
from relayd.core.interfaces import ISpliceable, ISplicer
from relayd.core.pauses import PEER_FULL, RESET_PENDING
from relayd.core.session import Direction, Ending, Session
from relayd.net.tcp_info import is_dead
from relayd.stream.deadlines import Timeouts, Watch
from relayd.stream.legs import HOLD_LIMIT, Leg, unsent
from relayd.stream.losses import ABORT, END, RESET_WHEN_DELIVERED, Loss, judge

#: What programs that embed a relay know by this module's name.
__all__ = ("HOLD_LIMIT", "Bridge", "Leg", "Timeouts", "unsent")

#: Seconds until a reset checks whether the bytes before it have arrived; they double
#: up to the second figure.
RESET_POLL_FIRST, RESET_POLL_LAST = 0.005, 0.5

#: How two legs are joined: every byte passes through them; their transports move the
#: bytes, and tell them of their loss; or do not even tell them of that; or whichever of
#: these the objects themselves leave open.
_THROUGH, _SPLICED, _SPLICED_UNTOLD, _ASK_OBJECTS = range(4)

#: Methods of a leg that are not called while it is spliced.
_NOT_CALLED = (
    "dataReceived",
    "readConnectionLost",
    "writeConnectionLost",
    "pauseProducing",
    "resumeProducing",
    "stopProducing",
    "shut_write",
    "close",
)


def _way_for(kinds: tuple[Any, Any, Any]) -> int:
    """How to join a transport and two legs of these classes.

    Asked of the transport's class: a wrapper (TLS, PROXY, throttling) claims to provide
    all that the transport below it does, and must not be bypassed.
    """
    transport, downstream, upstream = kinds
    if not ISpliceable.implementedBy(transport):
        return _THROUGH
    if all(leg.__module__.startswith("relayd.") for leg in (downstream, upstream)):
        return _way_past(downstream, upstream)
    # Classes that are not ours may give their objects methods.
    return _ASK_OBJECTS


def _way_past(*legs: Any) -> int:
    """Which way these legs leave open, or legs of these classes."""
    if any(overrides(leg, Leg, *_NOT_CALLED) for leg in legs):
        return _THROUGH
    told = any(overrides(leg, Leg, "connectionLost") for leg in legs)
    return _SPLICED if told else _SPLICED_UNTOLD


_ways = Remembered(_way_for)


def way_between(down: Any, up: Any, kind: type[Leg], ask: bool) -> int:
    """How to join two legs; 0: every byte passes through them.

    :param up: the server's, or what there is instead of it: its class.
    :param kind: its class.
    :param ask: a program may have put methods on these legs; if not, only their
        classes are asked.
    """
    way = _ways[type(down.transport), type(down), kind]
    if way == _ASK_OBJECTS or (ask and way):
        way = _way_past(down, up)
    return way


@implementer(ISplicer)
class Bridge(Watch):
    """Joins two connected legs until an Ending.

    :param session: gets `ending` and `detail` when the ending is decided.
    :param clock: the timer of a reset that waits for delivery.

    When both connections are gone it calls `over` of the downstream leg, once.
    """

    #: One direction may go on when the other has ended.
    half_closes = True
    #: What a lost server was sent and has not taken may go to another one.
    resends = True

    __slots__ = (
        "_clock",
        "_poll",
        "_way",
        "closing",
        "downstream",
        "session",
        "upstream",
    )

    def __init__(
        self,
        session: Session,
        downstream: Leg,
        upstream: Leg,
        timeouts: Timeouts,
        clock: IReactorTime,
    ) -> None:
        Watch.__init__(self, timeouts)
        self.session = session
        self.downstream = downstream
        self.upstream = upstream
        self._clock = clock
        self.closing = False
        self._poll: IDelayedCall | None = None

    def start(self, ask: bool = True) -> None:
        """Join the legs.  Both are connected; either may have data or EOF already.

        :param ask: see :func:`way_between`.
        """
        down, up = self.downstream, self.upstream
        down.bridge = up.bridge = self
        self._way = way = way_between(down, up, type(up), ask)
        if way:
            down.spliced = up.spliced = down.transport.splice(
                up.transport, down.direction, up.direction, self
            )
        # A spliced leg has nothing to do but to write what it has kept, and to read on.
        if down.held is not None or not down.spliced or down.paused:
            down.flow()
        if up.held is not None or not up.spliced or up.paused:
            up.flow()
        if down.direction.eof and self.session.ending is None:
            self.eof(down)
        if up.direction.eof and self.session.ending is None:
            self.eof(up)

    def part(self) -> None:
        """Undo `start`: the upstream leg is lost, and the other one is alone again."""
        down, up = self.downstream, self.upstream
        if down.spliced:
            down.transport.unsplice()
            down.spliced = up.spliced = False
        else:
            down.transport.unregisterProducer()
            down.sink = up.sink = None
        down.bridge = up.bridge = None

    # -- what the legs, or their transports, report

    def eof(self, leg: Leg) -> None:
        """`leg` has read its last byte."""
        if self.session.ending is not None or self.closing:
            return
        peer = leg.peer
        if peer.direction.eof:
            self._close_both()
        else:
            if leg is self.upstream:
                self.session.server_first = True
            peer.shut_write()

    def ended(self, direction: Direction, sink: Any) -> None:
        """See :meth:`ISplicer.ended`."""
        direction.eof = True
        session = self.session
        if session.ending is not None or self.closing:
            return
        if not session.up.eof:
            session.server_first = True
        elif session.down.eof:
            self._close_both()
            return
        sink.loseWriteConnection()

    def lost(self, leg: Leg, reason: Failure) -> None:
        """`leg`'s connection is gone."""
        if self.session.ending is None and not (
            self.closing and isinstance(reason.value, ConnectionDone)
        ):
            self._judge(leg, reason)
        # Closing the peer may have ended it, and the session, from within.
        if leg.bridge is self and not leg.peer.alive:
            self._over()

    def _judge(self, leg: Leg, reason: Failure) -> None:
        loss = judge(
            leg, reason, is_client=leg is self.downstream, closing=self.closing
        )
        if leg is self.upstream and self.downstream.tries_again(leg, loss, reason):
            return
        if loss.ending is not None:
            self._decide(loss.ending, loss.detail)
        if loss.then == END:
            self._left(leg)
        elif loss.then == RESET_WHEN_DELIVERED:
            self._reset_behind(leg.peer)
        elif loss.then == ABORT:
            leg.peer.abort()

    def _reset_behind(self, survivor: Leg) -> None:
        """Reset the survivor once it has what was read for it."""
        if not survivor.alive:
            return
        survivor.transport.unregisterProducer()
        survivor.pause(RESET_PENDING)
        if INegotiated.providedBy(survivor.transport):
            # TLS gathers small writes until the reactor's next turn is over.
            self._poll = self._clock.callLater(
                RESET_POLL_FIRST,
                self._reset_when_delivered,
                survivor,
                RESET_POLL_FIRST,
            )
        else:
            self._reset_when_delivered(survivor, RESET_POLL_FIRST)

    def _left(self, leg: Leg) -> None:
        """A transport that can't half-close (TLS, a wrapper) was closed by its peer.

        That is its end of data; but nothing more can be written to it.
        """
        leg.direction.eof = True
        survivor = leg.peer
        if not survivor.alive:
            return
        survivor.sink = None
        if survivor.direction.eof:
            self.closing = True
            survivor.close()
            return
        if leg is self.upstream:
            self.session.server_first = True
        # Closing it now would drop what it has not read yet.
        survivor.shut_write()
        # That buffer is gone; the survivor is read for its end of data.
        survivor.resume(PEER_FULL)

    def unwanted(self, survivor: Leg) -> None:
        """Something was read for a leg that has left, by the other one."""
        if not survivor.undelivered():
            self.abort(
                Ending.DOWNSTREAM_WRITE_FAILED
                if survivor is self.upstream
                else Ending.UPSTREAM_WRITE_FAILED
            )

    def _reset_when_delivered(self, leg: Leg, pause: float) -> None:
        # An abort drops what the kernel still has to send as well as what we
        # have.  Nothing tells when the peer has acknowledged it all, so ask
        # again; the stall timeout bounds this.
        self._poll = None
        if not leg.undelivered() or is_dead(leg.transport):
            leg.abort()
            return
        self._poll = self._clock.callLater(
            pause, self._reset_when_delivered, leg, min(pause * 2, RESET_POLL_LAST)
        )

    # -- endings

    def abort(self, ending: Ending, detail: str = "") -> None:
        """End the session now: reset both connections."""
        if self.session.ending is None:
            self._decide(ending, detail)
        self.downstream.abort()
        self.upstream.abort()

    def _close_both(self) -> None:
        # Closing writes what is buffered first.  Both directions have ended, so
        # nothing can arrive that a close would turn into a reset.
        self.closing = True
        down, up = self.downstream, self.upstream
        if down.spliced:
            if self._way == _SPLICED_UNTOLD and down.transport.close_both(down, up):
                down.alive = up.alive = False
                self._over()
                return
            down.transport.loseConnection()
            up.transport.loseConnection()
            return
        for leg in (down, up):
            if leg.alive:
                leg.close()

    def _decide(self, ending: Ending, detail: str = "") -> None:
        self.session.ending = ending
        self.session.detail = detail

    def _over(self) -> None:
        if self.session.ending is None:
            self.session.ending = Ending.DONE
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        # The legs hold this, and it them.
        down, up = self.downstream, self.upstream
        down.bridge = up.bridge = None
        if not down.spliced:
            down.sink = up.sink = None
        down.over()

    def give_up(self, leg: Leg, ending: Ending, detail: str = "") -> None:
        """End the session as if `leg`'s peer had reset its connection."""
        if self.session.ending is not None:
            self.abort(ending)
            return
        if leg is self.upstream:
            loss = Loss(RESET_WHEN_DELIVERED, ending, detail)
            if self.downstream.tries_again(leg, loss, None):
                leg.abort()
                return
        self._decide(ending, detail)
        survivor = leg.peer
        leg.abort()
        self._reset_behind(survivor)
