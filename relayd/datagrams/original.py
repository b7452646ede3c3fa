"""Servers that each flow finds for itself: where its client meant to go.

The kernel has brought a client's datagrams to a listener of this machine (TPROXY), and
told the listener what their destination was
(:mod:`relayd.datagrams.original_listener`).  An :class:`OriginalServer` stands in a
relay's list of servers, or in its pool, for all of these destinations: a flow that gets
it goes to that of its own client.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from relayd.core.addresses import socket_name
from relayd.core.names import name_of_original
from relayd.datagrams.servers import Server, is_one_host
from relayd.net.dial_options import DialOptions
from relayd.net.resolving import SocketAddress


class _NoSocket:
    """What replies leave by when their flow is over: by nothing."""

    def sendmsg(self, *_: Any) -> None:
        """As a closed socket does.

        :raises OSError: EBADF, always.
        """
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


NO_SOCKET = _NoSocket()


class Meant:
    """Where a client's datagrams come from, and where they were to go.

    A flow of a redirected client has this for where to reply to.

    :ivar source: the client's socket address.
    :ivar original: that of the destination.
    :ivar sock: what replies leave by, :data:`NO_SOCKET` while there is no flow; and
        `extra`, what `sendmsg` is told with them.
    """

    __slots__ = ("extra", "original", "sock", "source")

    def __init__(self, source: Any, original: Any) -> None:
        self.source = source
        self.original = original
        self.sock: Any = NO_SOCKET
        self.extra: list[Any] = []


class OriginalServer(Server):
    """Where the client of each flow meant to go.

    :param host: an address: that host, on the port that the client asked for; unless
        given, the host is the client's choice as well.
    :param preamble: see :class:`~relayd.datagrams.servers.Server`; so the others.
    :raises OSError: an IPv6 address has an interface that this machine lacks.
    :raises ValueError: the host is a name.
    """

    #: Its clients choose where it leads.
    judged = False

    def __init__(
        self,
        host: str | None = None,
        preamble: Any = None,
        dialing: DialOptions | None = None,
    ) -> None:
        super().__init__(host or "0.0.0.0", 0, preamble, dialing)
        if self.named:
            raise ValueError(f"original takes an address, not the name {host!r}")
        self._at = self.address if host else None
        # It leads to no address that others could be compared with.
        self.addresses = []
        self.name = name_of_original(host)

    @property
    def end(self) -> None:
        """It has no address of its own."""

    def at(self, ends: Any) -> SocketAddress:
        """See :meth:`relayd.datagrams.servers.Server.at`.

        :raises OSError: EDESTADDRREQ: the listener was not told where the client meant
            to go; EADDRNOTAVAIL: it meant no host.
        """
        meant = ends[1][2]
        if not isinstance(meant, Meant):
            raise OSError(
                errno.EDESTADDRREQ,
                f"{self.name}: its listener is not told where clients mean to go",
            )
        where = meant.original
        if self._at is not None:
            family, (host, _, *rest) = self._at
            return family, (host, where[1], *rest)
        if not where[1] or not is_one_host(where):
            raise OSError(
                errno.EADDRNOTAVAIL, f"{socket_name(where)} is no destination"
            )
        return (socket.AF_INET if len(where) == 2 else socket.AF_INET6), where

    def has(self, address: SocketAddress) -> bool:
        """Every flow's address is its own, and stays that."""
        return True

    def name_at(self, address: SocketAddress) -> str:
        """The address that a flow has gone to."""
        return socket_name(address[1])
