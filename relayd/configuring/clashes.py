"""Finds listeners of one process that can't be open at the same time.

The kernel would refuse the second one.  This says so before anything starts, and which
two they are.  Names other than `localhost` are compared as they are written; what is
left is found as the listeners are opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    PortRange,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.address_settings import (
    LISTEN,
    SOCKS4_LISTEN,
    SOCKS4_LISTENER,
)
from relayd.configuring.endpoint_strings import passed_name
from relayd.configuring.ends import EVERY, real_path, short_form, sockets_of
from relayd.configuring.given import Given, RelaySection

#: What a socket is bound to: of which kind it is, the port or the path, the family, the
#: address.  `_ANY` stands for those of any address.
_Bound = tuple[str, int | str, int, str]

_ANY = "any"


def clashes(
    relays: Iterable[RelaySection], others: Iterable[Given] = ()
) -> Iterator[str]:
    """A line for each listener whose address another one has.

    :param others: listeners that are no relay's.
    """
    taken: dict[_Bound, Given] = {}
    for given in chain(chain.from_iterable(map(_listeners, relays)), others):
        for kind, end, family, host in _bound(given.value):
            asked = (_ANY,) if host == EVERY else (host, EVERY)
            there = (taken.get((kind, end, family, each)) for each in asked)
            other = next(filter(None, there), given)
            if other is not given:
                yield _clash(given, other)
                break
            for each in (host, _ANY):
                taken.setdefault((kind, end, family, each), given)


def _listeners(relay: RelaySection) -> list[Given]:
    """A relay's listeners; a proxy need not say any."""
    given = relay.all(LISTEN.key)
    if relay.kind != "socks4" or given or LISTEN.key in relay.faulty:
        return given
    place = relay.place.below(LISTEN.key)
    return [Given(SOCKS4_LISTEN, str(SOCKS4_LISTENER), SOCKS4_LISTENER, place)]


def _clash(given: Given, other: Given) -> str:
    where = f" ({other.place})" if other.place.file else ""
    return (
        f"{given.place.prefix}{given} is the address of another listener,"
        f" {other}{where}: give each its own"
    )


def _bound(address: Address | PortRange) -> Iterator[_Bound]:
    """What a listener is bound to, at each of its ports."""
    if isinstance(address, PortRange):
        for number in range(len(address)):
            yield from _bound(address[number])
        return
    where = short_form(address, server=True)
    if isinstance(where, UnixPath):
        yield "unix", real_path(where), 0, ""
    elif where is not None:
        kind = "udp" if isinstance(address, UdpAddress) else "tcp"
        # Port 0 is another one each time.
        for family, host in sockets_of(where.host) if where.port else ():
            yield kind, where.port, family, host
    elif isinstance(address, UdpAddress):
        yield "udp:systemd", address.passed, 0, ""
    elif isinstance(address, EndpointString):
        text = address.text
        if name := passed_name(text):
            # The kernel would give each of them some of the clients.
            yield "systemd", name, 0, ""
        elif not text.startswith("systemd:"):
            yield "text", text, 0, ""
