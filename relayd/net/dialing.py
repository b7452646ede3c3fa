"""Connecting to addresses, with one socket and no timer for each.

Twisted's client endpoints serve any caller: they wrap the protocol to be notified
of the connection, keep a connector to reconnect with, and a timer.  A relay
dials once for each session, is notified of the connection by its leg, and has
its own timing wheel for the deadline.  Dialling this way takes a third less.

Several addresses of one server: :mod:`relayd.net.happy_eyeballs`.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import sys
from contextlib import suppress
from typing import Any

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

from relayd.core.addresses import address_name, is_loopback, socket_address
from relayd.core.hops import streams
from relayd.core.interfaces import ICaller, IDial, IDialer, IHopListener
from relayd.core.ports import may_be_handed_out
from relayd.net.all_ports import use_all_ports
from relayd.net.dial_options import DialOptions
from relayd.net.factory_caller import FactoryCaller
from relayd.net.handshake_ack import hold_back
from relayd.net.monotonic import monotonic
from relayd.net.socket_ends import is_self_connected
from relayd.net.transports import connection_class, reset_on_close, set_options

#: Seconds after which a UNIX socket whose backlog was full is tried again.
RETRY = 0.05

_IN_PROGRESS = errno.EINPROGRESS
#: connect(2): ask again later.
_TAKES_TIME = (errno.EINPROGRESS, errno.EAGAIN)

_numbers = itertools.count(1)


def connect_failure(number: int, why: str | None = None) -> error.ConnectError:
    """Twisted's error for an errno of connect(2).

    :param why: what it says; unless given, what the system calls it.
    """
    why = why or os.strerror(number)
    made: error.ConnectError = error.getConnectError((number, why))
    return made


@implementer(IDial, IWriteDescriptor)
class Dial:
    """A socket that is being connected; its connection gets Twisted's transport.

    :param where: the endpoint: the address, and the reactor.
    :param sock: its connect(2) is in progress.
    :param caller: notified of the outcome.
    """

    _retry: IDelayedCall | None = None
    #: It leads to this process itself.
    leads_here = False

    def __init__(
        self, where: SocketEndpoint, sock: socket.SocketType, caller: ICaller
    ) -> None:
        self._where = where
        self._socket = sock
        self._caller = caller

    def wait(self, problem: int) -> None:
        """Wait for the outcome of connect(2).

        :param problem: its errno.
        """
        if problem == errno.EAGAIN:
            # UNIX sockets only: the server's backlog is full.
            clock = monotonic(self._where.reactor)
            self._retry = clock.callLater(RETRY, self._try_again)
        else:
            self._watch()

    def note_hop(self) -> None:
        """It may lead to this process: tell the caller, if that wants to know."""
        listener = IHopListener(self._caller, None)
        if listener is not None:
            there = self._where.address
            self.leads_here = listener.dial_started(self._socket, there)

    def _try_again(self) -> None:
        problem = self._socket.connect_ex(self._where.address)
        if problem in _TAKES_TIME:
            self.wait(problem)
        elif problem:
            self._failed(problem)
        else:
            self._connected()

    # -- what depends on the kind of transport

    def _watch(self) -> None:
        """Have :meth:`doWrite` called when it is connected, or has failed."""
        self._where.reactor.addWriter(self)

    def _unwatch(self) -> None:
        self._where.reactor.removeWriter(self)

    def close(self) -> None:
        """Close the socket, which may have been watched."""
        # Not now: the batch of events that the reactor is handling may have one for
        # this descriptor, whose number might be reused by then.
        monotonic(self._where.reactor).callLater(0, self._socket.close)

    def transport(self, protocol: IProtocol) -> Any:
        """See :meth:`SocketEndpoint.transport`."""
        return self._where.transport(self._socket, protocol)

    # -- IWriteDescriptor

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "relayd dial"

    def doWrite(self) -> None:
        self._unwatch()
        problem = self._problem()
        if problem == errno.EAGAIN:
            problem = self.told_on_the_way()
        if problem is None:
            self._connected()
        else:
            self._failed(problem)

    def connectionLost(self, reason: Failure) -> None:
        """Some reactors report a failed connect so; or the reactor stops."""
        self._unwatch()
        problem = self._problem()
        if problem is None:
            self._connected()
        elif problem in (errno.EAGAIN, errno.ENOTCONN):
            self._failed(self.told_on_the_way() or errno.ECONNABORTED)
        else:
            self._failed(problem)

    def _problem(self) -> int | None:
        """The errno that a read would fail with; None where there is data, or EOF.

        A server may have sent data and reset the connection by now.  SO_ERROR would
        clear the reset before it can be read behind the data; this does not.
        """
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except OSError as problem:
            return problem.errno
        return None

    def told_on_the_way(self) -> int | None:
        """The errno that an ICMP message has brought, which a read does not tell of.

        One that comes while connect(2) has the socket, as from a filter of this machine
        or the next one, does not end it: Linux reports an error, once, and goes on to
        send SYNs (`sk_err_soft`, tcp_v4_err).  With nothing to read, SO_ERROR clears
        nothing else.
        """
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or None

    # -- outcomes

    def cancel(self) -> None:
        """See :meth:`IDial.cancel`."""
        if self._retry is not None and self._retry.active():
            self._retry.cancel()
        self._unwatch()
        if self.leads_here:
            reset_on_close(self._socket)
        self.close()

    def _failed(self, problem: int) -> None:
        self.close()
        self._caller.dial_failed(Failure(connect_failure(problem)))

    def _connected(self) -> None:
        self._where.attach(self._socket, self._caller, self)


def _give_name(sock: socket.SocketType) -> None:
    """Bind a UNIX socket to a name by which its other end recognizes it.

    unix(7): an abstract name, which begins with a zero byte, is no file, and ends with
    the socket.
    """
    if sys.platform.startswith("linux"):
        # Without a name it is treated like any other client.
        with suppress(OSError):
            sock.bind(b"\0relayd-" + os.urandom(8).hex().encode())


@implementer(IDialer, IStreamClientEndpoint)
class SocketEndpoint:
    """Connects to an address that needs no look-up.

    The factory only builds the protocol: its doStart and doStop are not called, as a
    single connection needs neither.

    :param reactor: provides `IReactorFDSet` and `IReactorTime`.
    :param family: AF_INET, AF_INET6 or AF_UNIX.
    :param address: as the socket module has it for that family.
    :cvar dialing: the class that waits for a connection; a subclass may set another.
    :cvar options: of its sockets, if they have any: see
        :func:`relayd.net.with_options.having`.

    :ivar is_near: it is a loopback address.
    :ivar port: its port; 0 if it has none.
    :ivar peer: the address as Twisted has it.
    :ivar peer_name: what the log calls it.
    """

    dialing: type[Dial] = Dial
    options: DialOptions | None = None

    def __init__(self, reactor: Any, family: int, address: Any) -> None:
        self.reactor = reactor
        self.family = family
        self.address = address
        is_unix = family == socket.AF_UNIX
        self.port: int = 0 if is_unix else address[1]
        self.is_near = not is_unix and is_loopback(address[0])
        self._may_self_connect = bool(self.port) and may_be_handed_out(self.port)
        self.peer = socket_address(family, address)
        self.peer_name = address_name(self.peer)

    # -- what depends on the kind of transport

    def open_socket(self, caller: ICaller) -> socket.SocketType:
        """A new non-blocking socket, with its options set.

        :param caller: for whom it is.
        :raises OSError: no descriptor is left, or an option is not possible.
        """
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        set_options(sock)
        return sock

    def transport(self, sock: socket.SocketType, protocol: IProtocol) -> Any:
        """A transport for a connected socket, which reads from now on."""
        made, clock = connection_class(self.family), monotonic(self.reactor)
        return made(sock, protocol, self.address, None, next(_numbers), clock)

    # -- dialling

    def dial(self, caller: ICaller) -> Dial | None:
        """See :meth:`IDialer.dial`."""
        try:
            sock = self.open_socket(caller)
        except OSError as raised:
            reason = connect_failure(raised.errno or errno.EMFILE, raised.strerror)
            caller.dial_failed(Failure(reason))
            return None
        dial: Dial | None = None
        try:
            if self.port:
                if not self.is_near:
                    use_all_ports(sock)
                if caller.speaks_first():
                    hold_back(sock)
            elif streams.files and streams.listens_at(self.address):
                _give_name(sock)
            problem = sock.connect_ex(self.address)
            if problem == _IN_PROGRESS and self.is_near:
                # The kernel has the outcome when the call returns, but does not report
                # it.  A second call says that it is connected, or refused; EALREADY if
                # the server's backlog is full.
                problem = sock.connect_ex(self.address)
                if problem == errno.EALREADY:
                    problem = _IN_PROGRESS
            if problem in _TAKES_TIME:
                dial = self.dialing(self, sock, caller)
                if self.port in streams.ports:
                    dial.note_hop()
                dial.wait(problem)
        except Exception:
            # A bad address, or a kernel that can't watch another socket.
            sock.close()
            caller.dial_failed(Failure())
            return None
        if not problem:
            self.attach(sock, caller)
        elif dial is None:
            sock.close()
            caller.dial_failed(Failure(connect_failure(problem, self.why(problem))))
        return dial

    def why(self, problem: int) -> str | None:
        """What an errno of connect(2) means here; None: what the system calls it."""
        return None

    def attach(
        self, sock: socket.SocketType, caller: ICaller, dial: Dial | None = None
    ) -> None:
        """Connect the caller's protocol to a socket that is connected.

        :param dial: what waited for the connection, if it took time.
        """
        if self._may_self_connect and is_self_connected(sock):
            # It would relay the client to itself.  A close without a reset would block
            # the server's port for a minute (TIME_WAIT).
            reset_on_close(sock)
            if dial is None:
                sock.close()
            else:
                dial.close()
            caller.dial_failed(Failure(connect_failure(errno.ECONNREFUSED)))
            return
        transport: Any = None
        try:
            protocol = caller.build_leg(self.peer)
            if protocol is None:
                raise error.NoProtocol
            if dial is None:
                transport = self.transport(sock, protocol)
            else:
                transport = dial.transport(protocol)
            protocol.makeConnection(transport)
        except Exception:
            if transport is not None:
                transport.abortConnection()
            elif dial is not None:
                dial.close()
            else:
                sock.close()
            caller.dial_failed(Failure())
        else:
            caller.leg_connected(protocol)

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""

        def cancel(_: object) -> None:
            if dial is not None:
                dial.cancel()

        done: Deferred[IProtocol] = Deferred(cancel)
        dial = self.dial(FactoryCaller(factory, done))
        return done


class WithOptions(SocketEndpoint):
    """Endpoints whose sockets have options: put before a class, or in its place.

    The class has the options, and no endpoint: so one without any has nothing to ask.
    """

    options: DialOptions

    def open_socket(self, caller: ICaller) -> socket.SocketType:
        sock = super().open_socket(caller)
        try:
            self.prepare(sock, caller)
        except OSError:
            sock.close()
            raise
        return sock

    def prepare(self, sock: socket.SocketType, caller: ICaller) -> None:
        """Set the options.

        :raises OSError: that is not possible.
        """
        self.options.prepare_stream(sock, self.family)
