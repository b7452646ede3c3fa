"""The UDP NAT relay: a listening socket, a socket for each client, a table between.

A client's datagram to the listener goes to the server from a socket of the client's
own, connected to the server, so that the kernel drops what others send there.  What
comes back on that socket goes to the client, from the address that it had spoken to.
:mod:`relayd.nat_table` says which socket is whose, and when it is closed.

The sockets are our own and not `reactor.listenUDP`'s: that cuts datagrams at 8,192
bytes, lets a flood of empty ones starve everything else, and hides the address that a
client spoke to.  They are watched by a :class:`Watcher`: the plane's epoll where there
is one, the reactor otherwise, or a test.

Reading.  A socket is read in bounded batches into one buffer that all share, which is
larger than any datagram, so none is cut.  A batch goes on while there is more; a socket
that has had a single datagram the last time is not asked for a second one, because
asking costs as much as being told again.

Nothing that arrives raises: each datagram is passed on, or dropped and counted by its
reason (:class:`Counters`), and `datagrams in = datagrams out + dropped` holds for both
directions.
"""

from __future__ import annotations

import errno
import itertools
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import attrs
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IHalfCloseableDescriptor,
    IListeningPort,
    IReactorTime,
    IReadDescriptor,
    IStreamServerEndpoint,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.addresses import host_port, numeric_host
from relayd.errors import ListenError
from relayd.listening import Listeners
from relayd.nat_table import Flow, NatTable, TableFull
from relayd.resolving import Resolver, SocketAddress

log = Logger(namespace="relayd.udp_nat")
flow_log = Logger(namespace="relayd.flow")

#: Larger than any datagram: 65,507 bytes over IPv4, 65,527 over IPv6.
BUFFER_SIZE = 65536

#: Datagrams that are read from one socket before others have their turn.
BATCH = 64

TURNS = range(BATCH)

#: Room for what the kernel says besides a datagram, in bytes: one address of ours.
ANCILLARY = 64

#: Descriptors that flows leave to everything else, or a quarter of the limit.
RESERVE = 1024

#: What the kernel may keep of unread datagrams, in bytes, if it lets us.
RECEIVE_BUFFER = 4 << 20

#: socket(7), Linux: counters of a socket's memory, and the one of its drops.
_SO_MEMINFO, _DROPS = 55, 8

#: Flows without an answer whose end is logged in a second.
MOST_LINES = 100

#: Seconds between two look-ups of a server's name.
LOOK_UP_EVERY = 30.0

#: Seconds without a datagram after which a flow need not be waited for.
QUIET = 1.0

#: The errors of an address family that this machine does not have.
_LACKS = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

_WILDCARDS = ("0.0.0.0", "::")

_numbers = itertools.count()

_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)
_PKTINFO4 = struct.Struct("=I4s4s")
_PKTINFO6 = struct.Struct("=16sI")


class Watcher(Protocol):
    """What tells when a socket can be read: the plane, the reactor, or a test."""

    def watch(self, descriptor: int, handler: Any, mask: int) -> None:
        """Call `handler.ready` while there is something to read.

        :raises OSError: the kernel can't watch another descriptor.
        """

    def give_up(self, sock: Any) -> None:
        """Watch `sock` no more, and close it."""


class ReactorWatcher:
    """Any reactor that has `addReader`.

    A socket is closed at once: if the reactor still has an event for its number, and
    the number is another socket's by then, that one is read in vain.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._readers: dict[int, _Reader] = {}

    def watch(self, descriptor: int, handler: Any, mask: int) -> None:
        """See :meth:`Watcher.watch`."""
        reader = _Reader(self._reactor, descriptor, handler)
        self._reactor.addReader(reader)
        self._readers[descriptor] = reader

    def give_up(self, sock: Any) -> None:
        """See :meth:`Watcher.give_up`."""
        reader = self._readers.pop(sock.fileno(), None)
        if reader is not None:
            self._reactor.removeReader(reader)
        sock.close()


@implementer(IReadDescriptor, IHalfCloseableDescriptor)
class _Reader:
    """A socket, as reactors want it."""

    def __init__(self, reactor: Any, descriptor: int, handler: Any) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._handler = handler

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> None:
        self._handler.ready(0)

    def readConnectionLost(self, reason: Failure) -> None:
        # Reactors that poll take an error without data for the end of a connection,
        # and forget the socket.  Here an earlier datagram was refused (ICMP).
        self._reactor.addReader(self)
        self._handler.ready(0)

    def writeConnectionLost(self, reason: Failure) -> None:
        """Nothing is written through the reactor."""

    def connectionLost(self, reason: Failure) -> None:
        self._handler.connectionLost(reason)

    def logPrefix(self) -> str:
        return "relayd udp"


#: epoll_ctl(2): readable, and again as long as it is.
_READABLE = 1


@attrs.define(eq=False)
class Counters:
    """What has become of datagrams.

    :ivar received: from clients; each was sent on or is in `dropped`.
    :ivar sent: to servers.
    :ivar replies_received: from servers; each was sent on or is in `replies_dropped`.
    :ivar replies_sent: to clients.
    :ivar dropped: by reason: `no_flow` (the table is full, or no descriptor is left),
        `no_server` (its name has no address yet), `source_port_0`, `truncated`,
        `draining`, or `send_` and the name of the error.
    :ivar replies_dropped: likewise: `reply_cap`, `truncated`, `send_…`.
    :ivar icmp_errors: how often a server's host refused what had been sent.
    :ivar kernel_dropped: how many the kernel dropped because they were not read in
        time; they are in no other counter.
    """

    received: int = 0
    sent: int = 0
    replies_received: int = 0
    replies_sent: int = 0
    dropped: Counter[str] = attrs.Factory(Counter)
    replies_dropped: Counter[str] = attrs.Factory(Counter)
    icmp_errors: int = 0
    kernel_dropped: int = 0


class FlowLog:
    """Writes one line when a flow ends.

    Whoever floods a listener with clients that nobody answers ends flows as fast as
    it can send, so of those :data:`MOST_LINES` in a second have a line.

    :ivar left_out: how many flows had none.
    """

    def __init__(self) -> None:
        self._second = 0
        self._lines = 0
        self.left_out = 0

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :attr:`UdpNat.observer`."""
        if not flow.replied and not self._room(int(flow.began + facts.age)):
            return
        flow_log.info(
            "{line}",
            line=(
                f"flow client={facts.client} listener={facts.listener}"
                f" port={facts.port} server={facts.server} age={facts.age:.3f}"
                f" up={flow.up_datagrams}/{flow.up_bytes}"
                f" down={flow.down_datagrams}/{flow.down_bytes} ending={facts.ending}"
            ),
            **attrs.asdict(facts),
        )

    def _room(self, second: int) -> bool:
        """Whether this second has room for another line; says so once if not."""
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines <= MOST_LINES:
            return True
        if self._lines == MOST_LINES + 1:
            flow_log.warn(
                "{most} flows without an answer ended in a second: the rest of them"
                " have no line ({left_out} left out so far)",
                most=MOST_LINES,
                left_out=self.left_out,
            )
        self.left_out += 1
        return False


class QuietFlowLog(FlowLog):
    """Writes a line only for a flow that did not end by itself, with a reply."""

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :attr:`UdpNat.observer`."""
        if facts.ending != "expired":
            super().ended(flow, facts)


@attrs.frozen
class FlowFacts:
    """Who a flow was between, and why it ended.

    :ivar port: the relay's own address towards the server.
    :ivar age: seconds.
    :ivar ending: `expired`, `unreplied` (it expired without a reply), `evicted`,
        `drained`, or `failed`.
    """

    client: str
    listener: str
    port: str
    server: str
    age: float
    ending: str


class ClientFlow(Flow):
    """A flow, and the socket that is the relay's port for its client.

    :ivar front: where the client speaks to the relay.
    :ivar here: what the front knows it by.
    :ivar to: where the client is, as the front replies to it.
    :ivar sock: connected to the server.
    :ivar server: the server's name.
    """

    __slots__ = (
        "_more",
        "_turn",
        "front",
        "here",
        "nat",
        "recv",
        "send",
        "server",
        "sock",
        "to",
    )

    def __init__(
        self, nat: UdpNat, front: Front, key: Any, to: Any, sock: Any, server: str
    ) -> None:
        # Two listeners of a relay may have the same client.
        Flow.__init__(self, (front.number, key), _source(to)[0], nat.now())
        self.nat = nat
        self.front = front
        self.here = key
        self.to = to
        self.sock = sock
        self.server = server
        self.send = sock.send
        self.recv = sock.recv_into
        #: The last time there was more than one datagram.
        self._more = False
        self._turn = 0

    def ready(self, mask: int) -> None:
        """The server has answered, or its host has refused."""
        nat, recv, reply = self.nat, self.recv, self.front.reply
        buffer, cap, to = nat.buffer, nat.reply_cap, self.to
        received = sent = moved = 0
        for _ in TURNS:
            try:
                size = recv(buffer)
            except BlockingIOError:
                break
            except OSError:
                # What was sent before was refused.  Being told takes the error away.
                nat.counters.icmp_errors += 1
                continue
            received += 1
            if size >= BUFFER_SIZE:
                nat.counters.replies_dropped["truncated"] += 1
            elif cap and self.down_bytes + moved + size > cap * self.up_bytes:
                nat.counters.replies_dropped["reply_cap"] += 1
            else:
                try:
                    reply(buffer[:size], to)
                except OSError as problem:
                    nat.counters.replies_dropped[_send_error(problem)] += 1
                else:
                    sent += 1
                    moved += size
            if not self._more and received == 1:
                # Asking whether there is more costs as much as being told: now and
                # then is enough to notice a flow that has several under way.
                self._turn = (self._turn + 1) & 7
                if self._turn:
                    break
        if received:
            counters = nat.counters
            counters.replies_received += received
            counters.replies_sent += sent
            self.down_datagrams += sent
            self.down_bytes += moved
            self._more = received > 1
            nat.table.inbound(self, nat.now())

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops, or reading has raised."""
        self.nat.end(self, "failed")


class Front:
    """A socket that clients send to.

    :param sock: bound to one address.
    """

    def __init__(self, nat: UdpNat, sock: Any) -> None:
        self._nat = nat
        self.number = next(_numbers)
        self.sock = sock
        self.address = sock.getsockname()
        self.recv = sock.recvfrom_into
        self.reply: Callable[[Any, Any], Any] = sock.sendto
        self.drops = 0
        #: Those of the relay's flows whose clients speak to this address, by what
        #: tells one from another here.
        self.flows: dict[Any, ClientFlow] = {}
        #: How many datagrams may still be unread that came before the last tick.
        self.owed = 0

    def ready(self, mask: int) -> None:
        """Clients have sent something."""
        self.read()

    def read(self) -> bool:
        """Pass a batch on.

        :return: whether there is nothing more.
        """
        nat, recv = self._nat, self.recv
        counters, buffer, flows = nat.counters, nat.buffer, self.flows
        now, drained = nat.now(), False
        received = sent = 0
        for _ in TURNS:
            try:
                size, source = recv(buffer)
            except BlockingIOError:
                drained = True
                break
            except OSError:
                counters.icmp_errors += 1
                continue
            received += 1
            flow = flows.get(source) or nat.admit(self, source, source, source)
            if flow is None:
                continue
            if size >= BUFFER_SIZE:
                counters.dropped["truncated"] += 1
                continue
            try:
                flow.send(buffer[:size])
            except OSError as problem:
                if not nat.send_again(flow, buffer[:size], problem):
                    continue
            sent += 1
            flow.up_datagrams += 1
            flow.up_bytes += size
            if flow.replied:
                flow.seen = now
            else:
                nat.table.outbound(flow, now)
        counters.received += received
        counters.sent += sent
        self.owed = 0 if drained else self.owed - received
        return drained

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops, or reading has raised."""

    def name(self, to: Any) -> str:
        """The address that a client spoke to, as text."""
        return host_port(self.address[0], self.address[1])

    def look_at_drops(self) -> int:
        """How many datagrams the kernel has dropped since the last look."""
        drops = kernel_drops(self.sock)
        new, self.drops = drops - self.drops, drops
        return new


class WildcardFront(Front):
    """One that is bound to all addresses, and answers from the one that was spoken to.

    The kernel says which with each datagram: IP_PKTINFO of ip(7), and
    IPV6_RECVPKTINFO of ipv6(7) and RFC 3542.
    """

    def __init__(self, nat: UdpNat, sock: Any) -> None:
        super().__init__(nat, sock)
        self._v6 = sock.family == socket.AF_INET6
        _ask_for_local_address(sock)
        self.reply = self._reply

    def read(self) -> bool:
        # The loop of Front.read with other calls in it: what they have in common would
        # be a call of its own for each datagram.
        nat, recv = self._nat, self.sock.recvmsg_into
        counters, buffer, flows = nat.counters, nat.buffer, self.flows
        now, drained = nat.now(), False
        buffers = [buffer]
        received = sent = 0
        for _ in TURNS:
            try:
                size, extra, flags, source = recv(buffers, ANCILLARY)
            except BlockingIOError:
                drained = True
                break
            except OSError:
                counters.icmp_errors += 1
                continue
            received += 1
            if not extra:
                counters.dropped["no_local_address"] += 1
                continue
            # One client that speaks to two of our addresses is two flows: each must be
            # answered from its own.
            key = (source, extra[0][2])
            flow = flows.get(key) or nat.admit(
                self, key, source, (source, self._from(extra[0][2]))
            )
            if flow is None:
                continue
            if flags & socket.MSG_TRUNC or size >= BUFFER_SIZE:
                counters.dropped["truncated"] += 1
                continue
            try:
                flow.send(buffer[:size])
            except OSError as problem:
                if not nat.send_again(flow, buffer[:size], problem):
                    continue
            sent += 1
            flow.up_datagrams += 1
            flow.up_bytes += size
            nat.table.outbound(flow, now)
        counters.received += received
        counters.sent += sent
        self.owed = 0 if drained else self.owed - received
        return drained

    def _from(self, local: bytes) -> list[tuple[int, int, bytes]]:
        """What tells the kernel to answer from the address that was spoken to."""
        if self._v6:
            return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, local)]
        # in_pktinfo: the interface, ours; the header's destination, unused.
        _, ours, _ = _PKTINFO4.unpack(local)
        packed = _PKTINFO4.pack(0, ours, bytes(4))
        return [(socket.IPPROTO_IP, _IP_PKTINFO, packed)]

    def _reply(self, data: Any, to: Any) -> None:
        source, extra = to
        self.sock.sendmsg([data], extra, 0, source)

    def name(self, to: Any) -> str:
        [(_, _, local)] = to[1]
        if self._v6:
            host = socket.inet_ntop(socket.AF_INET6, _PKTINFO6.unpack(local)[0])
        else:
            host = socket.inet_ntop(socket.AF_INET, _PKTINFO4.unpack(local)[1])
        return host_port(host, self.address[1])


def _ask_for_local_address(sock: Any) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def kernel_drops(sock: Any) -> int:
    """Datagrams that the kernel has dropped for want of room; 0 if it can't tell."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        counters = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
    except OSError:
        return 0
    return int.from_bytes(counters[4 * _DROPS : 4 * _DROPS + 4], sys.byteorder)


def _send_error(problem: OSError) -> str:
    return f"send_{errno.errorcode.get(problem.errno or 0, problem.errno)}"


class Server:
    """Where flows go: a host and a port, and the address that the host has now.

    :ivar address: as the socket module has it, with its family; None until the name
        has been looked up.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.name = host_port(host, port)
        self.address: SocketAddress | None = None
        if ":" in host:
            found = socket.getaddrinfo(
                host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
            )
            self.address = socket.AF_INET6, found[0][4]
        elif host.rpartition(".")[2].isdigit():
            self.address = socket.AF_INET, (host, port)
        #: Its host is a name, which is looked up again and again.
        self.named = self.address is None


class UdpNat:
    """Relays datagrams between clients and servers.

    :param reactor: provides `IReactorTime`, and what `watcher` needs.
    :param servers: each flow gets one of them, in turn; at least one.
    :param watcher: watches the sockets; unless given, the reactor does.
    :param resolver: finds the addresses of servers' names.
    :param clock: where time comes from, unless it is the reactor.
    :param observer: its `ended(flow, facts)` hears of every flow that has ended;
        unless given, one that logs a line for each.
    :param open_socket: opens a datagram socket of a family; for tests.
    :param most_flows: flows in all; unless given, what the limit of open files allows,
        less a reserve.
    :param most_flows_each: of one client address without its port; unless given, half
        of that.
    :param timeout: seconds that a flow lives after something moved.
    :param unreplied_timeout: likewise, until its server has answered.
    :param refresh_inbound: what a server sends keeps a flow alive, too.
    :param reply_cap: a flow's replies may have so many times the bytes of what its
        client has sent; 0 is no limit.
    :param receive_buffer: bytes that the kernel may keep unread for a listener.
    :raises ValueError: a setting can't be used.

    :ivar counters: what has become of datagrams.
    :ivar table: the flows that live.
    """

    def __init__(
        self,
        reactor: Any,
        servers: Iterable[Server],
        *,
        watcher: Watcher | None = None,
        resolver: Resolver | None = None,
        clock: IReactorTime | None = None,
        observer: Any = None,
        open_socket: Callable[[int], Any] | None = None,
        most_flows: int | None = None,
        most_flows_each: int | None = None,
        timeout: float = 300.0,
        unreplied_timeout: float = 30.0,
        refresh_inbound: bool = True,
        reply_cap: float = 0.0,
        receive_buffer: int = RECEIVE_BUFFER,
    ) -> None:
        self.servers = tuple(servers)
        if not self.servers:
            raise ValueError("a relay needs a server")
        if not reply_cap >= 0:
            raise ValueError(f"reply_cap must not be negative: {reply_cap!r}")
        self.clock: Any = clock if clock is not None else reactor
        self.now: Callable[[], float] = self.clock.seconds
        self.watcher = watcher if watcher is not None else ReactorWatcher(reactor)
        self._resolver = resolver
        self._reactor = reactor
        self.observer = observer if observer is not None else FlowLog()
        self._open = open_socket if open_socket is not None else _udp_socket
        most = most_flows or affordable_flows()
        self.table: NatTable[ClientFlow] = NatTable(
            most,
            most_flows_each or max(1, most // 2),
            timeout=timeout,
            unreplied_timeout=unreplied_timeout,
            refresh_inbound=refresh_inbound,
        )
        self.reply_cap = reply_cap
        self.receive_buffer = receive_buffer
        self.counters = Counters()
        self.buffer = memoryview(bytearray(BUFFER_SIZE))
        self.fronts: list[Front] = []
        self._turns = itertools.count()
        self._timer: IDelayedCall | None = None
        #: Up to when flows may expire, as soon as what came before has been read.
        self._expire_to: float | None = None
        self._lookups: IDelayedCall | None = None
        self._refused_at: float | None = None
        self._drained: Deferred[None] | None = None
        self._drain_until = 0.0

    # -- listening

    def listen(self, sockets: Sequence[Any]) -> None:
        """Serve the clients of bound, non-blocking sockets, from now on.

        :raises OSError: the kernel can't watch them.
        """
        opened: list[Front] = []
        try:
            for sock in sockets:
                self._raise_buffer(sock)
                host = sock.getsockname()[0]
                kind = WildcardFront if host in _WILDCARDS else Front
                front = kind(self, sock)
                self.watcher.watch(sock.fileno(), front, _READABLE)
                opened.append(front)
        except OSError:
            # All or none: what is watched can't be closed by the caller.
            for front in opened:
                self.watcher.give_up(front.sock)
            raise
        self.fronts += opened
        if self._lookups is None:
            self._look_up()

    def _raise_buffer(self, sock: Any) -> None:
        wanted = self.receive_buffer
        forced = getattr(socket, "SO_RCVBUFFORCE", 33)
        try:
            # Beyond net.core.rmem_max, for those who may (socket(7)).
            sock.setsockopt(socket.SOL_SOCKET, forced, wanted)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)

    def _look_up(self) -> None:
        """Look the servers' names up, now and in the background."""
        names = [server for server in self.servers if server.named]
        for server in names:
            resolver = self._resolver or Resolver.of(self._reactor)
            found = resolver.addresses(server.host, server.port)
            found.addCallbacks(
                self._found, self._not_found, (server,), errbackArgs=(server,)
            )
        if names:
            self._lookups = self.clock.callLater(LOOK_UP_EVERY, self._look_up)

    def _found(self, addresses: list[SocketAddress], server: Server) -> None:
        if server.address not in addresses:
            # Flows keep the one that they have.
            server.address = addresses[0]

    def _not_found(self, reason: Failure, server: Server) -> None:
        log.warn(
            "{name}: {why}; {then}",
            name=server.name,
            why=reason.getErrorMessage(),
            then="its last address is kept" if server.address else "nothing is sent",
        )

    # -- flows

    def admit(self, front: Front, key: Any, source: Any, to: Any) -> ClientFlow | None:
        """The flow for a client that has none yet, or None: counted as dropped.

        :param key: what tells it from others of this front.
        :param to: what the front's `reply` takes for it.
        """
        dropped = self.counters.dropped
        if source[1] == 0:
            # Nobody could be answered there.
            dropped["source_port_0"] += 1
            return None
        if self._drained is not None:
            dropped["draining"] += 1
            return None
        server = self._choose()
        if server is None:
            dropped["no_server"] += 1
            return None
        host = source[0]
        try:
            gone = self.table.room(host)
        except TableFull as problem:
            self._refuse(str(problem))
            return None
        if gone is not None:
            self.end(gone, "evicted")
            if not self.fronts:
                # The observer has closed the relay.
                dropped["draining"] += 1
                return None
        try:
            sock = self._dial(server)
        except OSError as problem:
            self._refuse(f"no socket for a flow of {host}: {problem.strerror}")
            return None
        flow = ClientFlow(self, front, key, to, sock, server.name)
        try:
            self.watcher.watch(sock.fileno(), flow, _READABLE)
        except OSError as problem:
            sock.close()
            self._refuse(f"no socket for a flow of {host}: {problem.strerror}")
            return None
        self.table.add(flow)
        front.flows[key] = flow
        if self._timer is None:
            self._tick_later()
        return flow

    def _choose(self) -> Server | None:
        """The next server in turn that has an address."""
        for _ in self.servers:
            server = self.servers[next(self._turns) % len(self.servers)]
            if server.address is not None:
                return server
        return None

    def _dial(self, server: Server) -> Any:
        address: Any = server.address
        sock = self._open(address[0])
        try:
            sock.connect(address[1])
        except OSError:
            sock.close()
            raise
        return sock

    def _refuse(self, why: str) -> None:
        self.counters.dropped["no_flow"] += 1
        now = self.now()
        if self._refused_at is not None and now - self._refused_at < 1.0:
            return
        self._refused_at = now
        log.warn(
            "{why} ({count} datagrams dropped for want of a flow so far)",
            why=why,
            count=self.counters.dropped["no_flow"],
        )

    def send_again(self, flow: ClientFlow, data: Any, problem: OSError) -> bool:
        """A send to the server has failed; whether it was sent after all.

        A host that refused an earlier datagram (ICMP) is reported by the next call,
        which does nothing else.
        """
        if problem.errno == errno.ECONNREFUSED:
            self.counters.icmp_errors += 1
            try:
                flow.send(data)
            except OSError as again:
                problem = again
            else:
                return True
        self.counters.dropped[_send_error(problem)] += 1
        # Its client is there, whatever became of the datagram.
        self.table.outbound(flow, self.now())
        return False

    def end(self, flow: ClientFlow, ending: str) -> None:
        """A flow is over: close its socket, forget it, and tell."""
        if self.table.flows.get(flow.key) is not flow:
            return
        self.table.remove(flow, evicted=ending == "evicted")
        del flow.front.flows[flow.here]
        self.counters.kernel_dropped += kernel_drops(flow.sock)
        ours = flow.sock.getsockname()
        self.watcher.give_up(flow.sock)
        facts = FlowFacts(
            client=host_port(flow.host, _source(flow.to)[1]),
            listener=flow.front.name(flow.to),
            port=host_port(ours[0], ours[1]),
            server=flow.server,
            age=self.now() - flow.began,
            ending=ending,
        )
        try:
            self.observer.ended(flow, facts)
        except Exception:
            log.failure("the observer of flows failed")

    # -- time

    def _tick(self) -> None:
        self._timer = None
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
                flow.ready(_READABLE)
                limit = (
                    self.table.timeout if flow.replied else self.table.unreplied_timeout
                )
                # The last of its replies may have come just now.
                if flow.seen + limit <= now:
                    self.end(flow, "expired" if flow.replied else "unreplied")
        self.look_at_drops()
        self._drain_more(self.now())
        # Reading may have admitted a client, and so have set the timer.
        if self.table.flows and self._timer is None:
            self._tick_later()

    def _tick_later(self) -> None:
        # Where the table's steps begin, or flows would be two steps late.
        step = self.table.step
        self._timer = self.clock.callLater(step - self.now() % step, self._tick)

    def look_at_drops(self) -> None:
        """Bring `counters.kernel_dropped` up to now, for the listeners."""
        for front in self.fronts:
            self.counters.kernel_dropped += front.look_at_drops()

    # -- the end

    @property
    def draining(self) -> bool:
        """It takes no new client."""
        return self._drained is not None

    @property
    def sessions(self) -> dict[Any, ClientFlow]:
        """The flows that live, by key."""
        return self.table.flows

    def drain(self, timeout: float = 10.0) -> Deferred[None]:
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
        if timeout <= 0:
            self._drain_until = now
        self._drain_more(now)
        if not self.fronts:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._drained.addCallback(lambda _: waiting.callback(None))
        return waiting

    def cut_all(self) -> None:
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
        for front in fronts:
            self.watcher.give_up(front.sock)
        for timer in (self._timer, self._lookups):
            if timer is not None and timer.active():
                timer.cancel()
        self._timer = self._lookups = None
        if self._drained is not None and not self._drained.called:
            self._drained.callback(None)


def _source(to: Any) -> Any:
    """The client's socket address in what a front socket replies to."""
    return to[0] if isinstance(to[0], tuple) else to


def _udp_socket(family: int) -> Any:
    return socket.SocketType(
        family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )


def affordable_flows() -> int:
    """How many flows the limit of open files allows, less a reserve."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    return max(1, limit - min(RESERVE, limit // 4))


def bind_udp(host: str, port: int) -> socket.SocketType:
    """A non-blocking datagram socket, bound.

    :raises ListenError: it can't be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = host_port(host, port)
    try:
        address = socket.getaddrinfo(
            host, port, family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0][4]
        sock = _udp_socket(family)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if address[0] in _WILDCARDS:
                # Before a datagram can come.
                _ask_for_local_address(sock)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as problem:
        why = problem.strerror or str(problem)
        raise ListenError(f"can't listen on udp:{where}: {why}") from problem
    return sock  # type: ignore[no-any-return]


@implementer(IListeningPort)
class UdpPort:
    """One of the addresses that a relay listens on."""

    def __init__(self, nat: UdpNat, address: Any) -> None:
        self._nat = nat
        kind = IPv6Address if ":" in address[0] else IPv4Address
        self._address = kind("UDP", address[0], address[1])

    def startListening(self) -> None:
        """It listens already."""

    def stopListening(self) -> Deferred[None]:
        """Close all of the relay's addresses; while it drains, when that is over."""
        if self._nat.draining:
            return self._nat.drain()
        self._nat.close()
        return succeed(None)

    def getHost(self) -> IAddress:
        """Where it listens."""
        return self._address


@implementer(IStreamServerEndpoint)
class UdpListener:
    """Opens the sockets that a relay's clients send to.

    :param host: an address, a name whose every address is listened on (looked up once,
        when listening starts), or None for all addresses of this machine.
    :param port: 0 picks one that is free.
    """

    def __init__(self, host: str | None, port: int) -> None:
        self._host, self._port = host, port

    def listen(self, nat: Any) -> Deferred[IListeningPort]:
        """Let a :class:`UdpNat` serve them.

        :raises ListenError: through the Deferred.
        """
        sockets: list[Any] = []
        try:
            port = self._port
            for host in self._hosts():
                try:
                    sockets.append(bind_udp(host, port))
                except ListenError as problem:
                    # A family that this machine lacks is left out.
                    lacks = getattr(problem.__cause__, "errno", None) in _LACKS
                    if self._host is not None or not lacks:
                        raise
                    continue
                port = sockets[0].getsockname()[1]
            if not sockets:
                raise ListenError(f"can't listen on udp:{port}: no address family")
            nat.listen(sockets)
        except (ListenError, OSError) as problem:
            for sock in sockets:
                sock.close()
            if isinstance(problem, ListenError):
                return fail(problem)
            why = problem.strerror or str(problem)
            return fail(ListenError(f"can't listen on udp:{self._host}: {why}"))
        ports = [UdpPort(nat, sock.getsockname()) for sock in sockets]
        listening: Any = ports[0] if len(ports) == 1 else Listeners(ports)
        return succeed(listening)

    def _hosts(self) -> list[str]:
        if self._host is None:
            return ["0.0.0.0", "::"]
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)
        return list(dict.fromkeys(numeric_host(item[4]) for item in found))
