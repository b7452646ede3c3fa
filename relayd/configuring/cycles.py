"""Refuses loops of relays before they start.

A relay whose server is its own listener opens a connection for each connection until
descriptors run out, and so do several relays in a loop.  Whether a relay leads to
another is decided by their addresses, both short forms and Twisted's endpoint strings.
Names are not looked up for this, except those that always mean this machine; a loop
through another name is found at run time (:mod:`relayd.core.hops`).
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.endpoint_strings import parts
from relayd.core.errors import ConfigError
from relayd.core.networks import Ip
from relayd.net.own_addresses import is_own

_LOOPBACK: tuple[Ip, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))

#: Endpoint types whose first or second field is a port, and those that wrap another.
_BY_PORT = ("tcp", "tcp6", "ssl", "tls")
_WRAPPERS = ("haproxy",)


def refuse_cycles(
    relays: Sequence[Relay | UdpRelay], own: Callable[[Ip], bool] = is_own
) -> None:
    """Refuse a loop of relays.

    :param own: whether an address is this machine's.
    :raises ConfigError: there is a loop; the message lists its listeners.
    """
    leads_to = [
        [
            number
            for number, other in enumerate(relays)
            if type(other) is type(relay)
            and any(_leads(there, other.listen, own) for there in relay.destinations)
        ]
        for relay in relays
    ]
    for start in range(len(relays)):
        loop = _find_loop(start, leads_to)
        if len(loop) == 1:
            listen = relays[start].listen
            raise ConfigError(
                f"--listen '{listen}' is relayed to itself: give another --dest"
            )
        if loop:
            names = " to ".join(f"'{relays[number].listen}'" for number in loop)
            raise ConfigError(
                f"a loop of relays: --listen {names} to '{relays[start].listen}':"
                " give one of them another --dest"
            )


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


def _leads(there: Address, listen: Address, own: Callable[[Ip], bool]) -> bool:
    """Whether a destination is the address of a listener."""
    destination, listener = (
        _short_form(there, server=False),
        _short_form(listen, server=True),
    )
    if isinstance(destination, UnixPath) and isinstance(listener, UnixPath):
        return os.path.realpath(destination.path) == os.path.realpath(listener.path)
    if not isinstance(destination, HostPort) or not isinstance(listener, HostPort):
        return False
    if destination.port != listener.port:
        return False
    return any(
        _serves(listener.host, address, own) for address in _addresses(destination.host)
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
