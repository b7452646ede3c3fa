"""Gates: which clients may connect.

A gate is asked once for each accepted connection, before anything is dialled
for it, and hands out a lease that the session gives back when it has ended
(:class:`relayd.core.interfaces.IGate`).  A relay without one admits all.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable

from zope.interface import implementer

from relayd.core.addresses import host_of
from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease
from relayd.core.networks import Network
from relayd.core.session import Session


@implementer(IGate, ILease)
class ClientGate:
    """Admits the clients of some networks; it counts nothing.

    Clients of UNIX sockets have no address: the permissions of the socket's file have
    admitted them.

    :param networks: an IPv4 client of an IPv6 socket counts as IPv4.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks = tuple(networks)
        # Clients return; saves 25,000 instructions for each session.
        self._admits = functools.lru_cache(maxsize=1024)(self._is_inside)

    def enter(self, session: Session) -> ILease:
        host = host_of(session.client)
        # A client that has neither an address nor a socket file can't be identified.
        if self._admits(host) if host else session.client.startswith("unix:"):
            return self
        raise Refused("no --allow-client names this client")

    def release(self) -> None:
        """Nothing to give back."""

    def _is_inside(self, host: str) -> bool:
        address = ipaddress.ip_address(host)
        # Not of other addresses that embed one (6to4): a client may choose those.
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)
