"""Makes endpoints for the addresses of :mod:`relayd.configuring.address_grammar`.

Short forms get endpoints of relayd, on the plane or not; a Twisted endpoint string gets
Twisted's endpoint.  An address that can't be used raises
:class:`relayd.core.errors.ConfigError`, in one line, when the endpoint is made.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Any

from twisted.internet.endpoints import (
    AdoptedStreamServerEndpoint,
    clientFromString,
    serverFromString,
)
from twisted.internet.interfaces import (
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)

from relayd.configuring.address_grammar import (
    DIGITS,
    EndpointString,
    HostPort,
    OriginalAddress,
    StreamAddress,
    StreamServer,
    UdpAddress,
    UnixPath,
    dialled_host,
)
from relayd.configuring.endpoint_strings import (
    host_in,
    missing_files,
    passed_name,
    server_name,
    what_is_wrong,
)
from relayd.configuring.hosts import check_host, is_ipv6
from relayd.core import process_settings, settings
from relayd.core.errors import ConfigError
from relayd.core.names import is_name
from relayd.core.process_settings import Transport
from relayd.datagrams.endpoint import AdoptedUdpListener, UdpListener
from relayd.datagrams.watching import ReactorWatcher, Watcher
from relayd.net.activation import sockets_named
from relayd.net.dial_options import DialOptions
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import Dialer, NameEndpoint
from relayd.net.listening import (
    AdoptedListenerEndpoint,
    TCPListenerEndpoint,
    UNIXListenerEndpoint,
)
from relayd.net.tls import ServerIdentity
from relayd.net.with_options import having
from relayd.operating.tls_listening import ListensForAll
from relayd.plane import obstacle

if TYPE_CHECKING or sys.platform == "linux":
    from relayd.plane.endpoints import (
        PlaneAdoptedListenerEndpoint,
        PlaneSocketEndpoint,
        PlaneTCPListenerEndpoint,
        PlaneUNIXListenerEndpoint,
    )
    from relayd.plane.poller import Plane


def on_plane(transport: Transport, reactor: Any) -> bool:
    """Whether short forms get the plane's transports (:mod:`relayd.plane`).

    :raises ConfigError: they were asked for and are not available.
    """
    if transport == "twisted":
        return False
    problem = obstacle(reactor)
    if transport == "plane" and problem:
        raise ConfigError(
            "transport plane needs Linux, epoll, and a reactor that watches"
            f" descriptors; {problem}: leave it out"
        )
    return not problem


def listening_endpoint(
    address: StreamAddress,
    reactor: Any,
    backlog: int = settings.BACKLOG.default,
    transport: Transport = process_settings.TRANSPORT.default,
) -> IStreamServerEndpoint:
    """The endpoint that listens on an address.

    :param backlog: for the short forms; an endpoint string has its own.
    :param transport: for the short forms and `systemd:`; other endpoint strings get
        Twisted's.
    :raises ConfigError: Twisted can't use the endpoint string, or the transport is
        not available.
    """
    plane = on_plane(transport, reactor)
    if isinstance(address, HostPort):
        tcp = PlaneTCPListenerEndpoint if plane else TCPListenerEndpoint
        return tcp(reactor, address.host, address.port, backlog)
    if isinstance(address, UnixPath):
        unix = PlaneUNIXListenerEndpoint if plane else UNIXListenerEndpoint
        return unix(reactor, address.path, backlog)
    try:
        endpoint = _from_string(reactor, address.text, plane=plane)
    except ConfigError:
        raise
    except Exception as problem:
        raise _unusable(address, problem, reactor) from problem
    check_host(host_in(address.text, listens=True), address.text)
    if missing := missing_files(address.text):
        raise ConfigError(f"bad endpoint {address.text!r}: {missing}")
    if plane and isinstance(endpoint, AdoptedStreamServerEndpoint):
        return PlaneAdoptedListenerEndpoint(reactor, [endpoint.fileno])
    return endpoint


def string_of(address: StreamAddress) -> str:
    """The endpoint string of a listener that is one of Twisted's; empty for ours."""
    if not isinstance(address, EndpointString) or passed_name(address.text):
        return ""
    return address.text


def _from_string(reactor: Any, text: str, *, plane: bool) -> IStreamServerEndpoint:
    if name := passed_name(text):
        adopting = PlaneAdoptedListenerEndpoint if plane else AdoptedListenerEndpoint
        return adopting(reactor, _passed(text, name, socket.SOCK_STREAM), text)
    listens: Any = ListensForAll(reactor)
    endpoint: IStreamServerEndpoint = serverFromString(listens, text)
    return endpoint


def _passed(text: str, name: str, kind: int) -> list[int]:
    try:
        return sockets_named(name, kind)
    except ValueError as problem:
        raise ConfigError(f"bad endpoint {text!r}: {problem}") from problem


def datagram_endpoint(address: UdpAddress) -> UdpListener:
    """The endpoint that listens for datagrams on an address.

    :raises ConfigError: systemd has passed no such sockets.
    """
    if not address.passed:
        return UdpListener(address.host, address.port)
    text = str(address)
    return AdoptedUdpListener(_passed(text, address.passed, socket.SOCK_DGRAM), text)


def dialing_endpoint(
    address: StreamServer,
    reactor: Any,
    transport: Transport = process_settings.TRANSPORT.default,
    options: DialOptions | None = None,
) -> IStreamClientEndpoint:
    """The endpoint that connects to an address.  The relay limits the time of a dial.

    :param transport: for the short forms; endpoint strings get Twisted's.
    :param options: of its sockets, for the short forms with a port.
    :raises ConfigError: Twisted can't use the endpoint string, or the transport is
        not available.
    """
    by_socket = _socket_endpoint(transport, reactor)
    if isinstance(address, UnixPath):
        return by_socket(reactor, socket.AF_UNIX, address.path)
    by_socket = having(by_socket, options)
    if isinstance(address, OriginalAddress):
        return _original_endpoint(address, reactor, by_socket)
    if isinstance(address, HostPort):
        host, port = dialled_host(address.host), address.port
        check_host(host, str(address))
        if is_ipv6(host):
            try:
                # Nothing is looked up but the scope of fe80::1%eth0.
                found = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
            except OSError as problem:
                raise ConfigError(
                    f"bad address '{address}': {problem.strerror}"
                ) from problem
            return by_socket(reactor, socket.AF_INET6, found[0][4])
        if DIGITS.fullmatch(host.rpartition(".")[2]):
            return by_socket(reactor, socket.AF_INET, (host, port))
        return NameEndpoint(reactor, host, port, endpoint=by_socket)
    try:
        endpoint: IStreamClientEndpoint = clientFromString(reactor, address.text)
    except Exception as problem:
        raise _unusable(address, problem, reactor) from problem
    check_host(host_in(address.text, listens=False), address.text)
    # Twisted checks no port before it dials.
    dialled: Any = getattr(endpoint, "_wrappedEndpoint", endpoint)
    number = getattr(dialled, "_port", 1)
    if not 1 <= number <= 65535:
        raise ConfigError(
            f"bad endpoint {address.text!r}: a port here is 1 to 65535, not {number}"
        )
    return endpoint


def _original_endpoint(
    address: OriginalAddress, reactor: Any, by_socket: type[SocketEndpoint]
) -> IStreamClientEndpoint:
    """The endpoint that connects to where the client meant to go.

    :raises ConfigError: the interface in the address of its host does not exist.
    """
    # Most relays do not need it.
    from relayd.net.original import OriginalEndpoint, OriginalNameEndpoint

    if address.host is None:
        return OriginalEndpoint(reactor, by_socket)
    host = dialled_host(address.host)
    check_host(host, str(address))
    if is_name(host):
        return OriginalNameEndpoint(reactor, by_socket, host)
    try:
        return OriginalEndpoint(reactor, by_socket, host)
    except OSError as problem:
        raise ConfigError(f"bad address '{address}': {problem.strerror}") from problem


def server_identity(address: StreamServer) -> ServerIdentity | None:
    """The name that the server's certificate must have; None if none is given.

    :param address: one that :func:`dialing_endpoint` accepts.
    """
    if not isinstance(address, EndpointString):
        return None
    name = server_name(address.text)
    return ServerIdentity(name, alone=True) if name else None


def _socket_endpoint(transport: Transport, reactor: Any) -> type[SocketEndpoint]:
    return PlaneSocketEndpoint if on_plane(transport, reactor) else SocketEndpoint


def dialer(
    reactor: Any,
    transport: Transport = process_settings.TRANSPORT.default,
    options: DialOptions | None = None,
) -> Dialer:
    """The dialer for addresses that need no look-up.

    :param options: of its sockets.
    :raises ConfigError: the transport is not available.
    """
    return Dialer(reactor, having(_socket_endpoint(transport, reactor), options))


def watcher(
    reactor: Any, transport: Transport = process_settings.TRANSPORT.default
) -> Watcher:
    """The watcher for datagram sockets.

    :raises ConfigError: the transport is not available.
    """
    if on_plane(transport, reactor):
        return Plane.of(reactor)
    return ReactorWatcher(reactor)


def _unusable(address: EndpointString, problem: Exception, reactor: Any) -> ConfigError:
    # Endpoint parsers raise exceptions of any kind.
    why = what_is_wrong(address.text, problem, lambda: _from_systemd(reactor))
    return ConfigError(f"bad endpoint {address.text!r}: {why}")


def _from_systemd(reactor: Any) -> int:
    """How many sockets systemd has passed to this process.

    Twisted has removed the number from the environment, so each is tried.
    """
    count = 0
    while True:
        try:
            serverFromString(reactor, f"systemd:domain=INET:index={count}")
        except Exception:
            return count
        count += 1
