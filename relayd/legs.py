"""One of a session's two connections, and what it does before the two are joined.

A leg that is not joined keeps what it reads, up to HOLD_LIMIT.  Joined, it hands what
it reads to the other leg's transport, and everything that is to be decided to the
Bridge (:mod:`relayd.bridge`).
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

from relayd.deadlines import MUCH, Delivery
from relayd.interfaces import IHearsLoss, IHearsReset, ISpliceable
from relayd.session import Direction
from relayd.tcp_info import tcp_info, unacknowledged

#: A leg that is not joined yet keeps at most this much, plus one read.
HOLD_LIMIT = 65536


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


def _closing_below(transport: Any) -> bool:
    """Whether the connection under a TLS transport is about to be closed."""
    below = getattr(transport, "transport", None)
    return bool(getattr(below, "disconnecting", False))


@implementer(IHalfCloseableProtocol, IPushProducer, IHearsReset, IHearsLoss)
class Leg(Protocol):
    """One connection of a session.

    Until it is joined, it keeps what it reads, up to HOLD_LIMIT.  As a producer
    it stands between the other leg's transport and its own, instead of lending
    that transport its own as Twisted's examples do: a transport that loses its
    connection tells its producer to stop, which for a transport means a polite
    close, and whether the survivor is closed politely is not its decision.

    Once spliced it hears of nothing but its loss: bytes and their ends pass it by.  Nor
    of its loss at a common end.  One that has such a method of its own (of its class, a
    mixin's, or the object's) is not spliced, or is told of its loss, respectively; that
    is decided as the two are joined.

    :ivar direction: counts what this leg reads.
    :ivar alive: connected, and not lost yet.
    :ivar paused: told to stop reading.
    :ivar spliced: its transport hands what it reads straight to the other's.
    """

    transport: Any = None
    #: The other leg, while the two are joined.
    peer: Any = None
    #: What has become of the bytes that were written here, once some have waited.
    delivery: Delivery | None = None
    #: When `Bridge.check` has asked about them; and what was written when it last had
    #: a look at the peer's window.
    asked_at = 0.0
    seen = 0
    #: Looks of the wheel at its being aborted, and that itself: see `outlives_abort`.
    aborted = 0

    def __init__(self, direction: Direction) -> None:
        # Not defaults of the class: the interpreter finds these faster.
        self.direction = direction
        #: The Bridge, once the two legs are joined.
        self.bridge: Any = None
        self.sink: Callable[[bytes], object] | None = None
        self.held: bytearray | None = None
        self.alive = False
        self.paused = False
        self.spliced = False

    # -- called by the transport

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.alive = True
        self.connectionMade()

    def dataReceived(self, data: bytes) -> None:
        direction, count = self.direction, len(data)
        direction.read += count
        sink = self.sink
        if sink is not None:
            direction.written += count
            sink(data)
        elif self.bridge is None:
            self.hold(data)
        else:
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
        """See :meth:`IHearsLoss.lost_anyway`."""
        if self.alive:
            Leg.connectionLost(self, reason)

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
            self.direction.written += len(held)
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
            self.aborted = self.aborted or 1
            self.transport.abortConnection()

    def outlives_abort(self) -> bool:
        """Asked at each look: it was aborted before the last, and not told of its loss.

        An abort is told in the reactor's next turn.
        """
        if self.alive and self.aborted:
            self.aborted += 1
        return self.alive and self.aborted > 2

    def undelivered(self) -> int:
        """Bytes written to this leg that its peer's kernel does not have yet."""
        return unsent(self.transport) + unacknowledged(self.transport)

    # -- how far what was written has got

    @property
    def held_bytes(self) -> int:
        """Bytes that its transport holds; 1 for 'some' where that can't be asked."""
        if not self.alive:
            return 0
        if self.spliced:
            return int(self.transport.unsent)
        # A foreign transport that can't be asked is full while it pauses.
        peer = self.peer
        return unsent(self.transport) or int(peer.alive and peer.paused)

    def look(
        self, now: float, since: float, written: int, held: int, last_words: bool
    ) -> int:
        """Ask how far what was written has got, and keep that in `delivery`.

        What the peer's kernel has taken counts as written: the kernel wakes a writer
        only when a third of its queue is free, which on a slow, willing reader may
        take longer than the timeout.

        :param since: nothing was written after that.
        :param written: bytes in all; `held` of them by the transport.
        :param last_words: the kernel's queue is to be delivered, too, as soon as what
            the transport holds.
        :return: bytes in the kernel's queue.
        """
        transport = self.transport
        queued = unacknowledged(transport)
        self.asked_at = now
        much = written - self.seen >= MUCH
        if not (held or queued or much) and self.delivery is None:
            return 0
        if self.delivery is None:
            self.delivery = Delivery()
        info = None
        if held or queued or much:
            self.seen = written
            info = tcp_info(transport)
        taken = written - held - queued
        ours, kernels = (held + queued, 0) if last_words else (held, queued)
        self.delivery.look(now, since, taken, ours, kernels, info)
        return queued
