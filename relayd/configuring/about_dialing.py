"""Checks of how servers are dialled: what can't be set, and what contradicts itself.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import chain

from relayd.configuring.address_grammar import (
    DIGITS,
    EndpointString,
    HostPort,
    OriginalAddress,
    PortRange,
    UdpAddress,
    UnixPath,
    dialled_host,
)
from relayd.configuring.dial_settings import INTERFACE, MARK, SOURCE, TRANSPARENT
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import servers_given
from relayd.configuring.route_settings import ROUTE
from relayd.configuring.server_grammar import options_of
from relayd.core import settings
from relayd.net.dial_options import family_of

_FAMILIES = {int(socket.AF_INET): "IPv4", int(socket.AF_INET6): "IPv6"}


def about_dialing(section: RelaySection) -> Iterator[str]:
    """What is wrong with how one relay dials its servers."""
    sources, servers = section.all(SOURCE.key), servers_given(section)
    for options in _of_sockets(section):
        foreign = next(filter(_is_foreign, servers), None)
        if foreign is not None:
            given = options[0]
            own = "; or give it bindAddress=" if given.setting is SOURCE else ""
            yield (
                f"{given.place.prefix}{given} is not possible at {foreign}, which"
                f" Twisted dials: write a short form such as 10.0.0.5:80{own}"
            )
    yield from _about_families(section, sources, servers)
    yield from _about_user_timeout(section)


def _of_sockets(section: RelaySection) -> list[list[Given]]:
    """What was given that is set on sockets of ours."""
    found = (section.all(row.key) for row in (SOURCE, INTERFACE, MARK, TRANSPARENT))
    return [each for each in found if each and each[0].value]


def _about_families(
    section: RelaySection, sources: Sequence[Given], servers: Sequence[Given]
) -> Iterator[str]:
    by_family: dict[int, Given] = {}
    for each in sources:
        first = by_family.setdefault(family_of(each.value), each)
        if first is not each:
            kind = _FAMILIES[family_of(each.value)]
            yield (
                f"{each.place.prefix}{each} is the second source for {kind}, after"
                f" {first}: give one of each family"
            )
    if not sources or SOURCE.key in section.faulty:
        return
    place = sources[0].place
    for server in servers:
        family = family_of_server(server.value)
        own = options_of(server.value).source
        if family and family not in by_family and own is None:
            kind = _FAMILIES[family]
            yield (
                f"{place.prefix}{sources[0]} is not possible at {server}: give a source"
                f" for {kind}, too"
            )
            break
    if section.kind == "socks4" and int(socket.AF_INET) not in by_family:
        yield (
            f"{place.prefix}{sources[0]} is not enough: clients of SOCKS4 ask for IPv4"
            " addresses; give a source for IPv4, too"
        )


def _about_user_timeout(section: RelaySection) -> Iterator[str]:
    given = section.one(settings.USER_TIMEOUT)
    row = settings.STALL_TIMEOUT
    if given is None or row.key in section.faulty:
        return
    stall = section.one(row)
    seconds = row.default if stall is None else stall.value
    if 0 < given.value <= seconds:
        name = given.place.option(row)
        yield (
            f"{given.place.prefix}{given} must be longer than {name}, which is"
            f" {seconds:g}, or 0"
        )


def dials_no_socket(sections: Sequence[RelaySection]) -> Iterator[str]:
    """Options of sockets where all servers are UNIX sockets, which have none of them.

    Those of the command line, or of `[defaults]`, are for those relays that can.
    """
    useful: dict[int, bool] = {}
    found: dict[int, Given] = {}
    for section in sections:
        servers = servers_given(section)
        # A route may make servers of its own.
        all_unix = bool(servers) and all(map(is_unix, servers))
        all_unix = all_unix and section.one(ROUTE) is None
        for given in chain.from_iterable(_of_sockets(section)):
            found[id(given)] = given
            useful[id(given)] = useful.get(id(given), False) or not all_unix
    for key, given in found.items():
        if not useful[key]:
            yield (
                f"{given.place.prefix}{given} does nothing: all servers are UNIX"
                " sockets; leave it out"
            )


def is_unix(given: Given) -> bool:
    """Whether a server, or a listener, is a UNIX socket."""
    address = given.value
    if isinstance(address, EndpointString):
        return address.text.lower().startswith("unix:")
    return isinstance(address, UnixPath)


def _is_foreign(server: Given) -> bool:
    return isinstance(server.value, EndpointString) and not is_unix(server)


def family_of_server(address: object) -> int:
    """The family of a server's address; 0 if it is a name, or has none."""
    if isinstance(address, PortRange):
        address = address.first
    if isinstance(address, OriginalAddress) and address.host is None:
        return 0
    if not isinstance(address, HostPort | UdpAddress | OriginalAddress):
        return 0
    host = dialled_host(address.host)
    if ":" in host:
        return int(socket.AF_INET6)
    return int(socket.AF_INET) if DIGITS.fullmatch(host.rpartition(".")[2]) else 0
