"""Listening for datagrams: an endpoint whose factory is a relay.

Streams have Twisted's endpoints and factories; these let a service treat a
:class:`relayd.udp_nat.UdpNat` as one of those.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relayd.addresses import numeric_host
from relayd.errors import ListenError
from relayd.listening import Listeners
from relayd.udp_nat import UdpNat
from relayd.udp_sockets import bind_udp

#: The errors of an address family that this machine does not have.
_LACKS = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


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
