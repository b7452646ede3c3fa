"""Builds the pool of a TCP relay from its destinations and its settings.

A single server of which nothing is said needs no state, and gets none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.interfaces import IStreamClientEndpoint

from relayd.configuring.address_grammar import HostPort, StreamAddress
from relayd.configuring.config import PoolSettings
from relayd.configuring.server_options import PLAIN
from relayd.core.process_settings import Transport
from relayd.net.dial_options import DialOptions
from relayd.net.upstream import Upstream
from relayd.operating.endpoints import dialing_endpoint, server_identity
from relayd.preludes.proxy_protocol import preamble_of
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


def stream_pool(
    destinations: Sequence[StreamAddress],
    settings: PoolSettings,
    reactor: Any,
    transport: Transport,
    dialing: DialOptions | None = None,
) -> Pool:
    """The servers of one listener.

    :param dialing: of their sockets.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    plain = len(destinations) == 1 and destinations[0].options == PLAIN
    plain = plain and settings.check is None
    servers = [
        (_upstream if plain else _server)(
            address, dialing_endpoint(address, reactor, transport, dialing)
        )
        for address in destinations
    ]
    return Pool(servers, try_all=settings.when_none.what == "try-all")


def _upstream(address: StreamAddress, endpoint: IStreamClientEndpoint) -> Upstream:
    return Upstream(
        endpoint,
        name_of(address),
        server_identity(address),
        preamble_of(address.options.send_proxy),
    )


def _server(address: StreamAddress, endpoint: IStreamClientEndpoint) -> Server:
    options = address.options
    label, name = options.name or "", name_of(address)
    return Server(
        endpoint,
        f"{label}/{name}" if label else name,
        server_identity(address),
        preamble_of(options.send_proxy),
        label=label,
        weight=options.weight,
        max_sessions=options.max,
        tier=int(options.backup),
        disabled=options.disabled,
    )


def name_of(address: StreamAddress) -> str:
    """What the log calls a server until it is connected."""
    if isinstance(address, HostPort) and address.host is None:
        return f"127.0.0.1:{address.port}"
    return str(address)
