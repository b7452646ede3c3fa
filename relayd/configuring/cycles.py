"""Finds loops of relays before they start.

A relay whose server is its own listener opens a connection for each connection until
descriptors run out, and so do several relays in a loop.  Whether a relay leads to
another is decided by their addresses, both short forms and Twisted's endpoint strings.
Names are not looked up for this, except those that always mean this machine; a loop
through another name is found at run time (:mod:`relayd.core.hops`).
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address

import attrs

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    PortRange,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.endpoint_strings import parts
from relayd.configuring.given import Given, RelaySection
from relayd.core.networks import Ip
from relayd.core.setting_types import Kind
from relayd.net.own_addresses import is_own

_LOOPBACK: tuple[Ip, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

#: Endpoint types whose first or second field is a port, and those that wrap another.
_BY_PORT = ("tcp", "tcp6", "ssl", "tls")
_WRAPPERS = ("haproxy",)


@attrs.frozen(eq=False)
class _Way:
    """A relay, or one port of a range of it.

    :ivar listeners: as they were given, and their addresses.
    :ivar destinations: their addresses.
    """

    kind: Kind
    listeners: Sequence[tuple[Given, Address]]
    destinations: Sequence[Address]


def cycles(
    relays: Iterable[RelaySection], own: Callable[[Ip], bool] = is_own
) -> Iterator[str]:
    """The loops that there are of relays; a line for each, which lists its listeners.

    :param own: whether an address is this machine's.
    """
    ways = [way for each in relays if each.kind != "socks4" for way in _ways(each)]
    ways = [way for way in ways if way.listeners]
    listeners = _by_end(ways)
    leads_to = [sorted(_leads_to(way, listeners, own)) for way in ways]
    told: set[int] = set()
    for start, way in enumerate(ways):
        loop = [] if start in told else _find_loop(start, leads_to)
        told.update(loop)
        first, _ = way.listeners[0]
        if len(loop) == 1:
            yield (
                f"{first.place.prefix}{first} is relayed to itself: give another"
                f" {first.place.option(DEST)}"
            )
        elif loop:
            names = " to ".join(_name(ways[number]) for number in loop)
            option = first.place.option(LISTEN)
            yield (
                f"{first.place.prefix}a loop of relays: {option} {names} to"
                f" {_name(way)}: give one of them another {first.place.option(DEST)}"
            )


def _name(way: _Way) -> str:
    return repr(way.listeners[0][0].text)


def _ways(relay: RelaySection) -> Iterator[_Way]:
    listeners, destinations = relay.all(LISTEN.key), relay.all(DEST.key)
    ranges = [each.value for each in listeners if isinstance(each.value, PortRange)]
    for number in range(len(ranges[0]) if ranges else 1):
        yield _Way(
            relay.kind,
            [(each, _at(each.value, number)) for each in listeners],
            [_at(each.value, number) for each in destinations],
        )


def _at(address: Address | PortRange, number: int) -> Address:
    if isinstance(address, PortRange):
        # Ranges that are not equally long are reported by another check.
        return address[min(number, len(address) - 1)]
    return address


#: What a listener and a destination that may be the same have in common: the kind of
#: relay, and the port or the path.
_End = tuple[str, int | str]


def _end(kind: Kind, where: HostPort | UnixPath) -> _End:
    if isinstance(where, UnixPath):
        return kind, os.path.realpath(where.path)
    return kind, where.port


def _by_end(
    ways: Sequence[_Way],
) -> dict[_End, list[tuple[int, HostPort | UnixPath]]]:
    """The listeners' short forms, each with the number of its way."""
    found: dict[_End, list[tuple[int, HostPort | UnixPath]]] = {}
    for number, way in enumerate(ways):
        for _, address in way.listeners:
            where = _short_form(address, server=True)
            if where is not None:
                found.setdefault(_end(way.kind, where), []).append((number, where))
    return found


def _leads_to(
    way: _Way,
    listeners: Mapping[_End, Sequence[tuple[int, HostPort | UnixPath]]],
    own: Callable[[Ip], bool],
) -> set[int]:
    """The numbers of the ways whose listeners are destinations of this one."""
    found = set()
    for address in way.destinations:
        there = _short_form(address, server=False)
        if there is not None:
            for number, listener in listeners.get(_end(way.kind, there), ()):
                if _leads(there, listener, own):
                    found.add(number)
    return found


def _find_loop(start: int, leads_to: Sequence[Sequence[int]]) -> list[int]:
    """The shortest path from `start` back to itself, or an empty list."""
    came_from: dict[int, int] = {}
    reached = [start]
    for number in reached:
        for there in leads_to[number]:
            if there == start:
                loop = [number]
                while loop[-1] != start:
                    loop.append(came_from[loop[-1]])
                return loop[::-1]
            if there not in came_from:
                came_from[there] = number
                reached.append(there)
    return []


def _leads(
    there: HostPort | UnixPath, listener: HostPort | UnixPath, own: Callable[[Ip], bool]
) -> bool:
    """Whether a destination is the address of a listener with the same end."""
    if isinstance(there, UnixPath) or isinstance(listener, UnixPath):
        return type(there) is type(listener)
    return any(
        _serves(listener.host, address, own) for address in _addresses(there.host)
    )


def _addresses(host: str | None) -> Iterator[Ip]:
    """The addresses of a destination's host that are known without a look-up."""
    if host is None:
        yield _LOOPBACK[0]
    elif _is_this_machine(host):
        yield from _LOOPBACK
    else:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_unspecified:
            # connect(2) treats it as this machine.
            yield _LOOPBACK[address.version == 6]
        else:
            yield address


def _serves(host: str | None, address: Ip, own: Callable[[Ip], bool]) -> bool:
    """Whether a listener on this host accepts connections to an address."""
    if host is None:
        return own(address)
    if _is_this_machine(host):
        return address in _LOOPBACK
    try:
        listens = ipaddress.ip_address(host)
    except ValueError:
        return False
    if listens.is_unspecified:
        return listens.version == address.version and own(address)
    return listens == address


def _is_this_machine(host: str) -> bool:
    name = host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


def _short_form(address: Address, *, server: bool) -> HostPort | UnixPath | None:
    """An address as a short form; None if it has none."""
    if isinstance(address, UdpAddress):
        return HostPort(address.host, address.port)
    if not isinstance(address, EndpointString):
        return address
    return _short_form_of_string(address.text, server=server)


def _short_form_of_string(text: str, *, server: bool) -> HostPort | UnixPath | None:
    try:
        values, named = parts(text)
    except ValueError:
        return None
    while values and values[0].lower() in _WRAPPERS:
        del values[0]
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
        return _short_form_of_string(named["endpoint"], server=False)
    if server:
        everywhere = "::" if kind.lower() == "tcp6" else "0.0.0.0"
        host, given = named.get("interface") or everywhere, ["", *given]
    else:
        host = named.get("host") or next(iter(given), "")
    port = named.get("port") or (given[1] if len(given) > 1 else "")
    return HostPort(host, int(port)) if host and port.isdigit() else None
