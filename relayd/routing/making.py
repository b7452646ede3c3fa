"""Makes the router of a relay that a program embeds, of a coroutine function.

Such a relay does not know the grammar of destinations: its routes name a server as
`HOST:PORT`, or give an endpoint.  A service's routes name them as it is written
everywhere (:mod:`relayd.operating.routing`).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from twisted.internet.endpoints import HostnameEndpoint

from relayd.core.errors import ConfigError
from relayd.core.names import is_address, is_name
from relayd.core.routing import IRouter
from relayd.core.setting_types import Kind
from relayd.net.upstream import Upstream
from relayd.routing.router import Route, Router


def router_of(
    route: Route | IRouter,
    reactor: Any,
    *,
    kind: Kind = "tcp",
    pools: Collection[str] | None = None,
    server_speaks_first: bool,
) -> IRouter:
    """A router, which is returned as it is, or one that asks a coroutine function.

    :param reactor: dials the servers that the route names.
    :param pools: the names of its relay's.
    :raises TypeError: it is neither.
    """
    if IRouter.providedBy(route):
        return route
    if not callable(route):
        raise TypeError(f"a route is a coroutine function, not {route!r:.60}")
    return Router(
        route,
        server=partial(server_of, reactor),
        kind=kind,
        server_speaks_first=server_speaks_first,
        pools=pools,
    )


def server_of(reactor: Any, text: str) -> Upstream:
    """The server at `HOST:PORT`, or `[ADDRESS]:PORT`.

    :raises ConfigError: it is neither.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if ":" in host else host
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if (
        not digits
        or not 0 < int(port) < 65536
        or not (is_address(host) or is_name(host))
    ):
        raise ConfigError(f"bad server {text!r:.60}: expected HOST:PORT")
    return Upstream(HostnameEndpoint(reactor, host, int(port)), text)
