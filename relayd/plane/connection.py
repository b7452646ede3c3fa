"""One connection of the plane, and the protocol that it serves: events and reading.

It is registered once with the plane's epoll, edge-triggered: the kernel tells when
there is something new to read, and the connection remembers that until a read has found
nothing more.  Pausing and resuming set a flag and take no system call.

What Twisted's transports do in another turn of the reactor, such as telling the
protocol of the loss that it asked for, these do when the call that is under way has
returned, mostly in the same turn; and at once where nothing is buffered and the
protocol knows that it may come: a half-close, and a close behind the end of data.

What an event leads to is decided in :class:`relayd.plane.splicing.SplicingConnection`,
which may move bytes to another connection instead of reading them for the protocol.
Writing is in :mod:`relayd.plane.writing`, state and closing in
:mod:`relayd.plane.connection_base`.
"""

from __future__ import annotations

import socket

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

from relayd.core.interfaces import IResetListener
from relayd.net.tcp_info import unacknowledged
from relayd.net.transports import PeerReset, lost_by
from relayd.plane.connection_base import (
    ABORTED,
    BEHIND,
    CLOSING,
    DONE,
    FAILED,
    HINTS,
    NOT_WAITING,
    READABLE,
    UNREAD,
    WAITING,
    failure_by,
)
from relayd.plane.writing import WritingConnection

#: The most that a protocol gets at once, in bytes; as Twisted's transports.
READ_SIZE = 65536


class Connection(WritingConnection):
    """A connection that reads for its protocol; made as `ConnectionBase`."""

    __slots__ = ()

    def take_over(self, mask: int) -> None:
        """Go on with a descriptor that was watched for both edges and got `mask`."""
        self._waiting = NOT_WAITING
        self._plane.hand_over(self._sock.fileno(), self)
        if mask & READABLE:
            self._readable = True
            self._hints |= mask & HINTS
            self._schedule()

    # -- events

    def proceed(self) -> None:
        """Do what could not be done within the call that asked for it."""
        self._scheduled = False
        if self.protocol is None:
            return
        loss = self._loss
        # What was sent to one whose write failed comes before its loss, if it is read.
        if loss is not None and (
            loss is ABORTED or not (self._may_read() or self._is_read_first())
        ):
            self.connectionLost(loss)
            return
        if not self.clear and self._waiting != WAITING and loss is None:
            self._flush()
        if self._readable:
            self.ready(UNREAD)

    # -- reading

    def _may_read(self) -> bool:
        """Whether it is read when there is something to read."""
        return self._reading

    def _is_read_first(self) -> bool:
        """Whether a loss that is known waits until what came before it can be read."""
        return bool(self._hints & BEHIND) and self._write_side != CLOSING

    def _read(self, most: int = READ_SIZE) -> None:
        """Hand some of what there is to the protocol, `most` bytes at once."""
        try:
            data = self._sock.recv(most)
        except BlockingIOError:
            self._found_nothing()
            return
        except OSError as problem:
            self.connectionLost(failure_by(problem.errno))
            return
        if not data:
            self._found_end()
            return
        if len(data) < most and not self._hints:
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
        loss = self._loss
        if loss is not None and loss is not ABORTED:
            self.connectionLost(loss)

    def _found_end(self) -> None:
        self._readable = self._reading = False
        self._ended = True
        if self._pipe is not None:
            # A splice has not moved all, and does not say what stopped it.  If that
            # was a reset, the kernel has told of it, and this only looks like an end.
            lost = self._lost_by_sending()
            if lost is not None:
                self._write_failed(lost)
        loss = self._loss
        if loss is not None and loss is not ABORTED:
            # Behind the data of a connection whose write failed, the error that the
            # write took away looks like an end.
            self.connectionLost(loss)
        elif self._sink is None:
            self.readConnectionLost(DONE)
        else:
            try:
                self._splicer.ended(self._direction, self._sink)
            except Exception:
                self._failed("the end of data")
        if self._hints & FAILED:
            # Reset after its end of data, which no read reports.
            self._lost_unread()

    def _lost_unread(self) -> None:
        """The kernel says that the connection is lost, and nothing is read from it.

        So it ends now if all has been read, or if the protocol does not want the rest.
        Otherwise the rest is read first, when the protocol resumes.
        """
        if (
            self.protocol is None
            or self._loss is not None
            or not (self._ended or self._hears_reset())
        ):
            return
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            error = lost_by(number)
            if error is CONNECTION_LOST:
                # The socket is closed when the protocol is told: count it now.
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

    # -- pausing

    def pauseProducing(self) -> None:
        self._reading = False
        if self._hints & FAILED:
            # It has been reset already, which the kernel reports once.
            self._schedule()

    def resumeProducing(self) -> None:
        if self.protocol is not None and not (self._ended or self.disconnecting):
            self._reading = True
            if self._readable:
                self._schedule()
