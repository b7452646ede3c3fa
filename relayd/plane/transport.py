"""The plane's connections as Twisted's transports.

A :class:`PlaneTransport` provides what Twisted's own do: `ITCPTransport`, `IConsumer`,
`IPushProducer`, `IHalfCloseableDescriptor`, and `abortConnection`; and
:class:`relayd.core.interfaces.ISpliceable`.  What it does is in
:mod:`relayd.plane.connection_base` and the layers that are listed there; here is what
Twisted's interfaces ask for besides.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableDescriptor,
    IPushProducer,
    ITCPTransport,
)
from zope.interface import implementer

from relayd.core.addresses import socket_address
from relayd.core.interfaces import ISpliceable
from relayd.core.session import Direction
from relayd.net.transports import inline_urgent
from relayd.plane.connection_base import PULL, PUSH, UNREAD
from relayd.plane.large_reads import LargeReadsConnection
from relayd.plane.pacing import PacedConnection
from relayd.plane.splicing import SplicingConnection

_SOCKET = int(socket.SOL_SOCKET)

#: sock_diag(7), Linux: the memory that a socket's queues take, in bytes; the first of
#: these numbers, and the one that is asked for, is that of what was not read yet.
_SO_MEMINFO = 55


@implementer(
    ITCPTransport, IConsumer, IPushProducer, IHalfCloseableDescriptor, ISpliceable
)
class PlaneTransport(SplicingConnection):
    """A connected TCP socket; made as `relayd.plane.connection_base.ConnectionBase`."""

    __slots__ = ()

    #: Set on the listening socket, or before connecting.
    options_are_set = True

    #: As Twisted's: no TLS on this connection.
    TLS = False

    # -- ISpliceable; the rest is SplicingConnection's

    def keep_pace(self, direction: Direction) -> None:
        """See :meth:`ISpliceable.keep_pace`."""
        self._direction = direction
        # Another class instead of a question in `ready`: a connection that is not
        # limited pays nothing.  They have the same layout.
        self.__class__ = PacedTransport

    def read_much(self) -> None:
        """See :meth:`ISpliceable.read_much`."""
        # Another class again.
        self.__class__ = LargeReadsTransport

    def has_unread(self) -> bool:
        """See :meth:`ISpliceable.has_unread`."""
        try:
            return self._sock.getsockopt(_SOCKET, _SO_MEMINFO) > 0
        except OSError:
            # The kernel does not say.
            return False

    def relay_soon(self, then: Callable[[], object]) -> None:
        """See :meth:`ISpliceable.relay_soon`.

        The event still comes if there is more, or an end, an error or an urgent mark
        behind it: epoll asks the socket again as it hands an event out.
        """

        def relay() -> None:
            if self.protocol is not None:
                self.ready(UNREAD)
            then()

        # Not at once: to wake a server between two clients that are accepted costs 4 %
        # of a short session.
        self._plane.behind_batch(relay)

    # -- ITransport

    def writeSequence(self, data: Any) -> None:
        pieces = list(data)
        if not all(isinstance(piece, bytes) for piece in pieces):
            raise TypeError("Data must be bytes")
        self.write(b"".join(pieces))

    def getPeer(self) -> Any:
        peer = self._peer
        # Not kept: thousands of sessions ask once, or never.
        if isinstance(peer, str):
            return named_address(peer)
        if isinstance(peer, tuple):
            return socket_address(self._sock.family, peer)
        return peer

    def getHost(self) -> Any:
        return self._local or socket_address(
            self._sock.family, self._sock.getsockname()
        )

    # -- IPushProducer

    def stopProducing(self) -> None:
        self.loseConnection()

    # -- IConsumer

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.producer is not None:
            raise RuntimeError(
                f"Cannot register producer {producer}, because producer "
                f"{self.producer} was never unregistered."
            )
        if self.protocol is None:
            producer.stopProducing()
            return
        self.producer = producer
        self._producing = PUSH if streaming else PULL
        if not streaming:
            self.clear = False
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        self._producer_gone()

    def stopConsuming(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    @property
    def streamingProducer(self) -> bool:
        return self.producer is not None and self._producing != PULL

    # -- ITCPTransport

    def getTcpNoDelay(self) -> bool:
        return bool(self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def setTcpNoDelay(self, enabled: bool) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, enabled)

    def getTcpKeepAlive(self) -> bool:
        return bool(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, enabled)

    # -- what Twisted's transports have besides

    def fileno(self) -> int:
        return self._sock.fileno()

    def getHandle(self) -> socket.SocketType:
        """The socket, as the socket module's C class."""
        return self._sock

    @property
    def connected(self) -> bool:
        """Its protocol has not been told of the loss."""
        return self.protocol is not None

    @property
    def disconnected(self) -> bool:
        return self.protocol is None

    @property
    def reactor(self) -> Any:
        return self._plane.reactor

    def logPrefix(self) -> str:
        return type(self.protocol).__name__


class PlaneUNIXTransport(PlaneTransport):
    """A connected UNIX socket."""

    __slots__ = ()

    # A read ends where a descriptor was passed, or the sender's credentials
    # change, with more behind it.
    _ALWAYS_HINTS = select.EPOLLPRI

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        inline_urgent(self._sock)
        self._hints = self._ALWAYS_HINTS

    def keep_pace(self, direction: Direction) -> None:
        self._direction = direction
        self.__class__ = PacedUNIXTransport

    def read_much(self) -> None:
        self.__class__ = LargeReadsUNIXTransport

    def getPeer(self) -> Any:
        if isinstance(self._peer, str | bytes):
            return socket_address(socket.AF_UNIX, self._peer)
        return self._peer

    def getTcpNoDelay(self) -> bool:
        return False

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is nothing to delay."""


class PacedTransport(PacedConnection, PlaneTransport):
    """A TCP socket that is read at the pace of its direction."""

    __slots__ = ()


class PacedUNIXTransport(PacedConnection, PlaneUNIXTransport):
    """A UNIX socket, likewise."""

    __slots__ = ()


class LargeReadsTransport(LargeReadsConnection, PlaneTransport):
    """A TCP socket that is read in large pieces."""

    __slots__ = ()


class LargeReadsUNIXTransport(LargeReadsConnection, PlaneUNIXTransport):
    """A UNIX socket, likewise."""

    __slots__ = ()


def named_address(name: str) -> IPv4Address:
    """The address that is `host:port`, in IPv4."""
    host, _, port = name.rpartition(":")
    return IPv4Address("TCP", host, int(port))


def transport_class(family: int) -> type[PlaneTransport]:
    """The transport for connected sockets of a family."""
    return PlaneUNIXTransport if family == socket.AF_UNIX else PlaneTransport
