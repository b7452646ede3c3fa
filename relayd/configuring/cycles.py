"""Finds loops of relays before they start.

A relay whose server is its own listener opens a connection for each connection until
descriptors run out, and so do several relays in a loop.  Whether a relay leads to
another is decided by their addresses, both short forms and Twisted's endpoint strings.
Names are not looked up for this, except those that always mean this machine; a loop
through another name is found at run time (:mod:`relayd.core.hops`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import attrs

from relayd.configuring.address_grammar import Address, PortRange, UnixPath
from relayd.configuring.address_settings import LISTEN
from relayd.configuring.ends import (
    EVERY,
    LOOPBACK,
    address_of,
    is_this_machine,
    real_path,
    short_form,
    sockets_of,
)
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import servers_given
from relayd.core.networks import Ip
from relayd.core.setting_types import Kind
from relayd.net.own_addresses import is_own


@attrs.frozen(eq=False)
class _Way:
    """A relay, or one port of a range of it.

    :ivar listeners: as they were given, and their addresses.
    :ivar destinations: their addresses.
    :ivar options: with which those were given.
    """

    kind: Kind
    listeners: Sequence[tuple[Given, Address]]
    destinations: Sequence[Address]
    options: Sequence[str]


def cycles(
    relays: Iterable[RelaySection], own: Callable[[Ip], bool] = is_own
) -> Iterator[str]:
    """The loops that there are of relays; a line for each, which lists its listeners.

    :param own: whether an address is this machine's.
    """
    ways = [way for each in relays if each.kind != "socks4" for way in _ways(each)]
    ways = [way for way in ways if way.listeners]
    listeners = _by_socket(ways)
    leads_to = [sorted(_leads_to(way, listeners, own)) for way in ways]
    seen: set[int] = set()
    # The ports of two ranges make as many loops, and one line.
    told: set[str] = set()
    for start in _onward(leads_to):
        loop = [] if start in seen else _find_loop(start, leads_to)
        seen.update(loop)
        line = _told([ways[number] for number in loop])
        if line and line not in told:
            told.add(line)
            yield line


def _told(loop: Sequence[_Way]) -> str:
    """What is wrong with the relays of a loop; empty if there are none."""
    if not loop:
        return ""
    first, _ = loop[0].listeners[0]
    found = [option for way in loop for option in way.options]
    options = " or ".join(dict.fromkeys(found))
    if len(loop) == 1:
        return (
            f"{first.place.prefix}{first} is relayed to itself: give another {options}"
        )
    # Ports of one range may follow each other.
    names = " to ".join(name for name, _ in groupby(map(_name, loop)))
    return (
        f"{first.place.prefix}a loop of relays: {first.place.option(LISTEN)} {names} to"
        f" {_name(loop[0])}: give one of them another {options}"
    )


def _name(way: _Way) -> str:
    return repr(way.listeners[0][0].text)


def _ways(relay: RelaySection) -> Iterator[_Way]:
    listeners, destinations = relay.all(LISTEN.key), servers_given(relay)
    ranges = [each.value for each in listeners if isinstance(each.value, PortRange)]
    options = {each.place.option(each.setting): None for each in destinations}
    for number in range(len(ranges[0]) if ranges else 1):
        yield _Way(
            relay.kind,
            [(each, _at(each.value, number)) for each in listeners],
            [_at(each.value, number) for each in destinations],
            list(options),
        )


def _at(address: Address | PortRange, number: int) -> Address:
    if isinstance(address, PortRange):
        # Ranges that are not equally long are reported by another check.
        return address[min(number, len(address) - 1)]
    return address


#: What a listener is bound to: the kind of relay, the port or the path, the family, the
#: address.
_Bound = tuple[Kind, int | str, int, str]


def _by_socket(ways: Sequence[_Way]) -> dict[_Bound, list[int]]:
    """The numbers of the ways that listen at each address."""
    found: dict[_Bound, list[int]] = {}
    for number, way in enumerate(ways):
        for _, address in way.listeners:
            where = short_form(address, server=True)
            if isinstance(where, UnixPath):
                found.setdefault((way.kind, real_path(where), 0, ""), []).append(number)
            elif where is not None:
                for family, host in sockets_of(where.host):
                    key = (way.kind, where.port, family, host)
                    found.setdefault(key, []).append(number)
    return found


def _leads_to(
    way: _Way, listeners: Mapping[_Bound, Sequence[int]], own: Callable[[Ip], bool]
) -> set[int]:
    """The numbers of the ways whose listeners are destinations of this one."""
    found: set[int] = set()
    for address in way.destinations:
        there = short_form(address, server=False)
        if isinstance(there, UnixPath):
            found.update(listeners.get((way.kind, real_path(there), 0, ""), ()))
        elif there is not None:
            for host in _addresses(there.host):
                end = way.kind, there.port, host.version
                found.update(listeners.get((*end, str(host)), ()))
                everywhere = listeners.get((*end, EVERY), ())
                if everywhere and own(host):
                    found.update(everywhere)
    return found


def _onward(leads_to: Sequence[Sequence[int]]) -> list[int]:
    """The ways from which one may come to a loop.

    Most lead out of the process at once; those are left out, and what leads only to
    them.  So the search for loops takes no time where there are none.
    """
    comes_from: dict[int, list[int]] = {}
    for number, there in enumerate(leads_to):
        for each in there:
            comes_from.setdefault(each, []).append(number)
    left = [len(there) for there in leads_to]
    out = [number for number, there in enumerate(left) if not there]
    for number in out:
        for each in comes_from.get(number, ()):
            left[each] -= 1
            if not left[each]:
                out.append(each)
    return [number for number, there in enumerate(left) if there]


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


def _addresses(host: str | None) -> Iterator[Ip]:
    """The addresses of a destination's host that are known without a look-up."""
    if host is None:
        yield LOOPBACK[0]
    elif is_this_machine(host):
        yield from LOOPBACK
    elif (address := address_of(host)) is not None:
        # connect(2) treats the wildcard as this machine.
        yield LOOPBACK[address.version == 6] if address.is_unspecified else address
