"""Sockets that have an address of somebody else's: a client's, or a destination's.

A flow that is transparent has a socket with its client's own address *and* port, and is
connected to the server (IP_TRANSPARENT, ip(7)).  The kernel must bring the server's
answers to this machine; whatever has done that, it finds the socket by both ends.

What may be shared.  A client has one socket for each server that it has a flow to, and
all of them have its address and port.  So may the socket from which others are answered
whom the kernel has redirected here (:mod:`relayd.datagrams.original_listener`).  The
kernel lets sockets share a port if all of them allow it (SO_REUSEADDR), and then never
says who else has it.  So the first socket of an address does not allow it: that another
program has that port is found as EADDRINUSE.  When a second one of ours needs it, both
do.  :class:`Places` knows who has what; as many sockets as there are flows and replies
from elsewhere, whose number is limited, and each leaves it when it is closed.  So is
the number of those that share (:data:`MOST_ALIKE`).

Two sockets with both ends the same could not be told apart.  The second is refused; but
if the first is a flow's whose listener gets no more datagrams, because another has
taken its place, then that flow ends.

A port of a client may also be that of a listener of ours on all addresses: clients of
NTP and IKE have the port of their servers.  The two never get each other's datagrams,
so the listener allows it for as long as the socket is bound.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import Hashable
from typing import Any

from relayd.core.addresses import numeric_host, socket_name
from relayd.datagrams.interfaces import Ends
from relayd.net import broadcast
from relayd.net import transparent as as_client

#: Hosts whose addresses are known to be fit, or not.
REMEMBERED = 1024

#: Sockets that have one address and port at once.  The kernel looks at each of them to
#: bind another: 0.05 ms with so many, and 1 ms with four times as many, in which nobody
#: else is served (net/ipv4/udp.c, udp_lib_get_port()).
MOST_ALIKE = 4096

#: bind(2) for want of the right to use a port below 1024 (capabilities(7)).
_LOW_PORT = "a port below 1024 takes the right CAP_NET_BIND_SERVICE"


class NotAsClient(OSError):
    """An address can't be had for a socket: that is no server's fault.

    :ivar reason: for which the datagram is dropped.
    """

    def __init__(self, why: str, reason: str = "no_source") -> None:
        super().__init__(errno.EADDRNOTAVAIL, why)
        self.reason = reason


class PlacedSocket:
    """A socket that gives its place back when it is closed.

    It has the other calls of the socket.

    :ivar ends: of the flow that has it; None if it is no flow's.
    :ivar hops: how many what it sends had left (:mod:`relayd.datagrams.hop_limits`); 0:
        it sends as any socket.
    """

    # The calls that every flow makes are found at once.
    __slots__ = (
        "_sock",
        "_use",
        "_where",
        "ends",
        "fileno",
        "hops",
        "recv",
        "recv_into",
        "send",
    )

    def __init__(self, sock: Any, where: Any, use: Hashable, ends: Ends | None) -> None:
        self._sock = sock
        self._where = where
        self._use = use
        self.ends = ends
        self.hops = 0
        self.fileno = sock.fileno
        self.send, self.recv, self.recv_into = sock.send, sock.recv, sock.recv_into

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def close(self) -> None:
        """Close it."""
        places.leave(self._where, self._use)
        self._sock.close()


class Places:
    """The addresses that sockets of this process have, and are not its own.

    :ivar taken: the sockets of each socket address, by what each is for.
    """

    def __init__(self) -> None:
        self.taken: dict[Any, dict[Hashable, PlacedSocket]] = {}

    def place(
        self,
        sock: Any,
        where: Any,
        use: Hashable,
        ends: Ends | None = None,
    ) -> PlacedSocket:
        """Bind a socket, which is transparent.

        :param where: the socket address.
        :param use: what the socket is for: of a flow the server's address; no two
            sockets of an address are for the same.
        :param ends: of the flow.
        :raises NotAsClient: the address can't be had.
        """
        others = self.taken.get(where)
        if others is not None and use in others:
            _give_way(others[use], where, ends)
            # The last one may have left.
            others = self.taken.get(where)
        if others and len(others) >= MOST_ALIKE:
            raise NotAsClient(
                f"{socket_name(where)} has {len(others)} flows to servers already"
            )
        try:
            if others:
                if len(others) == 1:
                    [alone] = others.values()
                    _share(alone, True)
                _share(sock, True)
            self._bind(sock, where, ends)
        except OSError as problem:
            raise _not_had(where, problem) from problem
        placed = PlacedSocket(sock, where, use, ends)
        if others:
            others[use] = placed
        else:
            self.taken[where] = {use: placed}
        return placed

    def leave(self, where: Any, use: Hashable) -> None:
        """A socket is closed."""
        others = self.taken.get(where)
        if others is not None and use in others:
            del others[use]
            if not others:
                del self.taken[where]

    @staticmethod
    def _bind(sock: Any, where: Any, ends: Ends | None) -> None:
        try:
            sock.bind(where)
        except OSError as problem:
            # A listener on all addresses of this machine has the port, too.
            listener = None if ends is None else ends[0]
            if (
                problem.errno != errno.EADDRINUSE
                or listener is None
                or not listener.wild
                or listener.port != where[1]
            ):
                raise
        else:
            return
        _share(listener.sock, True)
        try:
            _share(sock, True)
            sock.bind(where)
        finally:
            _share(listener.sock, False)


#: Those of this process.
places = Places()


def _share(sock: Any, shared: bool) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)


def _give_way(holder: PlacedSocket, where: Any, ends: Ends | None) -> None:
    """A socket is needed once more for the same: end the flow that has it.

    :raises NotAsClient: it stays.
    """
    flow = None
    if holder.ends is not None:
        listener, client = holder.ends
        # Unless it is the same flow, which is to go to another server there.
        if holder.ends != ends and (listener.retired or listener.deaf):
            flow = listener.flows.get(client[0])
    if flow is None or flow.sock is not holder:
        raise NotAsClient(
            f"another flow of {socket_name(where)} has the same server already"
        )
    flow.relay.end(flow, "drained")


def _not_had(where: Any, problem: OSError) -> NotAsClient:
    """The error for an address that can't be bound."""
    name = socket_name(where)
    if problem.errno == errno.EADDRINUSE:
        return NotAsClient(f"another program of this machine has {name}")
    why = problem.strerror
    if problem.errno == errno.EACCES and where[1] < 1024:
        why = _LOW_PORT
    return NotAsClient(f"can't send as {name}: {why}")


def connected_as(sock: Any, ends: Ends, where: Any) -> PlacedSocket:
    """Give a socket its client's address and port, and connect it to a server.

    :param sock: is transparent; stays the caller's if this fails.
    :param ends: of the flow.
    :param where: the socket address of the server.
    :raises NotAsClient: it can't have the client's address.
    :raises OSError: there is no route to the server.
    """
    source = ends[1][1]
    placed = places.place(sock, source, where, ends)
    try:
        if ends[0].closed:
            # By who was told of the flow that has given way.
            raise NotAsClient("its listener is closed")
        sock.connect(where)
    except OSError as problem:
        places.leave(source, where)
        if problem.errno == errno.EINVAL:
            # No route takes it from there, such as from an interface's own network.
            raise NotAsClient(
                f"can't send to {socket_name(where)} as {socket_name(source)}:"
                f" {os.strerror(errno.EINVAL)}"
            ) from problem
        raise
    return placed


def check_source(source: Any, where: Any) -> None:
    """Whether a server can be sent to from a client's address: as one is dialled from
    there (:mod:`relayd.net.transparent`).

    :param source: the client's socket address, `where` the server's.
    :raises NotAsClient: it can't.
    """
    host = source[0]
    try:
        # What is no host's is remembered here: each of its datagrams asks.
        if not is_host(host):
            raise as_client.no_host(host)
        as_client.check_client(host, where[0])
        # With an interface, it is link-local.
        if len(source) == 4 and source[3] and source[3] != where[3]:
            raise as_client.link_only(numeric_host(source))
    except OSError as problem:
        raise NotAsClient(problem.strerror or "") from problem
    if source == where:
        raise NotAsClient(f"{socket_name(source)} would be its own server")


@functools.lru_cache(maxsize=REMEMBERED)
def is_host(host: str) -> bool:
    """Whether an address is that of one host, and can be that of a socket.

    An IPv4 address that came in a packet of IPv6 (`::ffff:127.0.0.1`) would lead to
    this machine's own.
    """
    mapped = ":" in host and "." in host
    return not mapped and broadcast.is_host(host)
