"""Server endpoints for hosts and ports, for UNIX sockets, and for sockets passed on.

Sockets are bound in :mod:`relayd.net.binding`.  :mod:`relayd.net.listener`
accepts clients, and pauses while the descriptor table is full.
:mod:`relayd.plane.endpoints` has subclasses with the plane's transports.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import (
    Deferred,
    fail,
    succeed,
)
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relayd.core.errors import ListenError
from relayd.core.names import host_port
from relayd.net.binding import (
    FOR_ALL,
    bind_all,
    bind_tcp,
    bind_unix,
    hosts_of,
    unlink_own,
)
from relayd.net.listener import Listener, Listeners


class ListenerEndpoint:
    """Listens on the sockets of :meth:`bind`; errors name :attr:`where`.

    :cvar listener: the class that accepts clients; a subclass may set another.
    """

    where: str
    listener: type[Listener] = Listener

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        """Listening sockets, each with a callback for when it is closed."""
        raise NotImplementedError

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """:raises ListenError: through the Deferred."""
        try:
            bound = self.bind()
        except OSError as problem:
            why = problem.strerror or str(problem)
            return fail(ListenError(f"can't listen on {self.where}: {why}"))
        ports = [
            self.listener(self._reactor, sock, factory, on_closed)
            for sock, on_closed in bound
        ]
        listening = ports[0] if len(ports) == 1 else Listeners(ports)
        try:
            listening.startListening()
        except OSError as problem:
            # No descriptor or no memory is left to watch it.
            for port in ports:
                port.stopListening()
            why = problem.strerror or str(problem)
            return fail(ListenError(f"can't listen on {self.where}: {why}"))
        return succeed(listening)


@implementer(IStreamServerEndpoint)
class TCPListenerEndpoint(ListenerEndpoint):
    """Listens on a host and port.

    :param host: an address, a name (looked up once, when listening starts; all its
        addresses are used), or None for all addresses of this machine, IPv4 and IPv6.
    :param port: 0 picks a free port.
    :param backlog: how many clients may wait in the kernel's queue.
    """

    def __init__(self, reactor: Any, host: str | None, port: int, backlog: int) -> None:
        super().__init__(reactor)
        self._host, self._port, self._backlog = host, port, backlog
        self.where = host_port(host, port) if host else f"port {port} of all addresses"

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        hosts = hosts_of(self._host, self._port, socket.SOCK_STREAM)
        bound = bind_all(
            hosts, self._port, lambda host, port: bind_tcp(host, port, self._backlog)
        )
        return [(sock, _nothing) for sock in bound]


@implementer(IStreamServerEndpoint)
class UNIXListenerEndpoint(ListenerEndpoint):
    """Listens on a UNIX socket; makes its file, and removes it when it stops.

    A stale socket file, which has no listener any more, is replaced.

    :param mode: of the file.
    """

    def __init__(
        self, reactor: Any, path: str, backlog: int, mode: int = FOR_ALL
    ) -> None:
        super().__init__(reactor)
        self._path, self._backlog, self._mode = path, backlog, mode
        self.where = f"unix:{path}"

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        sock = bind_unix(self._path, self._backlog, self._mode)
        return [(sock, unlink_own(self._path, os.stat(self._path)))]


@implementer(IStreamServerEndpoint)
class AdoptedListenerEndpoint(ListenerEndpoint):
    """Listens on sockets that listen already.

    :param descriptors: the sockets'; they are duplicated, so that they stay the
        caller's to close, and the endpoint can be used again.
    :param where: what an error calls them.
    """

    def __init__(
        self, reactor: Any, descriptors: Sequence[int], where: str = ""
    ) -> None:
        super().__init__(reactor)
        self._descriptors = descriptors
        self.where = where or f"descriptor {', '.join(map(str, descriptors))}"

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        adopted = adopt_all(self._descriptors)
        for sock in adopted:
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                for each in adopted:
                    each.close()
                raise OSError(errno.EINVAL, "it is a socket that does not listen")
        return [(sock, _nothing) for sock in adopted]


def adopt_all(descriptors: Sequence[int]) -> list[socket.socket]:
    """Sockets of one's own that share what these descriptors have.

    :raises OSError: one of them is no socket; then there are none.
    """
    adopted: list[socket.socket] = []
    for descriptor in descriptors:
        duplicate = -1
        try:
            duplicate = os.dup(descriptor)
            adopted.append(socket.socket(fileno=duplicate))
        except OSError:
            for sock in adopted:
                sock.close()
            if duplicate >= 0:
                os.close(duplicate)
            raise
    return adopted


def _nothing() -> None:
    """A TCP socket leaves nothing to remove; an adopted one's file is its owner's."""
