"""Each datagram to the next server: for protocols without answers, such as syslog.

A flow has a socket that is connected to nobody, or one for each family of addresses and
way of dialling: what it sends goes to whichever server is next.  A server that does not
take part any more, as checks find it down, gets no more datagrams at once; nor does one
that its relay has no more, after a change of its settings.  A refusal
(ICMP) is not heard, and whatever comes back is dropped, as `one_way`: nobody knows who
sent it.

A flow opens its other sockets when it first needs them.  Where there is no descriptor
for one, the flow that was idle longest is ended, as for a new flow; if there is no
other, the datagram is dropped.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from relayd.core.flows import Counters, NewFlow
from relayd.core.names import is_name
from relayd.datagrams.dialing import Connected, FlowDialer, Served
from relayd.datagrams.interfaces import Ends
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.refusals import SHORTAGE
from relayd.datagrams.servers import Server, ServerPool
from relayd.net.dial_options import DialOptions, family_of

#: The reason for which replies are dropped.
ONE_WAY = "one_way"


class Everyone(Server):
    """What the flows of such a relay have for a server: none of them, in particular."""

    def __init__(self) -> None:
        super().__init__("0.0.0.0", 0)
        self.name = "each-in-turn"


class Turn:
    """What a selector is asked about: a datagram of a client."""

    __slots__ = ("client", "ordinal")

    def __init__(self, client: str = "", ordinal: int = 0) -> None:
        self.client = client
        self.ordinal = ordinal


class SpreadSocket:
    """What a flow takes for a socket that is connected to a server.

    :param first: its first socket is one for this server.
    :param open_for: opens one for a server, of a family.
    :param choose: the next server; None if there is none.
    :param shed: ends another flow, so that this one can have one more socket; whether
        it has.
    """

    def __init__(
        self,
        first: Server,
        open_for: Callable[[Server, int], Any],
        choose: Callable[[], Server | None],
        shed: Callable[[], bool],
        counters: Counters,
    ) -> None:
        self._open_for = open_for
        self._choose = choose
        self._shed = shed
        self._counters = counters
        #: By family, and what is set on it.
        self._sockets: dict[tuple[int, DialOptions | None], Any] = {}
        family = first.address[0] if first.address else socket.AF_INET
        self._first = self._of(first, family)
        self.fileno = self._first.fileno
        self.getsockname = self._first.getsockname
        self.getsockopt = self._first.getsockopt

    def _of(self, server: Server, family: int) -> Any:
        kind = family, server.dialing
        sock = self._sockets.get(kind)
        if sock is None:
            sock = self._open(server, family)
            if not sock.getsockname()[1]:
                # For the log.  A source address has been bound, and gets its port
                # later.
                with suppress(OSError):
                    sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
            if self._sockets:
                # Nobody reads this one.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            self._sockets[kind] = sock
        return sock

    def _open(self, server: Server, family: int) -> Any:
        if not self._sockets:
            # Of a new flow: whoever opens it sees to that.
            return self._open_for(server, family)
        self._check_open()
        try:
            return self._open_for(server, family)
        except OSError as problem:
            if problem.errno not in SHORTAGE or not self._shed():
                raise
        # An observer that was notified of a flow's end may have ended this one.
        self._check_open()
        return self._open_for(server, family)

    def _check_open(self) -> None:
        """Nobody would close what is opened for a flow that has ended.

        :raises OSError: it has.
        """
        if self.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def send(self, data: bytes) -> int:
        """Send a datagram to the next server.

        :raises OSError: it can't be sent; EADDRNOTAVAIL: there is no server.
        """
        server = self._choose()
        if server is None or server.address is None:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        family, where = server.address
        sent: int = self._of(server, family).sendto(data, where)
        return sent

    def sendmsg(self, run: Sequence[bytes], extra: Any) -> int:
        """A run has no single destination.

        :raises OSError: always: each is sent alone.
        """
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def recv(self, size: int) -> bytes:
        """Drop what is there, a batch at most.

        :raises BlockingIOError: always: there is nothing to pass on.
        """
        counters, recv = self._counters, self._first.recv
        for _ in range(BATCH):
            recv(size)
            counters.replies_received += 1
            counters.replies_dropped[ONE_WAY] += 1
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def recv_into(self, buffer: Any) -> int:
        """As :meth:`recv`."""
        return len(self.recv(len(buffer)))

    def close(self) -> None:
        """Close its sockets."""
        for each in self._sockets.values():
            each.close()


class SpreadDialer(FlowDialer):
    """Opens the sockets of flows whose datagrams go to one server after the other.

    :param pool: the servers.
    :param open_socket: opens a non-blocking datagram socket of a family.
    """

    def __init__(
        self,
        pool: ServerPool,
        open_socket: Callable[[int], Any],
        dialing: DialOptions | None = None,
    ) -> None:
        super().__init__(pool, open_socket, 0, dialing)
        if self._transparent or not all(each.judged for each in pool.servers):
            raise ValueError(
                "udp_balance datagram sends from the relay's own address, to servers"
                " that are known: neither transparent nor original goes with it"
            )
        self._everyone = Everyone()

    def serve(self, relay: Served) -> None:
        super().serve(relay)
        self._relay = relay

    def dial_any(
        self,
        server: Server,
        ends: Ends,
        asked: NewFlow | None = None,
        tried: Sequence[Server] = (),
    ) -> Connected:
        """A socket for all servers.

        :param server: gets the first datagram; the socket has its family.
        :param ends: of the flow, for which others may have to end.
        :raises OSError: no socket can be opened.
        """
        address: Any = server.address
        turn = Turn() if asked is None else Turn(asked.client, asked.ordinal)
        # Whose pool is another one after a change of settings.
        relay = self._relay
        first = [server]

        def choose() -> Server | None:
            if first:
                return first.pop()
            turn.ordinal += 1
            return relay.pool.choose(turn)

        shed = partial(self.shed, ends)
        sock = SpreadSocket(server, self.open_for, choose, shed, relay.counters)
        return Connected(self._everyone, sock, sock.getsockname(), [address])


def sockets_to(places: Iterable[tuple[str | None, DialOptions | None]]) -> int:
    """How many sockets a flow can have, at most: one for each family and way of
    dialling.

    :param places: of each server, its host, and how it is dialled; None for a host that
        is not known.  A name may have addresses of both families.
    """
    kinds: set[tuple[int, DialOptions | None]] = set()
    for host, dialing in places:
        if host is None or is_name(host):
            kinds |= {(socket.AF_INET, dialing), (socket.AF_INET6, dialing)}
        else:
            kinds.add((family_of(host), dialing))
    return max(1, len(kinds))
