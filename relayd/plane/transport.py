"""Stream connections of the plane.

A connection is registered once with the plane's epoll, edge-triggered: the kernel
tells when there is something new to read, and the connection remembers that
until a read has found nothing more.  Pausing and resuming are notes to itself;
no system call belongs to them.  It asks for writability when a write first finds
no room.

What is written goes to the kernel at once, and what the kernel does not take
waits in a buffer; a streaming producer is paused when that is more than
BUFFER_LIMIT, as Twisted does it.

Relaying.  :meth:`PlaneTransport.splice` makes two connections each other's *source*
and *sink*: what one reads goes to the other and not to its protocol, which only
hears of the end of data and of the loss.  Bytes are copied through one buffer
that all connections share, without an object for each chunk; a source whose sink
is full is *blocked*, and is not read, so that a sink never holds more than one
such chunk.  After FULL_READS full buffers in a row the bytes are spliced: from
the socket into a pipe and from there to the sink, without a copy to this process.
The pipe is the sink's while there is something in it, and counts as buffered.

What Twisted's transports do in another turn of the reactor, such as telling the
protocol of the loss that it asked for, these do when the call that is under way
has returned, mostly in the same turn; and at once where nothing is buffered and
the protocol knows that it may come: a half-close, and a close behind the end of
data.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from contextlib import suppress
from typing import Any

from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IPushProducer,
    ITCPTransport,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.addresses import socket_address
from relayd.interfaces import ISpliceable
from relayd.plane.pipes import PIPE_SIZE, Pipe
from relayd.plane.poller import COPY_SIZE, Plane
from relayd.session import Direction

log = Logger(namespace="relayd.plane")

#: The most that a protocol gets at once, in bytes; as Twisted's transports.
READ_SIZE = 65536

#: A streaming producer is paused when more than this waits, in bytes; likewise.
BUFFER_LIMIT = 65536

#: Chunks that are relayed in one round of the plane before others get their turn.
READS = 2

#: Full buffers that are copied in a row before splicing starts.
FULL_READS = 2

#: A splice that moves less than this, in bytes, is no better than copying.
SPLICE_LEAST = 16384

EDGE_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
EDGE_BOTH = EDGE_READ | select.EPOLLOUT

_WRITABLE = select.EPOLLOUT
_READABLE = EDGE_READ | select.EPOLLERR | select.EPOLLHUP
#: With these, a read that is not full was not the last: an end, an error or an
#: urgent mark comes behind it.
_MORE = select.EPOLLRDHUP | select.EPOLLERR | select.EPOLLHUP | select.EPOLLPRI

#: The peer has sent its last byte, and nothing else is the matter.
_END = select.EPOLLRDHUP

_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

#: SO_LINGER, socket(7): drop what is unsent, and reset.
_RESET = struct.pack("ii", 1, 0)

_DONE = Failure(CONNECTION_DONE)
_LOST = Failure(CONNECTION_LOST)


# What becomes of the write side: open, to be shut when all is written, shut.
_OPEN, _ENDING, _ENDED = range(3)

# What becomes of the connection: lives, was aborted, a write has failed.
_ALIVE, _ABORTED, _BROKEN = range(3)

#: Instead of a count of full reads: this socket can't be spliced.
_NEVER = -1000


@implementer(
    ITCPTransport, IConsumer, IPushProducer, IHalfCloseableDescriptor, ISpliceable
)
class PlaneTransport:
    """A connected TCP socket.

    Provides what Twisted's own do: `ITCPTransport`, `IConsumer`,
    `IPushProducer`, `IHalfCloseableDescriptor`, and `abortConnection`.

    :param plane: watches it.
    :param sock: connected, non-blocking; owned by this object from here on.
    :param peer: the peer's address, as Twisted or the socket module has it.
    :param local: this end's address, where that is known without asking.

    :ivar clear: a write goes straight to the kernel: nothing waits, nothing is
        to be closed.
    """

    __slots__ = (
        "_asked_writable",
        "_descriptor",
        "_direction",
        "_ended",
        "_fate",
        "_full_reads",
        "_local",
        "_more",
        "_out",
        "_peer",
        "_pipe",
        "_plane",
        "_producer_paused",
        "_queued",
        "_readable",
        "_reading",
        "_sink",
        "_sock",
        "_source",
        "_waiting",
        "_write_side",
        "clear",
        "connected",
        "disconnecting",
        "producer",
        "protocol",
        "streamingProducer",
    )

    #: Set on the listening socket, or before connecting.
    options_are_set = True

    #: As Twisted's: no TLS on this connection.
    TLS = False

    #: Events after which a short read is never taken for the last.
    _ALWAYS_MORE = 0

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
        self._descriptor = sock.fileno()
        self._peer = peer
        self._local = local
        self.protocol = protocol
        self.connected = True
        self.disconnecting = False
        self.clear = True
        # The next two are set with a producer, the third with a sink.
        self.producer: Any = None
        self.streamingProducer: bool
        self._producer_paused: bool
        self._direction: Direction
        self._reading = True
        self._readable = False
        self._more = self._ALWAYS_MORE
        self._ended = False
        self._out: bytearray | None = None
        self._waiting = False
        self._asked_writable = False
        self._write_side = _OPEN
        self._fate = _ALIVE
        self._queued = False
        self._sink: PlaneTransport | None = None
        self._source: PlaneTransport | None = None
        self._full_reads = 0
        self._pipe: Pipe | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._descriptor} of {self.protocol!r}>"

    def take_over(self, mask: int) -> None:
        """Go on with a descriptor that was watched for both edges and got `mask`."""
        self._asked_writable = True
        self._plane.hand_over(self._descriptor, self)
        if mask & _READABLE:
            self._readable = True
            self._more |= mask & _MORE
            self._queue()

    # -- events

    def ready(self, mask: int) -> None:
        """What the kernel says about the descriptor."""
        if self._waiting and mask & _WRITABLE:
            self._waiting = False
            self._flush()
        if mask & _READABLE:
            self._readable = True
            if mask & _MORE:
                self._more |= mask & _MORE
            if self._reading:
                if self._sink is None:
                    self._read()
                else:
                    self._relay(self._sink)

    def proceed(self) -> None:
        """What could not be done within the call that asked for it."""
        self._queued = False
        if not self.connected:
            return
        if self._fate == _ABORTED:
            self.connectionLost(Failure(ConnectionAborted()))
            return
        if self._fate == _BROKEN and (not self._reading or self.blocked):
            # Nothing can be read from it, so that is all there is to know.
            self.connectionLost(_LOST)
            return
        if not self.clear and not self._waiting and self._fate == _ALIVE:
            self._flush()
        if self._readable and self._reading:
            if self._sink is None:
                self._read()
            else:
                self._relay(self._sink)

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self._plane.again(self)

    # -- reading

    def _read(self) -> None:
        """Hand some of what there is to the protocol."""
        try:
            data = self._sock.recv(READ_SIZE)
        except BlockingIOError:
            self._found_nothing()
            return
        except OSError:
            self.connectionLost(_LOST)
            return
        if not data:
            self._found_end()
            return
        if len(data) < READ_SIZE and not self._more:
            self._readable = False
        try:
            self.protocol.dataReceived(data)
        except Exception:
            self._failed("dataReceived")
            return
        if self._readable and self._reading:
            self._queue()

    def _found_nothing(self) -> None:
        self._readable = False
        self._more = self._ALWAYS_MORE
        if self._fate == _BROKEN:
            self.connectionLost(_LOST)

    def _found_end(self) -> None:
        self._readable = self._reading = False
        self._ended = True
        # Behind the data of a connection whose write failed, the error that the
        # write took away looks like an end.
        self.readConnectionLost(_LOST if self._fate == _BROKEN else _DONE)

    def readConnectionLost(self, reason: Failure) -> None:
        if reason is _DONE and IHalfCloseableProtocol.providedBy(self.protocol):
            try:
                self.protocol.readConnectionLost()
            except Exception:
                self._failed("readConnectionLost")
        else:
            self.connectionLost(reason)

    def _failed(self, where: str) -> None:
        """The protocol raised: its own connection ends, nobody else's."""
        reason = Failure()
        log.failure(
            "{where} of {protocol!r} failed",
            reason,
            where=where,
            protocol=self.protocol,
        )
        self.connectionLost(reason)

    # -- relaying

    @property
    def blocked(self) -> bool:
        """Whether it is not read, for want of room in its sink."""
        return self._sink is not None and not self._sink.clear

    def splice(self, peer: object, here: Direction, there: Direction) -> bool:
        """See :meth:`ISpliceable.splice`."""
        if not isinstance(peer, PlaneTransport) or peer._plane is not self._plane:
            return False
        if not (self.connected and peer.connected):
            return False
        self._sink = self._source = peer
        peer._sink = peer._source = self
        self._direction, peer._direction = here, there
        return True

    def _relay(self, sink: PlaneTransport) -> None:
        """Hand what there is to the sink."""
        direction = self._direction
        buffer = self._plane.buffer
        receive = self._sock.recv_into
        for _ in range(READS):
            if not sink.clear:
                # Its flush makes this go on.
                return
            if self._full_reads >= FULL_READS:
                if self._splice(sink):
                    continue
                if not (self._readable and self._reading):
                    return
            try:
                count = receive(buffer)
            except BlockingIOError:
                self._found_nothing()
                return
            except OSError:
                self.connectionLost(_LOST)
                return
            if not count:
                self._found_end()
                return
            direction.bytes += count
            try:
                sent = sink._sock.send(buffer[:count])
            except BlockingIOError:
                sent = 0
            except OSError:
                sink._break()
                sent = count
            if sent < count:
                sink._keep(buffer[sent:count])
            if count == COPY_SIZE:
                self._full_reads += 1
                if self._full_reads == FULL_READS:
                    self._plane.pipes.join()
                continue
            if self._full_reads > 0:
                self._full_reads = 0
            if not self._more:
                self._readable = False
                return
            if self._more == _END:
                # All that came before the end was there to be read, and fewer
                # bytes than were asked for means that it was.
                self._found_end()
                return
        self._queue()

    def _splice(self, sink: PlaneTransport) -> bool:
        """Move what there is through a pipe.

        :return: whether it moved something, and there may be more.
        """
        pipes = self._plane.pipes
        if sink._full_reads == _NEVER:
            self._stop_splicing(_NEVER)
            return False
        pipe = pipes.take()
        if pipe is None:
            self._stop_splicing()
            return False
        try:
            count = os.splice(
                self._descriptor, pipe.write_end, PIPE_SIZE, flags=_SPLICE
            )
        except OSError as problem:
            pipes.give(pipe)
            if problem.errno == errno.EAGAIN:
                self._found_nothing()
            elif problem.errno == errno.EINVAL:
                self._plane.not_spliced += 1
                self._stop_splicing(_NEVER)
            else:
                self.connectionLost(_LOST)
            return False
        if not count:
            pipes.give(pipe)
            self._found_end()
            return False
        if count < SPLICE_LEAST:
            self._stop_splicing()
        self._direction.bytes += count
        pipe.held = count
        sink._pipe = pipe
        sink._drain_pipe()
        return True

    def _stop_splicing(self, full_reads: int = 0) -> None:
        """Copy, until there is as much to read as when splicing began; or for ever."""
        if self._full_reads >= FULL_READS:
            self._plane.pipes.leave()
        self._full_reads = full_reads

    def _drain_pipe(self) -> bool:
        """Hand what is in the pipe to the kernel; whether it is empty now."""
        pipe: Any = self._pipe
        try:
            pipe.held -= os.splice(
                pipe.read_end, self._descriptor, pipe.held, flags=_SPLICE
            )
        except OSError as problem:
            if problem.errno == errno.EINVAL:
                self._unpipe(pipe)
                return True
            if problem.errno != errno.EAGAIN:
                self._break()
                return False
        if pipe.held:
            self.clear = False
            self._wait_writable()
            return False
        self._pipe = None
        self._plane.pipes.give(pipe)
        return True

    def _unpipe(self, pipe: Pipe) -> None:
        """Move what is in the pipe to the buffer: this socket can't be spliced to."""
        self._plane.not_spliced += 1
        self._stop_splicing(_NEVER)
        self._out = bytearray(pipe.read()) + (self._out or b"")
        self._pipe = None
        self._plane.pipes.give(pipe)
        self.clear = False
        self._queue()

    # -- writing

    @property
    def unsent(self) -> int:
        """Bytes that were written and that the kernel has not taken yet."""
        waiting = 0 if self._out is None else len(self._out)
        return waiting if self._pipe is None else waiting + self._pipe.held

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
            self._keep(data)
            return
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return
        if sent < len(data):
            self._keep(memoryview(data)[sent:])

    def writeSequence(self, data: Any) -> None:
        pieces = list(data)
        if not all(isinstance(piece, bytes) for piece in pieces):
            raise TypeError("Data must be bytes")
        self.write(b"".join(pieces))

    def _keep(self, data: bytes | memoryview) -> None:
        """Hold what can't be sent now."""
        if not self.connected or self._write_side == _ENDED or self._fate != _ALIVE:
            return
        if self._out is None:
            self._out = bytearray(data)
        else:
            self._out += data
        if self.clear:
            # The kernel has just refused it.
            self.clear = False
            self._wait_writable()
        elif not self._waiting:
            self._queue()
        if (
            self.producer is not None
            and self.streamingProducer
            and not self._producer_paused
            and self.unsent > BUFFER_LIMIT
        ):
            self._producer_paused = True
            self.producer.pauseProducing()

    def _wait_writable(self) -> None:
        self._waiting = True
        if not self._asked_writable:
            self._asked_writable = True
            self._plane.watch_also(self._descriptor, EDGE_BOTH)

    def _flush(self) -> None:
        """Hand what waits to the kernel, then do what waited for that."""
        if self._pipe is not None and not self._drain_pipe():
            return
        out = self._out
        if out is not None:
            try:
                sent = self._sock.send(out)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._break()
                return
            if sent < len(out):
                del out[:sent]
                self._wait_writable()
                return
            self._out = None
        if self.producer is not None and (
            not self.streamingProducer or self._producer_paused
        ):
            self._producer_paused = False
            self._settle()
            try:
                self.producer.resumeProducing()
            except Exception:
                self._failed("resumeProducing, for")
        elif self.disconnecting:
            self.connectionLost(_DONE)
        elif self._write_side == _ENDING:
            self._end_writing()
        else:
            self._settle()
            source = self._source
            if source is not None and source._readable and source._reading:
                source._queue()

    def _settle(self) -> None:
        """Nothing waits any more: may a write go straight to the kernel?"""
        self.clear = (
            self.connected
            and not self.disconnecting
            and self._write_side == _OPEN
            and self._fate == _ALIVE
            and (self.producer is None or self.streamingProducer)
        )

    def _break(self) -> None:
        """A write has failed.

        What the peer sent before is read first, and then the loss is reported,
        from the plane and not from within a write.
        """
        if self._fate == _ALIVE:
            self._fate = _BROKEN
            self.clear = False
            self._drop()
            self._readable = True
            # It is read to the bitter end.
            self._more = select.EPOLLERR
            self._queue()

    def _drop(self) -> None:
        self._out = None
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._plane.pipes.give(pipe, empty=False)

    # -- half-close and close

    def loseWriteConnection(self) -> None:
        if not self.connected or self._write_side != _OPEN:
            return
        was_clear, self.clear = self.clear, False
        self._write_side = _ENDING
        if was_clear:
            self._end_writing()
        elif not self._waiting:
            self._queue()

    def _end_writing(self) -> None:
        self._write_side = _ENDED
        try:  # noqa: SIM105 - suppress() would cost each session a microsecond
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            # Reset a moment ago, which a read will tell.
            pass
        self.writeConnectionLost(_DONE)

    def writeConnectionLost(self, reason: Failure) -> None:
        if IHalfCloseableProtocol.providedBy(self.protocol):
            try:
                self.protocol.writeConnectionLost()
            except Exception:
                self._failed("writeConnectionLost")

    def loseConnection(self) -> None:
        if not self.connected or self.disconnecting:
            return
        was_clear, self.clear = self.clear, False
        self.disconnecting = True
        self._reading = False
        if self._write_side == _ENDED or (
            was_clear and self._ended and self.producer is None
        ):
            self.connectionLost(_DONE)
        elif not self._waiting:
            self._queue()

    def abortConnection(self) -> None:
        if self.connected and self._fate != _ABORTED:
            self._fate = _ABORTED
            self.disconnecting = True
            self._reading = self.clear = False
            self._queue()

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over: close the socket and tell the protocol."""
        if not self.connected:
            return
        self.connected = self.clear = self._reading = False
        sock = self._sock
        if self._fate == _ABORTED or not self._ended:
            self._hang_up(reason)
        self._plane.give_up(self._descriptor, sock)
        self._descriptor = -1
        if self._out is not None or self._pipe is not None:
            self._drop()
        if self._full_reads >= FULL_READS:
            self._stop_splicing()
        if self.producer is not None:
            self._stop_producer()
        protocol, self.protocol = self.protocol, None
        try:
            protocol.connectionLost(reason)
        except Exception:
            log.failure("connectionLost of {protocol!r} failed", protocol=protocol)
        peer, self._sink, self._source = self._sink, None, None
        if peer is not None:
            peer._sink = peer._source = None

    def _hang_up(self, reason: Failure) -> None:
        """Choose between a reset and an end of data, before the socket is closed."""
        with suppress(OSError):  # it may be gone already
            if reason.check(ConnectionAborted):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            else:
                # With something unread a close is a reset.  This sends what was
                # written, and an end of data, before that.
                self._sock.shutdown(socket.SHUT_RDWR)

    def _stop_producer(self) -> None:
        producer, self.producer = self.producer, None
        try:
            producer.stopProducing()
        except Exception:
            log.failure("stopProducing of {producer!r} failed", producer=producer)

    # -- IPushProducer

    def pauseProducing(self) -> None:
        self._reading = False

    def resumeProducing(self) -> None:
        if self.connected and not self.disconnecting and not self._ended:
            self._reading = True
            if self._readable:
                self._queue()

    def stopProducing(self) -> None:
        self.loseConnection()

    # -- IConsumer

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.producer is not None:
            raise RuntimeError(
                f"Cannot register producer {producer}, because producer "
                f"{self.producer} was never unregistered."
            )
        if not self.connected:
            producer.stopProducing()
            return
        self.producer = producer
        self.streamingProducer = streaming
        self._producer_paused = False
        if not streaming:
            self.clear = False
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        if self.connected and not self._waiting:
            if self.unsent or self.disconnecting or self._write_side == _ENDING:
                self._queue()
            else:
                self._settle()

    def stopConsuming(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    # -- ITCPTransport

    def fileno(self) -> int:
        return self._descriptor

    def getHandle(self) -> socket.SocketType:
        """The socket, as the socket module's C class."""
        return self._sock

    def getPeer(self) -> Any:
        if isinstance(self._peer, tuple | str | bytes):
            self._peer = socket_address(self._sock.family, self._peer)
        return self._peer

    def getHost(self) -> Any:
        if self._local is None:
            self._local = socket_address(self._sock.family, self._sock.getsockname())
        return self._local

    def getTcpNoDelay(self) -> bool:
        return bool(self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def setTcpNoDelay(self, enabled: bool) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, enabled)

    def getTcpKeepAlive(self) -> bool:
        return bool(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, enabled)

    @property
    def disconnected(self) -> bool:
        return not self.connected

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
    _ALWAYS_MORE = select.EPOLLPRI

    def getTcpNoDelay(self) -> bool:
        return False

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is nothing to delay."""


def transport_class(family: int) -> type[PlaneTransport]:
    """The transport for connected sockets of a family."""
    return PlaneUNIXTransport if family == socket.AF_UNIX else PlaneTransport
