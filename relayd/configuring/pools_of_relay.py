"""The pools of a relay: which servers each has, and which one is for a server name.

A destination belongs to the pool that it names (`pool=`), or else to `default`.  The
servers that `--sni` has for a name are a pool of their own, which is called as the name
is (:attr:`~relayd.configuring.route_settings.SniEntry.pool`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from relayd.configuring.address_settings import DEST
from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.route_settings import SNI, SniEntry
from relayd.configuring.server_grammar import options_of, without_pool
from relayd.core.route_spec import DEFAULT


def pools_of(
    destinations: Iterable[Any], sni: Sequence[SniEntry] = ()
) -> dict[str, list[Any]]:
    """The servers of each pool of a relay.

    :param destinations: as :func:`~relayd.configuring.config.each_port` has them: of
        one port.
    :param sni: of the relay: the same for each port.
    :return: destinations by pool, of which none says any more to which it belongs:
        `default`, which may be empty; those that `pool=` names, in order; those of
        server names, in order.
    """
    found: dict[str, list[Any]] = {DEFAULT: []}
    for each in destinations:
        name = options_of(each).pool or DEFAULT
        found.setdefault(name, []).append(without_pool(each))
    for entry in sni:
        if not isinstance(entry.target, str):
            found.setdefault(entry.pool, []).append(entry.target)
    return found


def servers_of(relay: Relay | UdpRelay) -> list[Any]:
    """All destinations of a relay, of whatever pool, and of server names."""
    sni = relay.sni if isinstance(relay, Relay) else ()
    own = [each.target for each in sni if not isinstance(each.target, str)]
    return [*relay.destinations, *own]


def sni_table(relay: Relay) -> dict[str, str]:
    """Which pool is for each server name, as `--sni` has them.

    :return: names of pools by pattern: a name in lower case, `*.` and what it ends
        with, or empty for any other.
    """
    return {entry.pattern: entry.pool for entry in relay.sni}


def servers_given(section: RelaySection) -> list[Given]:
    """All servers of a relay: its destinations, and those of its server names.

    :return: whose values are destinations; an error speaks of each as it was given.
    """
    return [each for _, each in with_pools(section)]


def with_pools(section: RelaySection) -> Iterator[tuple[str, Given]]:
    """The same, each with the name of its pool."""
    for each in section.all(DEST.key):
        yield options_of(each.value).pool or DEFAULT, each
    for each in section.all(SNI.key):
        if not isinstance(each.value.target, str):
            yield each.value.pool, as_server(each)


def as_server(given: Given) -> Given:
    """A server of a server name as one that was given; anything else as it is."""
    if given.setting is SNI and not isinstance(given.value.target, str):
        return attrs.evolve(given, value=given.value.target)
    return given
