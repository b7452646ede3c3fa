"""A connection that is read no faster than the pace of its direction allows.

Before each read the pace is asked how many bytes it may bring; when that is none, the
connection is paused until the pace resumes it.  Once the connection is reset, nobody
can be slowed down any more: what is left is read at once, and the reset passed on.
"""

from __future__ import annotations

from relayd.plane.connection import READ_SIZE
from relayd.plane.connection_base import (
    FAILED,
    HINTS,
    NOT_WAITING,
    READABLE,
    UNREAD,
    WAITING,
    WRITABLE,
    failure_by,
)
from relayd.plane.piping import FULL_READS
from relayd.plane.poller import COPY_SIZE, MIN_SHARE
from relayd.plane.splicing import _END, _MSG_MORE, FULL_READ, SplicingConnection


class PacedConnection(SplicingConnection):
    """The paced kind of a connection: its `_direction` has a pace."""

    __slots__ = ()

    def read_much(self) -> None:
        """See :meth:`ISpliceable.read_much`: its pace says how much."""

    def proceed(self) -> None:
        self._lift_if_lost()
        SplicingConnection.proceed(self)

    def _lift_if_lost(self) -> None:
        if self._hints & FAILED and self._direction.pace is not None:
            self._direction.pace.lift()

    def ready(self, mask: int) -> None:
        # As SplicingConnection's.
        if mask != UNREAD:
            if self._waiting == WAITING and mask & WRITABLE:
                self._waiting = NOT_WAITING
                self._flush()
            if not mask & READABLE:
                return
            self._hints |= mask & HINTS
        self._readable = True
        self._lift_if_lost()
        if not self._reading:
            if self._hints & FAILED:
                self._lost_unread()
            return
        sink = self._sink
        if sink is None:
            self._read()
        else:
            self._relay(sink)

    def _read(self, most: int = READ_SIZE) -> None:
        """Hand what is granted to the protocol, which spends it."""
        pace = self._direction.pace
        granted = most if pace is None else pace.grant(most)
        if granted:
            SplicingConnection._read(self, granted)
        elif pace is not None:
            pace.wait()

    def _relay(self, sink: SplicingConnection) -> None:
        """Move what may be moved to the sink; its flush makes this go on."""
        pace, share = self._direction.pace, self._plane.share
        if pace is None:
            return
        moved = 0
        while sink.clear:
            granted = pace.grant(share - moved)
            if not granted:
                pace.wait()
                return
            # What is less is copied as fast.
            splices = self._full_reads >= FULL_READS and granted >= MIN_SHARE
            if splices:
                count = self._splice_to(sink, granted)
                pace.spend(count)
                if not (self._readable and self._reading):
                    pace.rest()
                    return
            else:
                count = self._copy_to(sink, min(granted, COPY_SIZE))
                if count < 0:
                    pace.rest()
                    return
            moved += count
            if moved >= share:
                self._schedule()
                return

    def _copy_to(self, sink: SplicingConnection, most: int) -> int:
        """Copy up to so many bytes.

        :return: how many it were; -1: there is nothing more to read now.
        """
        buffer = self._plane.buffer
        try:
            count = self._sock.recv_into(buffer, most)
        except BlockingIOError:
            self._found_nothing()
            return -1
        except OSError as problem:
            self.connectionLost(failure_by(problem.errno))
            return -1
        if not count:
            self._found_end()
            return -1
        direction = self._direction
        direction.read += count
        if direction.pace is not None:
            direction.pace.spend(count)
        ends = self._hints == _END and count < most
        try:
            sent = sink._sock.send(buffer[:count], _MSG_MORE if ends else 0)
        except OSError as problem:
            sent = sink._send_plainly(buffer[:count], problem) if ends else 0
            if not ends:
                sink._not_sent(problem)
        if sent < count:
            sink._append(buffer[sent:count])
        if most >= FULL_READ and self._full_reads < FULL_READS:
            self._count_full(count)
        if count < most:
            if not self._hints:
                self._readable = False
                return -1
            if ends:
                self._found_end()
                return -1
        return count

    def _count_full(self, count: int) -> None:
        """Start splicing after FULL_READS full reads in a row."""
        if count < FULL_READ:
            self._full_reads = min(self._full_reads, 0)
        else:
            self._full_reads += 1
            if self._full_reads == FULL_READS:
                self._plane.pipes.add_user()
