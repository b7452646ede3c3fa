"""Where the flows of a UDP relay go, and what was sent there unanswered.

A :class:`Server` is a host and a port.  A host that is a name has addresses, which are
looked up again and again, and of which some may be dead: `localhost` is `::1` first,
and many a server listens on 127.0.0.1 alone.  UDP has no connect that would tell.  But
a host that has nobody at a port says so (ICMP), by an error of the socket's next call.
Then new flows have the next address, and so has the flow that met the refusal, if it
was never answered.

Which address.  New flows have the one that is in use, as long as the name has it.  When
it refuses, it is the next one's turn, round and round, so that the first has another
chance when the others have refused as well, or have left the name.  A flow goes to each
address once after each look-up of the name.

What such a flow has sent last is sent again.  So it is kept until the first answer
(:class:`Kept`): little of each flow, and so much in all.  What is older than a moment
is not: it was not that which was refused, and its sender has given it up.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from relayd.addresses import bare_end, host_port
from relayd.resolving import SocketAddress

#: How many datagrams are kept of a flow, and how many bytes in all, with so many that
#: each takes beside its own.
MOST_KEPT, MOST_KEPT_BYTES, KEPT_BESIDE = 4, 1 << 20, 200

#: Seconds after which a datagram is not sent again, but for a flow's last.
KEPT_FOR = 2.0


class Server:
    """A host and a port, and the addresses that the host has now.

    :param host: an address or a name.
    :raises OSError: an IPv6 address has an interface that this machine lacks.

    :ivar name: both, as the log has them.
    :ivar named: the host is a name.
    :ivar address: where new flows go, as the socket module has it, with its family;
        None until the name has been looked up.
    :ivar addresses: all that there are.
    :ivar look_ups: how many have found any.
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
        self.addresses: list[SocketAddress] = []
        if self.address is not None:
            self.addresses.append(self.address)
        self.look_ups = 0
        self._warned_at = -1

    def found(self, addresses: Sequence[SocketAddress]) -> None:
        """The name was looked up.  Flows keep the address that they have.

        Multicast groups and wildcards are no server's address, whatever a name says.
        """
        self.look_ups += 1
        addresses = [each for each in addresses if _is_one_host(each[1])]
        self.addresses = list(addresses)
        if self.address not in addresses:
            self.address = addresses[0] if addresses else None

    def candidates(
        self, tried: Sequence[SocketAddress] = ()
    ) -> Iterator[SocketAddress]:
        """The addresses to try, the one that is in use first.

        :param tried: those that were.
        """
        if self.address is None:
            return
        there = self.addresses
        first = there.index(self.address)
        for address in there[first:] + there[:first]:
            if address not in tried:
                yield address

    def turn_from(self, address: SocketAddress) -> bool:
        """New flows are to have the next address, if they have had this one.

        :return: whether to warn of it: once after each look-up at most.
        """
        if self.address != address or len(self.addresses) < 2:
            return False
        following = self.addresses.index(address) + 1
        self.address = self.addresses[following % len(self.addresses)]
        warn = self._warned_at != self.look_ups
        self._warned_at = self.look_ups
        return warn


class Kept:
    """Datagrams of flows that have had no answer, of those that spoke last.

    :ivar size: bytes that they take; bounded.
    """

    def __init__(self) -> None:
        self._datagrams: dict[Hashable, list[tuple[float, bytes]]] = {}
        self.size = 0

    def __len__(self) -> int:
        return len(self._datagrams)

    def add(self, flow: Hashable, run: Sequence[Any], now: float) -> None:
        """A flow has sent these; its last are kept."""
        own = self._datagrams.pop(flow, [])
        for data in run[-MOST_KEPT:]:
            # What it came in is written over by the next batch.
            own.append((now, bytes(data)))
            self.size += len(data) + KEPT_BESIDE
        while len(own) > MOST_KEPT:
            self.size -= len(own.pop(0)[1]) + KEPT_BESIDE
        # Behind those that have spoken before.
        self._datagrams[flow] = own
        while self.size > MOST_KEPT_BYTES:
            self.forget(next(iter(self._datagrams)))

    def of(self, flow: Hashable, now: float) -> Sequence[bytes]:
        """What a flow has sent of late, in order.

        The last of all, however old: a host that can't be found is said to be so after
        seconds, and nothing was sent since.
        """
        own = self._datagrams.get(flow, [])
        return [data for when, data in own[:-1] if now - when <= KEPT_FOR] + [
            data for _, data in own[-1:]
        ]

    def forget(self, flow: Hashable) -> None:
        """A flow was answered, or is over."""
        for _, data in self._datagrams.pop(flow, ()):
            self.size -= len(data) + KEPT_BESIDE


def _is_one_host(where: Any) -> bool:
    host = ipaddress.ip_address(bare_end(where)[0])
    everybody = str(host) == "255.255.255.255"
    return not (host.is_multicast or host.is_unspecified or everybody)
