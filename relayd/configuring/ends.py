"""Addresses in forms that can be compared: which sockets a listener has, and where.

Two listeners clash, or a destination is a listener, by the same rules: a wildcard
stands for each address of its family, `localhost` for both loopback addresses, and an
IPv4 address written as an IPv6 one for the former.  Other names are compared as they
are written.
"""

from __future__ import annotations

import ipaddress
import os

from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    OriginalAddress,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.endpoint_strings import parts
from relayd.configuring.server_grammar import Destination, ServersOf
from relayd.core.networks import Ip, unmapped

LOOPBACK: tuple[Ip, ...] = (
    ipaddress.IPv4Address("127.0.0.1"),
    ipaddress.IPv6Address("::1"),
)

#: All addresses of a family, in what `sockets_of` returns.
EVERY = "*"

#: What stands for the family of a name that is not looked up.
NAMED = 0

#: Endpoint types whose first or second field is a port.
_BY_PORT = ("tcp", "tcp6", "ssl", "tls")


def sockets_of(host: str | None) -> list[tuple[int, str]]:
    """What a listener on a host is bound to.

    :param host: as of a short form; None for all addresses.
    :return: the version of IP (or `NAMED`), and the address (or `EVERY`), of each.
    """
    if host is None:
        return [(4, EVERY), (6, EVERY), (NAMED, EVERY)]
    if is_this_machine(host):
        return [(each.version, str(each)) for each in LOOPBACK]
    address = address_of(host)
    if address is None:
        return [(NAMED, host.lower().removesuffix("."))]
    return [(address.version, EVERY if address.is_unspecified else str(address))]


def address_of(host: str) -> Ip | None:
    """The address that a host is; None if it is a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return unmapped(address)


def is_this_machine(host: str) -> bool:
    """Whether a name always means this machine (RFC 6761, section 6.3)."""
    name = host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


def real_path(where: UnixPath) -> str:
    """The path of a UNIX socket, however it is written."""
    return os.path.realpath(where.path)


def short_form(address: Destination, *, server: bool) -> HostPort | UnixPath | None:
    """An address as a short form; None if it has none.

    :param server: it is a listener's, not a destination's.
    """
    if isinstance(address, ServersOf):
        return HostPort(address.name, address.port) if address.port else None
    if isinstance(address, OriginalAddress):
        return None
    if isinstance(address, UdpAddress):
        return None if address.passed else HostPort(address.host, address.port)
    if not isinstance(address, EndpointString):
        return address
    return _of_string(address.text, server=server)


def _of_string(text: str, *, server: bool) -> HostPort | UnixPath | None:
    try:
        values, named = parts(text)
    except ValueError:
        return None
    if not values:
        return None
    kind, *given = values
    if kind.lower() == "unix":
        path = named.get("address" if server else "path") or next(iter(given), "")
        return UnixPath(path) if path else None
    if kind.lower() not in _BY_PORT:
        return None
    if "endpoint" in named and not server:
        # `tls:`, whose host is the name in the certificate.
        return _of_string(named["endpoint"], server=False)
    if server:
        everywhere = "::" if kind.lower() == "tcp6" else "0.0.0.0"
        host, given = named.get("interface") or everywhere, ["", *given]
    else:
        host = named.get("host") or next(iter(given), "")
    port = named.get("port") or (given[1] if len(given) > 1 else "")
    return HostPort(host, int(port)) if host and port.isdigit() else None
