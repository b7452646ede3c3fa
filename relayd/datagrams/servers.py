"""The servers of a UDP relay, and the look-ups of their names.

They have turns, or a pool with state chooses (:mod:`relayd.core.flow_pools`).

A :class:`Server` is a host and a port.  A host that is a name is looked up again from
time to time, and some of its addresses may not work: `localhost` is `::1` first, and
many servers listen on 127.0.0.1 only.  UDP has no handshake that would show it.  But a
host where no socket has the port refuses (ICMP), which the next call reports.  Then new
flows get the next address, and so does the flow that was refused, if it was never
answered.

Which address.  New flows get the current one, as long as the name has it.  When it
refuses, the next one becomes current, round robin, so that the first is tried again
when the others have refused as well, or have left the name.  A flow tries each address
once after each look-up of the name.
"""

from __future__ import annotations

import ipaddress
import itertools
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from math import inf
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.addresses import bare_end, socket_name
from relayd.core.flow_pools import CountedServer, FlowPool
from relayd.core.names import host_port
from relayd.core.networks import unmapped
from relayd.net.dial_options import DialOptions
from relayd.net.monotonic import monotonic
from relayd.net.resolving import Resolver, SocketAddress

log = Logger(namespace="relayd.datagrams")

#: Seconds between two look-ups of a server's name.
LOOK_UP_INTERVAL = 30.0


class Server:
    """A host and a port, and the host's present addresses.

    :param host: an address or a name.
    :param preamble: what it is told of each flow
        (:class:`relayd.datagrams.preamble.Preamble`).
    :param dialing: how it is sent to, if that is its own; unless given, as its relay
        says.
    :raises OSError: an IPv6 address has an interface that this machine lacks.

    :ivar name: host and port, as the log has them.
    :ivar named: the host is a name.
    :ivar address: the current one, for new flows: a family and a socket address; None
        until the name has been looked up.
    :ivar addresses: all of them.
    :ivar look_ups: how many look-ups of its name have succeeded.
    :ivar state: what its pool knows of it; None if it has no such pool.
    :ivar moves: flows that it refuses may have somewhere to go: another address of its
        name, or another server of its pool.
    :ivar judged: it counts as failed if it refuses flows, or does not answer them.
    :ivar answered_at: when it first answered its latest new flow.
    :ivar left: it is none of its relay's servers any more: flows that have it still go
        elsewhere when it fails them.
    """

    judged = True

    def __init__(
        self,
        host: str,
        port: int,
        preamble: Any = None,
        dialing: DialOptions | None = None,
    ) -> None:
        self.host = host
        self.preamble = preamble
        self.dialing = dialing
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
        #: Its host is a name, which is looked up periodically.
        self.named = self.address is None
        self.addresses: list[SocketAddress] = []
        if self.address is not None:
            self.addresses.append(self.address)
        self.look_ups = 0
        self.state: CountedServer | None = None
        self.moves = self.named
        self.answered_at = -inf
        self.left = False
        self._warned_at = -1

    @property
    def end(self) -> tuple[str, int] | None:
        """The host and port of its current address, if it has one."""
        if self.address is None:
            return None
        host, port, interface = bare_end(self.address[1])
        return f"{host}%{interface}" if interface else host, port

    def at(self, ends: Any) -> SocketAddress | None:
        """Where a flow goes, if the host is no name.

        :param ends: of the flow (:data:`relayd.datagrams.interfaces.Ends`).
        """
        return self.address

    def has(self, address: SocketAddress) -> bool:
        """Whether an address, to which a flow has gone, is still one of its own."""
        return address in self.addresses

    def name_at(self, address: SocketAddress) -> str:
        """What is reported of a flow that has gone to this address of it."""
        return self.name

    def found(self, addresses: Sequence[SocketAddress]) -> None:
        """The name was looked up.  Flows keep their address.

        Multicast groups and wildcards, which a name may have, are left out.
        """
        self.look_ups += 1
        addresses = [each for each in addresses if is_one_host(each[1])]
        self.addresses = list(addresses)
        if self.address not in addresses:
            had, self.address = self.address, addresses[0] if addresses else None
            if self.state is not None and (had is None) != (self.address is None):
                self.state.changed()

    def take_after(self, before: Server) -> None:
        """Know what another one knew that was at the same place, until its name is
        looked up."""
        self.answered_at = max(self.answered_at, before.answered_at)
        if self.address is None and before.address is not None:
            self.address = before.address
            self.found(before.addresses)
            if self.state is not None:
                self.state.changed()

    def candidates(
        self, tried: Sequence[SocketAddress] = ()
    ) -> Iterator[SocketAddress]:
        """The addresses to try, the current one first.

        :param tried: those not to try again.
        """
        if self.address is None:
            return
        there = self.addresses
        first = there.index(self.address)
        for address in there[first:] + there[:first]:
            if address not in tried:
                yield address

    def advance_from(self, address: SocketAddress) -> bool:
        """Make the next address current, if this one was.

        :return: whether to log it: once after each look-up at most.
        """
        if self.address != address or len(self.addresses) < 2:
            return False
        following = self.addresses.index(address) + 1
        self.address = self.addresses[following % len(self.addresses)]
        warn = self._warned_at != self.look_ups
        self._warned_at = self.look_ups
        return warn


class ServerPool:
    """The servers of one relay.

    :param servers: at least one, for turns; or what chooses, whose `endpoint` are
        servers, each of that pool alone.
    :param clock: seconds.
    :param resolver: returns the resolver; called when the first name is looked up.
    :raises ValueError: there is no server.

    :ivar changed: called when servers or their addresses have changed.
    :ivar tells: one of them has a preamble.
    :ivar balance: what chooses; None: they have turns.
    """

    def __init__(
        self,
        servers: Iterable[Server] | FlowPool,
        clock: IReactorTime,
        resolver: Callable[[], Resolver],
    ) -> None:
        self.tells = False
        self.balance: FlowPool | None = None
        self.changed: Callable[[], None] = lambda: None
        self._clock: IReactorTime = monotonic(clock)
        self._resolver = resolver
        self._turns = itertools.count()
        self._next_look_up: IDelayedCall | None = None
        #: Names are looked up periodically.
        self._started = False
        self._servers: tuple[Server, ...] = ()
        #: Those that `balance` had when they were last taken over.
        self._known: Sequence[CountedServer] = ()
        if isinstance(servers, FlowPool):
            self.have_state(servers)
        else:
            self.servers = servers

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers; may be set at any time, and names are looked up at once.

        :raises ValueError: there is none, or a pool has them: change that one.
        """
        return self._servers

    @servers.setter
    def servers(self, servers: Iterable[Server]) -> None:
        chosen = tuple(servers)
        if not chosen:
            raise ValueError("a relay needs a server")
        if self.balance is not None:
            raise ValueError("its pool has the servers: replace them there")
        self._use(chosen)

    def have_state(self, balance: FlowPool) -> None:
        """From now on a pool chooses, whose servers are these ones, with state."""
        self.balance = balance
        balance.listeners.append(self._notice)
        self._take_over(balance)

    def _notice(self, _: CountedServer) -> None:
        """A server of the pool has changed: perhaps there are others now."""
        balance = self.balance
        if balance is not None and balance.upstreams is not self._known:
            self._take_over(balance)

    def _take_over(self, balance: FlowPool) -> None:
        self._known = balance.upstreams
        for each in self._known:
            each.endpoint.state = each
            each.endpoint.moves = True
        self._use(tuple(each.endpoint for each in self._known))

    def _use(self, servers: tuple[Server, ...]) -> None:
        self._servers = servers
        self.tells = any(each.preamble is not None for each in servers)
        self.changed()
        if self._started:
            self._look_up()

    def learn(self, before: ServerPool) -> None:
        """Send where another one has sent that had the same names, until they are
        looked up."""
        known = {(each.host, each.port): each for each in before.servers}
        for each in self._servers:
            same = known.get((each.host, each.port))
            if same is not None and same is not each:
                each.take_after(same)

    def start(self) -> None:
        """Look names up, now and every :data:`LOOK_UP_INTERVAL` seconds."""
        if not self._started:
            self._started = True
            self._look_up()

    def stop(self) -> None:
        """Look up no more names."""
        self._started = False
        self._cancel()

    def choose(
        self, asked: Any = None, tried: Collection[Server] = ()
    ) -> Server | None:
        """A server for a flow, that has an address; None if there is none.

        :param asked: a :class:`~relayd.core.flows.NewFlow`, if a pool chooses.
        :param tried: servers not to choose again.
        """
        if self.balance is not None:
            chosen = self.balance.choose(asked, [each.state for each in tried])
            found: Server | None = None if chosen is None else chosen.endpoint
            return found
        for _ in self._servers:
            server = self._servers[next(self._turns) % len(self._servers)]
            if server.address is not None and server not in tried:
                return server
        return None

    def _cancel(self) -> None:
        timer, self._next_look_up = self._next_look_up, None
        if timer is not None and timer.active():
            timer.cancel()

    def _look_up(self) -> None:
        self._cancel()
        names = [server for server in self._servers if server.named]
        if names:
            self._next_look_up = self._clock.callLater(LOOK_UP_INTERVAL, self._look_up)
        for server in names:
            found = self._resolver().addresses(server.host, server.port)
            found.addCallbacks(
                self._found, self._not_found, (server,), errbackArgs=(server,)
            )

    def _found(self, addresses: list[SocketAddress], server: Server) -> None:
        server.found(addresses)
        self.changed()
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


def is_one_host(where: Any) -> bool:
    """Whether a socket address is that of one host: no group, and no wildcard."""
    host = ipaddress.ip_address(bare_end(where)[0])
    host = unmapped(host)
    broadcast = str(host) == "255.255.255.255"
    return not (host.is_multicast or host.is_unspecified or broadcast)
