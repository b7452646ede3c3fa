"""One of a session's two connections, and what it does before the two are joined.

A leg that is not joined keeps what it reads, up to HOLD_LIMIT.  Joined, it hands what
it reads to the other leg's transport, and everything that is to be decided to the
Bridge (:mod:`relayd.stream.bridge`).

A leg is paused for reasons (:mod:`relayd.core.pauses`), and read again when the last of
them has gone.  Whoever pauses one passes a reason of their own and resumes with the
same:

    leg.pause(pauses.ASKED)
    leg.resume(pauses.ASKED)

The other leg's transport, whose registered producer a leg is, calls `pauseProducing`
and `resumeProducing`: that is PEER_FULL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import (
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    INegotiated,
    IPushProducer,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.filtering import IFilterFactory
from relayd.core.interfaces import ILossListener, IResetListener, ISpliceable
from relayd.core.pauses import BEFORE_JOINING, HOLDING, PEER_FULL
from relayd.core.session import Direction
from relayd.net.tcp_info import tcp_info, unacknowledged
from relayd.stream.delivery import WORTH_A_CHECK, Delivery
from relayd.stream.paced_reads import PacedReads

#: A leg that is not joined yet keeps at most this much, plus one read.
HOLD_LIMIT = 65536


def buffered_by(transport: Any) -> int | None:
    """Bytes that `transport` was given and has not yet handed to the kernel.

    Spliceable transports say it.  Twisted's have no public way to ask; they keep
    them in these three attributes, in every release from the oldest to the newest
    that relayd is tested with, and wrappers (TLS, PROXY) pass attributes through.
    TLS keeps besides what it can't encrypt before its handshake is done.

    :return: None for a foreign transport that can't be asked.
    """
    try:
        if ISpliceable.providedBy(transport):
            count = int(transport.unsent)
        else:
            listed: int = transport._tempDataLen  # noqa: SLF001
            count = len(transport.dataBuffer) - int(transport.offset) + listed
    except AttributeError:
        return None
    return count + sum(map(len, getattr(transport, "_appSendBuffer", ())))


def unsent(transport: Any) -> int:
    """The same, where a transport that can't be asked counts as empty."""
    return buffered_by(transport) or 0


def _closing_below(transport: Any) -> bool:
    """Whether the connection under a TLS transport is about to be closed."""
    below = getattr(transport, "transport", None)
    return bool(getattr(below, "disconnecting", False))


@implementer(IHalfCloseableProtocol, IPushProducer, IResetListener, ILossListener)
class Leg(Protocol):
    """One connection of a session.

    Until it is joined, it keeps what it reads, up to HOLD_LIMIT.  As a producer
    it stands between the other leg's transport and its own, instead of lending
    that transport its own as Twisted's examples do: a transport that loses its
    connection tells its producer to stop, which for a transport means a polite
    close, and whether the survivor is closed politely is not its decision.

    Once spliced it is told of nothing but its loss: its transport moves the bytes, and
    tells the Bridge of their ends.  Nor is it told of its loss when both directions
    have ended.  One that has such a method of its own (of its class, a mixin's, or the
    object's) is not spliced, or is told of its loss, respectively; that is decided as
    the two are joined.

    :ivar direction: counts what this leg reads.
    :ivar alive: connected, and not lost yet.
    :ivar paused: the reasons for which it is not read (:mod:`relayd.core.pauses`); 0:
        none.
    :ivar spliced: its transport hands what it reads straight to the other's.
    :cvar was_dialled: an endpoint has made it, which may have set options of its own.
    """

    transport: Any = None
    #: Is given what is read before that, instead of it being kept,
    reader: Callable[[bytes], object] | None = None
    #: and after that, unless its transport hands it on.
    sink: Callable[[bytes], object] | None = None
    #: The filters of what it reads (:mod:`relayd.stream.chain`), if there are any.
    chain: Any = None
    #: Who is asked for filters of this session alone: of the client's leg.
    own_filters: tuple[IFilterFactory, ...] = ()
    #: How far the bytes that were written here have got, once some have waited.
    delivery: Delivery | None = None
    #: How much had been written when the peer's window was last checked.
    written_at_check = 0
    was_dialled = False
    #: 1 when it was aborted, and 1 more for each `outlives_abort`.
    aborted = 0

    def __init__(self, direction: Direction) -> None:
        # Not defaults of the class: the interpreter finds these faster.
        self.direction = direction
        #: The Bridge, once the two legs are joined.
        self.bridge: Any = None
        self.held: bytearray | None = None
        self.alive = False
        self.paused = 0
        self.spliced = False
        # What a check of an idle leg sets is set here, too, or the first check
        # would give each leg made before it a dictionary of its own: 200 bytes.

    @property
    def connected(self) -> bool:  # type: ignore[override]
        """It has been, as a protocol of Twisted's says it."""
        return self.transport is not None

    @property
    def peer(self) -> Any:
        """The other leg, while the two are joined."""
        bridge = self.bridge
        if bridge is None:
            return None
        return bridge.upstream if bridge.downstream is self else bridge.downstream

    # -- called by the transport

    def makeConnection(self, transport: Any) -> None:
        # Written out in the two legs of a session as well: a line that sets attributes
        # of two classes in turn is not specialised.  2,600 instructions a session.
        self.transport = transport
        self.alive = True
        if self.paused:
            transport.pauseProducing()
        self.connectionMade()

    def dataReceived(self, data: bytes) -> None:
        sink = self.sink
        if sink is not None:
            self.direction.read += len(data)
            sink(data)
        elif self.bridge is None:
            self.hold(data)
        else:
            self.direction.keep(len(data))
            self.bridge.unwanted(self)

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

    def lost_anyway(self, reason: Failure) -> None:
        """See :meth:`ILossListener.lost_anyway`."""
        if self.alive:
            Leg.connectionLost(self, reason)

    def wants_reset(self) -> bool:
        """Until it is joined, for whatever reason it is paused."""
        return self.bridge is None

    # -- what a leg that is not joined decides

    def ended_alone(self) -> None:
        """The peer has sent its last byte, before the legs were joined."""

    def lost_alone(self, reason: Failure) -> None:
        """The connection is gone, before the legs were joined or after the end."""

    # -- pauses

    def pause(self, reason: int) -> None:
        """Stop reading, until `resume` is called for this reason.

        :param reason: one of :mod:`relayd.core.pauses`, or several.
        """
        reasons, self.paused = self.paused, self.paused | reason
        if not reasons and self.alive:
            self.transport.pauseProducing()

    def resume(self, reason: int) -> None:
        """This reason holds no longer: read on if it was the last one."""
        reasons, self.paused = self.paused, self.paused & ~reason
        # A Twisted transport that is told to read past its EOF reports it again.
        if reasons and not self.paused and self.alive and not self.direction.eof:
            self.transport.resumeProducing()

    # -- called by the other leg's transport

    def pauseProducing(self) -> None:
        self.pause(PEER_FULL)

    def resumeProducing(self) -> None:
        peer = self.peer
        if peer is not None and peer.alive and _closing_below(peer.transport):
            # A TLS peer that said goodbye is closed as soon as its buffer is
            # empty, but not while a producer is registered.  Stay paused until
            # its loss is reported: nothing can be written to it any more.
            peer.transport.unregisterProducer()
            return
        self.resume(PEER_FULL)

    def stopProducing(self) -> None:
        """The other connection is lost; the Bridge hears of it and decides."""

    # -- called by the Bridge

    def tries_again(self, leg: Leg, loss: Any, reason: Failure | None) -> bool:
        """The server's connection is lost; whether another is dialled instead.

        Asked of the downstream leg.  If so, the two are parted.

        :param leg: the server's.
        :param loss: what it means (:class:`relayd.stream.losses.Loss`).
        :param reason: what its transport says, if it has been told.
        """
        return False

    def over(self) -> None:
        """Both connections are gone: called of the downstream leg, once."""

    def hold(self, data: bytes) -> None:
        """Keep what was read before the legs are joined, unless somebody reads it."""
        if self.reader is not None:
            self.reader(data)
            return
        self.direction.keep(len(data))
        if self.held is None:
            self.held = bytearray()
        self.held += data
        if len(self.held) >= HOLD_LIMIT:
            self.pause(HOLDING)

    def flow(self) -> None:
        """Write what was held to the other leg, and from now on all that is read."""
        sink = self.peer.transport.write
        if self.direction.pace is not None:
            sink = PacedReads(self, self.direction.pace, sink)
        if not self.spliced:
            self.sink = sink
            self.peer.transport.registerProducer(self, True)
        if self.paused:
            self.resume(BEFORE_JOINING)
        held, self.held = self.held, None
        if held is not None:
            self.direction.kept -= len(held)
            # May pause this leg again: the other's buffer fills up here.
            sink(bytes(held))

    @property
    def waits_for_peer(self) -> bool:
        """Whether it is not read because the other leg's transport is full."""
        if self.spliced and self.transport.blocked:
            return True
        # Somebody else may have called `pauseProducing`.
        return bool(self.paused & PEER_FULL) and self.peer.buffered > 0

    @property
    def can_say_end(self) -> bool:
        """Whether it may tell its peer of an end, and stay open; see `shut_write`."""
        is_tls = INegotiated.providedBy(self.transport)
        return is_tls or bool(IHalfCloseableDescriptor.providedBy(self.transport))

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
            self.aborted = self.aborted or 1
            self.transport.abortConnection()

    def outlives_abort(self) -> bool:
        """Asked at each check: it was aborted before the last one, and is still alive.

        Its transport tells of an abort in the reactor's next turn.
        """
        if self.alive and self.aborted:
            self.aborted += 1
        return self.alive and self.aborted > 2

    def undelivered(self) -> int:
        """Bytes written to this leg that its peer's kernel does not have yet."""
        return unsent(self.transport) + unacknowledged(self.transport)

    # -- how far what was written has got

    @property
    def buffered(self) -> int:
        """Bytes that its transport holds; 1 for 'some' where that can't be asked."""
        if not self.alive:
            return 0
        if self.spliced:
            return int(self.transport.unsent)
        count = buffered_by(self.transport)
        if count is None:
            # It is full while it pauses its producer.
            peer = self.peer
            return int(peer.alive and bool(peer.paused & PEER_FULL))
        return count

    def check_delivery(
        self, now: float, since: float, written: int, buffered: int, last: bool
    ) -> int:
        """Ask how far what was written has got, and keep that in `delivery`.

        What the peer's kernel has taken counts as written: the kernel wakes a writer
        only when a third of its queue is free, which on a slow, willing reader may
        take longer than the timeout.

        :param since: nothing was written after that.
        :param written: bytes in all; `buffered` of them by the transport.
        :param last: a reset, or a close, waits for their delivery: what the kernel
            still has must be taken as soon as what the transport holds.
        :return: bytes in the kernel's queue.
        """
        transport = self.transport
        queued = unacknowledged(transport)
        much = written - self.written_at_check >= WORTH_A_CHECK
        if not (buffered or queued or much) and self.delivery is None:
            return 0
        if self.delivery is None:
            self.delivery = Delivery()
        info = None
        if buffered or queued or much:
            self.written_at_check = written
            info = tcp_info(transport)
        taken = written - buffered - queued
        ours, kernels = (buffered + queued, 0) if last else (buffered, queued)
        self.delivery.update(now, since, taken, ours, kernels, info)
        return queued
