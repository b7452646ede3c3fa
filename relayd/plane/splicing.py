"""Two connections of the plane that move bytes between themselves.

:meth:`SplicingConnection.splice` makes each the other's *sink*: what one reads goes to
the other and not to its protocol, and the Bridge that has joined them is told of the
ends of data.

Bytes are copied through one buffer that all connections share, without an object for
each chunk.  A source whose sink is full is *blocked*, and is not read, so that a sink
never holds more than one such chunk.  After FULL_READS full reads in a row the bytes
are spliced, splice(2): from the socket into a pipe and from there to the sink, without
a copy to this process.  The pipe is the sink's while there is something in it, and
counts as buffered.  Where splice(2) is refused, by a sandbox or by a kernel that can't,
bytes are copied; whether a connection is lost is for `recv` and `send` to say.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import Any

from twisted.python.failure import Failure

from relayd.core.session import Direction
from relayd.net.transports import LOSSES
from relayd.plane.connection import Connection
from relayd.plane.connection_base import (
    CLOSING,
    FAILED,
    HINTS,
    NOT_WAITING,
    READABLE,
    UNREAD,
    WAITING,
    WRITABLE,
    failure_by,
)
from relayd.plane.pipes import PIPE_SIZE, Pipe
from relayd.plane.poller import COPY_SIZE, MIN_SHARE

#: A read of at least this, in bytes, is full.
FULL_READ = 65536

#: Full reads in a row before splicing starts.
FULL_READS = 2

#: A splice that moves less than this, in bytes, is no better than copying.
MIN_SPLICE = 16384

#: As many of these in a row, and it is copied again.
SMALL_SPLICES = 16

_MSG_MORE = int(socket.MSG_MORE)

#: The peer has sent its last byte, and nothing else has happened.
_END = select.EPOLLRDHUP

_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

#: What splice(2) says where it can be had at another time.
_SHORT = frozenset({errno.ENOMEM, errno.ENOBUFS})

#: Instead of a count of full reads: this socket can't be spliced.
_NEVER = -(1 << 62)


class SplicingConnection(Connection):
    """A connection that can be spliced to another one of its plane."""

    __slots__ = ()

    _sink: SplicingConnection | None
    # Up to FULL_READS; one more for each small splice in a row while it is spliced.
    _full_reads: int

    def splice(
        self, peer: object, here: Direction, there: Direction, splicer: Any
    ) -> bool:
        """See :meth:`ISpliceable.splice`."""
        if (
            not isinstance(peer, SplicingConnection)
            or peer._plane is not self._plane
            or self.protocol is None
            or peer.protocol is None
        ):
            return False
        self._sink, peer._sink = peer, self
        self._direction, peer._direction = here, there
        self._splicer = peer._splicer = splicer
        return True

    def keep_pace(self, direction: Direction) -> None:
        """See :meth:`ISpliceable.keep_pace`."""
        raise NotImplementedError

    def unsplice(self) -> None:
        """See :meth:`ISpliceable.unsplice`."""
        peer = self._sink
        if peer is None:
            return
        self._sink = peer._sink = self._splicer = peer._splicer = None
        for each in (self, peer):
            each._stop_splicing()
            # It may have been blocked.
            if each._readable and each._reading:
                each._schedule()

    @property
    def blocked(self) -> bool:
        """Whether it is not read because its sink is full."""
        return self._sink is not None and self._sink.unsent > 0

    def close_both(self, protocol: object, peers: object) -> bool:
        """See :meth:`ISpliceable.close_both`.

        The same as two `loseConnection` and `connectionLost` where there is nothing to
        write, release or report; it saves a twelfth of a short session.
        """
        peer = self._sink
        if (
            peer is None
            or self.protocol is not protocol
            or peer.protocol is not peers
            or not (self._ended and peer._ended)
            or self._loss is not None
            or peer._loss is not None
            or self._buffer is not None
            or peer._buffer is not None
            or self._pipe is not None
            or peer._pipe is not None
            or self.producer is not None
            or peer.producer is not None
            or self._full_reads >= FULL_READS
            or peer._full_reads >= FULL_READS
        ):
            return False
        self.protocol = peer.protocol = None
        self._write_side = peer._write_side = CLOSING
        self.clear = peer.clear = self._reading = peer._reading = False
        self._sink = peer._sink = self._splicer = peer._splicer = None
        give_up = self._plane.unwatch_and_close
        give_up(self._sock)
        give_up(peer._sock)
        return True

    # -- where a sink takes the protocol's place

    def _may_read(self) -> bool:
        return self._reading and (self._sink is None or self._sink.clear)

    def _hears_reset(self) -> bool:
        # Once joined, what is in the kernel is delivered first.
        return self._sink is None and Connection._hears_reset(self)

    def connectionLost(self, reason: Failure) -> None:
        if self._pipe is not None:
            self._drop_unsent()
        if self._full_reads >= FULL_READS:
            self._stop_splicing()
        Connection.connectionLost(self, reason)
        peer = self._sink
        if peer is not None:
            self._sink = peer._sink = self._splicer = peer._splicer = None

    def _has_room(self) -> None:
        # Each is the other's sink.
        source = self._sink
        if source is not None and source._readable and source._reading:
            source._schedule()

    # -- copying

    def ready(self, mask: int) -> None:
        # Nearly always there is just something to read.
        if mask != UNREAD:
            if self._waiting == WAITING and mask & WRITABLE:
                self._waiting = NOT_WAITING
                self._flush()
            if not mask & READABLE:
                return
            self._hints |= mask & HINTS
        self._readable = True
        if not self._reading:
            if self._hints & FAILED:
                self._lost_unread()
            return
        sink = self._sink
        if sink is None:
            self._read()
            return
        # Relaying.  Methods of their own for this and for a copy would be four calls
        # more for a request and its response, 1.5 % of them.
        moved = 0
        while sink.clear:
            if self._full_reads >= FULL_READS:
                moved += self._splice_to(sink, self._plane.share - moved)
                if not (self._readable and self._reading):
                    return
                if self._full_reads >= FULL_READS:
                    # Its share is used up, or the sink is full.
                    self._schedule()
                    return
                continue
            buffer = self._plane.buffer
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                self._found_nothing()
                return
            except OSError as problem:
                self.connectionLost(failure_by(problem.errno))
                return
            if not count:
                self._found_end()
                return
            self._direction.read += count
            # All that came before the end was there to be read, and fewer bytes
            # than were asked for means that it was.
            ends = self._hints == _END and count < COPY_SIZE
            try:
                # Its end goes with the last bytes then, in one segment.
                sent = sink._sock.send(buffer[:count], _MSG_MORE if ends else 0)
            except OSError as problem:
                # A flag that is refused is no lost connection.
                sent = sink._send_without_flags(buffer[:count]) if ends else 0
                if not ends:
                    sink._not_sent(problem)
            if sent < count:
                sink._append(buffer[sent:count])
            if count < FULL_READ:
                if self._full_reads > 0:
                    self._full_reads = 0
            else:
                self._full_reads += 1
                if self._full_reads == FULL_READS:
                    self._plane.pipes.add_user()
            if count < COPY_SIZE:
                if not self._hints:
                    self._readable = False
                    return
                if ends:
                    self._found_end()
                    return
            moved += count
            if moved >= self._plane.share:
                self._schedule()
                return
        # Its flush makes this go on.

    def _send_without_flags(self, data: memoryview) -> int:
        """How much the kernel takes."""
        try:
            return self._sock.send(data)
        except OSError as problem:
            self._not_sent(problem)
            return 0

    # -- splicing

    def _splice_to(self, sink: SplicingConnection, most: int) -> int:
        """Move what there is through a pipe, about `most` bytes of it.

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
                share = min(PIPE_SIZE, max(most - moved, MIN_SHARE))
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
        direction = self._direction
        direction.read += moved
        direction.spliced += moved
        self._count_small(moved)
        if held:
            pipe.held = held
            sink._pipe = pipe
            sink._not_drained(problem)
            return moved
        self._plane.pipes.give(pipe)
        if problem is not None:
            if problem != errno.EAGAIN:
                self._not_spliced(problem)
            elif self._hints & select.EPOLLPRI:
                # The urgent mark, maybe, which only a read passes.
                self._stop_splicing()
            else:
                self._found_nothing()
        return moved

    def _count_small(self, moved: int) -> None:
        """Stop splicing where that moves little, again and again."""
        if moved >= MIN_SPLICE:
            if self._full_reads > FULL_READS:
                self._full_reads = FULL_READS
        elif self._full_reads >= FULL_READS:
            self._full_reads += 1
            if self._full_reads - FULL_READS >= SMALL_SPLICES:
                self._stop_splicing()

    def _not_spliced(self, problem: int) -> None:
        """splice(2) has failed to read: it is refused, or the connection is lost.

        The kernel reports a loss once, here to splice: a `recv` after that finds what
        looks like an end of data.  Any other errno is a refusal by a kernel, a sandbox
        or a filter, each of which has its own.
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
            self.connectionLost(failure_by(lost))

    def _refused(self, problem: int) -> None:
        """Copy from now on; for good, unless the kernel was short of memory."""
        self._plane.not_spliced += 1
        self._stop_splicing(0 if problem in _SHORT else _NEVER)

    def _stop_splicing(self, full_reads: int = 0) -> None:
        """Copy, until there is as much to read as when splicing began; or for ever."""
        if self._full_reads >= FULL_READS:
            self._plane.pipes.remove_user()
        self._full_reads = full_reads

    # -- a sink's pipe

    @property
    def unsent(self) -> int:
        """Bytes that were written, or moved, here and that the kernel has not taken."""
        waiting = 0 if self._buffer is None else len(self._buffer)
        return waiting if self._pipe is None else waiting + self._pipe.held

    def _flush(self) -> None:
        if self._pipe is None or self._drain_pipe(self._pipe):
            Connection._flush(self)

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
        lost = self._lost_by_sending()
        if lost is not None:
            # If splice was told of the loss, its errno is the right one.
            self._write_failed(problem if problem in LOSSES else lost)
            return False
        if pipe is not None:
            self._empty_pipe(pipe, problem)
        return True

    def _empty_pipe(self, pipe: Pipe, problem: int) -> None:
        """Move what is in the pipe to the buffer: `send` goes on with it."""
        self._refused(problem)
        self._buffer = bytearray(pipe.read()) + (self._buffer or b"")
        self._pipe = None
        self._plane.pipes.give(pipe)
        self.clear = False
        self._schedule()

    def _drop_unsent(self) -> None:
        self._buffer = None
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._plane.pipes.give(pipe, empty=False)
