"""One connection of the plane: events, reading, writing, closing.

It is registered once with the plane's epoll, edge-triggered: the kernel tells when
there is something new to read, and the connection remembers that until a read has found
nothing more.  Pausing and resuming are notes to itself and take no system call.  It
asks for writability when a write first finds no room.

What is written goes to the kernel at once, and what the kernel does not take waits in a
buffer; a streaming producer is paused when that is more than BUFFER_LIMIT, as Twisted
does it.

What Twisted's transports do in another turn of the reactor, such as telling the
protocol of the loss that it asked for, these do when the call that is under way has
returned, mostly in the same turn; and at once where nothing is buffered and the
protocol knows that it may come: a half-close, and a close behind the end of data.

This is the half of a connection that knows its protocol.  What an event leads to is
decided in the other half, :class:`relayd.plane.splicing.SplicingConnection`, which may
move bytes to another connection instead.
"""

from __future__ import annotations

import errno
import select
import socket
from contextlib import suppress
from typing import Any

from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.interfaces import IResetListener
from relayd.core.session import Direction
from relayd.net.tcp_info import unacknowledged
from relayd.net.transports import PeerReset, loss_failed, lost_by, reset_on_close
from relayd.plane.pipes import Pipe
from relayd.plane.poller import Plane

log = Logger(namespace="relayd.plane")

#: The most that a protocol gets at once, in bytes; as Twisted's transports.
READ_SIZE = 65536

#: A streaming producer is paused when more than this waits, in bytes; likewise.
BUFFER_LIMIT = 65536

EDGE_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
EDGE_BOTH = EDGE_READ | select.EPOLLOUT

#: Instead of a mask of the kernel's: go on with what there was more of.
UNREAD = select.EPOLLIN

#: Hints that something comes behind what can be read, so that a read that is not full
#: was not the last: an end, an error or an urgent mark.
HINTS = select.EPOLLRDHUP | select.EPOLLERR | select.EPOLLHUP | select.EPOLLPRI

#: The connection is lost.
FAILED = select.EPOLLERR

READABLE, WRITABLE = select.EPOLLIN | HINTS, select.EPOLLOUT

DONE = Failure(CONNECTION_DONE)
_LOST = Failure(CONNECTION_LOST)

#: Whether the kernel reports writability, and whether that is waited for.
NOT_ASKED, NOT_WAITING, WAITING = range(3)

#: How a producer is asked for more: pull; push, which may be paused.
PULL, PUSH, PAUSED = range(3)

# What becomes of the write side: open, to be shut when all is written, shut.
_OPEN, _ENDING, _ENDED = range(3)

#: The state of a connection: it works, was aborted, a write has failed.
ALIVE, ABORTED, BROKEN = range(3)


def failure_by(number: int | None) -> Failure:
    """What a connection is lost with, by the errno of the call that said so."""
    error = lost_by(number)
    return _LOST if error is CONNECTION_LOST else Failure(error)


class Connection:
    """A connected socket on a plane, and the protocol that it serves.

    :param plane: watches it.
    :param sock: connected, non-blocking; owned by this object from here on.
    :param peer: the peer's address: as Twisted or as the socket module has it, or as
        text if it is IPv4.
    :param local: this end's address, where that is known without asking.

    :ivar clear: a write goes straight to the kernel: nothing waits, nothing is
        to be closed.
    """

    __slots__ = (
        "_buffer",
        "_direction",
        "_ended",
        "_full_reads",
        "_hints",
        "_local",
        "_loss",
        "_peer",
        "_pipe",
        "_plane",
        "_producing",
        "_readable",
        "_reading",
        "_releases",
        "_scheduled",
        "_sink",
        "_sock",
        "_splicer",
        "_state",
        "_waiting",
        "_write_side",
        "clear",
        "disconnecting",
        "producer",
        "protocol",
    )

    #: Hints after which a short read is never taken for the last.
    _ALWAYS_HINTS = 0

    def __init__(
        self,
        plane: Plane,
        sock: socket.SocketType,
        protocol: Any,
        peer: Any,
        local: IAddress | None,
    ) -> None:
        self._plane = plane
        self._sock = sock
        self._peer = peer
        self._local = local
        self.protocol = protocol
        self.disconnecting = False
        self.clear = True
        self.producer: Any = None
        # Set with a producer, and when a write has failed.
        self._producing: int
        self._loss: Failure
        self._reading = True
        self._readable = False
        self._hints = 0
        self._ended = False
        self._buffer: bytearray | None = None
        self._waiting = NOT_ASKED
        self._write_side = _OPEN
        self._state = ALIVE
        self._scheduled = False
        #: It has had something besides its socket that `_release` gives back.
        self._releases = False
        # Of a SplicingConnection.  They are here, as its own `__init__`, and methods
        # that it overrides where a sink makes a difference, would cost a short session
        # 1 % more.
        self._sink: Connection | None = None
        self._direction: Direction
        self._splicer: Any
        self._pipe: Pipe | None = None
        self._full_reads = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._sock.fileno()} of {self.protocol!r}>"

    def take_over(self, mask: int) -> None:
        """Go on with a descriptor that was watched for both edges and got `mask`."""
        self._waiting = NOT_WAITING
        self._plane.hand_over(self._sock.fileno(), self)
        if mask & READABLE:
            self._readable = True
            self._hints |= mask & HINTS
            self._schedule()

    # -- events

    def ready(self, mask: int) -> None:
        """Do what has become possible: flush, read, relay.

        :param mask: what the kernel says about the descriptor, or UNREAD.
        """
        raise NotImplementedError

    def proceed(self) -> None:
        """What could not be done within the call that asked for it."""
        self._scheduled = False
        if self.protocol is None:
            return
        if self._state == ABORTED:
            self.connectionLost(Failure(ConnectionAborted()))
            return
        if self._state == BROKEN and not self._may_read():
            # Nothing can be read from it, so that is all there is to know.
            self.connectionLost(self._loss)
            return
        if not self.clear and self._waiting != WAITING and self._state == ALIVE:
            self._flush()
        if self._readable:
            self.ready(UNREAD)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._plane.schedule(self)

    # -- reading

    def _may_read(self) -> bool:
        """Whether it is read when there is something to read."""
        return self._reading

    def _read(self) -> None:
        """Hand some of what there is to the protocol."""
        try:
            data = self._sock.recv(READ_SIZE)
        except BlockingIOError:
            self._found_nothing()
            return
        except OSError as problem:
            self.connectionLost(failure_by(problem.errno))
            return
        if not data:
            self._found_end()
            return
        if len(data) < READ_SIZE and not self._hints:
            self._readable = False
        try:
            self.protocol.dataReceived(data)
        except Exception:
            self._failed("dataReceived")
            return
        if self._readable and self._reading:
            self._schedule()

    def _found_nothing(self) -> None:
        self._readable = False
        self._hints = self._ALWAYS_HINTS
        if self._state == BROKEN:
            self.connectionLost(self._loss)

    def _found_end(self) -> None:
        self._readable = self._reading = False
        self._ended = True
        if self._state == BROKEN:
            # Behind the data of a connection whose write failed, the error that the
            # write took away looks like an end.
            self.connectionLost(self._loss)
        elif self._sink is None:
            self.readConnectionLost(DONE)
        else:
            try:
                self._splicer.ended(self._direction, self._sink)
            except Exception:
                self._failed("the end of data")
        if self._hints & FAILED:
            # Reset behind its end, which nothing that is read could tell.
            self._lost_unread()

    def _lost_unread(self) -> None:
        """The kernel says that the connection is lost, and nothing is read from it.

        So it is over now where all has been read, or where the protocol wants none of
        what has not.  Otherwise that comes first: when the protocol reads on.
        """
        if (
            self.protocol is None
            or self._state != ALIVE
            or not (self._ended or self._hears_reset())
        ):
            return
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            error = lost_by(number)
            if error is CONNECTION_LOST:
                # Nobody can ask any more when the protocol is told.
                error = PeerReset(self.unsent + unacknowledged(self))
            self.connectionLost(Failure(error))

    def _hears_reset(self) -> bool:
        """Whether to tell of a reset at once, and not behind what is unread."""
        protocol = self.protocol
        return bool(IResetListener.providedBy(protocol) and protocol.wants_reset())

    def readConnectionLost(self, reason: Failure) -> None:
        protocol = self.protocol
        if reason is DONE and IHalfCloseableProtocol.providedBy(protocol):
            try:
                protocol.readConnectionLost()
            except Exception:
                self._failed("readConnectionLost")
        else:
            self.connectionLost(reason)

    def _failed(self, where: str) -> None:
        """The protocol raised: only its own connection ends."""
        reason = Failure()
        self._state = ALIVE  # a close, even if it was to be an abort
        log.failure(
            "{where} of {protocol!r} failed",
            reason,
            where=where,
            protocol=self.protocol,
        )
        self.connectionLost(reason)

    # -- writing

    @property
    def unsent(self) -> int:
        """Bytes that were written and that the kernel has not taken yet."""
        return 0 if self._buffer is None else len(self._buffer)

    def write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError("Data must be bytes")
        if not data:
            return
        if self.producer is not None and len(data) > BUFFER_LIMIT:
            # Twisted buffers first and sends later, so that such a write always
            # pauses the producer, and resumes it.  Some wait for that.
            self.clear = False
        if not self.clear:
            self._append(data)
            return
        try:
            sent = self._sock.send(data)
        except OSError as problem:
            sent = 0
            self._not_sent(problem)
        if sent < len(data):
            self._append(memoryview(data)[sent:])

    def _append(self, data: bytes | memoryview) -> None:
        """Buffer what can't be sent now."""
        if self.protocol is None or self._write_side == _ENDED or self._state != ALIVE:
            return
        self._releases = True
        if self._buffer is None:
            self._buffer = bytearray(data)
        else:
            self._buffer += data
        if self.clear:
            # The kernel has just refused it.
            self.clear = False
            self._wait_writable()
        elif self._waiting != WAITING:
            self._schedule()
        if (
            self.producer is not None
            and self._producing == PUSH
            and self.unsent > BUFFER_LIMIT
        ):
            self._producing = PAUSED
            self.producer.pauseProducing()

    def _wait_writable(self) -> None:
        asked, self._waiting = self._waiting, WAITING
        if asked == NOT_ASKED:
            self._plane.change_mask(self._sock.fileno(), EDGE_BOTH)

    def _flush(self) -> None:
        """Hand what waits to the kernel, then do what waited for that."""
        data = self._buffer
        if data is not None:
            try:
                sent = self._sock.send(data)
            except OSError as problem:
                sent = 0
                self._not_sent(problem)
                if self._state == BROKEN:
                    return
            if sent < len(data):
                del data[:sent]
                self._wait_writable()
                return
            self._buffer = None
        if self.producer is not None and self._producing != PUSH:
            if self._producing == PAUSED:
                self._producing = PUSH
            self._update_clear()
            try:
                self.producer.resumeProducing()
            except Exception:
                self._failed("resumeProducing of the producer")
        elif self.disconnecting:
            self.connectionLost(DONE)
        elif self._write_side == _ENDING:
            self._end_writing()
        else:
            self._update_clear()
            self._has_room()

    def _has_room(self) -> None:
        """All is written, and there was no producer to tell, and nothing to close."""

    def _update_clear(self) -> None:
        """Nothing waits any more: may a write go straight to the kernel?"""
        self.clear = (
            self.protocol is not None
            and not self.disconnecting
            and self._write_side == _OPEN
            and self._state == ALIVE
            and (self.producer is None or self._producing != PULL)
        )

    def _not_sent(self, problem: OSError) -> None:
        if problem.errno == errno.ENOBUFS:
            # The kernel is short of memory, which is no edge: ask again.
            self._waiting = NOT_ASKED
        elif problem.errno != errno.EAGAIN:
            self._write_failed(problem.errno)

    def _write_failed(self, number: int | None) -> None:
        """The connection is lost.

        What the peer sent before is read first, and then the loss is reported,
        from the plane and not from within a write.
        """
        if self._state == ALIVE:
            self._state = BROKEN
            self._loss = failure_by(number)
            self.clear = False
            self._drop_unsent()
            self._readable = True
            # It is read until the kernel has nothing more.
            self._hints = select.EPOLLERR
            self._schedule()

    def _drop_unsent(self) -> None:
        self._buffer = None

    # -- half-close and close

    def loseWriteConnection(self) -> None:
        if self.protocol is None or self._write_side != _OPEN:
            return
        was_clear, self.clear = self.clear, False
        self._write_side = _ENDING
        if was_clear:
            self._end_writing()
        elif self._waiting != WAITING:
            self._schedule()

    def _end_writing(self) -> None:
        self._write_side = _ENDED
        try:  # noqa: SIM105 - suppress() costs a session a hundredth more
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            # Reset a moment ago, which a read will tell.
            pass
        if self._sink is None:
            self.writeConnectionLost(DONE)

    def writeConnectionLost(self, reason: Failure) -> None:
        protocol = self.protocol
        if IHalfCloseableProtocol.providedBy(protocol):
            try:
                protocol.writeConnectionLost()
            except Exception:
                self._failed("writeConnectionLost")

    def loseConnection(self) -> None:
        if self.protocol is None or self.disconnecting:
            return
        self.disconnecting = True
        if self._write_side == _ENDED or (
            self.clear and self._ended and self.producer is None
        ):
            self.connectionLost(DONE)
            return
        self.clear = self._reading = False
        if self._waiting != WAITING:
            self._schedule()

    def abortConnection(self) -> None:
        if self.protocol is not None and self._state != ABORTED:
            self._state = ABORTED
            self.disconnecting = True
            self._reading = self.clear = False
            # Writability is of no interest any more.
            self._waiting = NOT_WAITING
            self._schedule()

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over: close the socket and tell the protocol."""
        protocol, self.protocol = self.protocol, None
        if protocol is None:
            return
        self.clear = self._reading = False
        if not self._ended or self._state == ABORTED:
            self._end_or_reset()
        self._plane.unwatch_and_close(self._sock)
        if self._releases:
            self._release()
        try:
            protocol.connectionLost(reason)
        except Exception:
            loss_failed(protocol, reason)

    def _end_or_reset(self) -> None:
        """Choose between a reset and an end of data, before the socket is closed."""
        if self._state == ABORTED:
            reset_on_close(self._sock)
            return
        with suppress(OSError):  # it may be gone already
            # With something unread a close is a reset.  This sends what was
            # written, and an end of data, before that.
            self._sock.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        """Give back what a connection may have besides its socket."""
        self._drop_unsent()
        producer, self.producer = self.producer, None
        if producer is not None:
            try:
                producer.stopProducing()
            except Exception:
                log.failure("stopProducing of {producer!r} failed", producer=producer)

    # -- pausing

    def pauseProducing(self) -> None:
        self._reading = False
        if self._hints & FAILED:
            # It has been reset already, of which no event tells again.
            self._schedule()

    def resumeProducing(self) -> None:
        if self.protocol is not None and not self.disconnecting and not self._ended:
            self._reading = True
            if self._readable:
                self._schedule()

    def _producer_gone(self) -> None:
        """The producer was unregistered: do what waited for that."""
        if self.protocol is not None and self._waiting != WAITING:
            if self.unsent or self.disconnecting or self._write_side == _ENDING:
                self._schedule()
            else:
                self._update_clear()
