"""Finds loops: datagrams that would be relayed again and again.

A datagram may have a forged source: an address that a relay of this process listens on,
a server's, or the unspecified one, which Linux takes for this machine.  And a relay may
lead to another relay of this process, and that one back (:mod:`relayd.core.hops`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from relayd.core.addresses import bare_end, numeric_host
from relayd.core.hops import between
from relayd.core.hops import datagrams as hops
from relayd.core.networks import Ip
from relayd.datagrams.interfaces import Ends
from relayd.datagrams.servers import Server
from relayd.datagrams.sockets import WILDCARDS

#: Of the relays of this process that have listeners.
open_guards: set[LoopGuard] = set()


class Hopping(Protocol):
    """A flow that may be a hop.

    :ivar hop: what it is noted as; empty if it is not.
    """

    hop: str
    listener: Any
    ours: Any
    source: Any
    to: Any
    tried: list[Any]


def hop_name(here: Any, port: int) -> str:
    """The name of a hop, made of its two ends: see `relayd.core.hops`.

    The near end is in canonical form: both relays must find it, and each may see an
    IPv4 address, or an interface, in another form.  Of the far end the port is enough:
    the kernel gives no port to two UDP sockets, a wildcard listener may not know which
    address was sent to, and a flow to `0.0.0.0` does not know the address either.

    :param here: the socket address of a flow's socket, as either relay sees it.
    :param port: the port that it is connected to.
    """
    host, own_port, interface = bare_end(here)
    return between(f"{host}%{interface}:{own_port}", str(port))


class LoopGuard:
    """Knows the addresses of one relay's listeners and servers.

    :param own: whether an address is this machine's.
    :param redirected: its clients are brought here by the kernel, which may bring its
        own flows, too, wherever they go.

    :ivar ports: of its servers and listeners.
    """

    def __init__(
        self,
        own: Callable[[Ip], bool],
        *,
        redirected: Callable[[str], bool] | None = None,
    ) -> None:
        self._own = own
        self._redirected = redirected
        self._servers: tuple[Server, ...] = ()
        #: Addresses of servers and listeners, and the ports of wildcard listeners.
        self._server_ends: frozenset[tuple[str, int, int]] = frozenset()
        self._listener_ends = self._server_ends
        self._wild_ports: frozenset[int] = frozenset()
        self.ports: frozenset[int] = frozenset()

    def update(self, listeners: Sequence[Any], servers: Iterable[Server]) -> None:
        """Listeners or servers have changed.

        :param listeners: their socket addresses.
        """
        self._servers = tuple(servers)
        ends = [each[1] for server in self._servers for each in server.addresses]
        self._server_ends = frozenset(map(bare_end, ends))
        self._listener_ends = frozenset(map(bare_end, listeners))
        self.ports = frozenset(
            end[1] for end in self._server_ends | self._listener_ends
        )
        self._wild_ports = frozenset(
            where[1] for where in listeners if where[0] in WILDCARDS
        )
        if listeners:
            open_guards.add(self)
        else:
            open_guards.discard(self)

    def leads_back(self, source: Any) -> bool:
        """Whether a reply to this source would come back, and be relayed again.

        A server on this machine counts at all of the machine's addresses.  A server on
        another machine that belongs to another relay may be a client of this one, as
        with two peers that are relayed to each other.

        :param source: a client's socket address.
        """
        end = bare_end(source)
        if end[0] in WILDCARDS:
            return True
        if end in self._server_ends:
            return True
        return any(
            end[1] in each.ports and each.is_at(end, source) for each in open_guards
        )

    def is_at(self, end: tuple[str, int, int], source: Any) -> bool:
        """Whether this relay has a listener, or a server on this machine, there.

        :param end: `bare_end` of `source`; its port is one of `ports`.
        """
        if end in self._listener_ends:
            return True
        port = end[1]
        # A wildcard listener has every address of this machine.  So may a server on
        # this machine, whose socket we can't see.
        if not self._is_own(end, source):
            return False
        return port in self._wild_ports or any(
            self._is_own(bare_end(where), where)
            for server in self._servers
            for _, where in server.addresses
            if where[1] == port
        )

    def _is_own(self, end: tuple[str, int, int], where: Any) -> bool:
        host = numeric_host(where) if end[2] else end[0]
        return self._own(ipaddress.ip_address(host))

    def listens_at(self, where: Any) -> bool:
        """Whether this relay has a listener at a socket address."""
        end = bare_end(where)
        if end in self._listener_ends:
            return True
        return end[1] in self._wild_ports and self._is_own(end, where)

    def is_loop(self, source: Any, port: int) -> bool:
        """Whether a client is this relay itself, through others of this process.

        :param source: the client's socket address.
        :param port: that it sends to: of the listener, unless it was redirected.
        """
        return hops.is_loop(hop_name(source, port), self)

    def returns(self, ends: Ends, where: Any) -> bool:
        """Whether what is sent on with its client's own address comes back.

        It would be taken for the client's, and be sent on again, and again.

        :param ends: of the flow.
        :param where: the socket address of the server.
        """
        source, to = ends[1][1:]
        # What has brought the client's datagram here may bring this one as well.
        redirected = self._redirected
        if redirected is not None and where == to.original and redirected(where[0]):
            return True
        if where[1] not in hops.ports or not _is_listener(where):
            return False
        name, before = hop_name(source, where[1]), _came_by(*ends)
        for _ in range(len(hops.hops) + 1):
            if name == before:
                return True
            hop = hops.hops.get(before)
            if hop is None:
                break
            before = hop.before
        return False

    def note(self, flow: Hopping) -> None:
        """Note a flow's new socket, if it leads to a relay of this process."""
        if flow.hop:
            self.forget(flow)
        there = flow.tried[-1][1]
        if there[1] in hops.ports or self._redirected is not None:
            if flow.ours == flow.source and not _is_listener(there):
                # Its client may have the same way to a relay of this process.
                return
            flow.hop = hop_name(flow.ours, there[1])
            client = flow.source, flow.source, flow.to
            hops.add(flow.hop, self, _came_by(flow.listener, client))

    def forget(self, flow: Hopping) -> None:
        """A flow has ended, or has another server."""
        if flow.hop:
            hops.remove(flow.hop)
            flow.hop = ""


def _is_listener(where: Any) -> bool:
    """Whether a relay of this process has a listener at a socket address."""
    return any(each.listens_at(where) for each in open_guards)


def _came_by(listener: Any, client: tuple[Any, Any, Any]) -> str:
    """The name of the hop by which a client may have come."""
    _, source, to = client
    port = to.original[1] if listener.redirected else listener.port
    return hop_name(source, port)
