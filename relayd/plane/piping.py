"""A connection of the plane that is spliced: the pipe that its bytes go through.

splice(2) moves them from the source's socket into a pipe and from there to the sink,
without a copy to this process.  The pipe is the sink's while there is something in it,
and counts as buffered.  Where splice(2) is refused, by a sandbox or by a kernel that
can't, bytes are copied; whether a connection is lost is for `recv` and `send` to say.

When that begins, and what goes where, is in :mod:`relayd.plane.splicing`.
"""

from __future__ import annotations

import errno
import os
import select
import socket

from relayd.net.transports import LOSSES
from relayd.plane.connection import Connection
from relayd.plane.connection_base import BEHIND, failure_by
from relayd.plane.pipes import PIPE_SIZE, Pipe
from relayd.plane.poller import MIN_SHARE

#: Full reads in a row before splicing starts.
FULL_READS = 2

#: A splice that moves less than this, in bytes, is no better than copying.
MIN_SPLICE = 16384

#: As many of these in a row, and it is copied again.
SMALL_SPLICES = 16

_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

#: What splice(2) says where it can be had at another time.
_SHORT = frozenset({errno.ENOMEM, errno.ENOBUFS})

#: Instead of a count of full reads: this socket can't be spliced.
_NEVER = -(1 << 62)


class PipingConnection(Connection):
    """A connection that can be either end of a pipe; made as `ConnectionBase`."""

    __slots__ = ()

    # Up to FULL_READS; one more for each small splice in a row while it is spliced.
    _full_reads: int

    # -- splicing

    def _splice_to(self, sink: PipingConnection, most: int) -> int:
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
        looks like an end of data.  If it finds a byte, that is at an urgent mark, which
        splice can't pass, and the loss comes behind what is unread.  Any other errno is
        a refusal by a kernel, a sandbox or a filter, each of which has its own.
        """
        lost: int | None = None
        unread = b""
        try:
            unread = self._sock.recv(1, socket.MSG_PEEK)
            if problem in LOSSES:
                lost = problem
        except BlockingIOError:
            pass
        except OSError as raised:
            lost = raised.errno
        if lost is None:
            self._refused(problem)
        elif unread:
            self._stop_splicing()
            self._write_failed(lost)
            self._hints |= BEHIND
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
