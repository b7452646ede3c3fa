"""Follows the names of a pool's destinations: `dns:` and `srv:`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred

from relayd.configuring.address_grammar import HostPort
from relayd.configuring.config import PoolSettings
from relayd.configuring.server_grammar import ServersOf
from relayd.net.dns import Answer, Found, NameServers
from relayd.net.monotonic import monotonic
from relayd.operating.servers import Maker
from relayd.upstreams.names import Follower
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


def followers(
    names: Iterable[ServersOf],
    pool: Pool,
    maker: Maker,
    settings: PoolSettings,
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
    if name.how == "srv":
        return partial(name_servers.service, name.name)
    return partial(name_servers.host, name.name, name.port)


def _server(maker: Maker, name: ServersOf, found: Found) -> Server:
    """A server for one of a name's addresses."""
    address = HostPort(found.address, found.port, options=name.options)
    weight = found.weight if name.how == "srv" else name.options.weight
    return maker.named(
        address, name.options, f"{name.name}/{address}", found.tier, weight
    )
