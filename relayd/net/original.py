"""Where a client meant to go, of a connection that the kernel has brought here.

After REDIRECT or DNAT the accepted socket has the relay's own address, and the kernel's
connection tracking knows the one before (SO_ORIGINAL_DST, linux/netfilter_ipv4.h, and
IP6T_SO_ORIGINAL_DST, linux/netfilter_ipv6/ip6_tables.h).  By TPROXY nothing is changed:
the accepted socket has the address that the client asked for as its own.  Where a
balancer has told of its client, in a PROXY header, that says where the client meant to
go.

:class:`OriginalEndpoint` dials there, and :class:`OriginalNameEndpoint` a host by name
at the port that the client has asked for.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import socket
import struct
import sys
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.addresses import host_of, socket_name
from relayd.core.interfaces import ICaller, IDialer, IOnBehalf
from relayd.core.names import name_of_original
from relayd.core.session import Session
from relayd.net.dialing import Dial, SocketEndpoint
from relayd.net.factory_caller import NO_CLIENT
from relayd.net.foreign_transports import lent_socket
from relayd.net.happy_eyeballs import Dialer, NameEndpoint
from relayd.net.resolving import Resolver
from relayd.net.syn import mark_syn

_IPV4, _IPV6 = int(socket.AF_INET), int(socket.AF_INET6)
_IP, _IP6 = int(socket.IPPROTO_IP), int(socket.IPPROTO_IPV6)

#: The option's number, at either level.
_ORIGINAL_DST = 80

#: What IPv4 addresses in IPv6 ones begin with, as inet_ntop(3) writes them.
_MAPPED = "::ffff:"

#: struct sockaddr_in, and sockaddr_in6 up to its scope, which is a number of this
#: machine's: port and address.
_IN, _IN6 = struct.Struct("!2xH4s8x"), struct.Struct("!2xH4x16s")
_SIZE_IN6 = 28


def original_destination(sock: Any) -> tuple[int, Any]:
    """Where the client of an accepted TCP connection meant to go.

    :param sock: the accepted socket.
    :return: the family, and the address as the socket module has it; of an IPv4 client
        of an IPv6 socket, the IPv4 one.
    :raises OSError: it is no TCP socket, or is closed; or it went to an IPv4 address by
        IPv6, as nobody does who means well.
    """
    if sock.family == _IPV4:
        return _IPV4, _tracked4(sock) or sock.getsockname()
    here = sock.getsockname()
    if sock.family != _IPV6:
        raise OSError(errno.EAFNOSUPPORT, "it came by a UNIX socket")
    mapped = _mapped(here)
    if mapped is not None and _mapped(sock.getpeername()) is not None:
        return _IPV4, _tracked4(sock) or (str(mapped), here[1])
    there = _tracked6(sock) or here
    if _mapped(there) is not None:
        # connect(2) would go to 127.0.0.1 for who has sent to ::ffff:127.0.0.1, which
        # IPv6 takes for an address like others.
        why = f"it came by IPv6, to [{there[0]}]:{there[1]}"
        raise OSError(errno.EADDRNOTAVAIL, why)
    return _IPV6, there


def _mapped(address: Any) -> ipaddress.IPv4Address | None:
    """The IPv4 address in the IPv6 one of a socket, if there is one."""
    if not address[0].startswith(_MAPPED):
        # To parse one takes longer than all the rest.
        return None
    return ipaddress.IPv6Address(address[0].partition("%")[0]).ipv4_mapped


def _tracked4(sock: Any) -> tuple[str, int] | None:
    """What connection tracking knows; None: nothing has changed where it leads."""
    try:
        port, packed = _IN.unpack(sock.getsockopt(_IP, _ORIGINAL_DST, _IN.size))
    except (OSError, struct.error):
        # There is none, or it does not have this connection.
        return None
    return socket.inet_ntop(_IPV4, packed), port


def _tracked6(sock: Any) -> tuple[str, int, int, int] | None:
    try:
        found = sock.getsockopt(_IP6, _ORIGINAL_DST, _SIZE_IN6)
        port, packed = _IN6.unpack_from(found)
    except (OSError, struct.error):
        return None
    scope = int.from_bytes(found[_IN6.size :], sys.byteorder)
    return socket.inet_ntop(_IPV6, packed), port, 0, scope


def destination_of(transport: Any) -> tuple[int, Any]:
    """The same of a connection by its transport, of any kind.

    :raises OSError: as :func:`original_destination`, or it has no socket.
    """
    if getattr(transport, "options_are_set", False) and transport.connected:
        # One of ours, whose handle is the socket: each client is asked.
        return original_destination(transport.getHandle())
    with lent_socket(transport) as sock:
        if sock is None:
            raise OSError(errno.ENOTCONN, "its connection is lost, or has no socket")
        return original_destination(sock)


def original_of(session: Session, transport: Any) -> tuple[int, Any]:
    """Where the client of a session meant to go, in either way.

    :param transport: the connection that was accepted.
    :return: the family, and the address as the socket module has it, which can be
        dialled.
    :raises OSError: that can't be told, or can be no destination; `strerror` is one
        line.
    """
    header = session.header
    told = "" if header is None else header.destination
    try:
        family, address = _address(told) if told else destination_of(transport)
    except OSError as problem:
        why = problem.strerror or str(problem)
        raise _unknown(why) from problem
    if not address[1] or ipaddress.ip_address(address[0]).is_unspecified:
        # connect(2) would take 0.0.0.0 for this machine.
        raise _unknown(f"{socket_name(address)} is no destination")
    return family, address


def original_name(session: Session, transport: Any) -> str:
    """The same as text, as the log has addresses: `192.0.2.1:80`, `[2001:db8::1]:80`.

    :raises OSError: likewise.
    """
    return socket_name(original_of(session, transport)[1])


def _address(name: str) -> tuple[int, Any]:
    """The address in what :func:`relayd.core.addresses.address_name` makes."""
    host, port = host_of(name), name.rpartition(":")[2]
    if not host:
        raise OSError(errno.EAFNOSUPPORT, f"its PROXY header names {name}")
    if ":" in host:
        return _IPV6, (host, int(port), 0, 0)
    return _IPV4, (host, int(port))


def _unknown(why: str) -> OSError:
    said = f"where the client meant to go is not known: {why}"
    return OSError(errno.EADDRNOTAVAIL, said)


class _Noting(SocketEndpoint):
    """What :func:`noting` puts before a class: its dials may all lead back here.

    Whatever the address is, rules may redirect it to this process.
    """

    #: The socket of the dial that has just begun.
    _opened: socket.SocketType | None = None

    def open_socket(self, caller: ICaller) -> socket.SocketType:
        sock = self._opened = super().open_socket(caller)
        mark_syn(sock)
        return sock

    def dial(self, caller: ICaller) -> Dial | None:
        dial = super().dial(caller)
        sock, self._opened = self._opened, None
        if sock is not None:
            # Its SYN is sent.
            mark_syn(sock, marked=False)
        if dial is not None and not dial.leads_here:
            dial.note_hop()
        return dial


def noting(endpoint: type[SocketEndpoint]) -> type[SocketEndpoint]:
    """The class that dials as this one, and notes each dial (:class:`_Noting`)."""
    kind: Any = endpoint
    return _class_noting(kind)


@functools.lru_cache(maxsize=1024)
def _class_noting(endpoint: type[SocketEndpoint]) -> type[SocketEndpoint]:
    bases: Any = (_Noting,)
    if endpoint is not SocketEndpoint:
        bases = (_Noting, endpoint)
    return type(f"{endpoint.__name__}Noting", bases, {})


def _asked(caller: Any) -> Any:
    """Who answers for the client that a caller, or a factory, dials for.

    :raises OSError: there is none.
    """
    on_behalf = IOnBehalf(caller, None)
    if on_behalf is None:
        raise _unknown(NO_CLIENT)
    return on_behalf


@implementer(IDialer, IStreamClientEndpoint)
class OriginalEndpoint:
    """Connects to where the client meant to go.

    Whoever dials must be an :class:`relayd.core.interfaces.IOnBehalf`, as relays' own
    callers and factories are.

    :param endpoint: the class that dials each address.
    :param host: an IPv4 or IPv6 address, with its scope if it needs one: that host, at
        the port that the client has asked for; unless given, where it meant to go.
    :raises OSError: `host` is none, or its scope does not exist.

    :ivar peer_name: what the log calls it until it knows where it leads.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: type[SocketEndpoint] = SocketEndpoint,
        host: str | None = None,
    ) -> None:
        self.peer_name = name_of_original(host)
        #: Destinations repeat; their number is bounded there.
        self._dialer = Dialer(reactor, noting(endpoint))
        self._host: tuple[int, Any] | None = None
        if host is not None:
            found = socket.getaddrinfo(host, 0, flags=socket.AI_NUMERICHOST)
            self._host = found[0][0], found[0][4]

    def dial(self, caller: ICaller) -> Any:
        """See :meth:`IDialer.dial`."""
        try:
            endpoint = self._lead(_asked(caller))
        except Exception:
            caller.dial_failed(Failure())
            return None
        return endpoint.dial(caller)

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        try:
            endpoint = self._lead(_asked(factory))
        except Exception:
            return fail(Failure())
        connecting: Deferred[IProtocol] = endpoint.connect(factory)
        return connecting

    def _lead(self, on_behalf: Any) -> Any:
        where = on_behalf.original()
        if self._host is not None:
            family, (host, _, *rest) = self._host
            where = family, (host, where[1][1], *rest)
        endpoint = self._dialer([where])
        on_behalf.goes_to(endpoint)
        return endpoint


@implementer(IStreamClientEndpoint)
class OriginalNameEndpoint:
    """Connects to a name, which is looked up for each connection, at the port that the
    client has asked for.

    :param endpoint: the class that dials each address.
    :param host: the name.
    :param resolver: unless given, the one that the reactor's endpoints share.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: type[SocketEndpoint],
        host: str,
        resolver: Resolver | None = None,
    ) -> None:
        self._reactor = reactor
        self._endpoint = noting(endpoint)
        self._host = host
        self._resolver = resolver

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        try:
            on_behalf = _asked(factory)
            port = on_behalf.original()[1][1]
            endpoint = NameEndpoint(
                self._reactor, self._host, port, self._resolver, self._endpoint
            )
            on_behalf.goes_to(endpoint)
        except Exception:
            return fail(Failure())
        return endpoint.connect(factory)
