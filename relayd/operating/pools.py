"""Builds the pool of a TCP relay from its destinations and its settings.

A single server of which nothing is said needs no state, and gets none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relayd.configuring.address_grammar import StreamAddress
from relayd.configuring.config import PoolSettings
from relayd.configuring.server_grammar import ServersOf
from relayd.configuring.server_options import PLAIN
from relayd.net.upstream import Upstream
from relayd.operating.servers import Maker
from relayd.upstreams.pool import Pool


def stream_pool(
    destinations: Sequence[StreamAddress | ServersOf],
    settings: PoolSettings,
    reactor: Any,
    made: Maker,
) -> Pool:
    """The servers of one listener.

    :param made: makes its servers.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    fixed = [each for each in destinations if not isinstance(each, ServersOf)]
    servers: list[Upstream]
    plain = len(destinations) == len(fixed) == 1 and fixed[0].options == PLAIN
    if plain and settings.check is None:
        servers = [made.upstream(fixed[0])]
    else:
        servers = [made.server(each) for each in fixed]
    pool = Pool(servers, try_all=settings.when_none.what == "try-all")
    named = [each for each in destinations if isinstance(each, ServersOf)]
    if named:
        # Imports twisted.names, which few relays need.
        from relayd.operating.named_servers import followers

        pool.tasks += followers(named, pool, made, settings, reactor)
    return pool
