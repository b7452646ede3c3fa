"""The UDP NAT relay: a listening socket, a socket for each client, a table between.

A client's datagram to the listener goes to the server from a socket of the client's
own, connected to the server, so that the kernel drops what others send there.  What
comes back on that socket goes to the client, from the address that it had spoken to.
:mod:`relayd.nat_table` says which socket is whose, and when it is closed.

Reading.  A socket is read in bounded batches, with room for more than any datagram, so
none is cut.  Of a flow's socket, mostly as many datagrams are read as there were the
last time: asking whether there is more costs as much as being told again.

Writing.  Datagrams of one size that follow each other in a batch, from or to the same
client, are a run, and leave in one call (:mod:`relayd.udp_sockets`).  Where the kernel
can't do that, they are sent one by one.  A flow that has one reply at a time puts it
into its listener's outbox, and those of all flows that are ready leave in one call
(:mod:`relayd.udp_batches`).

Nothing that arrives raises: each datagram is passed on, or dropped and counted by its
reason (:class:`relayd.flow_log.Counters`), and `datagrams in = datagrams out + dropped`
holds for both directions.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IDelayedCall,
    IReactorTime,
)
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd import settings
from relayd.addresses import bare_end, client_key, host_port, numeric_host, socket_name
from relayd.flow_log import (
    Counters,
    FlowFacts,
    FlowLog,
    FlowObserver,
    UntilItFails,
)
from relayd.hops import between, datagrams
from relayd.log_throttle import LogThrottle
from relayd.monotonic import monotonic
from relayd.nat_table import Flow, NatTable, TableFull
from relayd.networks import Ip
from relayd.own_addresses import is_own
from relayd.resolving import Resolver, SocketAddress
from relayd.udp_batches import BATCH, TURNS, Outbox, outbox, receiver
from relayd.udp_servers import Kept
from relayd.udp_servers import Server as Server
from relayd.udp_sockets import (
    BUFFER_SIZE,
    READABLE,
    WILDCARDS,
    ReactorWatcher,
    Watcher,
    affordable_flows,
    ask_for_local_address,
    fits,
    kernel_drops,
    pktinfo,
    raise_buffer,
    segments,
    segments_after,
    send_error,
    udp_socket,
)

log = Logger(namespace="relayd.udp_nat")

#: Replies of a flow after which it is asked for more than it usually has.
LOOK_EVERY = 32

#: Replies at once from which on a flow is always read until there is no more: its runs
#: are the longer, which saves more than asking in vain costs.
MANY = 6

#: The largest receive buffer of a flow's socket, in bytes.
FLOW_BUFFER = 1 << 20

#: Flows that are asked in one step what the kernel has dropped of theirs.
LOOKS = 256

#: How many flows are asked for an answer that has just come before one of them is
#: evicted.
MOST_ASKED = 8

#: Errors in one batch of a flow's replies after which it can't be read.
MOST_ERRORS = 16

#: Seconds between two look-ups of a server's name.
LOOK_UP_EVERY = 30.0

#: How many sockets that turn out to be connected to themselves are closed again.
SELF_TRIES = 4

#: Seconds for which a listener that can't receive at all is left alone.
PAUSE = 1.0

#: Seconds without a datagram after which a flow need not be waited for.
QUIET = 1.0

_numbers = itertools.count()

#: The relays of this process that have listeners.
_listening: set[UdpNat] = set()

#: What a host, or one on the way, says of an earlier datagram (ICMP), by an error of
#: the next call: `icmp_err_convert` and `icmpv6_err_convert` of Linux.
_REFUSALS = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EACCES,
        errno.EPROTO,
        errno.EOPNOTSUPP,
        *([errno.ENONET] if sys.platform == "linux" else []),
    }
)

#: The same, and that one was too large for a part of the way ('fragmentation needed').
#: The call that says so has done nothing else, so it is made again, once.
_PENDING = _REFUSALS | {errno.EMSGSIZE}

#: This process or this machine has no descriptor, port, memory or watch left for
#: another flow, wherever it leads.  EAGAIN is what connect() says where no port is
#: left.  Any other error is of the server's address: there is no way to it.  So is
#: EADDRNOTAVAIL: there is no address of ours to start from, as without IPv6.
_SHORTAGE = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)


def _hop(here: Any, port: int) -> str:
    """What is known by its two ends: see `relayd.hops`.

    The near end is written in one way only: both relays must find it, and one may see
    an IPv4 address, or an interface, that the other one has in another spelling.  Of
    the far end, the port is enough.  The kernel gives no port to two UDP sockets; and a
    listener on a wildcard may not know where it was spoken to, nor the one who calls
    `0.0.0.0` what it has called.

    :param here: the socket address of a flow's socket, as either of them sees it.
    :param port: to which it is connected.
    """
    host, own_port, interface = bare_end(here)
    return between(f"{host}%{interface}:{own_port}", str(port))


class ClientFlow(Flow):
    """A flow, and the socket that is the relay's port for its client.

    :ivar front: where the client speaks to the relay.
    :ivar here: what the front knows it by.
    :ivar source: the client's socket address.
    :ivar to: where the client is, as the front replies to it.
    :ivar sock: connected to the server.
    :ivar ours: its own address.
    :ivar server: the server's name.
    :ivar upstream: the server.
    :ivar tried: its addresses that the flow has had, the last of which it has.
    :ivar envelope: what the front's outbox knows the client by.
    :ivar drops: what the kernel had dropped of `sock` at the last look.
    :ivar hop: what it is noted as if it leads to a relay of this process.
    """

    __slots__ = (
        "_alone_until",
        "_longest",
        "_look_from",
        "_look_up",
        "_segments_down",
        "_segments_up",
        "_usual",
        "drops",
        "envelope",
        "front",
        "here",
        "hop",
        "nat",
        "ours",
        "recv",
        "recv_into",
        "reply",
        "send",
        "server",
        "sock",
        "source",
        "to",
        "tried",
        "upstream",
    )

    def __init__(
        self,
        front: Front,
        key: Any,
        source: Any,
        to: Any,
        dialled: tuple[Any, Any],
        upstream: Server,
        tried: list[SocketAddress],
    ) -> None:
        nat = front.nat
        # Two listeners of a relay may have the same client.
        Flow.__init__(self, (front.number, key), client_key(source[0]), nat.now())
        self.nat = nat
        self.front = front
        self.here = key
        self.source = source
        self.to = to
        self.server = upstream.name
        self.upstream = upstream
        self.tried = tried
        self.hop = ""
        #: Which look-up of the name they are of.
        self._look_up = upstream.look_ups
        self.use(*dialled)
        self.reply = front.replier()
        self.envelope = front.envelope(key)
        #: Whether the kernel has made datagrams of runs as far as we know.
        self._segments_up = self._segments_down = True
        #: How many datagrams there were the last time.
        self._usual = 1
        #: From which datagram on to look whether there are more.
        self._look_from = 0
        #: Until which datagram they are taken to come alone, and may leave with
        #: those of other flows.
        self._alone_until = 0
        #: The longest run that the client has sent.
        self._longest = 1

    def use(self, sock: Any, ours: Any) -> None:
        """Have this socket, which is connected to the server, and its own address."""
        self.sock = sock
        self.ours = ours
        self.send = sock.send
        self.recv = sock.recv
        self.recv_into = sock.recv_into
        self.drops = 0

    def ready(self, mask: int) -> None:
        """The server has answered, or its host has refused."""
        try:
            if self.down_datagrams >= self._alone_until:
                self._read_some()
                return
            front = self.front
            waiting = front.waiting
            # A slot's callable is called from a local: as a method, it is looked up
            # slowly.
            recv_into = self.recv_into
            try:
                size = recv_into(front.rooms[len(waiting)])
            except BlockingIOError:
                return
            except OSError:
                self.nat.counters.icmp_errors += 1
                self._read_batch(BATCH)
                return
            if not waiting:
                front.flush_soon()
            waiting.append((self, size))
            if len(waiting) == BATCH:
                front.flush()
        except Exception:
            self.nat.fail(self)

    def _read_some(self) -> None:
        # Asking whether there is more costs as much as being told: now and then is
        # enough to notice a flow that has more under way than it had.
        if self.down_datagrams >= self._look_from or self._usual >= MANY:
            self._read_batch(BATCH)
        else:
            self._read_batch(self._usual)

    def _read_batch(self, most: int, refusal: OSError | None = None) -> None:
        """Pass on what the server has sent.

        :param refusal: what a call has said of an earlier datagram.
        """
        nat, recv = self.nat, self.recv
        counters, cap = nat.counters, nat.reply_cap
        received = size = errors = 0
        run: list[bytes] = []
        try:
            for _ in TURNS:
                try:
                    data = recv(BUFFER_SIZE)
                except BlockingIOError:
                    break
                except OSError as problem:
                    # What was sent before was refused.  Being told takes the error
                    # away; an answer may wait behind it.
                    counters.icmp_errors += 1
                    errors += 1
                    if errors > MOST_ERRORS:
                        break
                    refusal = problem
                    continue
                received += 1
                length = len(data)
                if length >= BUFFER_SIZE or (
                    cap and not self._may_have(size * len(run) + length)
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
        if errors > MOST_ERRORS:
            # It is not taken away by being told: a sandbox's, and told for ever.
            nat.end(self, "failed")
        elif received:
            # Of many, some may be late only; of few, asking in vain costs too much.
            self._usual = max(received, (self._usual - 4) >> 1)
            if most == BATCH:
                self._look_from = self.down_datagrams + max(LOOK_EVERY, 8 * received)
            alone = self._usual == 1 and self.front.outbox is not None
            self._alone_until = self._look_from if alone else 0
            if not self.replied and self.upstream.named:
                nat.kept.forget(self)
            nat.table.inbound(self, nat.now())
        elif refusal is not None and self._may_go(refusal):
            self._go_elsewhere(refusal)

    def _may_have(self, size: int) -> bool:
        """Whether the client may have so many bytes of replies more."""
        return self.down_bytes + size <= self.nat.reply_cap * self.up_bytes

    def _drop_reply(self, size: int) -> None:
        reason = "truncated" if size >= BUFFER_SIZE else "reply_cap"
        self.nat.counters.replies_dropped[reason] += 1

    def read_all(self) -> None:
        """Pass on what the server has sent by now, a batch at most."""
        self.front.flush()
        try:
            self._read_batch(BATCH)
        except Exception:
            self.nat.fail(self)

    def _reply(self, run: Sequence[bytes]) -> None:
        """Send the client what its server has sent: datagrams of one size."""
        front, counters, sent = self.front, self.nat.counters, 0
        size = len(run[0])
        if len(run) > 1 and self._segments_down:
            try:
                front.reply_run(run, self.to)
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
        """Send the server what the client has sent: datagrams of one size."""
        nat, sent, whole = self.nat, 0, run
        counters, size = nat.counters, len(run[0])
        if len(run) > self._longest:
            # Its replies may be as many.
            self._longest = len(run)
            self._look_from = self._alone_until = 0
        if len(run) > 1 and self._segments_up:
            try:
                self._send_run(run, size)
            except OSError as refusal:
                self._segments_up = segments_after(refusal)
                if refusal.errno == errno.ENOBUFS:
                    # Some of them may have left: none is sent twice.
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
                    # One of those that have left may be what was refused.
                    self._keep(run[kept:place], now)
                    kept = place
                sent += self.send_again(data, refusal)
            else:
                sent += 1
        counters.sent += sent
        self.up_datagrams += sent
        self.up_bytes += sent * size
        if now < self.due:
            self.seen = now
        else:
            self.spoke(whole[kept:], now)

    def spoke(self, run: Sequence[bytes], now: float) -> None:
        """A flow that is not in use has sent these, or tried to."""
        if self.upstream.named:
            self._keep(run, now)
        self.nat.table.outbound(self, now)

    def _keep(self, run: Sequence[bytes], now: float) -> None:
        """These have been sent, and may have to be sent to another address."""
        # Where there is none, there is nothing to keep.
        if (
            not self.replied
            and len(self.upstream.addresses) > 1
            and self.nat.table.flows.get(self.key) is self
        ):
            self.nat.kept.add(self, run, now)

    def _may_go(self, problem: OSError) -> bool:
        """Whether an error is a reason to go on at the server's next address."""
        return not self.replied and self.upstream.named and problem.errno in _REFUSALS

    def _refused(self, problem: OSError) -> None:
        """A call to send has said that an earlier datagram was refused."""
        if self._may_go(problem):
            # The kernel says so before it hands out an answer that came before.
            self._read_batch(BATCH, problem)

    def _go_elsewhere(self, problem: OSError) -> None:
        """The server's host has refused: go on at its next address, if it has one."""
        if self._look_up != self.upstream.look_ups:
            # What refused then may be there now.
            self._look_up = self.upstream.look_ups
            self.tried = self.tried[-1:]
        if not self.nat.redial(self, problem):
            return
        counters = self.nat.counters
        for data in self.nat.kept.of(self, self.nat.now()):
            try:
                self.send(data)
            except OSError:
                counters.not_sent_again += 1
            else:
                counters.sent_again += 1

    def _send_run(self, run: Sequence[bytes], size: int) -> None:
        """Send datagrams of one size in one call.

        :raises OSError: none was sent, but with ENOBUFS.
        """
        extra = [segments(size)]
        try:
            self.sock.sendmsg(run, extra)
        except OSError as problem:
            if problem.errno not in _PENDING:
                raise
            refused = problem.errno in _REFUSALS
            self.nat.counters.icmp_errors += refused
            self._refused(problem)
            # If it is too large itself, it will be so again.
            self.sock.sendmsg(run, extra)
            self.nat.counters.icmp_errors += not refused

    def send_again(self, data: bytes, problem: OSError) -> bool:
        """A send to the server has failed; whether it was sent after all.

        A host that refused an earlier datagram (ICMP) is reported by the next call,
        which does nothing else.
        """
        counters = self.nat.counters
        if problem.errno in _PENDING:
            refused = problem.errno in _REFUSALS
            counters.icmp_errors += refused
            self._refused(problem)
            try:
                self.send(data)
            except OSError as again:
                problem = again
            else:
                # It was an earlier one that was too large.
                counters.icmp_errors += not refused
                return True
        counters.dropped[send_error(problem)] += 1
        return False

    def forward_again(self, data: bytes, problem: OSError) -> None:
        """As :meth:`send_again`; what was sent after all is counted."""
        if self.send_again(data, problem):
            self.nat.counters.sent += 1
            self.up_datagrams += 1
            self.up_bytes += len(data)

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""
        self.nat.end(self, "failed")


class Front:
    """A socket that clients send to.

    :param sock: bound to one address.

    :ivar outbox: sends replies of many flows at once; None where that can't be.
    :ivar rooms: its places for replies.
    :ivar waiting: whose replies are in them, and their sizes.
    """

    #: Whether the address that a client spoke to is part of its key.
    local = False

    def __init__(self, nat: UdpNat, sock: Any) -> None:
        self.nat = nat
        self.number = next(_numbers)
        self.sock = sock
        self.address = sock.getsockname()
        self.port: int = self.address[1]
        self._receiver = receiver(sock, nat.counters, local=self.local)
        # With a cap, each reply is judged after the one before it has left.
        together = nat.watcher.after_batch is not None and not nat.reply_cap
        self.outbox = outbox(sock, local=self.local) if together else None
        self.rooms = [] if self.outbox is None else self.outbox.rooms
        self.waiting: list[tuple[ClientFlow, int]] = []
        self.drops = 0
        #: Those of the relay's flows whose clients speak to this address, by key.
        self.flows: dict[Any, ClientFlow] = {}
        #: How many datagrams may still be unread that came before the last tick.
        self.owed = 0
        #: When it is tried again to receive, where that was refused.
        self.paused: IDelayedCall | None = None

    def ready(self, mask: int) -> None:
        """Clients have sent something."""
        self.read()

    def read(self) -> bool:
        """Pass a batch on.

        :return: whether there is nothing more.
        """
        nat, known = self.nat, self.flows.get
        counters = nat.counters
        now = nat.now()
        sent = size = 0
        # Whose datagrams wait to be sent: the first of them, and all if there are more.
        last: ClientFlow | None = None
        first = b""
        run: list[bytes] | None = None
        # Where the datagrams are is written over by the next batch.
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
                # What came first is sent first, and before its flow may have to make
                # room.
                if last is not None:
                    if run is not None:
                        last.forward(run, now)
                        run = None
                    else:
                        # As `forward` does; the call would cost more than all of this.
                        send = last.send
                        try:
                            send(first)
                        except OSError as problem:
                            last.forward_again(first, problem)
                        else:
                            sent += 1
                            last.up_datagrams += 1
                            last.up_bytes += size
                        # The client is there, whatever became of its datagram.
                        if now < last.due:
                            last.seen = now
                        else:
                            last.spoke((first,), now)
                last = flow or nat.admit(self, key)
                first, size = data, len(data)
                if size >= BUFFER_SIZE and last is not None:
                    counters.dropped["truncated"] += 1
                    last = None
            if last is not None:
                last.forward(run or [first], now)
        except Exception:
            failed = True
            nat.log_failure("a listener failed; it goes on with the next batch")
        counters.sent += sent
        counters.received += len(batch)
        if failed:
            counters.balance()
        if not batch and (failed or self._receiver.refusal is not None):
            self._pause()
        # Where nothing can be had, flows of other listeners expire all the same.
        more = batch and not self._receiver.drained
        self.owed = self.owed - len(batch) if more else 0
        return self._receiver.drained

    def _pause(self) -> None:
        """Nothing can be received: be told nothing for a while, and try again."""
        nat, refusal = self.nat, self._receiver.refusal
        if self.paused is not None or self not in nat.fronts:
            return
        if refusal is not None:
            log.warn(
                "{where}: can't receive: {why}; tried again in {seconds:.0f} s",
                where=socket_name(self.address),
                why=refusal.strerror,
                seconds=PAUSE,
            )
        nat.watcher.unwatch(self.sock.fileno())
        self.paused = nat.clock.callLater(PAUSE, self._resume)

    def _resume(self) -> None:
        self.paused = None
        try:
            self.nat.watcher.watch(self.sock.fileno(), self, READABLE)
        except OSError:
            self._pause()

    def flush_soon(self) -> None:
        """Send the replies when no flow has more of them by now."""
        later = self.nat.watcher.after_batch
        if later is not None:
            later(self.flush)

    def flush(self) -> None:
        """Send the replies that are in the outbox, and account for them."""
        waiting, nat = self.waiting, self.nat
        if not waiting or self.outbox is None:
            return
        nat.counters.replies_received += len(waiting)
        try:
            self._flush(self.outbox, nat.now())
        except Exception:
            # The plane's whole turn would end with it.
            nat.log_failure("a listener failed to send replies")
            nat.counters.balance()
        finally:
            waiting.clear()

    def _flush(self, outbox: Outbox, now: float) -> None:
        waiting, table, counters = self.waiting, self.nat.table, self.nat.counters
        refresh = table.refresh_inbound
        problems = outbox.send(
            [size for _, size in waiting], [flow.envelope for flow, _ in waiting]
        )
        counters.replies_sent += len(waiting) - len(problems)
        for flow, size in waiting:
            flow.down_datagrams += 1
            flow.down_bytes += size
            # As `inbound` does; the call would cost more than all of this.
            if now >= flow.due:
                table.inbound(flow, now)
            elif refresh:
                flow.seen = now
        for number, problem in problems.items():
            flow, size = waiting[number]
            flow.down_datagrams -= 1
            flow.down_bytes -= size
            counters.replies_dropped[send_error(problem)] += 1

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""

    # -- what a key stands for

    def client(self, key: Any) -> tuple[Any, Any]:
        """A client's socket address, and where to reply to; None if it can't be."""
        source, _ = self._receiver.origin(key)
        return source, source

    def envelope(self, key: Any) -> bytes:
        """What the outbox knows a client by."""
        return b"" if self.outbox is None else self.outbox.envelope(key)

    def name(self, key: Any) -> str:
        """The address that a client spoke to, as text."""
        return socket_name(self.address)

    def replier(self) -> Callable[[bytes, Any], Any]:
        """What sends a datagram to where `client` says."""
        reply: Callable[[bytes, Any], Any] = self.sock.sendto
        return reply

    def reply_run(self, run: Sequence[bytes], to: Any) -> None:
        """Send several datagrams of one size in one call."""
        self.sock.sendmsg(run, [segments(len(run[0]))], 0, to)


class WildcardFront(Front):
    """One that is bound to all addresses, and answers from the one that was spoken to.

    The kernel says which with each datagram: IP_PKTINFO of ip(7), and
    IPV6_RECVPKTINFO of ipv6(7) and RFC 3542.  A client that speaks to two of our
    addresses is two flows: each must be answered from its own.

    :param sock: the kernel has been told to say it.
    """

    local = True

    def client(self, key: Any) -> tuple[Any, Any]:
        source, ours = self._receiver.origin(key)
        return source, (source, pktinfo(ours)) if ours else None

    def name(self, key: Any) -> str:
        _, ours = self._receiver.origin(key)
        if len(ours) == 4:
            return host_port(socket.inet_ntop(socket.AF_INET, ours), self.address[1])
        # Of a link-local address, the interface follows.
        scope = int.from_bytes(ours[16:], sys.byteorder)
        host = socket.inet_ntop(socket.AF_INET6, ours[:16])
        return socket_name((host, self.address[1], 0, scope))

    def replier(self) -> Callable[[bytes, Any], Any]:
        # Not kept: what refers to itself waits for the collector, with its rooms.
        return self._reply

    def _reply(self, data: bytes, to: Any) -> None:
        source, ours = to
        self.sock.sendmsg([data], [ours], 0, source)

    def reply_run(self, run: Sequence[bytes], to: Any) -> None:
        source, ours = to
        self.sock.sendmsg(run, [ours, segments(len(run[0]))], 0, source)


class UdpNat:
    """Relays datagrams between clients and servers.

    :param reactor: provides `IReactorTime`, and what `watcher` needs.
    :param servers: each flow gets one of them, in turn; at least one.
    :param watcher: watches the sockets; unless given, the reactor does.
    :param resolver: finds the addresses of servers' names.
    :param clock: where time comes from, unless it is the reactor.
    :param observer: hears of every flow that has ended; unless given, one that logs a
        line for each.
    :param open_socket: opens a datagram socket of a family; for tests.
    :param own: whether an address is this machine's.
    :param max_flows: flows in all; unless given, what the limit of open files allows,
        less a reserve.
    :param max_flows_per_client: of one client address without its port; unless given,
        half of that.
    :param timeout: seconds that a flow in use lives after something moved.  In use is
        one in which datagrams have gone both ways, and one later than two seconds after
        the first.
    :param unreplied_timeout: likewise, until it is in use; a flow that was answered
        has the shorter of the two.
    :param refresh_inbound: what a server sends keeps a flow alive, too.
    :param reply_cap: a flow's replies may have so many times the bytes of what its
        client has sent; 0 is no limit.
    :param receive_buffer: bytes that the kernel may keep unread for a listener.
    :raises ValueError: a setting can't be used.

    :ivar counters: what has become of datagrams.
    :ivar table: the flows that live.
    :ivar kept: what those have sent that may have to be sent to another address.
    :ivar ports: of its servers and listeners.
    """

    def __init__(
        self,
        reactor: Any,
        servers: Iterable[Server],
        *,
        watcher: Watcher | None = None,
        resolver: Resolver | None = None,
        clock: IReactorTime | None = None,
        observer: FlowObserver | None = None,
        open_socket: Callable[[int], Any] | None = None,
        own: Callable[[Ip], bool] = is_own,
        max_flows: int | None = settings.MAX_FLOWS.default,
        max_flows_per_client: int | None = settings.MAX_FLOWS_PER_CLIENT.default,
        timeout: float = settings.UDP_TIMEOUT.default,
        unreplied_timeout: float = settings.UDP_UNREPLIED_TIMEOUT.default,
        refresh_inbound: bool = settings.REFRESH_INBOUND.default,
        reply_cap: float = settings.REPLY_CAP.default,
        receive_buffer: int = settings.UDP_RCVBUF.default,
    ) -> None:
        if not reply_cap >= 0:
            raise ValueError(f"reply_cap must not be negative: {reply_cap!r}")
        self.clock: Any = monotonic(clock if clock is not None else reactor)
        self.now: Callable[[], float] = self.clock.seconds
        self.watcher = watcher if watcher is not None else ReactorWatcher(reactor)
        self._resolver = resolver
        self._reactor = reactor
        self.observer = UntilItFails(observer if observer is not None else FlowLog())
        self._open = open_socket if open_socket is not None else udp_socket
        most = affordable_flows() if max_flows is None else max_flows
        self.table: NatTable[ClientFlow] = NatTable(
            most,
            max(1, most // 2) if max_flows_per_client is None else max_flows_per_client,
            timeout=timeout,
            unreplied_timeout=unreplied_timeout,
            refresh_inbound=refresh_inbound,
        )
        self.reply_cap = reply_cap
        self.receive_buffer = receive_buffer
        self.counters = Counters()
        self.kept = Kept()
        self.fronts: list[Front] = []
        self._own = own
        #: Where servers and listeners are, and the ports of listeners on wildcards.
        self._front_ends: frozenset[tuple[str, int, int]] = frozenset()
        self._server_ends = self._front_ends
        self._wild_ports: frozenset[int] = frozenset()
        self.ports: frozenset[int] = frozenset()
        self._turns = itertools.count()
        self._timer: IDelayedCall | None = None
        #: Up to when flows may expire, as soon as what came before has been read.
        self._expire_to: float | None = None
        self._lookups: IDelayedCall | None = None
        self._throttle = LogThrottle(self.clock)
        self._throttle_round = LogThrottle(self.clock)
        self._throttle_failing = LogThrottle(self.clock)
        self._failures = 0
        #: How many flows were asked since the first of them was.
        self._looked_at = 0
        self._drained: Deferred[None] | None = None
        self._drain_until = 0.0
        self._drain_limit: IDelayedCall | None = None
        self._servers: tuple[Server, ...] = ()
        self.servers = servers

    # -- listening

    @property
    def servers(self) -> tuple[Server, ...]:
        """Where new flows go, in turn.

        May be set at any time; names are looked up at once.  Flows keep their server.
        """
        return self._servers

    @servers.setter
    def servers(self, servers: Iterable[Server]) -> None:
        chosen = tuple(servers)
        if not chosen:
            raise ValueError("a relay needs a server")
        self._servers = chosen
        self._ends_changed()
        if self.fronts:
            self._look_up()

    def listen(self, sockets: Sequence[Any]) -> None:
        """Serve the clients of bound, non-blocking sockets, from now on.

        :raises OSError: the kernel can't watch them.
        """
        opened: list[Front] = []
        try:
            for sock in sockets:
                raise_buffer(sock, self.receive_buffer)
                front = self._front(sock)
                self.watcher.watch(sock.fileno(), front, READABLE)
                opened.append(front)
        except OSError:
            # All or none: what is watched can't be closed by the caller.
            for front in opened:
                self.watcher.give_up(front.sock)
            raise
        if not self.fronts:
            # It may have been closed before, after a drain.
            self._drained = None
        self.fronts += opened
        for front in opened:
            datagrams.listens(front.address[1])
        _listening.add(self)
        self._ends_changed()
        if self._lookups is None:
            self._look_up()

    def _front(self, sock: Any) -> Front:
        if sock.getsockname()[0] not in WILDCARDS:
            return Front(self, sock)
        problem = ask_for_local_address(sock)
        if problem is None:
            return WildcardFront(self, sock)
        log.warn(
            "{where}: the kernel does not say which address clients speak to ({why}):"
            " they are answered from the one that it chooses, which may be another",
            where=socket_name(sock.getsockname()),
            why=problem.strerror,
        )
        return Front(self, sock)

    def _look_up(self) -> None:
        """Look the servers' names up, now and in the background."""
        if self._lookups is not None and self._lookups.active():
            self._lookups.cancel()
        self._lookups = None
        names = [server for server in self.servers if server.named]
        if names:
            self._lookups = self.clock.callLater(LOOK_UP_EVERY, self._look_up)
        for server in names:
            resolver = self._resolver or Resolver.of(self._reactor)
            found = resolver.addresses(server.host, server.port)
            found.addCallbacks(
                self._found, self._not_found, (server,), errbackArgs=(server,)
            )

    def _found(self, addresses: list[SocketAddress], server: Server) -> None:
        server.found(addresses)
        self._ends_changed()
        if server.address is None:
            where = ", ".join(socket_name(each[1]) for each in addresses)
            log.warn(
                "{name}: none of its addresses is a host's ({where}); nothing is sent",
                name=server.name,
                where=where,
            )

    def _not_found(self, reason: Failure, server: Server) -> None:
        log.warn(
            "{name}: {why}; {then}",
            name=server.name,
            why=reason.getErrorMessage(),
            then="its last address is kept" if server.address else "nothing is sent",
        )

    # -- flows

    def admit(self, front: Front, key: Any) -> ClientFlow | None:
        """The flow for a client that has none yet, or None: counted as dropped.

        :param key: what tells it from others of this front.
        """
        dropped = self.counters.dropped
        source, to = front.client(key)
        if to is None:
            dropped["no_local_address"] += 1
            return None
        if source[1] == 0:
            # Nobody could be answered there.
            dropped["source_port_0"] += 1
            return None
        if self.leads_back(source):
            dropped["source_loops"] += 1
            return None
        if datagrams.hops and datagrams.lead_round(_hop(source, front.port), self):
            dropped["loop"] += 1
            if self._throttle_round.is_due():
                log.warn(
                    "datagrams to {listener} lead back to their own relay: they are"
                    " dropped ({count} so far)",
                    listener=front.name(key),
                    count=dropped["loop"],
                )
            return None
        server = self._choose()
        if server is None and self._drained is None:
            dropped["no_server"] += 1
            return None
        try:
            self._make_room(client_key(source[0]), source)
            flow = None
            if self._drained is None and server is not None:
                flow = self._open_flow(front, key, source, to, server)
            if flow is None:
                dropped["draining"] += 1
                return None
        except TableFull as problem:
            self._refuse(str(problem))
            return None
        except OSError as problem:
            self._refuse(f"no socket for a flow of {source[0]}: {problem.strerror}")
            return None
        self.table.add(flow)
        front.flows[key] = flow
        self._note_hop(flow)
        if self._timer is None:
            self._tick_later()
        return flow

    def leads_back(self, source: Any) -> bool:
        """Whether what is sent there would come back, and be relayed again for ever.

        A datagram may claim any source: an address that a relay of this process listens
        on, one of a server, or the unspecified one, which Linux takes for this machine.
        A server on this machine may answer at all of its addresses.  Another relay's
        server on another machine may be a client of this one, as are two peers that are
        relayed to each other.

        :param source: a socket address.
        """
        end = bare_end(source)
        if end[0] in WILDCARDS:
            return True
        if end in self._server_ends:
            return True
        return any(end[1] in nat.ports and nat.is_at(end, source) for nat in _listening)

    def is_at(self, end: tuple[str, int, int], source: Any) -> bool:
        """Whether a listener, or a server on this machine, of this relay is there.

        :param end: of that socket address; its port is one of `ports`.
        """
        if end in self._front_ends:
            return True
        port = end[1]
        # Of a wildcard listener, every address of this machine is its own.  So it may
        # be of a server on this machine, whose listener we can't see.
        if not self._is_own(end, source):
            return False
        return port in self._wild_ports or any(
            self._is_own(bare_end(where), where)
            for server in self.servers
            for _, where in server.addresses
            if where[1] == port
        )

    def _is_own(self, end: tuple[str, int, int], where: Any) -> bool:
        host = numeric_host(where) if end[2] else end[0]
        return self._own(ipaddress.ip_address(host))

    def _note_hop(self, flow: ClientFlow) -> None:
        """The flow may lead to another relay of this process: see `relayd.hops`."""
        if flow.hop:
            datagrams.remove(flow.hop)
            flow.hop = ""
        there = flow.tried[-1][1]
        if there[1] in datagrams.ports:
            flow.hop = _hop(flow.ours, there[1])
            datagrams.add(flow.hop, self, _hop(flow.source, flow.front.port))

    def _ends_changed(self) -> None:
        """Listeners or servers are others than before."""
        servers = [each[1] for server in self.servers for each in server.addresses]
        self._server_ends = frozenset(map(bare_end, servers))
        self._front_ends = frozenset(bare_end(front.address) for front in self.fronts)
        self.ports = frozenset(end[1] for end in self._server_ends | self._front_ends)
        self._wild_ports = frozenset(
            front.address[1] for front in self.fronts if front.address[0] in WILDCARDS
        )

    def _make_room(self, host: str, source: Any) -> None:
        """End the flow that is in the way of another one of `host`, if one is.

        :param source: the client that needs the room.
        :raises TableFull: there is none that may be ended.
        """
        table = self.table
        if self._drained is not None or table.room(host) is None:
            return
        if not self._evict(lambda: table.room(host), source):
            raise table.full(host)

    def _evict(self, candidate: Callable[[], ClientFlow | None], source: Any) -> bool:
        """End the flow that is to make room.

        :param candidate: which that is now; None if there is none.
        :return: False if those that were asked are all in use, as it turned out.
        """
        for left in reversed(range(MOST_ASKED)):
            gone = candidate()
            if gone is None:
                return True
            # Its answer may have come, and not been read yet.  It is passed on, and
            # then another one may be the one that was quiet longest.
            gone.read_all()
            if not gone.in_use and (not left or candidate() is gone):
                self.end(gone, "evicted", socket_name(source))
                return True
        return False

    def _open_flow(
        self, front: Front, key: Any, source: Any, to: Any, server: Server
    ) -> ClientFlow | None:
        """A flow with its socket, watched; None if its listener is closed by now.

        :raises OSError: there is none to be had.
        """
        # An observer that heard of a flow's end may have closed the relay, and even
        # have opened it again.
        if front not in self.fronts:
            return None
        try:
            return self._try_flow(front, key, source, to, server)
        except OSError as problem:
            # The bound is not the table's: this process, or this machine, has no more.
            oldest = self.table.oldest
            if problem.errno not in _SHORTAGE or oldest() is None:
                raise
            if not self._evict(oldest, source):
                raise
        if front not in self.fronts:
            return None
        return self._try_flow(front, key, source, to, server)

    def _try_flow(
        self, front: Front, key: Any, source: Any, to: Any, server: Server
    ) -> ClientFlow:
        server, dialled, tried = self._dial_one(server)
        sock = dialled[0]
        try:
            flow = ClientFlow(front, key, source, to, dialled, server, tried)
            self.watcher.watch(sock.fileno(), flow, READABLE)
        except OSError:
            sock.close()
            raise
        return flow

    def _choose(self) -> Server | None:
        """The next server in turn that has an address."""
        for _ in self.servers:
            server = self.servers[next(self._turns) % len(self.servers)]
            if server.address is not None:
                return server
        return None

    def _dial_one(
        self, server: Server
    ) -> tuple[Server, tuple[Any, Any], list[SocketAddress]]:
        """A socket that is connected to this server, or to the next with a way there.

        :return: the server, and what :meth:`_dial` says of it.
        :raises OSError: there is none to be had, or no way to any of them.
        """
        refusal = OSError(errno.EHOSTUNREACH, "no way to any server")
        others = (self._choose() for _ in range(len(self.servers) - 1))
        tried: set[Server] = set()
        for candidate in itertools.chain((server,), others):
            if candidate is None or candidate in tried:
                continue
            tried.add(candidate)
            try:
                return (candidate, *self._dial(candidate))
            except OSError as problem:
                if problem.errno in _SHORTAGE:
                    raise
                refusal = problem
        raise refusal

    def _dial(
        self, server: Server, tried: Sequence[SocketAddress] = ()
    ) -> tuple[tuple[Any, Any], list[SocketAddress]]:
        """A socket that is connected to the server.

        :param tried: addresses that are not to be tried again.
        :return: the socket with its own address, and what was tried, the last of which
            it is connected to.
        :raises OSError: there is none to be had, or no address that is left takes it.
        """
        if not server.named:
            only: Any = server.address
            return self._connect(only), [only]
        had = list(tried)
        refusal = OSError(errno.EHOSTUNREACH, "no other address of its name")
        for address in list(server.candidates(had)):
            had.append(address)
            try:
                return self._connect(address), had
            except OSError as problem:
                if problem.errno in _SHORTAGE:
                    raise
                # There is no way to that family, for one.
                self._refused(server, address, problem)
                refusal = problem
        raise refusal

    def _connect(
        self, address: SocketAddress, tries: int = SELF_TRIES
    ) -> tuple[Any, Any]:
        """A socket that is connected to an address, and its own address."""
        family, where = address
        sock = self._open(family)
        try:
            raise_buffer(sock, min(self.receive_buffer, FLOW_BUFFER))
            sock.connect(where)
            ours = sock.getsockname()
            # The kernel may hand out the very port that is called, if nobody has it:
            # what is sent would come back as the answer.
            itself = ours[1] == where[1] and ours == sock.getpeername()
        except OSError:
            sock.close()
            raise
        if not itself:
            return sock, ours
        try:
            # Before this one is closed, or the next would get the same port.
            if tries > 1:
                return self._connect(address, tries - 1)
        finally:
            sock.close()
        raise OSError(
            errno.ECONNREFUSED, f"nobody has {socket_name(where)} but its own socket"
        )

    def redial(self, flow: ClientFlow, problem: OSError) -> bool:
        """Give a flow a socket that is connected to the next address of its server.

        :param problem: how the one that it has has refused.
        :return: whether there was one.
        """
        server = flow.upstream
        self._refused(server, flow.tried[-1], problem)
        try:
            dialled, tried = self._dial(server, flow.tried)
        except OSError:
            return False
        sock = dialled[0]
        try:
            self.watcher.watch(sock.fileno(), flow, READABLE)
        except OSError:
            sock.close()
            return False
        self._look_at(flow)
        self.watcher.give_up(flow.sock)
        flow.tried = tried
        flow.use(*dialled)
        self._note_hop(flow)
        return True

    def _refused(
        self, server: Server, address: SocketAddress, problem: OSError
    ) -> None:
        if server.turn_from(address):
            log.warn(
                "{name}: {address} refuses ({why}): the next of its addresses is tried,"
                " {next}",
                name=server.name,
                address=socket_name(address[1]),
                why=problem.strerror,
                next=socket_name(server.address[1]),  # type: ignore[index]
            )

    def _refuse(self, why: str) -> None:
        self.counters.dropped["no_flow"] += 1
        if not self._throttle.is_due():
            return
        log.warn(
            "{why} ({count} datagrams dropped for want of a flow so far)",
            why=why,
            count=self.counters.dropped["no_flow"],
        )

    def end(self, flow: ClientFlow, ending: str, by: str = "") -> None:
        """A flow is over: close its socket, forget it, and tell.

        :param by: whose arrival has evicted it, as the log has it.
        """
        if self.table.flows.get(flow.key) is not flow:
            return
        # A reply of its own may be among them.
        flow.front.flush()
        self.table.remove(flow, evicted=ending == "evicted")
        del flow.front.flows[flow.here]
        if flow.hop:
            datagrams.remove(flow.hop)
        self._look_at(flow)
        if flow.upstream.named:
            self.kept.forget(flow)
        self.watcher.give_up(flow.sock)
        facts = FlowFacts(
            client=socket_name(flow.source),
            listener=flow.front.name(flow.here),
            port=socket_name(flow.ours),
            server=flow.server,
            age=self.now() - flow.began,
            ending=ending,
            by=by,
        )
        self.observer.ended(flow, facts)

    def fail(self, flow: ClientFlow) -> None:
        """An exception of a flow's is being handled: it ends, and nothing else."""
        self.log_failure(f"the flow of {socket_name(flow.source)} failed and is ended")
        self.counters.balance()
        self.end(flow, "failed")

    def log_failure(self, what: str) -> None:
        """Log the exception that is being handled, once in a second at most."""
        self._failures += 1
        if self._throttle_failing.is_due():
            log.failure(
                "{what} ({count} failures so far)", what=what, count=self._failures
            )

    # -- time

    def _tick(self) -> None:
        self._timer = None
        try:
            self._expire()
        except Exception:
            # No flow would expire ever after.
            self.log_failure("the look at flows failed")
        # Reading may have admitted a client, and so have set the timer.
        if self.table.flows and self._timer is None:
            self._tick_later()

    def _expire(self) -> None:
        # What has arrived by now keeps its flow alive, even if it was not read yet: in
        # a flood, that takes until the next tick.
        now = self.now()
        if self._expire_to is None:
            self._expire_to = now
            for front in self.fronts:
                # The queue holds no more: the kernel counts 512 bytes at least for
                # each, of twice what it was asked for.
                front.owed = 2 * self.receive_buffer // 512
        for front in self.fronts:
            front.read()
        if all(front.owed <= 0 for front in self.fronts):
            now, self._expire_to = self._expire_to, None
            for flow in self.table.expire(now):
                flow.read_all()
                # The last of its replies may have come just now.
                if self.table.ends(flow) <= now:
                    self.end(flow, "expired" if flow.replied else "unreplied")
        self.look_at_drops()
        self._drain_more(self.now())

    def _tick_later(self) -> None:
        # Where the table's steps begin, or flows would be two steps late.
        step = self.table.step
        self._timer = self.clock.callLater(step - self.now() % step, self._tick)

    def look_at_drops(self) -> None:
        """Bring `counters.kernel_dropped` up to now, for the listeners and some flows.

        All flows have had their turn after so many calls as there are :data:`LOOKS`
        of them.
        """
        for front in self.fronts:
            self._look_at(front)
        flows, first = self.table.flows, self._looked_at
        for flow in itertools.islice(flows.values(), first, first + LOOKS):
            self._look_at(flow)
        self._looked_at = first + LOOKS if first + LOOKS < len(flows) else 0

    def _look_at(self, one: Front | ClientFlow) -> None:
        drops = kernel_drops(one.sock)
        if drops is None:
            return
        # The kernel counts in 32 bits.
        self.counters.kernel_dropped += (drops - one.drops) & 0xFFFFFFFF
        one.drops = drops

    # -- the end

    @property
    def draining(self) -> bool:
        """It takes no new client."""
        return self._drained is not None

    @property
    def sessions(self) -> dict[Any, ClientFlow]:
        """The flows that live, by key."""
        return self.table.flows

    def drain(self, timeout: float = settings.DRAIN_TIMEOUT.default) -> Deferred[None]:
        """Take no new client; let those that are being answered finish.

        A flow is finished when it has had an answer for each of its datagrams and
        nothing has moved for :data:`QUIET` seconds.

        :param timeout: seconds; 0 ends all now.
        :return: fires with None when no flow is left, and the listeners are closed.
        """
        now = self.now()
        if self._drained is None:
            self._drained = Deferred()
            self._drain_until = now + timeout
            self._drain_limit = self.clock.callLater(max(timeout, 0.0), self.abort_all)
        if timeout <= 0:
            self._drain_until = now
        self._drain_more(now)
        if not self.fronts:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._drained.addCallback(lambda _: waiting.callback(None))
        return waiting

    def abort_all(self) -> None:
        """End every flow, now; a drain that is under way is over."""
        self._end_all()
        self._drain_more(self.now())

    def _end_all(self) -> None:
        for flow in list(self.table.flows.values()):
            self.end(flow, "drained")

    def _drain_more(self, now: float) -> None:
        if self._drained is None:
            return
        for flow in list(self.table.flows.values()):
            # A server that still owes an answer has until the end.
            finished = flow.down_datagrams >= flow.up_datagrams
            if finished and now - flow.seen >= QUIET:
                # What comes next may have come, and not been read yet.
                flow.read_all()
                finished = now - flow.seen >= QUIET
            if now >= self._drain_until or (finished and now - flow.seen >= QUIET):
                self.end(flow, "drained")
        if self.table.flows:
            return
        self.close()

    def close(self) -> None:
        """Close the listeners, and whatever is left."""
        self._end_all()
        self.look_at_drops()
        fronts, self.fronts = self.fronts, []
        self._ends_changed()
        _listening.discard(self)
        for front in fronts:
            datagrams.closes(front.address[1])
            if front.paused is not None:
                front.paused.cancel()
            self.watcher.give_up(front.sock)
        if fronts:
            where = ",".join(socket_name(front.address) for front in fronts)
            self.observer.closed(where, self.counters)
        for timer in (self._timer, self._lookups, self._drain_limit):
            if timer is not None and timer.active():
                timer.cancel()
        self._timer = self._lookups = self._drain_limit = None
        if self._drained is not None and not self._drained.called:
            self._drained.callback(None)
