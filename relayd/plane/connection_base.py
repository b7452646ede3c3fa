"""A connection of the plane: what it holds, and how it ends.

A connection is one object of five layers, each with its own subject:

- :class:`ConnectionBase` (here): its state, how it is scheduled and closed;
- :class:`relayd.plane.writing.WritingConnection`: its buffer, producers, half-close;
- :class:`relayd.plane.connection.Connection`: events, and reading for its protocol;
- :class:`relayd.plane.piping.PipingConnection`: splice(2), and the pipe it takes;
- :class:`relayd.plane.splicing.SplicingConnection`: moving bytes to another connection.

The fields of all five are declared here.  Inheriting costs nothing per call: the
interpreter caches where it has found a method.

A close that was asked for waits until all is written; an abort, and the loss that a
failed write means, are reported when the call that is under way has returned.
"""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import Any

from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.session import Direction
from relayd.net.transports import loss_failed, lost_by, reset_on_close
from relayd.plane.pipes import Pipe
from relayd.plane.poller import Plane

log = Logger(namespace="relayd.plane")

EDGE_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
EDGE_BOTH = EDGE_READ | select.EPOLLOUT

#: Instead of a mask of the kernel's: go on with what there was more of.
UNREAD = select.EPOLLIN

#: Hints that something comes behind what can be read, so that a read that is not full
#: was not the last: an end, an error or an urgent mark.
HINTS = select.EPOLLRDHUP | select.EPOLLERR | select.EPOLLHUP | select.EPOLLPRI

#: The connection is lost.
FAILED = select.EPOLLERR

#: A hint of our own, no bit of the kernel's: the loss that is known is behind what can
#: be read, and waits for that.
BEHIND = 1 << 24

READABLE, WRITABLE = select.EPOLLIN | HINTS, select.EPOLLOUT

DONE = Failure(CONNECTION_DONE)
ABORTED = Failure(ConnectionAborted())
_LOST = Failure(CONNECTION_LOST)

#: Whether the kernel reports writability, and whether that is waited for.
NOT_ASKED, NOT_WAITING, WAITING = range(3)

#: How a producer is asked for more: pull; push, which may be paused.
PULL, PUSH, PAUSED = range(3)

#: What becomes of the write side: open; to be shut when all is written; shut; to be
#: closed when all is written, with the read side.
OPEN, ENDING, ENDED, CLOSING = range(4)


def failure_by(number: int | None) -> Failure:
    """What a connection is lost with, by the errno of the call that said so."""
    error = lost_by(number)
    return _LOST if error is CONNECTION_LOST else Failure(error)


class ConnectionBase:
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
        "_scheduled",
        "_sink",
        "_sock",
        "_splicer",
        "_waiting",
        "_write_side",
        "clear",
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
        self.clear = True
        self.producer: Any = None
        # Set with a producer.
        self._producing: int
        #: What it is to be lost with: ABORTED, or why a write has failed.
        self._loss: Failure | None = None
        self._reading = True
        self._readable = False
        self._hints = 0
        self._ended = False
        self._buffer: bytearray | None = None
        self._waiting = NOT_ASKED
        self._write_side = OPEN
        self._scheduled = False
        # Of a SplicingConnection.  They are here, as its own `__init__`, and methods
        # that it overrides where a sink makes a difference, would cost a short session
        # 1 % more.
        self._sink: ConnectionBase | None = None
        self._direction: Direction
        #: Whoever joined them; of one that is a sink and has none, its source.
        self._splicer: Any = None
        self._pipe: Pipe | None = None
        self._full_reads = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._sock.fileno()} of {self.protocol!r}>"

    # -- scheduling

    def ready(self, mask: int) -> None:
        """Do what has become possible: flush, read, relay.

        :param mask: what the kernel says about the descriptor, or UNREAD.
        """
        raise NotImplementedError

    def proceed(self) -> None:
        """Do what could not be done within the call that asked for it."""
        raise NotImplementedError

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._plane.schedule(self)

    # -- closing

    @property
    def disconnecting(self) -> bool:
        """Its close, or its abort, was asked for."""
        return self._write_side == CLOSING

    def loseConnection(self) -> None:
        before = self._write_side
        if self.protocol is None or before == CLOSING:
            return
        self._write_side = CLOSING
        if before == ENDED or (self.clear and self._ended and self.producer is None):
            self.connectionLost(DONE)
            return
        self.clear = self._reading = False
        if self._waiting != WAITING:
            self._schedule()

    def abortConnection(self) -> None:
        if self.protocol is not None and self._loss is not ABORTED:
            self._loss = ABORTED
            self._write_side = CLOSING
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
        if not self._ended or self._loss is ABORTED:
            self._end_or_reset()
        self._plane.unwatch_and_close(self._sock)
        self._buffer = None
        if self.producer is not None:
            self._stop_producer(self.producer)
        try:
            protocol.connectionLost(reason)
        except Exception:
            loss_failed(protocol, reason)

    def _end_or_reset(self) -> None:
        """Choose between a reset and an end of data, before the socket is closed."""
        if self._loss is ABORTED:
            reset_on_close(self._sock)
            return
        with suppress(OSError):  # it may be gone already
            # With something unread a close is a reset.  This sends what was
            # written, and an end of data, before that.
            self._sock.shutdown(socket.SHUT_RDWR)

    def _failed(self, where: str) -> None:
        """The protocol raised: only its own connection ends."""
        reason = Failure()
        self._loss = None  # a close, even if it was to be an abort
        log.failure(
            "{where} of {protocol!r} failed",
            reason,
            where=where,
            protocol=self.protocol,
        )
        self.connectionLost(reason)

    def _stop_producer(self, producer: Any) -> None:
        """Nobody will write any more."""
        self.producer = None
        try:
            producer.stopProducing()
        except Exception:
            log.failure("stopProducing of {producer!r} failed", producer=producer)

    # -- what it gives back

    def _drop_unsent(self) -> None:
        self._buffer = None
