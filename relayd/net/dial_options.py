"""How connections and flows leave this machine: from which address, by which way.

:class:`DialOptions` are set on a new socket before it is connected.

The address is bound with IP_BIND_ADDRESS_NO_PORT (ip(7)), so that connect(2) chooses
the port when it knows the server: connections to two servers may have the same port,
and the kernel's range of ports (net.ipv4.ip_local_port_range) bounds those to one
server, and not all.  Of datagram sockets each has a port of its own, with or without.

There is one address for each family.  If one is given, servers of the other family
need theirs: they are not dialled from whatever address the kernel would take.

Transparent ones are bound to the address of the client that is relayed, by whoever
dials for it (:mod:`relayd.net.transparent`): servers see that.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from relayd.core.names import check_interface
from relayd.core.number_types import MAX_MARK
from relayd.net.keepalive import Keepalive, set_keepalive, set_user_timeout

EXPECTED_SOURCE = "an address of this machine, such as 192.0.2.1 or 2001:db8::1"

_IPV4, _IPV6 = int(socket.AF_INET), int(socket.AF_INET6)
_SOCKET = int(socket.SOL_SOCKET)

# socket(7), ip(7): Linux alone has them.
_INTERFACE = getattr(socket, "SO_BINDTODEVICE", None)
_MARK = getattr(socket, "SO_MARK", None)
_LINUX = sys.platform == "linux"
_IP, _NO_PORT = int(socket.IPPROTO_IP), 24 if _LINUX else None

#: The level and the number of IP_TRANSPARENT (ip(7)), and of IPV6_TRANSPARENT
#: (linux/in6.h).
_TRANSPARENT = {_IPV4: (_IP, 19), _IPV6: (int(socket.IPPROTO_IPV6), 75)}


def check_source(text: str) -> str:
    """An address that sockets can be bound to, without a port.

    :raises ValueError: it is none of one host; the message says what is expected.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"expected {EXPECTED_SOURCE}") from None
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        raise ValueError(f"expected {EXPECTED_SOURCE}: this one is {mapped}")
    if address.is_multicast or address.is_unspecified or text == "255.255.255.255":
        raise ValueError(f"expected {EXPECTED_SOURCE}: it is not that of one host")
    return text


def family_of(source: str) -> int:
    """The family of an address: AF_INET or AF_INET6."""
    return _IPV6 if ":" in source else _IPV4


def _is_source(family: int) -> Any:
    def check(_: object, attribute: attrs.Attribute[str], value: str) -> None:
        if family_of(check_source(value)) != family:
            kind = "IPv4" if family == _IPV4 else "IPv6"
            raise ValueError(f"{attribute.name} is an {kind} address, not {value!r}")

    return attrs.validators.optional(check)


def _is_interface(_: object, __: object, value: str) -> None:
    check_interface(value)


@attrs.frozen(kw_only=True)
class DialOptions:
    """What is set on a socket before it is connected to a server.

    :ivar source4: the IPv4 address that it is bound to.
    :ivar source6: the same for IPv6; if link-local, with its interface: `fe80::1%eth0`.
    :ivar interface: it sends and receives by this interface only (SO_BINDTODEVICE),
        which takes no right since Linux 5.7.
    :ivar mark: the firewall mark of what it sends (SO_MARK), by which rules of routing
        choose; takes CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17.
    :ivar transparent: it may be bound to the address of another machine
        (IP_TRANSPARENT), and whoever dials for a client binds it to the client's; takes
        CAP_NET_RAW, or CAP_NET_ADMIN.  Then it has no address of its own.
    :ivar keepalive: of connections, from their beginning; unless given, the relay sets
        its own on those that last.
    :ivar user_timeout: likewise, in seconds; 0 is the relay's.
    :raises ValueError: a value can't be one.
    """

    source4: str | None = attrs.field(default=None, validator=_is_source(_IPV4))
    source6: str | None = attrs.field(default=None, validator=_is_source(_IPV6))
    interface: str | None = attrs.field(
        default=None, validator=attrs.validators.optional(_is_interface)
    )
    mark: int | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(
            attrs.validators.and_(attrs.validators.ge(1), attrs.validators.le(MAX_MARK))
        ),
    )
    transparent: bool = attrs.field(default=False)
    keepalive: Keepalive | None = None
    user_timeout: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))

    def __attrs_post_init__(self) -> None:
        if self.transparent and (self.source4 or self.source6):
            raise ValueError("transparent takes the client's address: leave out source")

    @classmethod
    def of(
        cls,
        sources: Sequence[str] = (),
        interface: str | None = None,
        mark: int | None = None,
    ) -> DialOptions:
        """Those of addresses of either family, one of each at most."""
        by_family = {family_of(each): each for each in sources}
        return cls(
            source4=by_family.get(_IPV4),
            source6=by_family.get(_IPV6),
            interface=interface,
            mark=mark,
        )

    def source(self, family: int) -> str | None:
        """The address of a family that sockets are bound to; None: any.

        :raises OSError: there is one of the other family only.
        """
        source = self.source4 if family == _IPV4 else self.source6
        if source is None and (self.source4 or self.source6):
            kind = "IPv4" if family == _IPV4 else "IPv6"
            raise OSError(errno.EAFNOSUPPORT, f"no source is an {kind} address")
        return source

    def check(self) -> None:
        """Try them on sockets that are closed again.

        :raises OSError: this process or this machine can't; `strerror` is one line,
            which names the option.
        """
        if self == DialOptions():
            return
        sources = ((_IPV4, self.source4), (_IPV6, self.source6))
        families = [family for family, source in sources if source is not None]
        for family in families or [_IPV4 if _has_ipv4() else _IPV6]:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                self.prepare(sock, family)

    def prepare(self, sock: Any, family: int) -> None:
        """Set them on a socket of a family, of any type; UNIX sockets have none.

        :raises OSError: as :meth:`check` does.
        """
        if family not in (_IPV4, _IPV6):
            return
        if self.interface is not None:
            name = self.interface
            _set(sock, _INTERFACE, name.encode() + b"\0", f"interface {name!r}")
        if self.mark is not None:
            # The kernel takes the bits of an unsigned number.
            bits = self.mark.to_bytes(4, sys.byteorder)
            _set(sock, _MARK, bits, f"mark {self.mark}")
        if self.transparent:
            set_transparent(sock, family)
        source = self.source(family)
        if source is not None:
            _bind(sock, source)

    def prepare_stream(self, sock: Any, family: int) -> None:
        """The same for a socket of a connection, which has all of them.

        :raises OSError: as :meth:`check` does.
        """
        self.prepare(sock, family)
        if self.keepalive is not None:
            set_keepalive(sock, self.keepalive)
        if self.user_timeout:
            set_user_timeout(sock, self.user_timeout)


#: What a right that is missing is called.
_RIGHTS = {
    _INTERFACE: "takes the right CAP_NET_RAW before Linux 5.7",
    _MARK: "takes the right CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17",
}


def _set(sock: Any, option: int | None, value: bytes, what: str) -> None:
    if option is None:
        raise OSError(errno.ENOPROTOOPT, f"{what} needs Linux")
    try:
        sock.setsockopt(_SOCKET, option, value)
    except PermissionError as problem:
        raise OSError(problem.errno, f"{what} {_RIGHTS[option]}") from problem
    except OSError as problem:
        why = problem.strerror
        if problem.errno == errno.ENODEV:
            why = "there is none of that name"
        raise OSError(problem.errno, f"{what}: {why}") from problem


def set_transparent(sock: Any, family: int) -> None:
    """Have a socket take addresses that are not this machine's for its own.

    It may be bound to one, and accept connections to any that the kernel brings to it
    (TPROXY); rules can tell what is for such sockets (`socket transparent`, nft(8)).

    :param family: the socket's, AF_INET or AF_INET6.
    :raises OSError: this process or this machine can't; `strerror` is one line.
    """
    if not _LINUX:
        raise OSError(errno.ENOPROTOOPT, "transparent needs Linux")
    try:
        sock.setsockopt(*_TRANSPARENT[family], 1)
    except PermissionError as problem:
        why = "transparent takes the right CAP_NET_RAW"
        raise OSError(problem.errno, why) from problem
    except OSError as problem:
        raise OSError(problem.errno, f"transparent: {problem.strerror}") from problem


def is_transparent(sock: Any) -> bool:
    """Whether that is set already: whoever has set it may have given up the right."""
    found = _TRANSPARENT.get(sock.family)
    return found is not None and bool(sock.getsockopt(*found))


def bind_to(sock: Any, address: Any) -> None:
    """Bind a socket to an address, as the socket module has it, with port 0.

    :raises OSError: see bind(2).
    """
    if _NO_PORT is not None:
        # Without it, the port is chosen now, among those of no other socket.
        try:  # noqa: SIM105 - suppress() costs more than the call
            sock.setsockopt(_IP, _NO_PORT, 1)
        except OSError:
            # An old kernel, or a sandbox.
            pass
    sock.bind(address)


def _bind(sock: Any, source: str) -> None:
    try:
        address: Any = (source, 0)
        if "%" in source:
            # Nothing is looked up but the scope of fe80::1%eth0.
            numeric = socket.AI_NUMERICHOST
            address = socket.getaddrinfo(source, 0, flags=numeric)[0][4]
        bind_to(sock, address)
    except OSError as problem:
        what, number = f"source {source!r}", problem.errno
        if isinstance(problem, socket.gaierror):
            # Its interface does not exist.
            number = errno.ENODEV
        if number == errno.EADDRNOTAVAIL:
            raise OSError(number, f"{what} is no address of this machine") from problem
        raise OSError(number, f"{what}: {problem.strerror}") from problem


def _has_ipv4() -> bool:
    try:
        socket.socket(_IPV4, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True
