"""Parses destinations: an address, or a name that stands for several, and options.

10.0.0.5:80,weight=3             an address, as :mod:`.address_grammar` has it, with
                                 options (:mod:`.server_options`)
dns:db.example.com:5432          a server for each address of a name, followed as it
                                 changes
srv:_http._tcp.example.com       a server for each of a service's
udp:dns:ns.example.com:53        the same for datagrams (`udp:srv:` as well)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    OriginalAddress,
    PortRange,
    UdpAddress,
    UnixPath,
    parse_destination,
    parse_range,
)
from relayd.configuring.server_options import (
    ADDRESS,
    PLAIN,
    ServerOptions,
    load_options,
    no_option,
    parse_options,
    split,
)
from relayd.core.errors import ConfigError
from relayd.core.names import host_port, is_name


@attrs.frozen
class ServersOf:
    """A name that stands for several servers.

    :ivar how: it is looked up as a host, or as a service.
    :ivar port: of a host; 0 for a service, which says it itself.
    :ivar udp: the servers are of datagrams.
    """

    how: Literal["dns", "srv"]
    name: str
    port: int = 0
    udp: bool = False
    options: ServerOptions = attrs.field(default=PLAIN, kw_only=True)

    def __str__(self) -> str:
        where = host_port(self.name, self.port) if self.port else self.name
        return f"{'udp:' if self.udp else ''}{self.how}:{where}"


#: What a destination may be.
Destination = Address | OriginalAddress | ServersOf

_NAMED = re.compile(r"(udp:)?(dns|srv):(.*)", re.DOTALL)

#: A label of a service's name may begin with an underscore (RFC 2782).
_SERVICE = re.compile(r"_[A-Za-z0-9-]+(\._(tcp|udp))?\.[^_.].*")


def parse_server(text: str) -> Destination | PortRange:
    """Parse a destination, which may have several ports, and options of its own.

    :raises ConfigError: `text` is not an address, or an option is not valid.
    """
    written, options = split(text)
    try:
        where = _parse(written)
    except ConfigError:
        if problem := no_option(written, text, _parse_short):
            raise problem from None
        raise
    if not options:
        return where
    return _with(where, parse_options(options, text, datagrams=is_udp(where)))


def load_server(table: Mapping[str, Any]) -> Destination | PortRange:
    """A destination that is a table of a file.

    :raises ConfigError: its address is none.
    :raises ValueError: an option is not valid.
    """
    address = table.get(ADDRESS)
    if not isinstance(address, str):
        raise ValueError(f'expected {ADDRESS} = "10.0.0.5:80", or the like, in it')
    where = _parse(address)
    return _with(where, load_options(table, datagrams=is_udp(where)))


def is_udp(where: Destination | PortRange) -> bool:
    """Whether a server is one of datagrams."""
    if isinstance(where, ServersOf | OriginalAddress):
        return where.udp
    return isinstance(
        where.first if isinstance(where, PortRange) else where, UdpAddress
    )


def _with(
    where: Destination | PortRange, options: ServerOptions
) -> Destination | PortRange:
    if isinstance(where, PortRange):
        return PortRange(attrs.evolve(where.first, options=options), where.last)
    return attrs.evolve(where, options=options)


def options_of(where: Destination | PortRange) -> ServerOptions:
    """What is said of the server at an address."""
    return where.first.options if isinstance(where, PortRange) else where.options


def without_pool(where: Destination | PortRange) -> Destination | PortRange:
    """The same server, of which is not said to which pool it belongs."""
    options = options_of(where)
    if options.pool is None:
        return where
    return _with(where, attrs.evolve(options, pool=None))


def _parse_short(text: str) -> None:
    """See that a text is a destination that has no commas.

    :raises ConfigError: it is none.
    """
    if isinstance(_parse(text), UnixPath | EndpointString):
        raise ConfigError(f"{text!r} may have commas")


def _parse(text: str) -> Destination | PortRange:
    """A destination without its options."""
    match = _NAMED.fullmatch(text)
    if match is None:
        return parse_range(text, parse_destination)
    udp, how, rest = bool(match[1]), match[2], match[3]
    if how == "srv":
        plain = rest.removesuffix(".")
        if not _SERVICE.fullmatch(plain) or not is_name(plain.replace("_", "")):
            raise ConfigError(
                f"bad address {text!r}: expected srv: with the name of a service, such"
                " as srv:_http._tcp.example.com"
            )
        return ServersOf("srv", plain, udp=udp)
    try:
        where = parse_destination(rest)
    except ConfigError as problem:
        why = str(problem).removeprefix(f"bad address {rest!r}: ")
        raise ConfigError(f"bad address {text!r}: {why}") from None
    if not isinstance(where, HostPort) or not where.host or not is_name(where.host):
        raise ConfigError(
            f"bad address {text!r}: expected dns: with a name and a port, such as"
            " dns:db.example.com:5432"
        )
    return ServersOf("dns", where.host, where.port, udp)
