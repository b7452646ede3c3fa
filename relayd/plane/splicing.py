"""Two connections of the plane that move bytes between themselves.

:meth:`SplicingConnection.splice` makes each the other's *sink*: what one reads goes to
the other and not to its protocol, and the Bridge that has joined them is told of the
ends of data.

:meth:`SplicingConnection.splice_one_way` does so for one direction, while the other
goes through its protocol.  Who is only a sink then has none itself, and knows its
source instead of a Bridge, for the few moments in which a sink has something to tell.

Bytes are copied through one buffer that all connections share, without an object for
each chunk.  A source whose sink is full is *blocked*, and is not read, so that a sink
never holds more than one such chunk.  After FULL_READS full reads in a row the bytes
are spliced, splice(2), which is in :mod:`relayd.plane.piping`.
"""

from __future__ import annotations

import errno
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
from relayd.plane.piping import FULL_READS, PipingConnection
from relayd.plane.poller import COPY_SIZE

#: A read of at least this, in bytes, is full.
FULL_READ = 65536

_MSG_MORE = int(socket.MSG_MORE)

#: The peer has sent its last byte, and nothing else has happened.
_END = select.EPOLLRDHUP


class SplicingConnection(PipingConnection):
    """A connection that can be spliced to another one of its plane."""

    __slots__ = ()

    _sink: SplicingConnection | None

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

    def splice_one_way(self, peer: object, direction: Direction, splicer: Any) -> bool:
        """See :meth:`ISpliceable.splice_one_way`."""
        if (
            not isinstance(peer, SplicingConnection)
            or peer._plane is not self._plane
            or self.protocol is None
            or peer.protocol is None
            or peer.producer is not None
        ):
            return False
        self._sink = peer
        self._direction = direction
        self._splicer = splicer
        if peer._sink is None:
            peer._splicer = self
        return True

    def keep_pace(self, direction: Direction) -> None:
        """See :meth:`ISpliceable.keep_pace`."""
        raise NotImplementedError

    def unsplice(self) -> None:
        """See :meth:`ISpliceable.unsplice`."""
        peer = self._splicer if self._sink is None else self._sink
        if peer is None:
            return
        self._sink = peer._sink = self._splicer = peer._splicer = None
        for each in (self, peer):
            each._stop_splicing(min(each._full_reads, 0))
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
            or peer._sink is not self
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
        # Behind an end they do not read.
        self.clear = peer.clear = False
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
        if peer is None:
            peer = self._splicer
        if peer is not None:
            self._sink = peer._sink = self._splicer = peer._splicer = None

    def _has_room(self) -> None:
        # Each is the other's sink, unless one way is spliced alone.
        source = self._sink
        if source is None:
            source = self._splicer
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
                sent = sink._send_plainly(buffer[:count], problem) if ends else 0
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

    def _send_plainly(self, data: memoryview, problem: OSError) -> int:
        """Send again, without flags, unless a send with flags was told of a loss.

        The kernel tells of it once: the next send would fail as after a reset.

        :param problem: what the first has failed with.
        :return: how much the kernel takes.
        """
        if problem.errno in LOSSES or problem.errno == errno.EAGAIN:
            self._not_sent(problem)
            return 0
        try:
            return self._sock.send(data)
        except OSError as again:
            self._not_sent(again)
            return 0
