"""Connecting to addresses: one socket, one wait, no timer.

Twisted's client endpoints serve any caller: they wrap the protocol to learn
that it is connected, keep a connector to reconnect with, and a timer.  A relay
dials once for each session, notices by itself that its leg is connected, and
has a deadline on its own wheel.  Dialling this way takes a third less.

A name's addresses are tried one after the other, the next one after a quarter
of a second or as soon as one fails, and the first that connects wins (RFC 8305,
'happy eyeballs').
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IWriteDescriptor,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.addresses import address_name, is_loopback, socket_address
from relayd.interfaces import IDial, IDialer
from relayd.resolving import Resolver, SocketAddress
from relayd.transports import connection_class, set_options

if TYPE_CHECKING:
    from twisted.internet.interfaces import ITCPTransport

#: Seconds after which a UNIX socket whose backlog was full is tried again.
RETRY = 0.05

#: Seconds that an address of a name has for itself before the next is tried, too
#: (RFC 8305, section 5).
HEAD_START = 0.25

#: Endpoints that a Dialer remembers.
REMEMBERED = 1024

_numbers = itertools.count(1)


def connect_failure(number: int) -> error.ConnectError:
    """Twisted's error for an errno of connect(2)."""
    made: error.ConnectError = error.getConnectError((number, os.strerror(number)))
    return made


@implementer(IDial, IWriteDescriptor)
class Dial:
    """A socket that is being connected; its connection gets Twisted's transport.

    :param where: the endpoint: what to connect to, and who watches.
    :param build: called with the peer's address for a protocol, or None.
    :param connected: called with the protocol, or else
    :param failed: called with why not.
    """

    _socket: socket.SocketType
    _retry: IDelayedCall | None = None

    def __init__(
        self,
        where: SocketEndpoint,
        build: Callable[[Any], Any],
        connected: Callable[[Any], None],
        failed: Callable[[Failure], None],
    ) -> None:
        self._where = where
        self._build = build
        self._succeed = connected
        self._fail = failed

    def start(self) -> None:
        """See :meth:`IDial.start`."""
        try:
            sock = self._socket = self._where.socket()
        except OSError as problem:
            self._fail(Failure(connect_failure(problem.errno or errno.EMFILE)))
            return
        try:
            self._try()
        except Exception:
            # A bad address, or a kernel that can't watch another socket.
            sock.close()
            self._fail(Failure())

    def _try(self) -> None:
        where = self._where
        problem = self._socket.connect_ex(where.address)
        if problem == errno.EINPROGRESS and where.is_near:
            # The kernel answers itself, but looks at the answer on its way out of the
            # call.  Asked again it says that the connection stands, or is refused; and
            # EALREADY if the server's backlog is full.
            problem = self._socket.connect_ex(where.address)
            if problem == errno.EALREADY:
                problem = errno.EINPROGRESS
        if problem == errno.EINPROGRESS:
            self._watch()
        elif problem == errno.EAGAIN:
            # Only a UNIX socket says this: the server's backlog is full.
            self._retry = where.reactor.callLater(RETRY, self._try)
        elif problem:
            self._failed(problem)
        else:
            self._connected()

    # -- what depends on the kind of transport

    def _watch(self) -> None:
        """Have :meth:`doWrite` called when the connection stands, or failed."""
        self._where.reactor.addWriter(self)

    def _unwatch(self) -> None:
        self._where.reactor.removeWriter(self)

    def _close(self) -> None:
        # Not now: an event for this descriptor may be waiting in the batch that
        # the reactor is working through, for whoever gets its number next.
        self._where.reactor.callLater(0, self._socket.close)

    def _transport(self, protocol: IProtocol) -> ITCPTransport:
        """A transport for the connection, which reads from now on."""
        where = self._where
        made = connection_class(where.family)
        return made(
            self._socket, protocol, where.address, None, next(_numbers), where.reactor
        )

    # -- IWriteDescriptor

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "relayd dial"

    def doWrite(self) -> None:
        self._unwatch()
        problem = self._problem()
        if problem is None or problem == errno.EAGAIN:
            self._connected()
        else:
            self._failed(problem)

    def connectionLost(self, reason: Failure) -> None:
        """How some reactors report a failed connect; or the reactor stops."""
        self._unwatch()
        problem = self._problem()
        if problem is None:
            self._connected()
        elif problem in (errno.EAGAIN, errno.ENOTCONN):
            self._failed(errno.ECONNABORTED)
        else:
            self._failed(problem)

    def _problem(self) -> int | None:
        """The errno that a read would fail with; None where there is data, or EOF.

        A server may have sent something and reset by now.  SO_ERROR would take
        the reset away before it can be read behind the data; this does not.
        """
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except OSError as problem:
            return problem.errno
        return None

    # -- outcomes

    def cancel(self) -> None:
        """See :meth:`IDial.cancel`."""
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        self._unwatch()
        self._close()

    def _failed(self, problem: int) -> None:
        self._close()
        self._fail(Failure(connect_failure(problem)))

    def _connected(self) -> None:
        transport: Any = None
        try:
            build = self._build
            protocol = build(self._where.peer)
            if protocol is None:
                raise error.NoProtocol
            transport = self._transport(protocol)
            protocol.makeConnection(transport)
        except Exception:
            if transport is None:
                self._close()
            else:
                transport.abortConnection()
            self._fail(Failure())
        else:
            succeed = self._succeed
            succeed(protocol)


@implementer(IDialer, IStreamClientEndpoint)
class SocketEndpoint:
    """Connects to an address that needs no look-up.

    The factory is asked for a protocol and nothing else: it is not told to
    start or stop, as there is nothing to start for a single connection.

    :param reactor: provides `IReactorFDSet` and `IReactorTime`.
    :param family: AF_INET, AF_INET6 or AF_UNIX.
    :param address: as the socket module has it for that family.
    :cvar dialing: what connects; subclasses may have another.

    :ivar is_near: it is a loopback address.
    :ivar peer: the address as Twisted has it.
    :ivar peer_name: what the log calls it.
    """

    dialing: type[Dial] = Dial

    def __init__(self, reactor: Any, family: int, address: Any) -> None:
        self.reactor = reactor
        self.family = family
        self.address = address
        self.is_near = family != socket.AF_UNIX and is_loopback(address[0])
        self.peer = socket_address(family, address)
        self.peer_name = address_name(self.peer)

    def socket(self) -> socket.SocketType:
        """A new non-blocking socket, with its options set.

        :raises OSError: no descriptor is left.
        """
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        set_options(sock)
        return sock

    def dial(
        self,
        build: Callable[[Any], Any],
        connected: Callable[[Any], None],
        failed: Callable[[Failure], None],
    ) -> Dial:
        """See :meth:`IDialer.dial`."""
        return self.dialing(self, build, connected, failed)

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        done: Deferred[IProtocol] = Deferred(lambda _: dial.cancel())
        dial = self.dial(factory.buildProtocol, done.callback, done.errback)
        dial.start()
        return done


@implementer(IStreamClientEndpoint)
class NameEndpoint:
    """Connects to a name, which is looked up for each connection.

    :param resolver: unless given, the one that the reactor's endpoints share.
    :param endpoint: what dials each of its addresses.
    """

    def __init__(
        self,
        reactor: Any,
        host: str,
        port: int,
        resolver: Resolver | None = None,
        endpoint: type[SocketEndpoint] = SocketEndpoint,
    ) -> None:
        self._reactor = reactor
        self._host, self._port = host, port
        self._resolver = resolver
        self._endpoint = endpoint

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        resolver = self._resolver or Resolver.of(self._reactor)
        return resolver.addresses(self._host, self._port).addCallback(
            lambda found: dial_first(self._reactor, found, factory, self._endpoint)
        )


@implementer(IStreamClientEndpoint)
class AddressesEndpoint:
    """Connects to the first of several addresses that answers.

    :param addresses: at least one, the best first.
    :param endpoint: what dials each.
    """

    def __init__(
        self,
        reactor: Any,
        addresses: Sequence[SocketAddress],
        endpoint: type[SocketEndpoint] = SocketEndpoint,
    ) -> None:
        self._reactor = reactor
        self._addresses = addresses
        self._endpoint = endpoint

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        return dial_first(self._reactor, self._addresses, factory, self._endpoint)


class Dialer:
    """Makes the endpoint for addresses that are known.

    :param endpoint: what dials each of them.
    """

    def __init__(
        self, reactor: Any, endpoint: type[SocketEndpoint] = SocketEndpoint
    ) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        # The same destinations are asked for again and again, and an endpoint is
        # nothing but where it leads.
        self._one = functools.lru_cache(maxsize=REMEMBERED)(self._make)

    def _make(self, family: int, address: Any) -> SocketEndpoint:
        return self._endpoint(self._reactor, family, address)

    def __call__(self, addresses: Sequence[SocketAddress]) -> IStreamClientEndpoint:
        """What connects to the first of them that answers.

        :param addresses: at least one, the best first.
        """
        if len(addresses) == 1:
            return self._one(*addresses[0])
        return AddressesEndpoint(self._reactor, addresses, self._endpoint)


def dial_first(
    reactor: Any,
    addresses: Sequence[SocketAddress],
    factory: IProtocolFactory,
    endpoint: type[SocketEndpoint] = SocketEndpoint,
) -> Deferred[IProtocol]:
    """Connect to the first of `addresses` that answers.

    :param addresses: at least one, the best first.
    :param endpoint: what dials each.
    :return: fires with the protocol, or fails as the last of them did.
    """
    race = _Race(reactor, addresses, factory, endpoint)
    race.next()
    return race.done


class _Race:
    """Dials that started one after the other; the first to connect wins."""

    def __init__(
        self,
        reactor: Any,
        addresses: Sequence[SocketAddress],
        factory: IProtocolFactory,
        endpoint: type[SocketEndpoint],
    ) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        self._left = list(reversed(addresses))
        self._factory = factory
        self._dials: list[Deferred[IProtocol]] = []
        self._timer: IDelayedCall | None = None
        self.done: Deferred[IProtocol] = Deferred(lambda _: self._stop())

    def next(self) -> None:
        self._timer = None
        endpoint = self._endpoint(self._reactor, *self._left.pop())
        if self._left:
            self._timer = self._reactor.callLater(HEAD_START, self.next)
        dial = endpoint.connect(self._factory)
        self._dials.append(dial)
        dial.addCallbacks(self._won, self._lost, errbackArgs=(dial,))

    def _won(self, protocol: IProtocol) -> None:
        self._stop()
        self.done.callback(protocol)

    def _lost(self, reason: Failure, dial: Deferred[IProtocol]) -> None:
        if dial not in self._dials:
            return  # cancelled by us
        self._dials.remove(dial)
        if self._left:
            if self._timer is not None:
                self._timer.cancel()
            self.next()
        elif not self._dials:
            self.done.errback(reason)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._left.clear()
        dials, self._dials = self._dials, []
        for dial in dials:
            dial.cancel()
