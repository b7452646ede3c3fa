"""Datagrams that are relayed from their clients' addresses lose a hop, as at a router.

A flow that is transparent sends what its client has sent, from there to where it was
sent.  If a router brings that back to the gateway, rules bring it to the relay again,
where it looks like the client's next datagram.  Sent anew, with all the hops of a new
datagram, it would go round for ever.  So its IP_TTL (IPv6: hop limit) goes with it, one
less each time (RFC 1812, 5.3.1): what goes round ends, as between routers.

The kernel says with each datagram how many hops it had left (IP_RECVTTL, ip(7);
IPV6_RECVHOPLIMIT, RFC 3542).  A flow's socket is told when that changes, which for a
client's datagrams is seldom.  The first of a flow is sent as any new datagram.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from twisted.logger import Logger

from relayd.core.flows import Counters
from relayd.datagrams.transparent import PlacedSocket
from relayd.net.log_throttle import LogThrottle

log = Logger(namespace="relayd.datagrams")

_IP, _IP6 = int(socket.IPPROTO_IP), int(socket.IPPROTO_IPV6)

#: ip(7), and linux/in6.h: to be told with each datagram; the type of that message; and
#: what is sent.
_RECVTTL, _TTL = (_IP, 12), (_IP, 2)
_RECVHOPLIMIT, _HOPLIMIT, _UNICAST_HOPS = (_IP6, 51), (_IP6, 52), (_IP6, 16)

#: Bytes of that message, and where the number is in it.
SPACE, NUMBER_AT = socket.CMSG_SPACE(4), socket.CMSG_LEN(0)

#: Where the kernel has not told.
UNKNOWN = -1

#: What a datagram has left that no router would pass on.
LAST = 1


def ask_for_hops(sock: Any) -> None:
    """Have the kernel say with each datagram how many hops it had left.

    :raises OSError: it does not.
    """
    v6 = sock.family == socket.AF_INET6
    sock.setsockopt(*(_RECVHOPLIMIT if v6 else _RECVTTL), 1)


def hops_in(level: int, kind: int) -> bool:
    """Whether an ancillary message of this level and type says that."""
    return (level, kind) in (_TTL, _HOPLIMIT)


class Ageing:
    """What a listener receives by, of which the hops are passed on.

    :param receiver: receives; has the hops of its last batch in `hops`.
    :param flows: of the listener, by key.
    :param counters: of the relay.
    :param throttle: of the log.
    """

    def __init__(
        self,
        receiver: Any,
        flows: Mapping[Any, Any],
        counters: Counters,
        throttle: LogThrottle,
    ) -> None:
        self._receiver = receiver
        self._flows = flows
        self._counters = counters
        self._throttle = throttle
        self.origin = receiver.origin

    @property
    def drained(self) -> bool:
        """See :class:`relayd.datagrams.batches.OneByOne`."""
        return bool(self._receiver.drained)

    @property
    def refusal(self) -> OSError | None:
        """See :class:`relayd.datagrams.batches.OneByOne`."""
        refusal: OSError | None = self._receiver.refusal
        return refusal

    def receive(self) -> list[tuple[Any, Any]]:
        """A batch, without what has gone round until no hop is left."""
        batch: list[tuple[Any, Any]] = self._receiver.receive()
        hops: Sequence[int] = self._receiver.hops
        known = self._flows.get
        # The fewest of a flow in this batch: none is sent with more than it had.
        fewest: dict[PlacedSocket, int] = {}
        spent = set()
        for number, ((_, key), left) in enumerate(zip(batch, hops, strict=True)):
            flow = known(key)
            if flow is None or left == UNKNOWN:
                continue
            sock = flow.sock
            if type(sock) is not PlacedSocket:
                # Not from its client's address: it can't come back as that.
                continue
            if left <= LAST:
                spent.add(number)
            elif left < fewest.get(sock, 256):
                fewest[sock] = left
        for sock, left in fewest.items():
            if left != sock.hops:
                _send_with(sock, left - 1)
                sock.hops = left
        if not spent:
            return batch
        self._drop(len(spent))
        return [each for number, each in enumerate(batch) if number not in spent]

    def _drop(self, count: int) -> None:
        """So many may go no further."""
        self._counters.received += count
        self._counters.dropped["loop"] += count
        if self._throttle.is_due():
            log.warn(
                "datagrams have no hops left, as if they went round between this"
                " machine and a router: they are dropped ({count} for a loop so far)",
                count=self._counters.dropped["loop"],
            )


def _send_with(sock: PlacedSocket, hops: int) -> None:
    """Have a socket send datagrams with so many hops."""
    option = _UNICAST_HOPS if sock.family == socket.AF_INET6 else _TTL
    sock.setsockopt(*option, hops)
