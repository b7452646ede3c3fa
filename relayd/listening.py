"""Listening sockets of our own, which wait out a full descriptor table.

Twisted's listening port, when the process has no descriptor left, accepts the
clients that wait and closes each at once, with a log line for each.  This one
stops accepting for a moment, so that they stay in the kernel's queue and are
served when a session ends.  It stops a little before the table is full, since
a client that is accepted needs a second descriptor for its server.  A factory that can
do without some of its clients (:class:`relayd.interfaces.IMakesRoom`) is asked to.

Accepted connections get Twisted's own transports; only the accepting is ours.
:mod:`relayd.plane.endpoints` has a subclass whose connections are the plane's.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from twisted.internet.defer import (
    Deferred,
    fail,
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
    IStreamServerEndpoint,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.addresses import address_name, host_port, numeric_host, socket_address
from relayd.errors import ListenError
from relayd.hops import file_of, streams
from relayd.interfaces import IMakesRoom
from relayd.libc import accept
from relayd.log_throttle import LogThrottle
from relayd.monotonic import monotonic
from relayd.transports import connection_class, set_keepalive, set_options
from relayd.udp_sockets import BROADCAST, is_broadcast

if TYPE_CHECKING:
    from twisted.internet.interfaces import IProtocol, ITCPTransport

log = Logger(namespace="relayd.listening")

Socket = TypeVar("Socket", bound=socket.SocketType)

#: At most this many clients are accepted before others get their turn.
ACCEPTS_PER_TURN = 32

#: Seconds for which a listener that found no descriptor stops accepting.
PAUSE = 0.1

#: Descriptors that accepting leaves for dials, logs and name look-ups.
RESERVE = 16

#: accept(2): the client was gone before it was accepted.
_CLIENT_GONE = frozenset({errno.ECONNABORTED, errno.EPROTO})

#: accept(2): this process, or this machine, has nothing left to accept with.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: How often port 0 is tried on several addresses that must get the same port.
_PORT_TRIES = 16


class _Exhaustion:
    """Notices that descriptors run out, and says so once a second at most.

    All listeners of a reactor share one, as they share the descriptors.
    """

    _all: weakref.WeakKeyDictionary[Any, _Exhaustion] = weakref.WeakKeyDictionary()

    def __init__(self, clock: Any) -> None:
        # Weakly, as the table of all of them is keyed by it.
        weakly: Any = weakref.proxy(monotonic(clock))
        self._throttle = LogThrottle(weakly)
        self._enough = 0
        self.pauses = 0

    @classmethod
    def of(cls, reactor: Any) -> _Exhaustion:
        """The one that this reactor's listeners share."""
        if reactor not in cls._all:
            cls._all[reactor] = cls(reactor)
        return cls._all[reactor]

    def reached(self, descriptor: int) -> bool:
        """Whether a newly opened `descriptor` leaves less than the reserve.

        The kernel hands out the lowest number that is free, so the number
        tells how many are taken.
        """
        if descriptor < self._enough:
            return False
        # The limit may have been raised since.  One that was lowered is noticed
        # when accept fails.
        try:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        except OSError:
            # A sandbox does not say.  That the table is full, accept will.
            return False
        self._enough = limit - min(RESERVE, limit // 4)
        return descriptor >= self._enough

    def log(self, where: str, why: str, *, short: bool = True) -> None:
        """Count a pause, and say so.

        :param short: it is for want of descriptors, or of memory.
        """
        self.pauses += 1
        if not self._throttle.is_due():
            return
        until, hint = (
            (" until a session ends", "raise the limit with ulimit -n")
            if short
            else ("", f"tried again after {PAUSE:g} s")
        )
        log.warn(
            "{where}: {why}; clients wait{until}"
            " (paused {pauses} times so far; {hint})",
            where=where,
            why=why,
            until=until,
            pauses=self.pauses,
            hint=hint,
        )


@implementer(IListeningPort, IReadDescriptor)
class Listener:
    """Accepts the clients of one listening socket.

    :param reactor: provides `IReactorFDSet` and `IReactorTime`.
    :param sock: bound and listening; owned by this object from here on.
    :param factory: builds a protocol for each client.
    :param on_closed: called when the socket has been closed.

    :ivar pauses: how often accepting was paused for want of descriptors, here or
        at another listener of this reactor.
    """

    connected = True

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
        self._exhaustion = _Exhaustion.of(reactor)
        self._accepted = 0
        self._build: Callable[[Any], IProtocol | None]
        sock.setblocking(False)
        self._family = int(sock.family)
        self._address = socket_address(self._family, sock.getsockname())
        #: Where it listens.  Not before it does; a UNIX socket has none.
        self._port = 0
        #: The same for a UNIX socket: its file.
        self._file: tuple[int, int] | None = None
        # What a client reached, unless it may have reached any of several.
        wildcard = getattr(self._address, "host", "") in ("0.0.0.0", "::")
        self._local = None if wildcard else self._address
        set_options(sock)
        set_keepalive(sock)

    @property
    def pauses(self) -> int:
        return self._exhaustion.pauses

    # -- IListeningPort

    def startListening(self) -> None:
        self._factory.doStart()
        self._build = self._builder()
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

    # -- what depends on the kind of transport

    def _watch(self) -> None:
        """Have :meth:`doRead` called while clients wait."""
        self._reactor.addReader(self)

    def _unwatch(self) -> None:
        self._reactor.removeReader(self)

    def _accept(self) -> tuple[socket.SocketType, Any]:
        """The next client's connection, and its address.

        :raises OSError: see accept(2).
        """
        return self._socket.accept()

    def _builder(self) -> Callable[[Any], IProtocol | None]:
        """What makes a protocol for a client, from now on, of its address."""
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
        """The socket is to be closed: by us, or because the reactor stops."""
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
        self._on_closed()
        self._factory.doStop()

    def doRead(self) -> None:
        """Accept some of the clients that wait."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = self._accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in _CLIENT_GONE:
                    continue
                client = self._accept_all_the_same(problem)
                if client is None:
                    return
                sock, address = client
            full = self._exhaustion.reached(sock.fileno())
            self._serve(sock, address)
            if not self.connected:
                return
            if full:
                self._pause("hardly any file descriptor is left")
                return

    def _accept_all_the_same(
        self, problem: OSError
    ) -> tuple[socket.SocketType, Any] | None:
        """The next client, after an accept that failed; None: no more for now.

        What Python calls is accept4(2), which a sandbox may not have on its list; so
        the plain accept(2) is asked, each time.  Where that is refused as well the
        client stays in the queue, and would be reported for ever.
        """
        if problem.errno not in _EXHAUSTED:
            try:
                return self._accept_plainly()
            except BlockingIOError:
                return None
            except OSError as again:
                if again.errno in _CLIENT_GONE:
                    return None  # whoever is behind it is reported again
                problem = again
        if problem.errno in _EXHAUSTED:
            self._pause(os.strerror(problem.errno))
        else:
            why = problem.strerror or str(problem)
            self._pause(f"accept failed: {why}", short=False)
        return None

    def _accept_plainly(self) -> tuple[socket.SocketType, Any]:
        """As :meth:`_accept`, with nothing but accept(2).

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
        """Accept nobody for a moment.

        :param short: it is for want of descriptors, or of memory.
        """
        self._exhaustion.log(address_name(self._address), why, short=short)
        self._unwatch()
        clock = monotonic(self._reactor)
        self._resume = clock.callLater(PAUSE, self._look_again)
        makes_room = IMakesRoom(self._factory, None) if short else None
        if makes_room is not None:
            try:
                makes_room.make_room()
            except Exception:
                log.failure("no room could be made")

    def _look_again(self) -> None:
        self._resume = None
        try:
            spare = os.dup(self.fileno())
        except OSError as problem:
            self._pause(os.strerror(problem.errno or 0))
            return
        os.close(spare)
        if self._exhaustion.reached(spare):
            self._pause("hardly any file descriptor is left")
            return
        try:
            self._watch()
        except OSError as problem:
            self._pause(os.strerror(problem.errno or 0))


@implementer(IListeningPort)
class Listeners:
    """Several listening sockets that are one relay's."""

    def __init__(self, ports: Sequence[IListeningPort]) -> None:
        self.ports = ports

    def startListening(self) -> None:
        for port in self.ports:
            port.startListening()

    def stopListening(self) -> Deferred[Any]:
        stopping = [maybeDeferred(port.stopListening) for port in self.ports]
        return gatherResults(stopping)

    def getHost(self) -> IAddress:
        """The first one's address; `ports` has them all."""
        first: IAddress = self.ports[0].getHost()
        return first


def _bind_tcp(host: str, port: int, backlog: int) -> socket.socket:
    if is_broadcast(host):
        # The kernel would listen there, and nobody could connect.
        raise OSError(errno.EACCES, BROADCAST)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Resolves nothing: the host is an address; this finds the scope of fe80::1%eth0.
    address = socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0][4]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `[::]` is IPv6 only, so that it can stand beside `0.0.0.0`.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def hosts_of(host: str | None, port: int, kind: int) -> list[str]:
    """The addresses to listen on.

    :param host: an address, a name, or None for all addresses of this machine.
    :param kind: of the sockets, such as SOCK_STREAM.
    :raises OSError: the name has none.
    """
    if host is None:
        return ["0.0.0.0", "::"]
    found = socket.getaddrinfo(host, port, type=kind)
    return list(dict.fromkeys(numeric_host(item[4]) for item in found))


def bind_all(
    hosts: Sequence[str], port: int, bind: Callable[[str, int], Socket]
) -> list[Socket]:
    """A socket for each address, all on the same port.

    An address family that this machine lacks is left out, if another is there.

    :param bind: makes one, for an address and a port.
    :raises OSError: what `bind` did.
    """
    for tries_left in range(_PORT_TRIES - 1, -1, -1):
        try:
            return _bind_each(hosts, port, bind)
        except OSError as problem:
            # Port 0: the one that was free for the first address may be taken on the
            # second.
            if port or problem.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _bind_each(
    hosts: Sequence[str], port: int, bind: Callable[[str, int], Socket]
) -> list[Socket]:
    bound: list[Socket] = []
    missing: OSError | None = None
    for host in hosts:
        try:
            bound.append(bind(host, port))
        except OSError as problem:
            if problem.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                missing = problem
                continue
            for sock in bound:
                sock.close()
            raise
        port = bound[0].getsockname()[1]
    if missing is not None and not bound:
        raise missing
    return bound


def _is_stale(path: str) -> bool:
    """Whether a UNIX socket was left at `path` by a process that is gone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _bind_unix(path: str, backlog: int) -> socket.socket:
    if _is_stale(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    try:
        # As Twisted's UNIX endpoint does; the folder says who may connect.
        os.chmod(path, 0o666)  # noqa: S103
        sock.listen(backlog)
    except OSError:
        sock.close()
        os.unlink(path)
        raise
    return sock


def _unlink_own(path: str, made: os.stat_result) -> Callable[[], None]:
    """What removes the socket file at `path`, unless another has taken its place."""

    def unlink() -> None:
        try:
            now = os.stat(path)
            if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):
                os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as problem:
            # This process may have given up the right to it since it listens.
            why = problem.strerror
            log.warn("unix:{path} stays behind: {why}", path=path, why=why)

    return unlink


class ListenerEndpoint:
    """Listens on what :meth:`bind` returns; errors name :attr:`where`.

    :cvar listener: what accepts the clients; subclasses may have another.
    """

    where: str
    listener: type[Listener] = Listener

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        """Listening sockets, each with what to do once it is closed."""
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
            # No descriptor, or no memory, to watch it with.
            for port in ports:
                port.stopListening()
            why = problem.strerror or str(problem)
            return fail(ListenError(f"can't listen on {self.where}: {why}"))
        return succeed(listening)


@implementer(IStreamServerEndpoint)
class TCPListenerEndpoint(ListenerEndpoint):
    """Listens on a host and port.

    :param host: an address, a name whose every address is listened on (looked
        up once, when listening starts), or None for all addresses of this
        machine, IPv4 and IPv6.
    :param port: 0 picks one that is free.
    :param backlog: how many clients the kernel may keep waiting.
    """

    def __init__(self, reactor: Any, host: str | None, port: int, backlog: int) -> None:
        super().__init__(reactor)
        self._host, self._port, self._backlog = host, port, backlog
        self.where = host_port(host, port) if host else f"port {port} of all addresses"

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        hosts = hosts_of(self._host, self._port, socket.SOCK_STREAM)
        bound = bind_all(
            hosts, self._port, lambda host, port: _bind_tcp(host, port, self._backlog)
        )
        return [(sock, _nothing) for sock in bound]


@implementer(IStreamServerEndpoint)
class UNIXListenerEndpoint(ListenerEndpoint):
    """Listens on a UNIX socket, whose file it makes, and removes when it stops.

    A socket file that nobody listens on any more is replaced.
    """

    def __init__(self, reactor: Any, path: str, backlog: int) -> None:
        super().__init__(reactor)
        self._path, self._backlog = path, backlog
        self.where = f"unix:{path}"

    def bind(self) -> list[tuple[socket.socket, Callable[[], None]]]:
        sock = _bind_unix(self._path, self._backlog)
        return [(sock, _unlink_own(self._path, os.stat(self._path)))]


def _nothing() -> None:
    """A TCP socket leaves nothing behind."""
