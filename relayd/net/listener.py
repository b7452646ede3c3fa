"""A listening socket: accepts clients, and pauses when descriptors run out.

Twisted's listening port, when the process has no descriptor left, accepts the
waiting clients and closes each at once, with a log line for each.  This one
stops accepting for a moment, so that they stay in the kernel's queue and are
served when a session ends (:mod:`relayd.net.descriptors`).  A factory that can
shed clients (:class:`relayd.core.interfaces.IShedsClients`) is asked to.

Accepted connections get Twisted's own transports; only accept is ours.
:mod:`relayd.plane.endpoints` has a subclass with the plane's transports.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import (
    Deferred,
    gatherResults,
    maybeDeferred,
    succeed,
)
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IListeningPort,
    IProtocolFactory,
    IReadDescriptor,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.addresses import address_name, socket_address
from relayd.core.hops import file_of, streams
from relayd.core.interfaces import IShedsClients
from relayd.net.descriptors import PAUSE, Descriptors
from relayd.net.keepalive import set_keepalive
from relayd.net.libc import accept
from relayd.net.monotonic import monotonic
from relayd.net.transports import connection_class, set_options

if TYPE_CHECKING:
    from twisted.internet.interfaces import IProtocol, ITCPTransport

log = Logger(namespace="relayd.listener")

#: Clients that are accepted in one turn of the reactor.
ACCEPTS_PER_TURN = 32

#: accept(2): the client was gone before it was accepted.
_CLIENT_GONE = frozenset({errno.ECONNABORTED, errno.EPROTO})

#: accept(2): this process, or this machine, is out of descriptors or memory.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@implementer(IListeningPort, IReadDescriptor)
class Listener:
    """Accepts the clients of one listening socket.

    :param reactor: provides `IReactorFDSet` and `IReactorTime`.
    :param sock: bound and listening; owned by this object from here on.
    :param factory: builds a protocol for each client.
    :param on_closed: called when the socket has been closed.

    :ivar pauses: how often this listener, or another of this reactor, has paused as
        descriptors ran out.
    """

    connected = True

    #: Somebody has asked that it accepts nobody for now.
    held = False

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        factory: IProtocolFactory,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._reactor = reactor
        self._socket = sock
        self._factory = factory
        self._on_closed = on_closed
        self._resume: IDelayedCall | None = None
        self._descriptors = Descriptors.of(reactor)
        self._accepted = 0
        self._build: Callable[[Any], IProtocol | None]
        sock.setblocking(False)
        self._family = int(sock.family)
        self._address = socket_address(self._family, sock.getsockname())
        #: The port, once it listens; 0 for a UNIX socket.
        self._port = 0
        #: The same for a UNIX socket: device and inode of its file.
        self._file: tuple[int, int] | None = None
        #: The local address of accepted connections, where there is only one.
        self._local: IAddress | None = None
        set_options(sock)
        set_keepalive(sock)

    @property
    def pauses(self) -> int:
        return self._descriptors.pauses

    # -- IListeningPort

    def startListening(self) -> None:
        self._factory.doStart()
        self._build = self._builder()
        self._begin_intercepting()
        self._watch()
        self._port = getattr(self._address, "port", 0)
        streams.listens(self._port)
        if self._family == socket.AF_UNIX:
            self._file = file_of(self._socket.getsockname())
            streams.opens_file(self._file)

    def stopListening(self) -> Deferred[None]:
        if self.connected:
            self._unwatch()
            self.connectionLost(Failure(CONNECTION_DONE))
        return succeed(None)

    def getHost(self) -> IAddress:
        return self._address

    # -- while it listens

    def serve(self, factory: IProtocolFactory, backlog: int | None = None) -> None:
        """Clients are another factory's from now on, those in the queue included.

        :param backlog: how many clients may wait in the kernel's queue; unless given,
            as many as before.
        """
        factory.doStart()
        before, self._factory = self._factory, factory
        self._build = self._builder()
        self._stop_intercepting(before)
        self._begin_intercepting()
        before.doStop()
        if backlog is not None:
            # listen(2) may be called again, to change nothing else.
            self._socket.listen(backlog)

    def hold(self) -> None:
        """Accept nobody: clients wait in the kernel's queue, up to its limit."""
        if not self.held and self.connected:
            self.held = True
            if self._resume is None:
                self._unwatch()

    def release(self) -> None:
        """Accept clients again, those first that have waited.

        :raises OSError: the kernel can't watch the socket.
        """
        if self.held:
            self.held = False
            if self._resume is None and self.connected:
                self._watch()

    # -- what was meant for others

    def _begin_intercepting(self) -> None:
        """Take what rules bring here, if the factory's relay is for that."""
        address: Any = self._address
        wildcard = getattr(address, "host", "") in ("0.0.0.0", "::")
        intercepts = getattr(self._factory, "intercepts", None)
        self._local = None if wildcard or intercepts is not None else address
        if intercepts is not None and self._family != socket.AF_UNIX:
            from relayd.net.transparent import listen_for_others

            intercepts.opens(address.host, address.port)
            listen_for_others(self._socket, address_name(address))

    def _stop_intercepting(self, factory: IProtocolFactory) -> None:
        intercepts = getattr(factory, "intercepts", None)
        if intercepts is not None and self._family != socket.AF_UNIX:
            address: Any = self._address
            intercepts.closes(address.host, address.port)

    # -- what depends on the kind of transport

    def _watch(self) -> None:
        """Have :meth:`doRead` called while clients wait."""
        self._reactor.addReader(self)

    def _unwatch(self) -> None:
        self._reactor.removeReader(self)

    def _waiting(self) -> int:
        """How many clients wait, or more where the kernel does not say."""
        return ACCEPTS_PER_TURN

    def _accept(self) -> tuple[socket.SocketType, Any]:
        """The next client's connection, and its address.

        :raises OSError: see accept(2).
        """
        return self._socket.accept()

    def _builder(self) -> Callable[[Any], IProtocol | None]:
        """The function that builds a protocol from a client's address."""
        return self._build_addressed

    def _build_addressed(self, address: Any) -> IProtocol | None:
        """The factory's protocol for a client at `address`."""
        return self._factory.buildProtocol(socket_address(self._family, address))

    def _transport(
        self, sock: socket.SocketType, protocol: IProtocol, address: Any
    ) -> ITCPTransport:
        """A transport for an accepted connection, which reads from now on."""
        number, self._accepted = self._accepted, self._accepted + 1
        transport = connection_class(self._family)(
            sock, protocol, address, None, number, monotonic(self._reactor)
        )
        transport.local = self._local
        return transport

    # -- IReadDescriptor

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "relayd listener"

    def connectionLost(self, reason: Failure) -> None:
        """Close the socket: it is no longer used, or the reactor stops."""
        if not self.connected:
            return
        self.connected = False
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        self._socket.close()
        if self._port:
            streams.closes(self._port)
        streams.closes_file(self._file)
        self._stop_intercepting(self._factory)
        self._on_closed()
        self._factory.doStop()

    def doRead(self) -> None:
        """Accept some of the waiting clients."""
        # This was called for one.
        waiting = 1
        for _ in range(ACCEPTS_PER_TURN):
            if not waiting:
                waiting = self._waiting()
                if not waiting:
                    return
            waiting -= 1
            try:
                sock, address = self._accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in _CLIENT_GONE:
                    continue
                client = self._accept_anyway(problem)
                if client is None:
                    return
                sock, address = client
            full = self._descriptors.is_low(sock.fileno())
            self._serve(sock, address)
            if self.held or not self.connected:
                return
            if full:
                self._pause("hardly any file descriptor is left")
                return

    def _accept_anyway(self, problem: OSError) -> tuple[socket.SocketType, Any] | None:
        """The next client, after an accept that failed; None: no more for now.

        Python calls accept4(2), which a sandbox may not allow; so accept(2) is tried,
        each time.  If that is refused as well, the client stays in the queue, and the
        listener pauses, since the client would be reported again at once.
        """
        if problem.errno not in _EXHAUSTED:
            try:
                return self._accept_plainly()
            except BlockingIOError:
                return None
            except OSError as again:
                if again.errno in _CLIENT_GONE:
                    return None  # the next in the queue is reported again
                problem = again
        if problem.errno in _EXHAUSTED:
            self._pause(os.strerror(problem.errno))
        else:
            why = problem.strerror or str(problem)
            self._pause(f"accept failed: {why}", short=False)
        return None

    def _accept_plainly(self) -> tuple[socket.SocketType, Any]:
        """As :meth:`_accept`, by accept(2).

        :raises OSError: see accept(2).
        """
        descriptor = accept(self.fileno())
        sock = socket.socket(self._family, socket.SOCK_STREAM, 0, descriptor)
        try:
            sock.setblocking(False)
            return sock, sock.getpeername()
        except OSError as problem:
            # ENOTCONN: it was reset a moment ago.
            sock.close()
            raise ConnectionAbortedError(errno.ECONNABORTED, "it left") from problem

    def _serve(self, sock: socket.SocketType, address: Any) -> None:
        transport: Any = None
        try:
            build = self._build
            protocol = build(address)
            if protocol is not None:
                # Fails when the kernel has no memory to watch it with.
                transport = self._transport(sock, protocol, address)
                protocol.makeConnection(transport)
        except Exception:
            log.failure("a client could not be served")
            if transport is not None:
                transport.abortConnection()
        if transport is None:
            sock.close()

    def _pause(self, why: str, *, short: bool = True) -> None:
        """Accept no client for :data:`PAUSE` seconds.

        :param short: descriptors, or memory, have run out.
        """
        self._descriptors.log_pause(address_name(self._address), why, short=short)
        if not self.held:
            self._unwatch()
        clock = monotonic(self._reactor)
        self._resume = clock.callLater(PAUSE, self._try_accepting)
        sheds = IShedsClients(self._factory, None) if short else None
        if sheds is not None:
            try:
                sheds.shed_clients()
            except Exception:
                log.failure("no clients could be shed")

    def _try_accepting(self) -> None:
        self._resume = None
        try:
            spare = os.dup(self.fileno())
        except OSError as problem:
            self._pause(os.strerror(problem.errno or 0))
            return
        os.close(spare)
        if self._descriptors.is_low(spare):
            self._pause("hardly any file descriptor is left")
            return
        if self.held:
            return
        try:
            self._watch()
        except OSError as problem:
            self._pause(os.strerror(problem.errno or 0))


@implementer(IListeningPort)
class Listeners:
    """The listening sockets of one relay."""

    def __init__(self, ports: Sequence[IListeningPort]) -> None:
        self.ports = ports

    def startListening(self) -> None:
        for port in self.ports:
            port.startListening()

    def stopListening(self) -> Deferred[Any]:
        stopping = [maybeDeferred(port.stopListening) for port in self.ports]
        return gatherResults(stopping)

    def getHost(self) -> IAddress:
        """The address of the first; `ports` has them all."""
        first: IAddress = self.ports[0].getHost()
        return first


def sockets_of(port: IListeningPort) -> Sequence[Any]:
    """The ports of one listener, which may have several addresses."""
    return port.ports if isinstance(port, Listeners) else [port]
