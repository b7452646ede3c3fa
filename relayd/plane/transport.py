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
and *sink*: what one reads goes to the other and not to its protocol, and of the ends
of data hears who has joined them.  Bytes are copied through one buffer
that all connections share, without an object for each chunk; a source whose sink
is full is *blocked*, and is not read, so that a sink never holds more than one
such chunk.  After FULL_READS full reads in a row the bytes are spliced: from
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
import functools
import os
import select
import socket
from contextlib import suppress
from typing import Any

from twisted.internet.address import IPv4Address
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
from relayd.interfaces import IHearsReset, ISpliceable
from relayd.plane.pipes import PIPE_SIZE, Pipe
from relayd.plane.poller import COPY_SIZE, SHARE_LEAST, Plane
from relayd.session import Direction
from relayd.tcp_info import unacknowledged
from relayd.transports import (
    LOSSES,
    PeerReset,
    inline_urgent,
    loss_failed,
    lost_by,
    reset_on_close,
)

log = Logger(namespace="relayd.plane")

#: The most that a protocol gets at once, in bytes; as Twisted's transports.
READ_SIZE = 65536

#: A streaming producer is paused when more than this waits, in bytes; likewise.
BUFFER_LIMIT = 65536

#: A read of at least this, in bytes, is full.
FULL_READ = 65536

#: Full reads in a row before splicing starts.
FULL_READS = 2

#: A splice that moves less than this, in bytes, is no better than copying.
SPLICE_LEAST = 16384

#: As many of these in a row, and it is copied again.
SMALL_SPLICES = 16

EDGE_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
EDGE_BOTH = EDGE_READ | select.EPOLLOUT

_WRITABLE = select.EPOLLOUT
#: Something is readable that the kernel has told of before.
_LEFT = select.EPOLLIN

#: With these, a read that is not full was not the last: an end, an error or an
#: urgent mark comes behind it.
_MORE = select.EPOLLRDHUP | select.EPOLLERR | select.EPOLLHUP | select.EPOLLPRI

_READABLE = select.EPOLLIN | _MORE

#: The connection is lost.
_FAILED = select.EPOLLERR

_MSG_MORE = int(socket.MSG_MORE)

#: The peer has sent its last byte, and nothing else is the matter.
_END = select.EPOLLRDHUP

_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

#: What splice(2) says where it can be had at another time.
_SHORT = frozenset({errno.ENOMEM, errno.ENOBUFS})

_DONE = Failure(CONNECTION_DONE)
_LOST = Failure(CONNECTION_LOST)


# Whether the kernel reports writability, and whether that is waited for.
_NOT_ASKED, _NOT_WAITING, _WAITING = range(3)

# How a producer is asked for more: pull; push, which may be paused.
_PULL, _PUSH, _PAUSED = range(3)

# What becomes of the write side: open, to be shut when all is written, shut.
_OPEN, _ENDING, _ENDED = range(3)

# What becomes of the connection: lives, was aborted, a write has failed.
_ALIVE, _ABORTED, _BROKEN = range(3)


def _loss(number: int | None) -> Failure:
    """What a connection is lost with, by the errno of the call that said so."""
    error = lost_by(number)
    return _LOST if error is CONNECTION_LOST else Failure(error)


#: Instead of a count of full reads: this socket can't be spliced.
_NEVER = -(1 << 62)


@implementer(
    ITCPTransport, IConsumer, IPushProducer, IHalfCloseableDescriptor, ISpliceable
)
class PlaneTransport:
    """A connected TCP socket.

    Provides what Twisted's own do: `ITCPTransport`, `IConsumer`,
    `IPushProducer`, `IHalfCloseableDescriptor`, and `abortConnection`.

    :param plane: watches it.
    :param sock: connected, non-blocking; owned by this object from here on.
    :param peer: the peer's address: as Twisted or as the socket module has it, or as
        text if it is IPv4.
    :param local: this end's address, where that is known without asking.

    :ivar clear: a write goes straight to the kernel: nothing waits, nothing is
        to be closed.
    """

    __slots__ = (
        "_direction",
        "_ended",
        "_fate",
        "_full_reads",
        "_laden",
        "_local",
        "_more",
        "_out",
        "_peer",
        "_pipe",
        "_plane",
        "_producing",
        "_queued",
        "_readable",
        "_reading",
        "_sink",
        "_sock",
        "_splicer",
        "_waiting",
        "_why",
        "_write_side",
        "clear",
        "disconnecting",
        "producer",
        "protocol",
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
        self._peer = peer
        self._local = local
        self.protocol = protocol
        self.disconnecting = False
        self.clear = True
        self.producer: Any = None
        # Set with a producer, with a sink, and when a write has failed.
        self._why: Failure
        self._producing: int
        self._direction: Direction
        self._splicer: Any
        self._reading = True
        self._readable = False
        self._more = 0
        self._ended = False
        self._out: bytearray | None = None
        self._waiting = _NOT_ASKED
        self._write_side = _OPEN
        self._fate = _ALIVE
        self._queued = False
        # It has had a buffer, a pipe or a producer, or a place among those who splice.
        self._laden = False
        self._sink: PlaneTransport | None = None
        # Up to FULL_READS; one more for each small splice in a row while it is spliced.
        self._full_reads = 0
        self._pipe: Pipe | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._sock.fileno()} of {self.protocol!r}>"

    def take_over(self, mask: int) -> None:
        """Go on with a descriptor that was watched for both edges and got `mask`."""
        self._waiting = _NOT_WAITING
        self._plane.hand_over(self._sock.fileno(), self)
        if mask & _READABLE:
            self._readable = True
            self._more |= mask & _MORE
            self._queue()

    # -- events

    def proceed(self) -> None:
        """What could not be done within the call that asked for it."""
        self._queued = False
        if self.protocol is None:
            return
        if self._fate == _ABORTED:
            self.connectionLost(Failure(ConnectionAborted()))
            return
        sink = self._sink
        if self._fate == _BROKEN and (
            not self._reading or (sink is not None and not sink.clear)
        ):
            # Nothing can be read from it, so that is all there is to know.
            self.connectionLost(self._why)
            return
        if not self.clear and self._waiting != _WAITING and self._fate == _ALIVE:
            self._flush()
        if self._readable:
            self.ready(_LEFT)

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
        except OSError as problem:
            self.connectionLost(_loss(problem.errno))
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
            self.connectionLost(self._why)

    def _found_end(self) -> None:
        self._readable = self._reading = False
        self._ended = True
        if self._fate == _BROKEN:
            # Behind the data of a connection whose write failed, the error that the
            # write took away looks like an end.
            self.connectionLost(self._why)
        elif self._sink is None:
            self.readConnectionLost(_DONE)
        else:
            try:
                self._splicer.ended(self._direction, self._sink)
            except Exception:
                self._failed("the end of data")
        if self._more & _FAILED:
            # Reset behind its end, which nothing that is read could tell.
            self._lost_unread()

    def _lost_unread(self) -> None:
        """The kernel says that the connection is lost, and nothing is read from it.

        So it is over now where all has been read, or where the protocol wants none of
        what has not.  Otherwise that comes first: when the protocol reads on.
        """
        protocol = self.protocol
        if (
            protocol is None
            or self._fate != _ALIVE
            or not (
                self._ended
                or (
                    self._sink is None
                    and IHearsReset.providedBy(protocol)
                    and protocol.hears_reset()
                )
            )
        ):
            return
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            error = lost_by(number)
            if error is CONNECTION_LOST:
                # Nobody can ask any more when the protocol is told.
                error = PeerReset(self.unsent + unacknowledged(self))
            self.connectionLost(Failure(error))

    def readConnectionLost(self, reason: Failure) -> None:
        protocol = self.protocol
        if reason is _DONE and _half_closes(protocol):
            try:
                protocol.readConnectionLost()
            except Exception:
                self._failed("readConnectionLost")
        else:
            self.connectionLost(reason)

    def _failed(self, where: str) -> None:
        """The protocol raised: its own connection ends, nobody else's."""
        reason = Failure()
        self._fate = _ALIVE  # a close, even if it was to be an abort
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
        return self._sink is not None and self._sink.unsent > 0

    def splice(
        self, peer: object, here: Direction, there: Direction, splicer: Any
    ) -> bool:
        """See :meth:`ISpliceable.splice`."""
        if (
            not isinstance(peer, PlaneTransport)
            or peer._plane is not self._plane
            or self.protocol is None
            or peer.protocol is None
        ):
            return False
        self._sink, peer._sink = peer, self
        self._direction, peer._direction = here, there
        self._splicer = peer._splicer = splicer
        return True

    def ready(self, mask: int) -> None:
        """Do what has become possible: flush, read, relay.

        :param mask: what the kernel says about the descriptor, or _LEFT: go on with
            what there was more of.
        """
        # Nearly always there is just something to read.
        if mask != _LEFT:
            if self._waiting == _WAITING and mask & _WRITABLE:
                self._waiting = _NOT_WAITING
                self._flush()
            if not mask & _READABLE:
                return
            self._more |= mask & _MORE
        self._readable = True
        if not self._reading:
            if self._more & _FAILED:
                self._lost_unread()
            return
        sink = self._sink
        if sink is None:
            self._read()
            return
        # Relaying: hand what there is to the sink.  A method of its own would be a
        # call more for each event.
        moved = 0
        while sink.clear:
            if self._full_reads >= FULL_READS:
                moved += self._splice(sink, self._plane.share - moved)
                if not (self._readable and self._reading):
                    return
                if self._full_reads >= FULL_READS:
                    # Its share is used up, or the sink is full.
                    self._queue()
                    return
                continue
            buffer = self._plane.buffer
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                self._found_nothing()
                return
            except OSError as problem:
                self.connectionLost(_loss(problem.errno))
                return
            if not count:
                self._found_end()
                return
            direction = self._direction
            direction.read += count
            direction.written += count
            # All that came before the end was there to be read, and fewer bytes
            # than were asked for means that it was.
            ends = self._more == _END and count < COPY_SIZE
            try:
                # Its end goes with the last bytes then, in one segment.
                sent = sink._sock.send(buffer[:count], _MSG_MORE if ends else 0)
            except OSError as problem:
                # A flag that is refused is no lost connection.
                sent = sink._sent_plainly(buffer[:count]) if ends else 0
                if not ends:
                    sink._not_sent(problem)
            if sent < count:
                sink._keep(buffer[sent:count])
            if count < FULL_READ:
                if self._full_reads > 0:
                    self._full_reads = 0
            else:
                self._full_reads += 1
                if self._full_reads == FULL_READS:
                    self._laden = True
                    self._plane.pipes.join()
            if count < COPY_SIZE:
                if not self._more:
                    self._readable = False
                    return
                if ends:
                    self._found_end()
                    return
            moved += count
            if moved >= self._plane.share:
                self._queue()
                return
        # Its flush makes this go on.

    def _splice(self, sink: PlaneTransport, most: int) -> int:
        """Move what there is through a pipe, about `most` bytes of it.

        Where splice(2) is refused, by a sandbox or by a kernel that can't, the bytes
        are copied; whether the connection is lost is for `recv` and `send` to say.

        :return: how many were moved.  If the connection is still readable and has
            stopped splicing, `recv` will tell why.
        """
        pipe = None if sink._full_reads < 0 else self._plane.pipes.take()
        if pipe is None:
            self._stop_splicing(_NEVER if sink._full_reads < 0 else 0)
            return 0
        splice = os.splice
        source, target = self._sock.fileno(), sink._sock.fileno()
        entry, exit_ = pipe.write_end, pipe.read_end
        moved = held = 0
        # Not the exception: its traceback would hold this frame, and that it.
        problem: int | None = None
        try:
            while moved < most:
                # Nothing is in the pipe, so nothing but the socket can refuse.
                share = min(PIPE_SIZE, max(most - moved, SHARE_LEAST))
                held = splice(source, entry, share, None, None, _SPLICE)
                if not held:
                    # The end, or an urgent mark, which splice can't pass.
                    self._stop_splicing()
                    break
                moved += held
                held -= splice(exit_, target, held, None, None, _SPLICE)
                if held:
                    break
        except OSError as raised:
            problem = raised.errno
        self._direction.read += moved
        self._direction.written += moved
        if moved >= SPLICE_LEAST:
            if self._full_reads > FULL_READS:
                self._full_reads = FULL_READS
        elif self._full_reads >= FULL_READS:
            self._full_reads += 1
            if self._full_reads - FULL_READS >= SMALL_SPLICES:
                self._stop_splicing()
        if held:
            pipe.held = held
            sink._pipe = pipe
            sink._laden = True
            sink._not_drained(problem)
            return moved
        self._plane.pipes.give(pipe)
        if problem is not None:
            if problem != errno.EAGAIN:
                self._not_spliced(problem)
            elif self._more & select.EPOLLPRI:
                # The urgent mark, maybe, which only a read passes.
                self._stop_splicing()
            else:
                self._found_nothing()
        return moved

    def _not_spliced(self, problem: int) -> None:
        """splice(2) has failed to read: it is refused, or the connection is lost.

        Of a loss the kernel tells once, and has told splice then: to `recv` what
        follows looks like an end of data.  Any other errno is a refusal: of a kernel, a
        sandbox or a filter, each of which has its own.
        """
        lost: int | None = None
        try:
            if not self._sock.recv(1, socket.MSG_PEEK) and problem in LOSSES:
                lost = problem
        except BlockingIOError:
            pass
        except OSError as raised:
            lost = raised.errno
        if lost is None:
            self._refused(problem)
        else:
            self.connectionLost(_loss(lost))

    def _refused(self, problem: int) -> None:
        """Copy: for ever, unless it is for want of memory."""
        self._plane.not_spliced += 1
        self._stop_splicing(0 if problem in _SHORT else _NEVER)

    def _stop_splicing(self, full_reads: int = 0) -> None:
        """Copy, until there is as much to read as when splicing began; or for ever."""
        if self._full_reads >= FULL_READS:
            self._plane.pipes.leave()
        self._full_reads = full_reads

    def _drain_pipe(self, pipe: Pipe) -> bool:
        """Hand what is in the pipe to the kernel; whether it is empty now."""
        problem = None
        try:
            pipe.held -= os.splice(
                pipe.read_end, self._sock.fileno(), pipe.held, None, None, _SPLICE
            )
        except OSError as raised:
            problem = raised.errno
        if pipe.held:
            return self._not_drained(problem)
        self._pipe = None
        self._plane.pipes.give(pipe)
        return True

    def _not_drained(self, problem: int | None) -> bool:
        """The kernel has not taken all that is in the pipe; whether it is empty."""
        pipe = self._pipe
        if problem is None or problem == errno.EAGAIN:
            self.clear = False
            self._wait_writable()
            return False
        try:
            # Nothing, which is refused where the connection is lost.
            self._sock.send(b"")
        except BlockingIOError:
            pass
        except OSError as raised:
            # If splice was told of it, that is what was the matter.
            self._break(problem if problem in LOSSES else raised.errno)
            return False
        if pipe is not None:
            self._unpipe(pipe, problem)
        return True

    def _unpipe(self, pipe: Pipe, problem: int) -> None:
        """Move what is in the pipe to the buffer: `send` goes on with it."""
        self._refused(problem)
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
        except OSError as problem:
            sent = 0
            self._not_sent(problem)
        if sent < len(data):
            self._keep(memoryview(data)[sent:])

    def writeSequence(self, data: Any) -> None:
        pieces = list(data)
        if not all(isinstance(piece, bytes) for piece in pieces):
            raise TypeError("Data must be bytes")
        self.write(b"".join(pieces))

    def _keep(self, data: bytes | memoryview) -> None:
        """Hold what can't be sent now."""
        if self.protocol is None or self._write_side == _ENDED or self._fate != _ALIVE:
            return
        self._laden = True
        if self._out is None:
            self._out = bytearray(data)
        else:
            self._out += data
        if self.clear:
            # The kernel has just refused it.
            self.clear = False
            self._wait_writable()
        elif self._waiting != _WAITING:
            self._queue()
        if (
            self.producer is not None
            and self._producing == _PUSH
            and self.unsent > BUFFER_LIMIT
        ):
            self._producing = _PAUSED
            self.producer.pauseProducing()

    def _wait_writable(self) -> None:
        asked, self._waiting = self._waiting, _WAITING
        if asked == _NOT_ASKED:
            self._plane.watch_also(self._sock.fileno(), EDGE_BOTH)

    def _flush(self) -> None:
        """Hand what waits to the kernel, then do what waited for that."""
        if self._pipe is not None and not self._drain_pipe(self._pipe):
            return
        out = self._out
        if out is not None:
            try:
                sent = self._sock.send(out)
            except OSError as problem:
                sent = 0
                self._not_sent(problem)
                if self._fate == _BROKEN:
                    return
            if sent < len(out):
                del out[:sent]
                self._wait_writable()
                return
            self._out = None
        if self.producer is not None and self._producing != _PUSH:
            if self._producing == _PAUSED:
                self._producing = _PUSH
            self._settle()
            try:
                self.producer.resumeProducing()
            except Exception:
                self._failed("resumeProducing of the producer")
        elif self.disconnecting:
            self.connectionLost(_DONE)
        elif self._write_side == _ENDING:
            self._end_writing()
        else:
            self._settle()
            # Each is the other's sink.
            source = self._sink
            if source is not None and source._readable and source._reading:
                source._queue()

    def _settle(self) -> None:
        """Nothing waits any more: may a write go straight to the kernel?"""
        self.clear = (
            self.protocol is not None
            and not self.disconnecting
            and self._write_side == _OPEN
            and self._fate == _ALIVE
            and (self.producer is None or self._producing != _PULL)
        )

    def _sent_plainly(self, data: memoryview) -> int:
        """How much the kernel takes, asked without flags."""
        try:
            return self._sock.send(data)
        except OSError as problem:
            self._not_sent(problem)
            return 0

    def _not_sent(self, problem: OSError) -> None:
        if problem.errno == errno.ENOBUFS:
            # The kernel is short of memory, which is no edge: ask again.
            self._waiting = _NOT_ASKED
        elif problem.errno != errno.EAGAIN:
            self._break(problem.errno)

    def _break(self, number: int | None) -> None:
        """A write has failed.

        What the peer sent before is read first, and then the loss is reported,
        from the plane and not from within a write.
        """
        if self._fate == _ALIVE:
            self._fate = _BROKEN
            self._why = _loss(number)
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
        if self.protocol is None or self._write_side != _OPEN:
            return
        was_clear, self.clear = self.clear, False
        self._write_side = _ENDING
        if was_clear:
            self._end_writing()
        elif self._waiting != _WAITING:
            self._queue()

    def _end_writing(self) -> None:
        self._write_side = _ENDED
        try:  # noqa: SIM105 - suppress() would cost each session a microsecond
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            # Reset a moment ago, which a read will tell.
            pass
        if self._sink is None:
            self.writeConnectionLost(_DONE)

    def writeConnectionLost(self, reason: Failure) -> None:
        protocol = self.protocol
        if _half_closes(protocol):
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
            self.connectionLost(_DONE)
            return
        self.clear = self._reading = False
        if self._waiting != _WAITING:
            self._queue()

    def close_both(self, protocol: object, peers: object) -> bool:
        """See :meth:`ISpliceable.close_both`.

        What two `loseConnection` and `connectionLost` come to where there is nothing
        to write, to give back or to tell: a twelfth of a short session.
        """
        peer = self._sink
        if (
            peer is None
            or self.protocol is not protocol
            or peer.protocol is not peers
            or self._laden
            or peer._laden
            or not (self._ended and peer._ended)
            or self._fate != _ALIVE
            or peer._fate != _ALIVE
        ):
            return False
        self.protocol = peer.protocol = None
        self.disconnecting = peer.disconnecting = True
        self.clear = peer.clear = self._reading = peer._reading = False
        self._sink = peer._sink = self._splicer = peer._splicer = None
        give_up = self._plane.give_up
        give_up(self._sock)
        give_up(peer._sock)
        return True

    def abortConnection(self) -> None:
        if self.protocol is not None and self._fate != _ABORTED:
            self._fate = _ABORTED
            self.disconnecting = True
            self._reading = self.clear = False
            # Writability is of no interest any more.
            self._waiting = _NOT_WAITING
            self._queue()

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over: close the socket and tell the protocol."""
        protocol, self.protocol = self.protocol, None
        if protocol is None:
            return
        self.clear = self._reading = False
        if not self._ended or self._fate == _ABORTED:
            self._hang_up()
        self._plane.give_up(self._sock)
        if self._laden:
            self._unload()
        try:
            protocol.connectionLost(reason)
        except Exception:
            loss_failed(protocol, reason)
        peer = self._sink
        if peer is not None:
            self._sink = peer._sink = self._splicer = peer._splicer = None

    def _hang_up(self) -> None:
        """Choose between a reset and an end of data, before the socket is closed."""
        if self._fate == _ABORTED:
            reset_on_close(self._sock)
            return
        with suppress(OSError):  # it may be gone already
            # With something unread a close is a reset.  This sends what was
            # written, and an end of data, before that.
            self._sock.shutdown(socket.SHUT_RDWR)

    def _unload(self) -> None:
        """Give back what a connection may have besides its socket."""
        self._drop()
        if self._full_reads >= FULL_READS:
            self._stop_splicing()
        producer, self.producer = self.producer, None
        if producer is not None:
            try:
                producer.stopProducing()
            except Exception:
                log.failure("stopProducing of {producer!r} failed", producer=producer)

    # -- IPushProducer

    def pauseProducing(self) -> None:
        self._reading = False
        if self._more & _FAILED:
            # It has been reset already, of which no event tells again.
            self._queue()

    def resumeProducing(self) -> None:
        if self.protocol is not None and not self.disconnecting and not self._ended:
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
        if self.protocol is None:
            producer.stopProducing()
            return
        self._laden = True
        self.producer = producer
        self._producing = _PUSH if streaming else _PULL
        if not streaming:
            self.clear = False
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        if self.protocol is not None and self._waiting != _WAITING:
            if self.unsent or self.disconnecting or self._write_side == _ENDING:
                self._queue()
            else:
                self._settle()

    def stopConsuming(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    # -- ITCPTransport

    def fileno(self) -> int:
        return self._sock.fileno()

    def getHandle(self) -> socket.SocketType:
        """The socket, as the socket module's C class."""
        return self._sock

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

    def getTcpNoDelay(self) -> bool:
        return bool(self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def setTcpNoDelay(self, enabled: bool) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, enabled)

    def getTcpKeepAlive(self) -> bool:
        return bool(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, enabled)

    @property
    def streamingProducer(self) -> bool:
        return self.producer is not None and self._producing != _PULL

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


def named_address(name: str) -> IPv4Address:
    """The address that is `host:port`, in IPv4."""
    host, _, port = name.rpartition(":")
    return IPv4Address("TCP", host, int(port))


def _half_closes(protocol: Any) -> bool:
    """Whether it is to be told of one side's end."""
    kind: Any = type(protocol)
    # Nearly always its class's answer, which is remembered.
    return _class_half_closes(kind) or IHalfCloseableProtocol.providedBy(protocol)


@functools.lru_cache(maxsize=64)
def _class_half_closes(kind: Any) -> bool:
    return bool(IHalfCloseableProtocol.implementedBy(kind))


class PlaneUNIXTransport(PlaneTransport):
    """A connected UNIX socket."""

    __slots__ = ()

    # A read ends where a descriptor was passed, or the sender's credentials
    # change, with more behind it.
    _ALWAYS_MORE = select.EPOLLPRI

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        inline_urgent(self._sock)
        self._more = self._ALWAYS_MORE

    def getPeer(self) -> Any:
        if isinstance(self._peer, str | bytes):
            return socket_address(socket.AF_UNIX, self._peer)
        return self._peer

    def getTcpNoDelay(self) -> bool:
        return False

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is nothing to delay."""


def transport_class(family: int) -> type[PlaneTransport]:
    """The transport for connected sockets of a family."""
    return PlaneUNIXTransport if family == socket.AF_UNIX else PlaneTransport
