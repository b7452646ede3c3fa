"""Listening and dialling on the plane, as Twisted endpoints.

They are those of :mod:`relayd.net.listening` and :mod:`relayd.net.dialing` with the
plane in the reactor's place: it watches the sockets, and its transports are what
protocols get.  An accepted or dialled socket is registered with the kernel once,
for the rest of its life.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
)
from twisted.logger import Logger

from relayd.core.interfaces import ICaller, INamedClients
from relayd.net.dialing import Dial, SocketEndpoint
from relayd.net.listener import ACCEPTS_PER_TURN, Listener
from relayd.net.listening import (
    AdoptedListenerEndpoint,
    TCPListenerEndpoint,
    UNIXListenerEndpoint,
)
from relayd.net.transports import set_options
from relayd.plane.connection_base import EDGE_BOTH, EDGE_READ
from relayd.plane.poller import Plane
from relayd.plane.transport import (
    PlaneTransport,
    named_address,
    transport_class,
)

log = Logger(namespace="relayd.plane")

# The C class: Python's wrapper of it costs more than the system call.
_SOCKET, _STREAM = socket.SocketType, int(socket.SOCK_STREAM)

_NEW = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

_IPV4 = int(socket.AF_INET)

_ERROR = select.EPOLLERR | select.EPOLLHUP

#: struct tcp_info, linux/tcp.h, up to tcpi_unacked: of a listening socket that is the
#: number of clients that wait to be accepted.
_TCP, _TCP_INFO = int(socket.IPPROTO_TCP), int(getattr(socket, "TCP_INFO", 11))
_BACKLOG = struct.Struct("24xI")


class PlaneListener(Listener):
    """A listener on the plane."""

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        factory: IProtocolFactory,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(reactor, sock, factory, on_closed)
        self._plane = Plane.of(reactor)
        self._made = transport_class(self._family)

    def ready(self, mask: int) -> None:
        """Clients wait.  Reported again until all are accepted."""
        try:
            self.doRead()
        except Exception as problem:
            # An exception that left this method would close the listener for good.
            log.failure("a client could not be accepted")
            self._pause(repr(problem), short=False)

    def _watch(self) -> None:
        self._plane.watch(self.fileno(), self, select.EPOLLIN)

    def _unwatch(self) -> None:
        self._plane.unwatch(self.fileno())

    def _waiting(self) -> int:
        # An accept(2) that finds nobody makes a socket all the same, which takes ten
        # times as long as this.
        try:
            info = self._socket.getsockopt(_TCP, _TCP_INFO, _BACKLOG.size)
            return int(_BACKLOG.unpack(info)[0])
        except (OSError, struct.error):
            # A UNIX socket, or a sandbox.
            return ACCEPTS_PER_TURN

    def _accept(self) -> tuple[socket.SocketType, Any]:
        # socket.accept() without its wrapper of the C class.
        descriptor, address = self._socket._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        sock = _SOCKET(self._family, _STREAM, 0, descriptor)
        sock.setblocking(False)
        if self._family == _IPV4:
            # As text, which a session and its transport can share.
            address = f"{address[0]}:{address[1]}"
        return sock, address

    def _accept_plainly(self) -> tuple[socket.SocketType, Any]:
        sock, address = super()._accept_plainly()
        if self._family == _IPV4:
            address = f"{address[0]}:{address[1]}"
        return sock, address

    def _builder(self) -> Callable[[Any], IProtocol | None]:
        named = INamedClients(self._factory, None)
        if named is not None and self._family == _IPV4 and named.takes_names():
            build: Callable[[Any], IProtocol | None] = named.build_named
            return build
        return super()._builder()

    def _build_addressed(self, address: Any) -> IProtocol | None:
        if isinstance(address, str) and self._family == _IPV4:
            return self._factory.buildProtocol(named_address(address))
        return super()._build_addressed(address)

    def _transport(
        self, sock: socket.SocketType, protocol: IProtocol, address: Any
    ) -> PlaneTransport:
        plane, made = self._plane, self._made
        transport = made(plane, sock, protocol, address, self._local)
        plane.watch(sock.fileno(), transport, EDGE_READ)
        return transport


class PlaneDial(Dial):
    """A dial on the plane."""

    _where: PlaneSocketEndpoint
    _watching = False
    _mask = 0

    def ready(self, mask: int) -> None:
        """The dial has succeeded or failed."""
        self._mask = mask
        if not mask & _ERROR:
            self._connected()
        elif mask & select.EPOLLOUT:
            self.doWrite()
        else:
            # It is not connected yet: it goes on, unless somebody has said why not.
            problem = self.told_on_the_way()
            if problem is not None:
                self._failed(problem)

    def _watch(self) -> None:
        self._where.plane.watch(self._socket.fileno(), self, EDGE_BOTH)
        self._watching = True

    def _unwatch(self) -> None:
        """The transport takes the descriptor over, or `close` gives it up."""

    def close(self) -> None:
        self._where.plane.unwatch_and_close(self._socket)

    def transport(self, protocol: IProtocol) -> PlaneTransport:
        if not self._watching:
            return self._where.transport(self._socket, protocol)
        where = self._where
        transport = where.made(where.plane, self._socket, protocol, where.peer, None)
        transport.take_over(self._mask)
        return transport


class PlaneSocketEndpoint(SocketEndpoint):
    """Connects to an address that needs no look-up, on the plane."""

    dialing = PlaneDial

    def __init__(self, reactor: Any, family: int, address: Any) -> None:
        super().__init__(reactor, family, address)
        self.plane = Plane.of(reactor)
        self.made = transport_class(family)

    def open_socket(self, caller: ICaller) -> socket.SocketType:
        sock = _SOCKET(self.family, _NEW)
        set_options(sock)
        return sock

    def transport(self, sock: socket.SocketType, protocol: IProtocol) -> PlaneTransport:
        plane, made = self.plane, self.made
        transport = made(plane, sock, protocol, self.peer, None)
        plane.watch(sock.fileno(), transport, EDGE_READ)
        return transport


class PlaneTCPListenerEndpoint(TCPListenerEndpoint):
    """Listens on a host and port, on the plane."""

    listener = PlaneListener


class PlaneUNIXListenerEndpoint(UNIXListenerEndpoint):
    """Listens on a UNIX socket, on the plane."""

    listener = PlaneListener


class PlaneAdoptedListenerEndpoint(AdoptedListenerEndpoint):
    """Listens on sockets that listen already, on the plane."""

    listener = PlaneListener
