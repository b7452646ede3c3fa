"""Builds the servers of a UDP relay from its destinations and its settings.

A single server of which nothing is said needs no state, and gets none.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

from relayd.admission.per_client import ClientPrefix
from relayd.configuring.address_grammar import (
    DatagramServer,
    OriginalAddress,
    dialled_host,
)
from relayd.configuring.config import FlowPoolSettings
from relayd.configuring.server_grammar import ServersOf
from relayd.configuring.server_options import ServerOptions
from relayd.core.errors import ConfigError
from relayd.net.broadcast import BROADCAST, is_broadcast
from relayd.net.dial_options import DialOptions
from relayd.operating.pools import keep_up, selector_of
from relayd.operating.servers import BACKUPS
from relayd.udp_nat import FlowServer, Server, preamble_of
from relayd.upstreams.pool import Pool

#: Options of a server that need no state.
_STATELESS = ("send_proxy", "source", "interface", "mark")


class FlowMaker:
    """Makes the servers of a pool.

    :param dialing: how they are sent to; some have their own.

    :ivar checked: called with the address of each, and with it.
    """

    checked: Callable[[DatagramServer, FlowServer], object] | None = None

    def __init__(self, dialing: DialOptions | None = None) -> None:
        self._dialing = dialing

    def plain(self, address: DatagramServer) -> Server:
        """A server without state.

        :raises ConfigError: this machine can't send there.
        """
        options = address.options
        dialing = options.dialing(self._dialing)
        try:
            own = None if dialing is self._dialing else dialing
            server = _server(address, preamble_of(options.send_proxy), own)
            host = server.host
            if not server.named and is_broadcast(host):
                raise OSError(errno.EACCES, BROADCAST)
        except OSError as problem:
            # An IPv6 address has a scope that this machine lacks.
            raise ConfigError(f"can't use {address}: {problem.strerror}") from problem
        return server

    def server(self, address: DatagramServer) -> FlowServer:
        """One with what is said of it."""
        return self.named(address, address.options, None)

    def named(
        self,
        address: DatagramServer,
        options: ServerOptions,
        name: str | None,
        tier: int = 0,
        weight: int | None = None,
    ) -> FlowServer:
        """See :meth:`relayd.operating.servers.Maker.named`."""
        where = self.plain(address)
        if name is not None:
            where.name = name
        server = FlowServer.at(
            where,
            label=options.name or "",
            weight=options.weight if weight is None else weight,
            max_sessions=options.max,
            tier=tier + (BACKUPS if options.backup else 0),
            disabled=options.disabled,
        )
        # The log of flows has it.
        where.name = server.name
        if self.checked is not None:
            self.checked(address, server)
        return server


def _server(
    address: DatagramServer, preamble: Any, dialing: DialOptions | None
) -> Server:
    """A server at an address.

    :raises OSError: its interface does not exist.
    """
    if not isinstance(address, OriginalAddress):
        return Server(dialled_host(address.host), address.port, preamble, dialing)
    # Most relays do not need it.
    from relayd.datagrams.original import OriginalServer

    host = dialled_host(address.host) if address.host else None
    return OriginalServer(host, preamble, dialing)


def flow_servers(
    destinations: Sequence[DatagramServer | ServersOf],
    settings: FlowPoolSettings,
    reactor: Any,
    made: FlowMaker,
    prefix: ClientPrefix | None = None,
) -> Pool | list[Server]:
    """The servers of one listener.

    :param made: makes them.
    :param prefix: which clients count as one.
    :raises ConfigError: this machine can't send to one of them.
    """
    fixed = [each for each in destinations if not isinstance(each, ServersOf)]
    if len(destinations) == len(fixed) == 1 and settings.check is None:
        [only] = fixed
        if only.options.says_only(*_STATELESS):
            return [made.plain(only)]
    pool = Pool(
        [made.server(each) for each in fixed],
        selector_of(settings.balance, prefix),
        try_all=settings.when_none.what == "try-all",
    )
    named = [each for each in destinations if isinstance(each, ServersOf)]
    if named or len(fixed) > 1:
        keep_up(pool, named, settings, reactor, made)
    return pool
