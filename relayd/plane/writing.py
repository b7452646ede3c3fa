"""The writing half of a connection: its buffer, its producer, its half-close.

What is written goes to the kernel at once, and what the kernel does not take waits in a
buffer; a streaming producer is paused when that is more than BUFFER_LIMIT, as Twisted
does it.  Writability is asked for when a write first finds no room.

A write that fails means that the connection is lost.  What the peer sent before is read
first, and the loss is reported then.
"""

from __future__ import annotations

import errno
import select
import socket

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

from relayd.net.transports import WriteRefused
from relayd.plane.connection_base import (
    CLOSING,
    DONE,
    EDGE_BOTH,
    ENDED,
    ENDING,
    NOT_ASKED,
    OPEN,
    PAUSED,
    PULL,
    PUSH,
    WAITING,
    ConnectionBase,
    failure_by,
)

#: A streaming producer is paused when more than this waits, in bytes; as Twisted does.
BUFFER_LIMIT = 65536


class WritingConnection(ConnectionBase):
    """A connection that can be written to."""

    __slots__ = ()

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
            self._write_much(data)
            return
        self.write_on(data)

    def write_on(self, data: bytes) -> None:
        """See :meth:`ISpliceable.write_on`."""
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

    def _write_much(self, data: bytes) -> None:
        """Write more than a producer may have waiting.

        Twisted buffers first and sends later, so that such a write always pauses the
        producer, and resumes it.  Some producers rely on that.  What can be sent is
        sent none the less: a copy of it costs as much as sending it.
        """
        sent = 0
        if self.clear:
            try:
                sent = self._sock.send(data)
            except OSError as problem:
                self._not_sent(problem)
        if sent < len(data):
            self._append(memoryview(data)[sent:])
        if self.producer is None or self._producing != PUSH:
            return
        if self.clear or self.unsent:
            self._producing = PAUSED
            if self.clear:
                self.clear = False
                self._schedule()
            self.producer.pauseProducing()

    def _append(self, data: bytes | memoryview) -> None:
        """Buffer what can't be sent now."""
        if self.protocol is None or self._write_side == ENDED:
            return
        if self._loss is not None:
            self._refuse(data)
            return
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

    def _refuse(self, data: bytes | memoryview) -> None:
        """A write has failed: what was not sent may go to somebody else."""
        problem = None if self._loss is None else self._loss.value
        if problem is CONNECTION_LOST:
            self._loss = Failure(WriteRefused(bytes(data)))
        elif isinstance(problem, WriteRefused) and len(problem.data) <= BUFFER_LIMIT:
            problem.data += data

    def _wait_writable(self) -> None:
        asked, self._waiting = self._waiting, WAITING
        if asked == NOT_ASKED:
            self._plane.change_mask(self._sock.fileno(), EDGE_BOTH)

    def _flush(self) -> None:
        """Send what is buffered, then do what waited for that."""
        data = self._buffer
        if data is not None:
            try:
                sent = self._sock.send(data)
            except OSError as problem:
                sent = 0
                self._not_sent(problem)
                if self._loss is not None:
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
        elif self._write_side == CLOSING:
            self.connectionLost(DONE)
        elif self._write_side == ENDING:
            self._end_writing()
        else:
            self._update_clear()
            self._has_room()

    def _has_room(self) -> None:
        """All is written; there was no producer to resume, and nothing to close."""

    def _update_clear(self) -> None:
        """Nothing is buffered: set whether a write may go straight to the kernel."""
        self.clear = (
            self.protocol is not None
            and self._write_side == OPEN
            and self._loss is None
            and (self.producer is None or self._producing != PULL)
        )

    def _not_sent(self, problem: OSError) -> None:
        if problem.errno == errno.ENOBUFS:
            # The kernel is short of memory, which is no edge: ask again.
            self._waiting = NOT_ASKED
        elif problem.errno != errno.EAGAIN:
            self._write_failed(problem.errno)

    def _lost_by_sending(self) -> int | None:
        """The errno of an empty send: it fails if the connection is lost."""
        try:
            self._sock.send(b"")
        except BlockingIOError:
            pass
        except OSError as problem:
            return problem.errno
        return None

    def _write_failed(self, number: int | None) -> None:
        """The connection is lost.

        What the peer sent before is read first, and then the loss is reported,
        from the plane and not from within a write.
        """
        if self._loss is None:
            self._loss = failure_by(number)
            self.clear = False
            self._drop_unsent()
            self._readable = True
            # It is read until the kernel has nothing more.
            self._hints = select.EPOLLERR
            self._schedule()

    # -- half-close

    def loseWriteConnection(self) -> None:
        if self.protocol is None or self._write_side != OPEN:
            return
        was_clear, self.clear = self.clear, False
        self._write_side = ENDING
        if was_clear:
            self._end_writing()
        elif self._waiting != WAITING:
            self._schedule()

    def _end_writing(self) -> None:
        self._write_side = ENDED
        try:  # noqa: SIM105 - suppress() costs a session a hundredth more
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            # Reset a moment ago: a read will report it.
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

    # -- producers

    def _producer_gone(self) -> None:
        """The producer was unregistered: do what waited for it."""
        if self.protocol is not None and self._waiting != WAITING:
            if self.unsent or self._write_side in (ENDING, CLOSING):
                self._schedule()
            else:
                self._update_clear()
