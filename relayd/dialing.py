"""Connecting to addresses: one socket, one wait, no timer.

Twisted's client endpoints serve any caller: they wrap the protocol to learn
that it is connected, keep a connector to reconnect with, and a timer.  A relay
dials once for each session, notices by itself that its leg is connected, and
has a deadline on its own wheel.  Dialling this way takes a third less.

Names are left to Twisted's HostnameEndpoint, which looks them up and tries
their addresses in the order of RFC 8305.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from typing import Any

from twisted.internet import error
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import (
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IWriteDescriptor,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.addresses import socket_address
from relayd.transports import connection_class, set_options

#: Seconds after which a UNIX socket whose backlog was full is tried again.
RETRY = 0.05

_numbers = itertools.count(1)


def _failure(number: int) -> error.ConnectError:
    """Twisted's error for an errno of connect(2)."""
    made: error.ConnectError = error.getConnectError((number, os.strerror(number)))
    return made


@implementer(IStreamClientEndpoint)
class SocketEndpoint:
    """Connects to an address that needs no look-up.

    The factory is asked for a protocol and nothing else: it is not told to
    start or stop, as there is nothing to start for a single connection.

    :param reactor: provides `IReactorFDSet` and `IReactorTime`.
    :param family: AF_INET, AF_INET6 or AF_UNIX.
    :param address: as the socket module has it for that family.
    """

    def __init__(self, reactor: Any, family: int, address: Any) -> None:
        self._reactor = reactor
        self._family = family
        self._address = address

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError as problem:
            return fail(_failure(problem.errno or errno.EMFILE))
        sock.setblocking(False)
        set_options(sock)
        dial = _Dial(self._reactor, self._family, sock, self._address, factory)
        dial.start()
        return dial.done


@implementer(IWriteDescriptor)
class _Dial:
    """A socket that is being connected."""

    def __init__(
        self,
        reactor: Any,
        family: int,
        sock: socket.socket,
        address: Any,
        factory: IProtocolFactory,
    ) -> None:
        self._reactor = reactor
        self._family = family
        self._socket = sock
        self._address = address
        self._factory = factory
        self._retry: IDelayedCall | None = None
        self.done: Deferred[IProtocol] = Deferred(self._cancelled)

    def start(self) -> None:
        self._retry = None
        problem = self._socket.connect_ex(self._address)
        if problem == errno.EINPROGRESS:
            self._reactor.addWriter(self)
        elif problem == errno.EAGAIN:
            # Only a UNIX socket says this: the server's backlog is full.
            self._retry = self._reactor.callLater(RETRY, self.start)
        elif problem:
            self._failed(problem)
        else:
            self._connected()

    # -- IWriteDescriptor

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "relayd dial"

    def doWrite(self) -> None:
        self._reactor.removeWriter(self)
        problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            self._failed(problem)
        else:
            self._connected()

    def connectionLost(self, reason: Failure) -> None:
        """How some reactors report a failed connect; or the reactor stops."""
        self._reactor.removeWriter(self)
        problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._failed(problem or errno.ECONNABORTED)

    # -- outcomes

    def _cancelled(self, _: Deferred[IProtocol]) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._reactor.removeWriter(self)
        self._socket.close()

    def _failed(self, problem: int) -> None:
        self._socket.close()
        self.done.errback(Failure(_failure(problem)))

    def _connected(self) -> None:
        try:
            address, sock = self._address, self._socket
            protocol = self._factory.buildProtocol(socket_address(self._family, address))
            if protocol is None:
                raise error.NoProtocol()
            made = connection_class(self._family)
            protocol.makeConnection(
                made(sock, protocol, address, None, next(_numbers), self._reactor)
            )
        except Exception:
            self._socket.close()
            self.done.errback(Failure())
        else:
            self.done.callback(protocol)
