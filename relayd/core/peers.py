"""Peers by their networks: whether a connection comes from one that is meant."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable

from relayd.core.addresses import host_of
from relayd.core.networks import UNIX, Ip, Network, parse_network, unmapped


class Peers:
    """The peers of some networks.

    :param networks: networks, or how they are written; `unix` for the peers of UNIX
        sockets, which have no address.
    :raises ValueError: one is neither.
    """

    def __init__(self, networks: Iterable[Network | str]) -> None:
        if isinstance(networks, str):
            raise ValueError(f"a list of networks, not one: {networks!r}")
        given = list(networks)
        self._unix = UNIX in given
        self._networks = tuple(_network(each) for each in given if each != UNIX)
        # Balancers return.
        self._has = functools.lru_cache(maxsize=1024)(self._is_inside)

    def __bool__(self) -> bool:
        return self._unix or bool(self._networks)

    def __contains__(self, peer: object) -> bool:
        """Whether a peer, by its address as text, is one of them.

        An IPv4 peer of an IPv6 socket counts as IPv4.
        """
        name = str(peer)
        host = host_of(name)
        return self._has(host) if host else self._unix and name.startswith("unix:")

    def _is_inside(self, host: str) -> bool:
        address: Ip = ipaddress.ip_address(host)
        # Not of other addresses that embed one (6to4): a peer may choose those.
        address = unmapped(address)
        return any(address in network for network in self._networks)


def _network(given: Network | str) -> Network:
    if isinstance(given, str):
        return parse_network(given)
    if not isinstance(given, Network):
        raise ValueError(f"no network, nor how one is written: {given!r}")
    return given
