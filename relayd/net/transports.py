"""Twisted's connections for sockets that relayd accepted or connected itself.

They are Twisted's own in all but three things.  A connection that has nothing
buffered does at once what Twisted does in another turn of the reactor: it hands
what is written to the kernel, shuts its write side, closes after its end of
data.  A short session has four such turns, a third of what it costs, and a
request with its response has two.  A socket's options are set before it
gets here, once on the listening socket, whose connections inherit them.  And a
connection whose peer can't be reached any more is told apart from a reset.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twisted.internet import tcp, unix
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.interfaces import ILossListener
from relayd.net.libc import disconnect
from relayd.net.monotonic import monotonic

if TYPE_CHECKING:
    from twisted.internet.interfaces import IAddress

log = Logger(namespace="relayd.transports")

_DONE = Failure(CONNECTION_DONE)

_UNIX = int(socket.AF_UNIX)
_TCP, _NODELAY = int(socket.IPPROTO_TCP), int(socket.TCP_NODELAY)

#: A silent peer is probed after so many seconds, again after so many, and is gone when
#: it has not answered so many probes: tcp(7).  The kernel's own figures (7,200, 75, 9)
#: come after the idle timeout.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 60, 15, 4

#: Whether accepted connections have the listening socket's options.
KEEPALIVE_IS_INHERITED = sys.platform.startswith("linux")

# macOS has another name for the first.
_IDLE = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
_INTERVAL = getattr(socket, "TCP_KEEPINTVL", None)
_COUNT = getattr(socket, "TCP_KEEPCNT", None)

_SOCKET = int(socket.SOL_SOCKET)
_OOBINLINE = int(socket.SO_OOBINLINE)

#: What `set_options` sets.
_OPTIONS = ((_TCP, _NODELAY), (_SOCKET, _OOBINLINE))

#: SO_LINGER, socket(7): drop what is unsent, and reset.
_LINGER, _RESET = int(socket.SO_LINGER), struct.pack("ii", 1, 0)


class PeerVanished(ConnectionLost):
    """Nothing is heard of the peer any more, which has not reset the connection.

    Keepalive or the retransmissions were given up, or the network says that there is
    no way to it.  The message is that of the system's error.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class PeerReset(ConnectionLost):
    """A reset that the kernel has told of by itself: no read and no write has met it.

    It came behind the end of data, or while the protocol did not read.

    :ivar undelivered: how many bytes were written that the peer's kernel did not have.
    """

    def __init__(self, undelivered: int = 0) -> None:
        super().__init__()
        self.undelivered = undelivered


#: tcp(7): what the kernel has then.
_VANISHED = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}
)

#: And besides, of any connection that is lost; ECONNREFUSED is what some firewalls
#: answer to one that stood.
LOSSES = _VANISHED | {
    errno.ECONNRESET,
    errno.EPIPE,
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
}


def lost_by(number: int | None) -> ConnectionLost:
    """What a connection is lost with, by the errno of the call that said so."""
    if number in _VANISHED:
        return PeerVanished(os.strerror(number or 0))
    return CONNECTION_LOST


def loss_failed(protocol: Any, reason: Failure) -> None:
    """From an `except`: a protocol has raised as it was told of its loss.

    A relay's own hears of it none the less: an override that raises keeps no session.
    """
    log.failure("connectionLost of {protocol!r} failed", protocol=protocol)
    if ILossListener.providedBy(protocol):
        try:
            protocol.lost_anyway(reason)
        except Exception:
            log.failure("and so did what follows the loss")


class _Connection(tcp.Server):
    """A connection, accepted or dialled; what can be done now needs no turn.

    :ivar local: the local address where that is known without asking.
    """

    #: See `set_options`.
    options_are_set = True

    _read_ended = False
    _end_was_read = False
    #: What a write was told: the kernel says it once.
    _loss: ConnectionLost | None = None
    local: IAddress | None = None

    def __repr__(self) -> str:
        # Twisted's own needs a Twisted port.
        return f"<{type(self).__name__} #{self.sessionno}>"

    def getHost(self) -> IAddress:
        return self.local or super().getHost()

    def _dataReceived(self, data: bytes | None) -> ConnectionDone | None:
        if not data:
            self._end_was_read = True
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def readConnectionLost(self, reason: Failure) -> None:
        if not self._end_was_read:
            loss = self._lost_unread()
            if loss is not None:
                self.connectionLost(Failure(loss))
                return
        self._read_ended = True
        super().readConnectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        # None: it has been lost.
        protocol = getattr(self, "protocol", None)
        try:
            super().connectionLost(reason)
        except Exception:
            loss_failed(protocol, reason)
        # `_read_to_the_loss`, which holds this connection: a cycle of references.
        vars(self).pop("doRead", None)

    @property
    def _shouldShutdown(self) -> bool:  # type: ignore[override]
        # Nobody else holds the descriptor, so closing it is enough; but with
        # something unread that is a reset, unless the end of data goes first.
        return not self._read_ended

    def _closeSocket(self, orderly: bool) -> None:
        if not orderly:
            reset_on_close(self.socket)
        super()._closeSocket(orderly)

    def write(self, data: bytes) -> None:
        if (
            self.dataBuffer
            or self._tempDataLen
            or not self.connected
            or self._writeDisconnected
            or self._writeDisconnecting
            or self.disconnecting
            or self._aborting
            or self.TLS
            or not isinstance(data, bytes)
            # A pull producer is asked for more from the reactor, after a write.
            or (self.producer is not None and not self.streamingProducer)
        ):
            super().write(data)
            return
        sent = self.writeSomeData(data)
        if sent == len(data):
            return
        if isinstance(sent, int):
            super().write(data[sent:])
            return
        # Lost.  Twisted buffers it all and reports the loss where it always
        # does: from the reactor, not from within a call of write.
        self.doRead = self._read_to_the_loss  # type: ignore[method-assign]
        super().write(data)

    def _lost_unread(self) -> ConnectionLost | None:
        """Ask the kernel about an end of data that no read has found.

        Twisted takes an event that says hung up, and not readable, for a clean end.
        A reset that arrives while the kernel puts the event together looks like that,
        about once in a thousand on a busy machine.
        """
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as problem:
            return lost_by(problem.errno)
        return None

    def _read_to_the_loss(self) -> ConnectionDone | ConnectionLost | None:
        """Read what is left on a connection whose write has failed.

        That took the socket's error away: behind the data it looks like an end.
        """
        # Its class's: the instance has this one.
        why: ConnectionDone | ConnectionLost | None = type(self).doRead(self)
        ended = isinstance(why, ConnectionDone)
        return self._loss or CONNECTION_LOST if ended else why

    def _busy(self) -> bool:
        """Bytes are buffered, or promised, or TLS has a goodbye to say."""
        return bool(
            self.dataBuffer
            or self._tempDataLen
            or self.producer is not None
            or self.TLS
        )

    def loseWriteConnection(self) -> None:
        if not self.connected or self._writeDisconnected or self._aborting:
            return
        if self._busy():
            super().loseWriteConnection()
            return
        # In the order of FileDescriptor.doWrite: the protocol may close us.
        self._writeDisconnected = True
        self._closeWriteConnection()

    def loseConnection(self) -> None:
        if not self.connected or self.disconnecting or self._aborting:
            return
        # At once only past the end of data: no event for this descriptor can be
        # under way then, so its number may be used again.
        if self._read_ended and not self._busy():
            self.connectionLost(_DONE)
        elif self._writeDisconnected:
            # Twisted would, in this case, too, with an event under way.
            self.disconnecting = True
            self.stopReading()
            clock = monotonic(self.reactor)
            clock.callLater(0, self.connectionLost, _DONE)
        else:
            super().loseConnection()


class TCPConnection(_Connection):
    """A TCP connection."""

    # Both as Twisted's, which take every error for a reset.

    def doRead(  # type: ignore[override]
        self,
    ) -> ConnectionDone | ConnectionLost | None:
        try:
            data = self.socket.recv(self.bufferSize)
        except BlockingIOError:
            return None
        except OSError as problem:
            return lost_by(problem.errno)
        return self._dataReceived(data)

    def writeSomeData(self, data: bytes) -> int | ConnectionLost:
        try:
            return self.socket.send(memoryview(data)[: self.SEND_LIMIT])
        except BlockingIOError:
            return 0
        except OSError as problem:
            if problem.errno == errno.ENOBUFS:
                return 0
            if self._loss is None:
                self._loss = lost_by(problem.errno)
            return self._loss


class UNIXConnection(_Connection, unix.Server):
    """A UNIX stream connection."""

    def __init__(self, sock: socket.socket, *args: Any) -> None:
        inline_urgent(sock)
        super().__init__(sock, *args)


def inline_urgent(sock: socket.SocketType) -> None:
    """Urgent bytes in their place, on a UNIX connection.

    Linux has them there, too, since 5.15, but an accepted connection does not have the
    option from its listening socket.
    """
    try:  # noqa: SIM105 - suppress() would cost each session a microsecond
        sock.setsockopt(_SOCKET, _OOBINLINE, 1)
    except OSError:
        # Refused, by a sandbox: it is left as it is.
        pass


def set_options(sock: socket.SocketType) -> None:
    """No delay for small writes, and urgent bytes in their place.

    An urgent byte (telnet's interrupt) is read in its place among the others, instead
    of being kept for who asks for it (SO_OOBINLINE, socket(7)).  Accepted connections
    have these options from their listening socket; UNIX connections set it
    themselves (`inline_urgent`).  An option that is refused, by a sandbox or a security
    module, is left as it is.
    """
    if sock.family != _UNIX:
        try:
            sock.setsockopt(_TCP, _NODELAY, 1)
            sock.setsockopt(_SOCKET, _OOBINLINE, 1)
        except OSError:
            for level, option in _OPTIONS:
                with suppress(OSError):
                    sock.setsockopt(level, option, 1)


def set_keepalive(sock: socket.SocketType) -> None:
    """Keepalive probes, for peers that vanish.

    A relay sets them on its listening sockets, and on a connection that did not get
    them from there when it has lasted for a while: a short session does without.
    """
    if sock.family == _UNIX:
        return
    for level, option, value in (
        (_SOCKET, socket.SO_KEEPALIVE, 1),
        (_TCP, _IDLE, KEEPALIVE_IDLE),
        (_TCP, _INTERVAL, KEEPALIVE_INTERVAL),
        (_TCP, _COUNT, KEEPALIVE_COUNT),
    ):
        if option is not None:
            try:  # noqa: SIM105 - suppress() costs more than the call
                sock.setsockopt(level, option, value)
            except OSError:
                # Without one of them, its system's own figure serves as well.
                pass


def reset_on_close(sock: socket.SocketType) -> None:
    """Have a close drop what is unsent, and reset the connection."""
    try:
        sock.setsockopt(_SOCKET, _LINGER, _RESET)
    except OSError:
        # Refused, or it is gone.  Closed without, it would look like the end of data.
        with suppress(OSError):
            disconnect(sock.fileno())


def connection_class(family: int) -> Callable[..., TCPConnection | UNIXConnection]:
    """The transport for connected sockets of a family.

    It is made with (socket, protocol, the peer's address as the socket module
    has it, None, a number that tells it from others in a log, reactor), and
    starts to read.  The last one's calls of zero delay are to be on no clock that
    somebody sets: see :func:`relayd.net.monotonic.monotonic`.
    """
    return UNIXConnection if family == socket.AF_UNIX else TCPConnection
