"""Finds listeners of one process that can't be open at the same time.

The kernel would refuse the second one.  This says so before anything starts, and which
two they are.  Names and Twisted's endpoint strings are compared as they are written;
what is left is found as the listeners are opened.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address

from relayd.configuring.address_grammar import (
    Address,
    HostPort,
    PortRange,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.address_settings import LISTEN
from relayd.configuring.endpoint_strings import passed_name
from relayd.configuring.given import Given, RelaySection

#: What two listeners that may be one have in common, and what tells them apart.
_End = tuple[str, int | str]


def clashes(relays: Iterable[RelaySection]) -> Iterator[str]:
    """A line for each listener whose address another one has."""
    taken: dict[_End, list[tuple[str | None, Given]]] = {}
    for relay in relays:
        for given in relay.all(LISTEN.key):
            for end, host in _ends(given.value):
                there = taken.setdefault(end, [])
                other = next((one for its, one in there if _meet(its, host)), None)
                if other is not None:
                    where = f" ({other.place})" if other.place.file else ""
                    yield (
                        f"{given.place.prefix}{given} is the address of another"
                        f" listener, {other}{where}: give each its own"
                    )
                    break
                there.append((host, given))


def _ends(address: Address | PortRange) -> Iterator[tuple[_End, str | None]]:
    """Each port or path of an address, with its host."""
    if isinstance(address, PortRange):
        for number in range(len(address)):
            yield from _ends(address[number])
    elif isinstance(address, UnixPath):
        yield ("unix", os.path.realpath(address.path)), ""
    elif isinstance(address, UdpAddress) and address.passed:
        yield ("udp:systemd", address.passed), ""
    elif isinstance(address, HostPort | UdpAddress):
        # Port 0 is another one each time.
        if address.port:
            kind = "udp" if isinstance(address, UdpAddress) else "tcp"
            yield (kind, address.port), address.host
    elif name := passed_name(address.text.removeprefix("haproxy:")):
        # The kernel would give each of them some of the clients.
        yield ("systemd", name), ""
    elif not address.text.startswith(("systemd:", "haproxy:systemd:")):
        yield ("text", address.text), ""


def _meet(one: str | None, other: str | None) -> bool:
    """Whether two hosts can't both be listened on, at one port."""
    if one == other or one is None or other is None:
        return True
    first, second = _address(one), _address(other)
    if first is None or second is None or first.version != second.version:
        return False
    return first == second or first.is_unspecified or second.is_unspecified


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
