"""A flow: the relay's socket for one client, and the datagrams through it.

The socket is connected to the server, so the kernel drops what others send to it.  The
server's datagrams are sent to the client by the listener that the client sends to.

Reading.  The socket is read in limited batches, into more bytes than any datagram has,
so none is truncated.  Usually as many datagrams are read as were pending the last time:
a read that finds none costs as much as another event.  A flow that has one reply at a
time puts it into the batch of its listener (:mod:`relayd.datagrams.replies`).

Writing.  Consecutive datagrams of one size in a batch are a run, and sent in one call
(:mod:`relayd.datagrams.sockets`).  Where the kernel can't do that, they are sent one by
one.

Refusals.  A host where no socket has the port refuses (ICMP), which is the error of the
socket's next call.  Then a flow may go on elsewhere (:mod:`relayd.datagrams.moving`).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from twisted.python.failure import Failure

from relayd.core.addresses import client_key
from relayd.core.interfaces import ILease
from relayd.datagrams.batches import BATCH_RANGE
from relayd.datagrams.dialing import Connected
from relayd.datagrams.interfaces import Ends, FlowListener, FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.moving import MovingFlow
from relayd.datagrams.refusals import REFUSALS, REPORTED
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    fits,
    segments,
    segments_after,
    send_error,
)

#: Replies of a flow after which it is read until nothing is pending.
FULL_READ_EVERY = 32

#: A flow with so many replies at once is always read until nothing is pending: its runs
#: are longer then, which saves more than a read in vain costs.
BURST = 6

#: Errors in one batch of a flow's replies after which it can't be read.
MAX_ERRORS = 16


class ClientFlow(MovingFlow):
    """A flow, and the socket that is the relay's port for its client.

    :ivar listener: the one that the client sends to.
    :ivar here: the client's key at that listener.
    :ivar source: the client's socket address.
    :ivar to: where to send replies, for the listener.
    :ivar sock: connected to the server.
    :ivar ours: the local address of `sock`.
    :ivar server: the server.
    :ivar replies: the pending replies of its listener.
    :ivar envelope: the client's addresses, for a batch of replies.
    :ivar drops: the kernel's count of drops at `sock` when it was last read.
    :ivar lease: what the gate gave for it, if there is one.
    :ivar hop: its name as a hop, if it leads to a relay of this process.
    :ivar chain: its filters; set if there are any.
    """

    #: What it receives is from a server, not from clients.
    hears_server = True
    limits: Any = None  # those of its bytes, if there are any
    #: The names of its filters, and how many datagrams they keep back
    #: (:mod:`relayd.datagrams.filtered`).
    filtered: Sequence[str] = ()
    kept = 0

    __slots__ = (
        "_batch_until",
        "_full_read_at",
        "_longest_run",
        "_segments_down",
        "_segments_up",
        "_usual",
        "chain",
        "drops",
        "envelope",
        "here",
        "hop",
        "lease",
        "listener",
        "ours",
        "recv",
        "recv_into",
        "replies",
        "reply",
        "send",
        "sock",
        "source",
        "to",
    )

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        relay: FlowRelay,
        listener: FlowListener,
        client: tuple[Any, Any, Any],
        connected: Connected,
    ) -> None:
        """:param client: its key at the listener, its address, where to reply to."""
        self.here, self.source, self.to = client
        # A client may send to two listeners of a relay.
        key = (listener.number, self.here)
        MovingFlow.__init__(self, key, client_key(self.source[0]), ledger.now())
        self.ledger = ledger
        self.relay = relay
        self.listener = listener
        self.hop = ""
        self.lease: ILease | None = None
        self.use(connected)
        self.reply = listener.replier(self.to)
        self.replies = listener.replies
        self.envelope = listener.envelope(self.here)
        #: Whether runs can be sent, as far as is known.
        self._segments_up = self._segments_down = True
        #: How many datagrams were pending the last time.
        self._usual = 1
        #: The number of replies from which on to read until nothing is pending.
        self._full_read_at = 0
        #: The number of replies up to which they are expected one at a time, and put
        #: into the batch of the listener.
        self._batch_until = 0
        #: The length of the client's longest run.
        self._longest_run = 1

    @property
    def ends(self) -> Ends:
        """What a socket for it is made of."""
        return self.listener, (self.here, self.source, self.to)

    def use(self, connected: Connected) -> None:
        """Use this socket, which is connected to the server."""
        sock = self.sock = connected.sock
        self.ours = connected.ours
        self.arrive(connected)
        self.send = sock.send
        self.recv = sock.recv
        self.recv_into = sock.recv_into
        self.drops = 0

    def move(self, connected: Connected) -> None:
        """Use another socket from now on; it is read anew."""
        self.use(connected)
        self.since = self.ledger.now()
        self._full_read_at = self._batch_until = 0

    def reply_alone(self) -> None:
        """No more replies go into the batch of the listener."""
        self._batch_until = 0

    def ready(self, mask: int) -> None:
        """The server has answered, or its host has refused."""
        try:
            if self.down_datagrams >= self._batch_until:
                self._read_some()
                return
            replies = self.replies
            pending = replies.pending
            try:
                size = self.recv_into(replies.slots[len(pending)])
            except BlockingIOError:
                return
            except OSError as problem:
                self.ledger.counters.icmp_errors += 1
                self._read_batch(BATCH, problem)
                return
            if not pending:
                replies.flush_soon()
            pending.append((self, size))
            if len(pending) == BATCH:
                replies.flush()
        except Exception:
            self.relay.fail(self)

    def _read_some(self) -> None:
        # A read that finds nothing costs as much as an event: one every
        # FULL_READ_EVERY replies is enough to notice a flow that has become busier.
        if self.down_datagrams >= self._full_read_at or self._usual >= BURST:
            self._read_batch(BATCH)
        else:
            self._read_batch(self._usual)

    def _read_batch(self, most: int, refusal: OSError | None = None) -> None:
        """Pass the server's datagrams on to the client.

        :param most: the limit of datagrams to read.
        :param refusal: the error of an earlier datagram, reported by another call.
        """
        ledger, recv = self.ledger, self.recv
        counters, cap = ledger.counters, ledger.reply_cap
        received = size = errors = 0
        run: list[bytes] = []
        try:
            for _ in BATCH_RANGE:
                try:
                    data = recv(BUFFER_SIZE)
                except BlockingIOError:
                    break
                except OSError as problem:
                    # An earlier datagram was refused.  Reporting it clears the error;
                    # an answer may be pending behind it.
                    counters.icmp_errors += 1
                    errors += 1
                    if errors > MAX_ERRORS:
                        break
                    refusal = problem
                    continue
                received += 1
                length = len(data)
                if length >= BUFFER_SIZE or (
                    cap and not self._within_reply_cap(size * len(run) + length)
                ):
                    self._drop_reply(length)
                elif length == size and fits(run, size):
                    run.append(data)
                else:
                    if run:
                        self._reply(run)
                    run, size = [data], length
                if received == most:
                    break
            if run:
                self._reply(run)
        finally:
            counters.replies_received += received
        if errors > MAX_ERRORS:
            # Reporting does not clear it: a sandbox refuses the call.
            self.relay.end(self, "failed")
        elif received:
            # If many, the next may only be late; if few, a read in vain costs too much.
            self._usual = max(received, (self._usual - 4) >> 1)
            if most == BATCH:
                self._full_read_at = self.down_datagrams + max(
                    FULL_READ_EVERY, 8 * received
                )
            one_by_one = self._usual == 1 and self.replies.slots
            self._batch_until = self._full_read_at if one_by_one else 0
            if self.awaits:
                self.awaits = False
                if self.server.moves:
                    self.answered()
            ledger.table.inbound(self, ledger.now())
        elif refusal is not None and self.may_redial(refusal):
            self.redial_next(refusal)

    def _within_reply_cap(self, size: int) -> bool:
        """Whether another reply of so many bytes is within the cap."""
        return self.down_bytes + size <= self.ledger.reply_cap * self.up_bytes

    def _drop_reply(self, size: int) -> None:
        reason = "truncated" if size >= BUFFER_SIZE else "reply_cap"
        self.ledger.counters.replies_dropped[reason] += 1

    def read_all(self) -> None:
        """Pass the pending datagrams of the server on, a batch at most."""
        self.replies.flush()
        try:
            self._read_batch(BATCH)
        except Exception:
            self.relay.fail(self)

    def _reply(self, run: Sequence[bytes]) -> None:
        """Send the server's datagrams, all of one size, to the client."""
        counters, sent = self.ledger.counters, 0
        size = len(run[0])
        if len(run) > 1 and self._segments_down:
            try:
                self.listener.reply_run(run, self.to)
            except OSError as problem:
                self._segments_down = segments_after(problem)
                if problem.errno == errno.ENOBUFS:
                    counters.replies_dropped["send_ENOBUFS"] += len(run)
                    run = ()
            else:
                sent, run = len(run), ()
        for data in run:
            try:
                self.reply(data, self.to)
            except OSError as problem:
                counters.replies_dropped[send_error(problem)] += 1
            else:
                sent += 1
        counters.replies_sent += sent
        self.down_datagrams += sent
        self.down_bytes += sent * size

    def forward(self, run: Sequence[bytes], now: float) -> None:
        """Send the client's datagrams, all of one size, to the server."""
        sent, whole = 0, run
        counters, size = self.ledger.counters, len(run[0])
        if len(run) > self._longest_run:
            # There may be as many replies.
            self._longest_run = len(run)
            self._full_read_at = self._batch_until = 0
        if len(run) > 1 and self._segments_up:
            try:
                self._send_run(run, size)
            except OSError as refusal:
                self._segments_up = segments_after(refusal)
                if refusal.errno == errno.ENOBUFS:
                    # Some of them may have been sent: none is sent twice.
                    counters.dropped["send_ENOBUFS"] += len(run)
                    run = ()
            else:
                sent, run = len(run), ()
        kept = 0
        for place, data in enumerate(run):
            try:
                self.send(data)
            except OSError as refusal:
                if place > kept:
                    # One of those already sent may be what was refused.
                    self.keep(run[kept:place], now)
                    kept = place
                sent += self.send_after_error(data, refusal)
            else:
                sent += 1
        counters.sent += sent
        self.up_datagrams += sent
        self.up_bytes += sent * size
        if now < self.due:
            self.seen = now
        else:
            self.client_sent(whole[kept:], now)

    def _send_run(self, run: Sequence[bytes], size: int) -> None:
        """Send datagrams of one size in one call.

        :raises OSError: none was sent; with ENOBUFS, some may have been.
        """
        extra = [segments(size)]
        try:
            self.sock.sendmsg(run, extra)
        except OSError as problem:
            if problem.errno not in REPORTED:
                raise
            refused = problem.errno in REFUSALS
            self.ledger.counters.icmp_errors += refused
            self._refused(problem)
            # If this run is too large itself, this raises again.
            self.sock.sendmsg(run, extra)
            self.ledger.counters.icmp_errors += not refused

    def send_after_error(self, data: bytes, problem: OSError) -> bool:
        """Handle a failed send to the server; whether it was sent after all.

        The refusal of an earlier datagram (ICMP) is reported by the next call, which
        does nothing else: it is made again.
        """
        counters = self.ledger.counters
        if problem.errno in REPORTED:
            refused = problem.errno in REFUSALS
            counters.icmp_errors += refused
            self._refused(problem)
            try:
                self.send(data)
            except OSError as again:
                problem = again
            else:
                # An earlier datagram was too large, not this one.
                counters.icmp_errors += not refused
                return True
        counters.dropped[send_error(problem)] += 1
        return False

    def forward_after_error(self, data: bytes, problem: OSError) -> None:
        """As :meth:`send_after_error`; counts the datagram if it was sent."""
        if self.send_after_error(data, problem):
            self.ledger.counters.sent += 1
            self.up_datagrams += 1
            self.up_bytes += len(data)

    def _refused(self, problem: OSError) -> None:
        """A send has reported that an earlier datagram was refused."""
        if self.server.moves and problem.errno in REFUSALS:
            # The kernel reports that even before an answer that came earlier.
            self._read_batch(BATCH, problem)

    def close_filters(self) -> None:
        """Of a flow with filters: it is over."""

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""
        self.relay.end(self, "failed")
