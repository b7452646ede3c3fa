"""Listeners: the sockets that clients send to.

A listener reads a batch, finds the flow of each datagram by the client's key, and asks
its relay to open one if there is none.  Consecutive datagrams of one size from the same
client are forwarded as a run.
"""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.addresses import socket_name
from relayd.core.names import host_port
from relayd.datagrams.batches import Batches, OneByOne, Outbox, outbox, receiver
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.interfaces import FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.replies import Replies
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    WILDCARDS,
    ask_for_local_address,
    fits,
    pktinfo,
    raise_buffer,
    segments,
)
from relayd.datagrams.watching import READABLE, Watcher

log = Logger(namespace="relayd.datagrams")

#: Seconds for which a listener that can't receive at all pauses.
PAUSE = 1.0

_numbers = itertools.count()


class DatagramListener:
    """A socket that clients send to.

    :param sock: bound to one address.

    :ivar number: unique in this process.
    :ivar flows: of the clients that send to this address, by key.
    :ivar replies: its pending replies.
    :ivar drops: the kernel's count of drops at `sock` when it was last read.
    :ivar owed: how many datagrams from before the last check of the flows may still be
        unread.
    :ivar closed: its relay has closed it.
    :ivar group: the number of the first that was opened together with it, for the
        addresses of one listener.
    :ivar retired: it has the flows that it has, and gets no others; once there are none
        in its group it is closed (:func:`done_with`).
    :ivar deaf: its clients' datagrams are another relay's, to which its socket was
        handed; it sends replies still.
    """

    retired = deaf = False

    #: What it receives is from a server, not from clients.
    hears_server = False

    #: Whether the address that a client has sent to is part of its key.
    local = False

    #: Whether it is bound to all addresses of this machine.
    wild = False

    #: Whether it gets what was sent to others
    #: (:mod:`relayd.datagrams.original_listener`).
    redirected = False

    def __init__(
        self, ledger: Ledger[ClientFlow], relay: FlowRelay, watcher: Watcher, sock: Any
    ) -> None:
        self.ledger = ledger
        self._relay = relay
        self._watcher = watcher
        self.number = self.group = next(_numbers)
        self.sock = sock
        self.address = sock.getsockname()
        self.port: int = self.address[1]
        self._receiver = self._open_receiver()
        # With a cap as well, which may be gone one day: it takes no memory until then.
        batches = watcher.after_batch is not None
        self.replies = Replies(
            ledger, self._open_outbox() if batches else None, watcher.after_batch
        )
        self.drops = 0
        self.flows: dict[Any, ClientFlow] = {}
        self.owed = 0
        self.closed = False
        #: Ends a pause.
        self._paused: IDelayedCall | None = None

    def _open_receiver(self) -> OneByOne | Batches:
        return receiver(self.sock, self.ledger.counters, local=self.local)

    def _open_outbox(self) -> Outbox | None:
        return outbox(self.sock, local=self.local)

    def watch(self) -> None:
        """Serve clients from now on.

        :raises OSError: the kernel can't watch the socket.
        """
        self._watcher.watch(self.sock.fileno(), self, READABLE)

    def stop_reading(self) -> None:
        """Its clients' datagrams are another's: no longer receive them."""
        if not self.deaf:
            self.deaf = True
            self.owed = 0
            if self._paused is None:
                self._watcher.unwatch(self.sock.fileno())

    def read_again(self) -> None:
        """Its clients' datagrams are its own again.

        :raises OSError: the kernel can't watch the socket.
        """
        if self.deaf:
            self.deaf = False
            if self._paused is None:
                self.watch()

    def settings_changed(self, receive_buffer: int) -> None:
        """Its ledger may have another cap of replies, for flows that live as well.

        :param receive_buffer: of its socket, in bytes, from now on.
        """
        # The socket may be another relay's, too, with what that one has said.
        if not (self.deaf or self.retired):
            raise_buffer(self.sock, receive_buffer)
        capped, batched = bool(self.ledger.reply_cap), bool(self.replies.slots)
        self.replies.send_together(not capped)
        if capped and batched:
            for flow in self.flows.values():
                flow.reply_alone()

    def close(self) -> None:
        """Stop serving, and close the socket."""
        self.closed = True
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        # Before it is closed: epoll would go on watching it for another descriptor of
        # the same socket, which another relay has, or systemd has passed.
        self._watcher.unwatch(self.sock.fileno())
        self._watcher.unwatch_and_close(self.sock)

    def ready(self, mask: int) -> None:
        """The socket is readable."""
        self.read()

    def read(self) -> bool:
        """Receive a batch, and forward it.

        :return: whether nothing is pending any more.
        """
        if self.deaf:
            # Its relay's flows expire all the same.
            self.owed = 0
            return True
        ledger, known = self.ledger, self.flows.get
        counters = ledger.counters
        now = ledger.now()
        sent = size = 0
        # The flow whose datagrams are not sent yet, their first, and all if several.
        last: ClientFlow | None = None
        first = b""
        run: list[bytes] | None = None
        # The buffers of the datagrams are overwritten by the next batch.
        batch: list[tuple[Any, Any]] = []
        failed = False
        try:
            batch = self._receiver.receive()
            for data, key in batch:
                flow = known(key)
                if flow is last and flow is not None and len(data) == size:
                    if run is None:
                        run = [first]
                    if fits(run, size):
                        run.append(data)
                        continue
                # In order of arrival, and before `admit` may evict the flow.
                if last is not None:
                    if run is not None:
                        last.forward(run, now)
                        run = None
                    else:
                        # As `forward` does, whose call costs 9 % of a round trip.
                        try:
                            last.send(first)
                        except OSError as problem:
                            last.forward_after_error(first, problem)
                        else:
                            sent += 1
                            last.up_datagrams += 1
                            last.up_bytes += size
                        # The client is alive, whether its datagram was sent or not.
                        if now < last.due:
                            last.seen = now
                        else:
                            last.client_sent((first,), now)
                last = flow or self._relay.admit(self, key, data)
                first, size = data, len(data)
                if size >= BUFFER_SIZE and last is not None:
                    counters.dropped["truncated"] += 1
                    last = None
            if last is not None:
                last.forward(run or [first], now)
        except Exception:
            failed = True
            ledger.log_failure("a listener failed; it goes on with the next batch")
        counters.sent += sent
        counters.received += len(batch)
        if failed:
            ledger.balance()
        if not batch and (failed or self._receiver.refusal is not None):
            self._pause()
        # If nothing was received, flows of other listeners must still expire.
        more = batch and not self._receiver.drained
        self.owed = self.owed - len(batch) if more else 0
        return self._receiver.drained

    def _pause(self) -> None:
        """Nothing can be received: try again after :data:`PAUSE` seconds."""
        refusal = self._receiver.refusal
        if self._paused is not None or self.closed or self.deaf:
            return
        if refusal is not None:
            log.warn(
                "{where}: can't receive: {why}; tried again in {seconds:.0f} s",
                where=socket_name(self.address),
                why=refusal.strerror,
                seconds=PAUSE,
            )
        self._watcher.unwatch(self.sock.fileno())
        self._paused = self.ledger.clock.callLater(PAUSE, self._resume)

    def _resume(self) -> None:
        self._paused = None
        if self.deaf:
            return
        try:
            self.watch()
        except OSError:
            self._pause()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""

    # -- what a key means

    def client(self, key: Any) -> tuple[Any, Any]:
        """A client's socket address, and where to reply to; None if that is unknown."""
        source, _ = self._receiver.origin(key)
        return source, source

    def envelope(self, key: Any) -> Any:
        """A client's addresses, as a batch of replies needs them."""
        return self.replies.envelope(key)

    def name(self, key: Any) -> str:
        """The address that a client has sent to, as text."""
        return socket_name(self.address)

    def replier(self, to: Any) -> Callable[[bytes, Any], Any]:
        """See :meth:`relayd.datagrams.interfaces.FlowListener.replier`."""
        reply: Callable[[bytes, Any], Any] = self.sock.sendto
        return reply

    def gone(self, to: Any) -> None:
        """See :meth:`relayd.datagrams.interfaces.FlowListener.gone`."""

    def reply_run(self, run: Sequence[bytes], to: Any) -> None:
        """Send several datagrams of one size in one call."""
        self.sock.sendmsg(run, [segments(len(run[0]))], 0, to)


class WildcardListener(DatagramListener):
    """Bound to all addresses; replies from the address that the client sent to.

    The kernel reports that with each datagram: IP_PKTINFO of ip(7), and
    IPV6_RECVPKTINFO of ipv6(7) and RFC 3542.  A client that sends to two of our
    addresses has two flows: each must be answered from its own.

    :param sock: has the option set.
    """

    local = wild = True

    def client(self, key: Any) -> tuple[Any, Any]:
        source, ours = self._receiver.origin(key)
        return source, (source, pktinfo(ours)) if ours else None

    def name(self, key: Any) -> str:
        _, ours = self._receiver.origin(key)
        if len(ours) == 4:
            return host_port(socket.inet_ntop(socket.AF_INET, ours), self.address[1])
        # A link-local address is followed by its interface.
        scope = int.from_bytes(ours[16:], sys.byteorder)
        host = socket.inet_ntop(socket.AF_INET6, ours[:16])
        return socket_name((host, self.address[1], 0, scope))

    def replier(self, to: Any) -> Callable[[bytes, Any], Any]:
        # Not stored on the listener: that would be a cycle of references.
        return self._reply

    def _reply(self, data: bytes, to: Any) -> None:
        source, ours = to
        self.sock.sendmsg([data], [ours], 0, source)

    def reply_run(self, run: Sequence[bytes], to: Any) -> None:
        source, ours = to
        self.sock.sendmsg(run, [ours, segments(len(run[0]))], 0, source)


def open_listeners(
    ledger: Ledger[ClientFlow],
    relay: FlowRelay,
    watcher: Watcher,
    sockets: Sequence[Any],
    receive_buffer: int,
    made: Callable[..., DatagramListener],
) -> list[DatagramListener]:
    """A listener for each bound, non-blocking socket, which serves its clients.

    :param receive_buffer: of the sockets, in bytes.
    :param made: makes one, as :func:`datagram_listener` does.
    :raises OSError: the kernel can't watch them.
    """
    opened: list[DatagramListener] = []
    try:
        for sock in sockets:
            raise_buffer(sock, receive_buffer)
            listener = made(ledger, relay, watcher, sock)
            listener.watch()
            opened.append(listener)
            listener.group = opened[0].number
    except OSError:
        # All or none: the caller can't close a socket that is watched.
        for listener in opened:
            listener.close()
        raise
    return opened


def done_with(listeners: Sequence[DatagramListener]) -> list[DatagramListener]:
    """Those of a relay's listeners that have retired, and are to be closed now.

    None is while another of its group has flows: the group can be taken back then,
    which takes all its addresses.  The port of the one that has flows could not be
    bound anew for the others.
    """
    kept = {each.group for each in listeners if each.flows or not each.retired}
    return [each for each in listeners if each.group not in kept]


def datagram_listener(
    ledger: Ledger[ClientFlow], relay: FlowRelay, watcher: Watcher, sock: Any
) -> DatagramListener:
    """The listener for a bound socket."""
    parts = ledger, relay, watcher, sock
    if sock.getsockname()[0] not in WILDCARDS:
        return DatagramListener(*parts)
    problem = ask_for_local_address(sock)
    if problem is None:
        return WildcardListener(*parts)
    log.warn(
        "{where}: the kernel does not tell which address clients send to ({why}):"
        " they are answered from the one that it chooses, which may be another",
        where=socket_name(sock.getsockname()),
        why=problem.strerror,
    )
    return DatagramListener(*parts)
