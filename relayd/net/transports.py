"""Twisted's connections for sockets that relayd accepted or connected itself.

They differ from Twisted's in three things.  A connection with nothing buffered does
at once what Twisted does in the next turn of the reactor: it passes written bytes to
the kernel, shuts its write side, closes after its end of data.  That saves a short
session four turns, a third of its cost, and a request with its response two.  Socket
options are set before, once on the listening socket, whose connections inherit them.
And a lost peer is distinguished from a reset.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
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

_SOCKET = int(socket.SOL_SOCKET)
_OOBINLINE = int(socket.SO_OOBINLINE)

#: What `set_options` sets.
_OPTIONS = ((_TCP, _NODELAY), (_SOCKET, _OOBINLINE))

#: SO_LINGER, socket(7): drop what is unsent, and reset.
_LINGER, _RESET = int(socket.SO_LINGER), struct.pack("ii", 1, 0)


class PeerVanished(ConnectionLost):
    """The peer is lost: it does not answer, and has not reset the connection.

    Keepalive or retransmission has timed out, or the network reports it unreachable.
    The message is that of the system's error.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class PeerReset(ConnectionLost):
    """A reset that an event reported, and not a read or a write.

    It came after the end of data, or while the protocol did not read.

    :ivar undelivered: bytes that were written and not acknowledged by the peer.
    """

    def __init__(self, undelivered: int = 0) -> None:
        super().__init__()
        self.undelivered = undelivered


class WriteRefused(ConnectionLost):
    """A reset that a write has met.

    :ivar data: what the kernel did not take of it and of those that followed, in order.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data


#: tcp(7): the errors of a connection whose peer is lost.
_VANISHED = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}
)

#: The errors of any connection that has ended.  ECONNREFUSED: some firewalls answer
#: so on an established one.
LOSSES = _VANISHED | {
    errno.ECONNRESET,
    errno.EPIPE,
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
}


def lost_by(number: int | None) -> ConnectionLost:
    """The exception for a lost connection, by the errno of the call that failed."""
    if number in _VANISHED:
        return PeerVanished(os.strerror(number or 0))
    return CONNECTION_LOST


def loss_failed(protocol: Any, reason: Failure) -> None:
    """Called in an `except`: a protocol's connectionLost has raised.

    A relay's own protocol is still notified, so that an override that raises does not
    keep its session.
    """
    log.failure("connectionLost of {protocol!r} failed", protocol=protocol)
    if ILossListener.providedBy(protocol):
        try:
            protocol.lost_anyway(reason)
        except Exception:
            log.failure("and so did what follows the loss")


class _Connection(tcp.Server):
    """A connection, accepted or dialled, that acts at once where it can.

    :ivar local: the local address, where it is known without a system call.
    """

    #: See `set_options`.
    options_are_set = True

    _read_ended = False
    _end_was_read = False
    #: The error of a write: the kernel reports it once.
    _loss: ConnectionLost | None = None
    local: IAddress | None = None

    def __repr__(self) -> str:
        # Twisted's needs a Twisted port.
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
        # None: connectionLost was called before.
        protocol = getattr(self, "protocol", None)
        try:
            super().connectionLost(reason)
        except Exception:
            loss_failed(protocol, reason)
        # `_read_remaining`, a bound method: a cycle of references.
        vars(self).pop("doRead", None)

    @property
    def _shouldShutdown(self) -> bool:  # type: ignore[override]
        # No other process has the descriptor, so closing it is enough; but with data
        # unread that is a reset, unless the end of data is sent first.
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
            # Twisted resumes a pull producer from the reactor, after a write.
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
        # Lost.  Twisted buffers the data and reports the loss as always: from the
        # reactor, not from within a call of write.
        self.doRead = self._read_remaining  # type: ignore[method-assign]
        super().write(data)

    def _lost_unread(self) -> ConnectionLost | None:
        """Check an end of data that was reported by an event, without a read.

        Twisted takes a hang-up that is not readable for a clean end.  A reset that
        arrives while the kernel makes up the event looks like that, about once in a
        thousand on a busy machine.
        """
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as problem:
            return lost_by(problem.errno)
        return None

    def _read_remaining(self) -> ConnectionDone | ConnectionLost | None:
        """Read the remaining data of a connection whose write has failed.

        The failed write cleared the socket's error: after the data, a read returns an
        end of data.
        """
        # The class's method: the instance's `doRead` is this one.
        why: ConnectionDone | ConnectionLost | None = type(self).doRead(self)
        ended = isinstance(why, ConnectionDone)
        return self._loss or CONNECTION_LOST if ended else why

    def _busy(self) -> bool:
        """Bytes are buffered, a producer may write more, or TLS must close."""
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
        # At once only after the end of data: no event for this descriptor can be
        # pending then, so its number may be reused.
        if self._read_ended and not self._busy():
            self.connectionLost(_DONE)
        elif self._writeDisconnected:
            # Twisted would close at once here, too, even with an event pending.
            self.disconnecting = True
            self.stopReading()
            clock = monotonic(self.reactor)
            clock.callLater(0, self.connectionLost, _DONE)
        else:
            super().loseConnection()


class TCPConnection(_Connection):
    """A TCP connection."""

    # Both are as Twisted's, which take every error for a reset.

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
    """Receive urgent bytes in line, on a UNIX connection.

    UNIX sockets have urgent bytes since Linux 5.15, but an accepted connection does not
    inherit the option from its listening socket.
    """
    try:  # noqa: SIM105 - suppress() would cost each session a microsecond
        sock.setsockopt(_SOCKET, _OOBINLINE, 1)
    except OSError:
        # Refused by a sandbox: the option stays as it is.
        pass


def set_options(sock: socket.SocketType) -> None:
    """Set TCP_NODELAY and SO_OOBINLINE.

    With SO_OOBINLINE (socket(7)) an urgent byte, such as telnet's interrupt, is read in
    line with the others, and so relayed.  Accepted connections inherit these options
    from their listening socket; UNIX connections set it themselves (`inline_urgent`).
    An option that a sandbox or a security module refuses stays as it is.
    """
    if sock.family != _UNIX:
        try:
            sock.setsockopt(_TCP, _NODELAY, 1)
            sock.setsockopt(_SOCKET, _OOBINLINE, 1)
        except OSError:
            for level, option in _OPTIONS:
                with suppress(OSError):
                    sock.setsockopt(level, option, 1)


def reset_on_close(sock: socket.SocketType) -> None:
    """Make a later close drop unsent data, and reset the connection."""
    try:
        sock.setsockopt(_SOCKET, _LINGER, _RESET)
    except OSError:
        # Refused, or the connection is gone.  A plain close would look like the end of
        # data.
        with suppress(OSError):
            disconnect(sock.fileno())


def connection_class(family: int) -> Callable[..., TCPConnection | UNIXConnection]:
    """The transport for connected sockets of a family.

    It is made with (socket, protocol, the peer's address as the socket module has it,
    None, a number that identifies it in a log, reactor), and starts to read.  The
    reactor's calls of zero delay should be on a monotonic clock: see
    :func:`relayd.net.monotonic.monotonic`.
    """
    return UNIXConnection if family == socket.AF_UNIX else TCPConnection
