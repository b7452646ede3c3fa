"""Follows the names of a pool's destinations: `dns:` and `srv:`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred

from relayd.configuring.address_grammar import HostPort, UdpAddress
from relayd.configuring.config import FlowPoolSettings
from relayd.configuring.server_grammar import ServersOf
from relayd.configuring.server_options import ServerOptions
from relayd.core.names import host_port
from relayd.datagrams.servers import is_one_host
from relayd.net.broadcast import is_broadcast
from relayd.net.dns import Answer, Found, NameServers
from relayd.net.monotonic import monotonic
from relayd.upstreams.names import Follower
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


class ServerMaker(Protocol):
    """Makes servers (:class:`relayd.operating.servers.Maker`, or that of flows)."""

    def named(
        self, address: Any, options: ServerOptions, name: str, tier: int, weight: int
    ) -> Server:
        """One at an address, with options that are said elsewhere."""


def followers(
    names: Iterable[ServersOf],
    pool: Pool,
    maker: ServerMaker,
    settings: FlowPoolSettings,
    reactor: Any,
) -> list[Follower]:
    """What keeps the servers of these names in a pool."""
    name_servers = NameServers(reactor)
    return [
        Follower(
            str(name),
            pool,
            _look_up(name, name_servers),
            partial(_server, maker, name),
            clock=monotonic(reactor),
            every=settings.resolve_every,
            grace=settings.resolve_grace,
        )
        for name in names
    ]


def _look_up(
    name: ServersOf, name_servers: NameServers
) -> Callable[[], Deferred[Answer]]:
    ask: Callable[[], Deferred[Answer]]
    if name.how == "srv":
        ask = partial(name_servers.service, name.name)
    else:
        ask = partial(name_servers.host, name.name, name.port)
    return lambda: ask().addCallback(_hosts_in)


def _hosts_in(answer: Answer) -> Answer:
    """Without addresses that are no single host's, whatever a name says.

    What is sent there would go to many hosts, or to this one.
    """
    found = [
        each
        for each in answer.found
        if is_one_host((each.address, each.port)) and not is_broadcast(each.address)
    ]
    if len(found) == len(answer.found):
        return answer
    why = answer.why if found else "none of its addresses is a host's"
    return attrs.evolve(answer, found=found, why=why)


def _server(maker: ServerMaker, name: ServersOf, found: Found) -> Server:
    """A server for one of a name's addresses."""
    kind = UdpAddress if name.udp else HostPort
    address = kind(found.address, found.port, options=name.options)
    weight = found.weight if name.how == "srv" else name.options.weight
    said = f"{name.name}/{host_port(found.address, found.port)}"
    return maker.named(address, name.options, said, found.tier, weight)
