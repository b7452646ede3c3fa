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
   `stall` seconds.  Both connections are aborted.
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
transport that is told of a reset by the kernel says so (PeerReset): behind an EOF it
counts as a failed write, too, but what was read is delivered.

What it costs.  For each chunk: one addition, one call of the other transport's
`write`; nothing where it is spliced.  Activity is not timed; :meth:`Bridge.check`
looks at the counters once a tick and sees whether they moved.
"""

from __future__ import annotations

import fcntl
import select
import struct
import sys
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.error import ConnectionClosed, ConnectionDone
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    INegotiated,
    IPushProducer,
    IReactorTime,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.interfaces import IHearsReset, ISpliceable, ISplicer
from relayd.session import Direction, Ending, Session
from relayd.transports import PeerReset

# An enum's members cost a look-up by its metaclass each time.
_DONE = Ending.DONE

#: A leg that is not joined yet keeps at most this much, plus one read.
HOLD_LIMIT = 65536

#: Classes of transports of which is remembered whether they splice.
KINDS_REMEMBERED = 64

#: Linux, sockios(7): the bytes in a socket's send queue that the peer's kernel
#: has not acknowledged.  The same request as TIOCOUTQ; None elsewhere.
SIOCOUTQ = 0x5411 if sys.platform.startswith("linux") else None

#: How often a reset looks whether the bytes before it have arrived, in seconds;
#: the pause doubles up to the second figure.
RESET_POLL_FIRST, RESET_POLL_LAST = 0.005, 0.5


def _not_negative(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{attribute.name} must not be negative: {value!r}")


@attrs.frozen
class Timeouts:
    """How long a session may stay in each state, in seconds; 0 is for ever.

    :ivar connect: until the upstream connection stands, with its TLS.
    :ivar stall: with bytes buffered and none of them taken by the peer.
    :ivar idle: with nothing moving.
    :ivar half_close: with nothing moving, after one direction has ended.
    :ivar handshake: until the client has done its handshake, of TLS or SOCKS4 or both.
    """

    connect: float = attrs.field(default=10.0, validator=_not_negative)
    stall: float = attrs.field(default=10.0, validator=_not_negative)
    idle: float = attrs.field(default=3600.0, validator=_not_negative)
    half_close: float = attrs.field(default=300.0, validator=_not_negative)
    handshake: float = attrs.field(default=30.0, validator=_not_negative)

    @property
    def tick(self) -> float:
        """How often sessions are looked at: an eighth of the shortest, <= 1 s."""
        given: list[float] = [t for t in attrs.astuple(self) if t]
        return max(min([1.0, *(t / 8 for t in given)]), 0.01)


def unsent(transport: Any) -> int:
    """Bytes that `transport` was given and has not yet handed to the kernel.

    Spliceable transports say it.  Twisted's have no public way to ask; they keep
    them in these three attributes, in every release from the oldest to the newest
    that relayd is tested with, and wrappers (TLS, PROXY) pass attributes through.
    A foreign transport that has none of them counts as empty.
    """
    if ISpliceable.providedBy(transport):
        return int(transport.unsent)
    try:
        listed: int = transport._tempDataLen  # noqa: SLF001
        return len(transport.dataBuffer) - int(transport.offset) + listed
    except AttributeError:
        return 0


def unacknowledged(transport: Any) -> int:
    """Bytes in the kernel's send queue for `transport`; 0 where it can't tell."""
    if SIOCOUTQ is None:
        return 0
    try:
        queued = fcntl.ioctl(transport.fileno(), SIOCOUTQ, b"\0\0\0\0")
    except (AttributeError, OSError, TypeError, ValueError):
        # Not a socket of ours, or closed a moment ago.
        return 0
    return int(struct.unpack("i", queued)[0])


#: What `_can_splice` has answered: a look-up that takes no call.
_spliceable: dict[Any, bool] = {}


def _can_splice(kind: Any) -> bool:
    """Whether transports of this class are ISpliceable.

    Asked of the class: a wrapper (TLS, PROXY, throttling) claims to provide all
    that the transport below it does, and would be cut out of the way.
    """
    if len(_spliceable) >= KINDS_REMEMBERED:
        # A program that makes up classes as it goes.
        _spliceable.clear()
    answer = _spliceable[kind] = bool(ISpliceable.implementedBy(kind))
    return answer


def _is_tls(error: BaseException) -> bool:
    """A failed TLS handshake.  Asked by name: TLS is an optional dependency."""
    return type(error).__module__.partition(".")[0] in ("OpenSSL", "service_identity")


def _closing_below(transport: Any) -> bool:
    """Whether the connection under a TLS transport is about to be closed."""
    below = getattr(transport, "transport", None)
    return bool(getattr(below, "disconnecting", False))


def is_dead(transport: Any) -> bool:
    """Whether the kernel knows that a connection which nobody reads is gone.

    Its unacknowledged bytes stay in the queue for ever then.
    """
    poll = select.poll()
    try:
        poll.register(transport.fileno(), 0)
    except (AttributeError, TypeError, ValueError):
        return False
    return bool(poll.poll(0))


def _tls_detail(leg: Leg, error: BaseException) -> str:
    """What to add to a TLS connection's reset."""
    if _is_tls(error):
        return f"TLS: {error!r}"
    return "TLS without close_notify" if INegotiated.providedBy(leg.transport) else ""


@implementer(IHalfCloseableProtocol, IPushProducer, IHearsReset)
class Leg(Protocol):
    """One connection of a session.

    Until it is joined, it keeps what it reads, up to HOLD_LIMIT.  As a producer
    it stands between the other leg's transport and its own, instead of lending
    that transport its own as Twisted's examples do: a transport that loses its
    connection tells its producer to stop, which for a transport means a polite
    close, and whether the survivor is closed politely is not its decision.

    Once spliced it hears of nothing but its loss: bytes and their ends pass it by.  Nor
    of its loss at a common end, unless its class has a `connectionLost` of its own.

    :ivar direction: counts what this leg reads.
    :ivar alive: connected, and not lost yet.
    :ivar paused: told to stop reading.
    :ivar spliced: its transport hands what it reads straight to the other's.
    """

    transport: Any = None
    #: The other leg, while the two are joined.
    peer: Any = None
    #: What `Bridge.check` saw delivered while bytes waited, and when that grew.
    delivered: int | None = None
    delivered_at = 0.0

    def __init__(self, direction: Direction) -> None:
        # Not defaults of the class: the interpreter finds these faster.
        self.direction = direction
        self.bridge: Bridge | None = None
        self.sink: Callable[[bytes], object] | None = None
        self.held: bytearray | None = None
        self.alive = False
        self.paused = False
        self.spliced = False

    # -- called by the transport

    def makeConnection(self, transport: Any) -> None:
        # In one call what Twisted's does in two, twice in each session.
        self.transport = transport
        self.alive = True

    def dataReceived(self, data: bytes) -> None:
        self.direction.bytes += len(data)
        if self.sink is None:
            self.hold(data)
        else:
            self.sink(data)

    def readConnectionLost(self) -> None:
        self.direction.eof = True
        bridge = self.bridge
        if bridge is not None:
            bridge.eof(self)
        else:
            self.ended_alone()

    def writeConnectionLost(self) -> None:
        """The write side is shut, as the Bridge asked; nothing is left to do."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.alive = False
        bridge = self.bridge
        if bridge is not None:
            bridge.lost(self, reason)
        else:
            self.lost_alone(reason)

    def hears_reset(self) -> bool:
        """Until it is joined: what it has not read by then is nobody's."""
        return self.bridge is None

    # -- what a leg that is not joined decides

    def ended_alone(self) -> None:
        """The peer has sent its last byte, before the legs were joined."""

    def lost_alone(self, reason: Failure) -> None:
        """The connection is gone, before the legs were joined or after the end."""

    # -- called by the other leg's transport

    def pauseProducing(self) -> None:
        self.paused = True
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        if self.bridge is not None and _closing_below(self.peer.transport):
            # A TLS peer that said goodbye is closed as soon as its buffer is
            # empty, but not while a producer is registered.  Stay paused until
            # its loss is reported: nothing can be written to it any more.
            self.peer.transport.unregisterProducer()
            return
        self.paused = False
        # A Twisted transport that is told to read past its EOF reports it again.
        if not self.direction.eof:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The other connection is lost; the Bridge hears of it and decides."""

    # -- called by the Bridge

    def hold(self, data: bytes) -> None:
        """Keep what was read before the legs are joined."""
        if self.held is None:
            self.held = bytearray()
        self.held += data
        if len(self.held) >= HOLD_LIMIT:
            self.pauseProducing()

    def flow(self) -> None:
        """Write what was held to the other leg, and from now on all that is read."""
        sink = self.peer.transport.write
        if not self.spliced:
            self.sink = sink
            self.peer.transport.registerProducer(self, True)
        if self.paused:
            self.resumeProducing()
        held, self.held = self.held, None
        if held is not None:
            # May pause this leg again: the other's buffer fills up here.
            sink(bytes(held))

    @property
    def waits(self) -> bool:
        """Whether it is not read because the other leg's buffer is full."""
        return self.paused or (self.spliced and self.transport.blocked)

    def shut_write(self) -> None:
        """Pass on the other leg's EOF, after what is buffered."""
        transport = self.transport
        # With a paused producer registered Twisted resumes that instead of
        # shutting down, and never comes back to it.
        transport.unregisterProducer()
        if INegotiated.providedBy(transport):
            # TLS: sends close_notify and reads on until the peer's.
            transport.loseConnection()
        elif IHalfCloseableDescriptor.providedBy(transport):
            self.transport.loseWriteConnection()
        # Any other transport can't say it.  Closing would lose the response, so
        # it stays open for the peer to end, within the half-close timeout.

    def close(self) -> None:
        """Write what is buffered, then close politely."""
        # Twisted's loseConnection waits for a registered producer to finish.
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def abort(self) -> None:
        """Reset the connection now and drop what is buffered."""
        if self.alive:
            self.transport.abortConnection()

    def undelivered(self) -> int:
        """Bytes written to this leg that its peer's kernel does not have yet."""
        return unsent(self.transport) + unacknowledged(self.transport)


#: What a class of legs has that does not care for its loss in a way of its own.
_LEGS_LOSS = Leg.connectionLost


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

    def start(self) -> None:
        """Join the legs.  Both are connected; either may have data or EOF already."""
        down, up = self.downstream, self.upstream
        down.bridge = up.bridge = self
        down.peer, up.peer = up, down
        kind: Any = type(down.transport)
        can_splice = _spliceable.get(kind)
        if can_splice is None:
            can_splice = _can_splice(kind)
        if can_splice:
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
        elif INegotiated.providedBy(leg.transport) and leg.peer.direction.eof:
            # It was told that the other side has ended, and closed its own
            # without the goodbye that TLS asks for, as most clients do.
            if not self._closing:
                self._left(leg)
        elif _is_tls(error) and not down and not leg.direction.bytes:
            self._decide(Ending.CONNECT_FAILED, f"TLS: {error!r}")
            leg.peer.abort()
        elif not isinstance(error, ConnectionClosed | OSError) and not _is_tls(error):
            self._decide(Ending.FAILED, repr(error))
            leg.peer.abort()
        elif self._closing or leg.waits or leg.direction.eof:
            self._decide(
                Ending.DOWNSTREAM_WRITE_FAILED if down else Ending.UPSTREAM_WRITE_FAILED
            )
            if isinstance(error, PeerReset):
                self._reset_behind(leg.peer)
            else:
                leg.peer.abort()
        else:
            self._decide(
                Ending.DOWNSTREAM_RESET if down else Ending.UPSTREAM_RESET,
                _tls_detail(leg, error),
            )
            self._reset_behind(leg.peer)

    def _reset_behind(self, survivor: Leg) -> None:
        """Reset the survivor once it has what was read for it."""
        if survivor.alive:
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
        survivor.sink = self._unwanted
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

    def _unwanted(self, _: bytes) -> None:
        """The survivor of a leg that left still sends to it."""
        survivor = self.upstream if self.upstream.alive else self.downstream
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
            client: Any = type(down)
            server: Any = type(up)
            # A subclass may have to be told.
            if (
                client.connectionLost is _LEGS_LOSS
                and server.connectionLost is _LEGS_LOSS
                and down.transport.close_both(down, up)
            ):
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
        session, timeouts = self.session, self._timeouts
        waiting = 0
        for leg, written in (
            (self.upstream, session.up.bytes),
            (self.downstream, session.down.bytes),
        ):
            # A foreign transport that can't be asked is full while it pauses.
            buffered = int(leg.alive and (unsent(leg.transport) or leg.peer.waits))
            if session.ending is not None and leg.alive:
                # It is to be reset once its kernel's queue is delivered, too.
                buffered = leg.undelivered()
            if not buffered:
                leg.delivered = None
                continue
            waiting += buffered
            # What the peer's kernel has taken counts as written: the kernel
            # wakes a writer only when a third of its queue is free, which on
            # a slow, willing reader may take longer than the timeout.
            delivered = written - buffered - unacknowledged(leg.transport)
            if leg.delivered is None or delivered > leg.delivered:
                leg.delivered = delivered
                leg.delivered_at = now
            elif timeouts.stall and now - leg.delivered_at >= timeouts.stall:
                self.cut(
                    Ending.DOWNSTREAM_STALLED
                    if leg is self.downstream
                    else Ending.UPSTREAM_STALLED,
                    f"{buffered} bytes waited {timeouts.stall:g} s",
                )
                return
        # Grows with every byte read, every byte written and every EOF.
        ended = session.up.eof + session.down.eof
        progress = 2 * (session.up.bytes + session.down.bytes) - waiting + ended
        if progress != self._progress:
            self._progress = progress
            self._active_at = now
            self._queued = None
            return
        if self._queued != 0:
            # Our buffers are empty, but a kernel may still be delivering: quiet
            # begins when its queues are empty, too.
            queued = sum(
                unacknowledged(leg.transport)
                for leg in (self.downstream, self.upstream)
                if leg.alive
            )
            if queued != self._queued:
                # The first look only tells where it starts from.
                if self._queued is not None:
                    self._active_at = now
                self._queued = queued
        limit = timeouts.half_close if ended else timeouts.idle
        if limit and now - self._active_at >= limit:
            self.cut(
                Ending.HALF_CLOSED if ended else Ending.IDLE,
                f"nothing moved for {limit:g} s",
            )
