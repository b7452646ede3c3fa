"""Listening for datagrams: an endpoint whose factory is a relay.

With these a service treats a :class:`relayd.datagrams.relay.DatagramRelay` as it does
Twisted's endpoints and factories for streams.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relayd.core.addresses import numeric_host
from relayd.core.names import host_port
from relayd.datagrams.listener import DatagramListener
from relayd.datagrams.relay import DatagramRelay
from relayd.datagrams.sockets import bound_socket, cannot_listen
from relayd.net.binding import bind_all, hosts_of
from relayd.net.listener import Listeners
from relayd.net.listening import adopt_all


@implementer(IListeningPort)
class UdpPort:
    """One of the addresses that a relay listens on."""

    def __init__(self, relay: DatagramRelay, listener: DatagramListener) -> None:
        self._relay = relay
        self._listener = listener
        address = listener.address
        kind = IPv6Address if ":" in address[0] else IPv4Address
        # With its scope, which a link-local address needs.
        self._address = kind("UDP", numeric_host(address), address[1])

    def startListening(self) -> None:
        """It listens already."""

    def stopListening(self) -> Deferred[None]:
        """Close all addresses of the relay; if it drains, when that is done."""
        if self._relay.draining:
            return self._relay.drain()
        self._relay.close()
        return succeed(None)

    def hold(self) -> None:
        """Give no client a flow for now: new ones of all addresses wait."""
        self._relay.hold(True)

    def release(self) -> None:
        """Serve those that have waited, and others."""
        self._relay.hold(False)

    def retire(self) -> None:
        """Admit no new client; close once the flows of this address have ended."""
        self._relay.retire([self._listener])

    @property
    def is_open(self) -> bool:
        """Whether it holds the address."""
        return not self._listener.closed

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs it: it has no flow, and no client waits for one."""
        return not (self._listener.flows or self._relay.standby)

    @property
    def is_given_away(self) -> bool:
        """Whether another relay has got a copy of the socket."""
        return self._listener.deaf

    def return_to_service(self) -> None:
        """Admit clients again.

        :raises OSError: the kernel can't watch the socket.
        """
        self._listener.retired = False
        self._listener.read_again()

    @property
    def descriptor(self) -> int:
        """Of its socket, to be duplicated for another relay."""
        return int(self._listener.sock.fileno())

    def give_away(self) -> None:
        """Another relay has a copy of the socket, and gets the clients.

        This one reads it no more, and admits no client; its flows send replies still.
        """
        self._listener.stop_reading()

    def getHost(self) -> IAddress:
        """The address that it listens on."""
        return self._address


@implementer(IStreamServerEndpoint)
class UdpListener:
    """Opens the sockets that a relay's clients send to.

    :param host: an address, a name (looked up once, when listening starts; all its
        addresses are used), or None for all addresses of this machine.
    :param port: 0 picks a free port.
    """

    def __init__(self, host: str | None, port: int) -> None:
        self._host, self._port = host, port
        self.where = host_port(host, port) if host else str(port)

    def bind(self) -> Sequence[Any]:
        """Its sockets, bound; they do not block.

        :raises OSError: one can't be bound.
        """
        hosts = hosts_of(self._host, self._port, socket.SOCK_DGRAM)
        return bind_all(hosts, self._port, bound_socket)

    def listen(self, relay: Any) -> Deferred[IListeningPort]:
        """Open them, and let a :class:`DatagramRelay` serve them.

        :raises ListenError: through the Deferred.
        """
        sockets: list[Any] = []
        try:
            sockets += self.bind()
            listeners = relay.listen(sockets)
        except OSError as problem:
            for sock in sockets:
                sock.close()
            return fail(cannot_listen(self.where, problem))
        ports = [UdpPort(relay, each) for each in listeners]
        listening: Any = ports[0] if len(ports) == 1 else Listeners(ports)
        return succeed(listening)


class AdoptedUdpListener(UdpListener):
    """Listens on datagram sockets that are bound already.

    :param descriptors: the sockets'; they are duplicated, so that they stay the
        caller's to close, and the listener can be used again.
    :param name: what an error calls them, with `udp:` before it.
    """

    def __init__(self, descriptors: Sequence[int], name: str) -> None:
        super().__init__(None, 0)
        self.where = name.removeprefix("udp:")
        self._descriptors = descriptors

    def bind(self) -> Sequence[Any]:
        adopted = adopt_all(self._descriptors)
        for sock in adopted:
            sock.setblocking(False)
        # The C class: Python's wrapper of it costs more than the system call.
        return [socket.SocketType(fileno=sock.detach()) for sock in adopted]
