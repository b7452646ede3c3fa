"""Two connections joined: bytes, backpressure, half-close, and every way to end.

A session has two legs, the client's (downstream) and the server's (upstream).
What one leg reads, it writes to the other's transport.  The Bridge joins them
and is the only place that passes on an end of data, resets or closes.

The rules, by their numbers in ARCHITECTURE.md:

2. Each leg is the push producer of the other's transport: when that transport's
   buffer is full the leg stops reading.  Nothing else buffers.  Two transports
   that are ISpliceable see to that between themselves, and the bytes don't pass
   through the legs at all.
3. Stall: a transport holds bytes and the peer's kernel took none of them for
   `stall` seconds, and what a slow reader's kernel needs beyond that
   (:mod:`relayd.deadlines`).  Both connections are aborted.  A peer that does not
   even answer is lost, which is read as a reset (6).
4. End of data (EOF) on one leg: the other's buffer is written, then its write
   side is shut; the opposite direction goes on.
5. The pair ends when both directions have ended and all is written, or at once
   when a write fails.
6. Reset on one leg: what was read from it is delivered, then the other leg is
   reset as well.
8. A pair on which nothing moves ends after `idle` seconds, or `half_close`
   seconds once one direction has ended.

How a lost connection is read.  Twisted reports a reset and a failed write with
the same ConnectionLost.  A leg that was being read learns of a reset by
reading; one that was paused, or had reached EOF, can only have learnt of it by
writing.  So the first is a reset (rule 6) and the second a failed write (5).  A
transport that is told of a reset by the kernel says so (PeerReset), and what was read
is delivered: it is a failed write if something that was written to the peer had not
arrived, and else a reset.  Of a leg that is not read, and to which nothing is written,
other transports may not hear: the kernel is asked once a tick, which comes to the same.

What it costs.  For each chunk: one addition, one call of the other transport's
`write`; nothing where it is spliced.  Activity is not timed; :meth:`Bridge.check`
looks at the counters once a tick and sees whether they moved.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from twisted.internet.error import ConnectionClosed, ConnectionDone
from twisted.internet.interfaces import IDelayedCall, INegotiated, IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.deadlines import MUCH, Timeouts
from relayd.interfaces import ISpliceable, ISplicer
from relayd.legs import HOLD_LIMIT, Leg, unsent
from relayd.session import Direction, Ending, Session
from relayd.tcp_info import is_dead, unread, was_reset
from relayd.tls import in_words, is_openssls
from relayd.transports import PeerReset, PeerVanished

#: What programs that embed a relay know by this module's name.
__all__ = ("HOLD_LIMIT", "Bridge", "Leg", "Timeouts", "unsent")

# An enum's members cost a look-up by its metaclass each time.
_DONE = Ending.DONE

#: Classes of transports of which is remembered whether they splice.
KINDS_REMEMBERED = 64

#: How often a reset looks whether the bytes before it have arrived, in seconds;
#: the pause doubles up to the second figure.
RESET_POLL_FIRST, RESET_POLL_LAST = 0.005, 0.5

#: What `_shortcut_of_kinds` has answered: a look-up that takes no call.
_shortcuts: dict[Any, int] = {}

#: How two legs' transports may move bytes without them: not at all; but they are told
#: of their loss; and they are not; or whatever the objects themselves say.
_NONE, _TOLD, _UNTOLD, _ASK = range(4)


def _shortcut_of_kinds(kinds: tuple[Any, Any, Any]) -> int:
    """Which shortcut there is for a transport and two legs of these classes.

    Asked of the transport's class: a wrapper (TLS, PROXY, throttling) claims to provide
    all that the transport below it does, and would be cut out of the way.
    """
    if len(_shortcuts) >= KINDS_REMEMBERED:
        # A program that makes up classes as it goes.
        _shortcuts.clear()
    transport, *legs = kinds
    if not ISpliceable.implementedBy(transport):
        answer = _NONE
    elif all(leg.__module__.startswith("relayd.") for leg in legs):
        answer = _shortcut_past(*legs)
    else:
        # Classes that are not ours may give their objects methods.
        answer = _ASK
    _shortcuts[kinds] = answer
    return answer


def _shortcut_past(*legs: Any) -> int:
    """Which shortcut these legs leave, or legs of these classes."""
    if any(_has_own(leg, name) for leg in legs for name in _PASSED_BY):
        return _NONE
    return _TOLD if any(_has_own(leg, "connectionLost") for leg in legs) else _UNTOLD


def _has_own(leg: Any, name: str) -> bool:
    """Whether a leg, or a class of them, has another method of this name than Leg."""
    ours = getattr(Leg, name)
    return getattr(leg, name) not in (ours, MethodType(ours, leg))


def _is_tls(error: BaseException) -> bool:
    """A failed TLS handshake.  Asked by name: TLS is an optional dependency."""
    by_name = type(error).__module__.partition(".")[0] == "service_identity"
    return by_name or is_openssls(error)


def _tls_detail(leg: Leg, error: BaseException) -> str:
    """What to add to a TLS connection's reset."""
    if _is_tls(error):
        return f"TLS: {in_words(error)}"
    return "TLS without close_notify" if INegotiated.providedBy(leg.transport) else ""


#: Methods of a leg that are not called while it is spliced.
_PASSED_BY = (
    "dataReceived",
    "readConnectionLost",
    "writeConnectionLost",
    "pauseProducing",
    "resumeProducing",
    "stopProducing",
    "shut_write",
    "close",
)


@implementer(ISplicer)
class Bridge:
    """Joins two connected legs until an Ending.

    :param session: gets `ending` and `detail` when the ending is decided.
    :param clock: seconds, and the timer of a reset that waits for delivery.
    :param on_over: called once, with `downstream`, when both connections are gone.
    """

    __slots__ = (
        "_active_at",
        "_clock",
        "_closing",
        "_on_over",
        "_poll",
        "_progress",
        "_queued",
        "_shortcut",
        "_timeouts",
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
        on_over: Callable[[Any], None],
    ) -> None:
        self.session = session
        self.downstream = downstream
        self.upstream = upstream
        self._timeouts = timeouts
        self._clock = clock
        self._on_over = on_over
        self._closing = False
        self._poll: IDelayedCall | None = None
        self._progress = -1
        #: What the kernels' queues held at the last look; None: look again.
        self._queued: int | None = None
        # Legs are joined as soon as the session is connected.
        self._active_at = session.connected_at or clock.seconds()

    def start(self, ask: bool = True) -> None:
        """Join the legs.  Both are connected; either may have data or EOF already.

        :param ask: somebody else has had the legs in hand, and may have put methods on
            them; if not, only their classes are asked.
        """
        down, up = self.downstream, self.upstream
        down.bridge = up.bridge = self
        down.peer, up.peer = up, down
        kinds = (type(down.transport), type(down), type(up))
        shortcut = _shortcuts.get(kinds)
        if shortcut is None:
            shortcut = _shortcut_of_kinds(kinds)
        if shortcut == _ASK or (ask and shortcut):
            shortcut = _shortcut_past(down, up)
        self._shortcut = shortcut
        if shortcut:
            down.spliced = up.spliced = down.transport.splice(
                up.transport, down.direction, up.direction, self
            )
        # Unless there is something to write: a spliced leg's transport sees to it.
        if down.held is not None or not down.spliced:
            down.flow()
        if up.held is not None or not up.spliced:
            up.flow()
        if down.direction.eof and self.session.ending is None:
            self.eof(down)
        if up.direction.eof and self.session.ending is None:
            self.eof(up)

    # -- what the legs, or their transports, report

    def eof(self, leg: Leg) -> None:
        """`leg` has read its last byte."""
        if self.session.ending is not None or self._closing:
            return
        peer = leg.peer
        if peer.direction.eof:
            self._close_both()
        else:
            peer.shut_write()

    def ended(self, direction: Direction, sink: Any) -> None:
        """See :meth:`ISplicer.ended`."""
        direction.eof = True
        session = self.session
        if session.ending is not None or self._closing:
            return
        if session.up.eof and session.down.eof:
            self._close_both()
        else:
            sink.loseWriteConnection()

    def lost(self, leg: Leg, reason: Failure) -> None:
        """`leg`'s connection is gone."""
        if self.session.ending is None and not (
            self._closing and isinstance(reason.value, ConnectionDone)
        ):
            self._judge(leg, reason)
        # Closing the peer may have ended it, and the session, from within.
        if leg.bridge is self and not leg.peer.alive:
            self._over()

    def _judge(self, leg: Leg, reason: Failure) -> None:
        down = leg is self.downstream
        error: Any = reason.value
        if isinstance(error, ConnectionDone):
            self._left(leg)
        elif isinstance(error, PeerVanished):
            self._decide(
                Ending.DOWNSTREAM_LOST if down else Ending.UPSTREAM_LOST,
                str(error),
            )
            self._reset_behind(leg.peer)
        elif INegotiated.providedBy(leg.transport) and leg.peer.direction.eof:
            # It was told that the other side has ended, and closed its own
            # without the goodbye that TLS asks for, as most clients do.
            if not self._closing:
                self._left(leg)
        elif _is_tls(error) and not down and not leg.direction.read:
            self._decide(Ending.CONNECT_FAILED, f"TLS: {in_words(error)}")
            leg.peer.abort()
        elif not isinstance(error, ConnectionClosed | OSError) and not _is_tls(error):
            self._decide(Ending.FAILED, repr(error))
            leg.peer.abort()
        elif isinstance(error, PeerReset):
            self._decide(self._name_of_reset(leg, error.undelivered))
            self._reset_behind(leg.peer)
        elif self._closing or leg.waits or leg.direction.eof:
            self._decide(
                Ending.DOWNSTREAM_WRITE_FAILED if down else Ending.UPSTREAM_WRITE_FAILED
            )
            leg.peer.abort()
        else:
            self._decide(self._name_of_reset(leg, 0), _tls_detail(leg, error))
            self._reset_behind(leg.peer)

    def _name_of_reset(self, leg: Leg, undelivered: int) -> Ending:
        """A reset that cost `undelivered` bytes written to `leg` is a failed write."""
        if leg is self.downstream:
            resets = Ending.DOWNSTREAM_RESET, Ending.DOWNSTREAM_WRITE_FAILED
        else:
            resets = Ending.UPSTREAM_RESET, Ending.UPSTREAM_WRITE_FAILED
        return resets[undelivered > 0]

    def _reset_behind(self, survivor: Leg) -> None:
        """Reset the survivor once it has what was read for it."""
        if not survivor.alive:
            return
        survivor.transport.unregisterProducer()
        survivor.pauseProducing()
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
            self._closing = True
            survivor.close()
            return
        # Closing it now would drop what it has not read yet.
        survivor.shut_write()
        if survivor.paused:
            # For a buffer that is gone; it is read for its end of data.
            survivor.paused = False
            survivor.transport.resumeProducing()

    def unwanted(self, survivor: Leg) -> None:
        """The survivor of a leg that left still sends to it."""
        if not survivor.undelivered():
            self.cut(
                Ending.DOWNSTREAM_WRITE_FAILED
                if survivor is self.upstream
                else Ending.UPSTREAM_WRITE_FAILED
            )

    def _reset_when_delivered(self, leg: Leg, pause: float) -> None:
        # An abort drops what the kernel still has to send as well as what we
        # have.  Nothing tells when the peer has acknowledged it all, so look
        # again; the stall timeout bounds this.
        self._poll = None
        if not leg.undelivered() or is_dead(leg.transport):
            leg.abort()
            return
        self._poll = self._clock.callLater(
            pause, self._reset_when_delivered, leg, min(pause * 2, RESET_POLL_LAST)
        )

    # -- endings

    def cut(self, ending: Ending, detail: str = "") -> None:
        """End the session now: reset both connections."""
        if self.session.ending is None:
            self._decide(ending, detail)
        self.downstream.abort()
        self.upstream.abort()

    def _close_both(self) -> None:
        # Closing writes what is buffered first.  Both directions have ended, so
        # nothing can arrive that a close would turn into a reset.
        self._closing = True
        down, up = self.downstream, self.upstream
        if down.spliced:
            if self._shortcut == _UNTOLD and down.transport.close_both(down, up):
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
            self.session.ending = _DONE
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        # The legs hold each other, and this.
        down, up = self.downstream, self.upstream
        down.bridge = down.sink = down.peer = up.bridge = up.sink = up.peer = None
        over = self._on_over
        over(down)

    # -- deadlines

    def check(self, now: float) -> None:
        """Look at the deadlines; called about once a tick."""
        session, stall = self.session, self._timeouts.stall
        up, down = self.upstream, self.downstream
        held_up, held_down = up.held_bytes, down.held_bytes
        to_server, to_client = session.up, session.down
        ended = to_server.eof + to_client.eof
        # Grows with every byte read, every byte that a kernel takes and every EOF.
        progress = to_server.read + to_server.written - held_up
        progress += to_client.read + to_client.written - held_down + ended
        moved = progress != self._progress
        # Our buffers may be empty while a kernel still delivers: quiet begins when its
        # queues are empty, too.  So does the reset of one that has last words to get.
        last_words = session.ending is not None
        ask = last_words or (not moved and self._queued != 0)
        # Nothing was written since then, so what waits has waited since then.
        since = now if moved else self._active_at
        queued = 0
        for leg, written, held, blocks in (
            (up, to_server.written, held_up, held_down),
            (down, to_client.written, held_down, held_up),
        ):
            if not leg.alive:
                continue
            delivery = leg.delivery
            if (
                ask
                or held
                or written - leg.seen >= MUCH
                or (delivery is not None and delivery.waits)
                # While other things move, one in a while will do.
                or (moved and now - leg.asked_at >= stall / 2 > 0)
            ):
                queued += leg.look(now, since, written, held, last_words)
                if stall and self._ended_by_peer(now, leg, held):
                    return
            is_read = not (leg.direction.eof or leg.paused or blocks)
            if not is_read and self._ended_unread(leg):
                return
        if moved:
            self._progress = progress
            self._active_at = now
            self._queued = None
            return
        if self._queued is None:
            # The first look only tells where it starts from.  Until then the kernel may
            # have delivered: one that is late, as the machine was paused, knows no more
            # than one that is in time.
            self._active_at = max(self._active_at, now - self._timeouts.tick)
            self._queued = queued
        elif self._queued != 0 and queued != self._queued:
            self._active_at = now
            self._queued = queued
        limit = self._timeouts.half_close if ended else self._timeouts.idle
        if limit and now - self._active_at >= limit:
            self.cut(
                Ending.HALF_CLOSED if ended else Ending.IDLE,
                f"nothing moved for {limit:g} s",
            )

    def _ended_by_peer(self, now: float, leg: Leg, held: int) -> bool:
        """End the session if `leg`'s peer is gone, or takes nothing."""
        delivery, stall = leg.delivery, self._timeouts.stall
        if delivery is None:
            return False
        down = leg is self.downstream
        silence = delivery.silence(now)
        if silence >= stall:
            waiting = leg.undelivered()
            self._give_up(
                leg,
                Ending.DOWNSTREAM_LOST if down else Ending.UPSTREAM_LOST,
                f"{waiting} bytes unacknowledged for {silence:.1f} s",
            )
            return True
        limit = stall + delivery.allowance
        if delivery.idleness(now) >= limit:
            self.cut(
                Ending.DOWNSTREAM_STALLED if down else Ending.UPSTREAM_STALLED,
                f"{held} bytes waited {round(limit, 1):g} s",
            )
            return True
        return False

    def _ended_unread(self, leg: Leg) -> bool:
        """End the session if a connection that is not read was reset.

        Its transport may not hear of that before it writes, or reads, again.
        """
        if (
            self._closing
            or self.session.ending is not None
            or not was_reset(leg.transport)
            # What it sent before is read as the other side takes it.
            or (not leg.direction.eof and unread(leg.transport))
        ):
            return False
        self._give_up(leg, self._name_of_reset(leg, leg.undelivered()))
        return True

    def _give_up(self, leg: Leg, ending: Ending, detail: str = "") -> None:
        """End the session as if `leg`'s peer had reset its connection."""
        if self.session.ending is not None:
            self.cut(ending)
            return
        self._decide(ending, detail)
        survivor = leg.peer
        leg.abort()
        self._reset_behind(survivor)
