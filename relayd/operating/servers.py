"""Makes servers of a pool: how each is dialled, checked, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.interfaces import IStreamClientEndpoint

from relayd.configuring.address_grammar import (
    HostPort,
    PortRange,
    StreamServer,
)
from relayd.configuring.config import AnyRelay, Dialing, UdpRelay
from relayd.configuring.interceptions import listens_for_others, uses_tproxy
from relayd.configuring.server_grammar import Destination, options_of
from relayd.configuring.server_options import ServerOptions
from relayd.core.errors import ConfigError
from relayd.core.process_settings import Transport
from relayd.core.route_spec import DEFAULT
from relayd.net.dial_options import DialOptions
from relayd.net.upstream import Upstream
from relayd.operating.checks import ServerCheckService
from relayd.operating.endpoints import dialing_endpoint, server_identity
from relayd.preludes.proxy_protocol import preamble_of
from relayd.upstreams.server import Server


class Maker:
    """Makes the servers of a pool.

    :param transport: what their connections are made of.
    :param dialing: of their sockets.
    :param pool: the name of their pool, with which their names begin: an address may
        stand in several.  That of `default` is left out.

    :ivar checked: called with the address of each server with state, and with it; if
        they are to be checked.
    """

    checked: Callable[[StreamServer, Server], object] | None = None

    def __init__(
        self,
        reactor: Any,
        transport: Transport,
        dialing: DialOptions | None = None,
        pool: str = DEFAULT,
    ) -> None:
        self._reactor = reactor
        self._transport = transport
        self._dialing = dialing
        self._before = "" if pool == DEFAULT else f"{pool}/"

    def _endpoint(
        self, address: StreamServer, options: ServerOptions
    ) -> IStreamClientEndpoint:
        dialing = options.dialing(self._dialing)
        return dialing_endpoint(address, self._reactor, self._transport, dialing)

    def upstream(self, address: StreamServer) -> Upstream:
        """One without a state: no pool counts its sessions, or says how it is."""
        options = address.options
        name = name_of(address)
        return Upstream(
            self._endpoint(address, options),
            self._before + (f"{options.name}/{name}" if options.name else name),
            server_identity(address),
            preamble_of(options.send_proxy),
        )

    def server(self, address: StreamServer) -> Server:
        """One with what is said of it."""
        return self.named(address, address.options, name_of(address))

    def named(
        self,
        address: StreamServer,
        options: ServerOptions,
        name: str,
        tier: int = 0,
        weight: int | None = None,
    ) -> Server:
        """One at an address with options that are said elsewhere.

        :param name: what the log calls it; behind its label, if it has one.
        :param tier: of a name's servers, theirs among each other.
        :param weight: unless given, that of the options.
        """
        label = options.name or ""
        server = Server(
            self._endpoint(address, options),
            self._before + (f"{label}/{name}" if label else name),
            server_identity(address),
            preamble_of(options.send_proxy),
            label=label,
            weight=options.weight if weight is None else weight,
            max_sessions=options.max,
            # Backups come behind all that are none, whatever their tier.
            tier=tier + (BACKUPS if options.backup else 0),
            disabled=options.disabled,
        )
        if self.checked is not None:
            self.checked(address, server)
        return server


#: The tier of the first backups: there are fewer priorities of a service.
BACKUPS = 1 << 16


def name_of(address: StreamServer) -> str:
    """What the log calls a server until it is connected."""
    if isinstance(address, HostPort) and address.host is None:
        return f"127.0.0.1:{address.port}"
    return str(address)


def dial_options(dialing: Dialing) -> DialOptions:
    """The options of sockets, which this process and this machine can set, now.

    :raises ConfigError: they can't.
    """
    options = dialing.options
    try:
        options.check()
    except OSError as problem:
        raise ConfigError(str(problem.strerror)) from problem
    return options


def check_listening(relay: AnyRelay) -> None:
    """Whether a relay's listeners can take what is for other addresses, if they are to.

    Those of connections need no right for what NAT brings; the log says if that is all
    that they can.

    :raises ConfigError: they can't.
    """
    if whom := listens_transparently(relay):
        try:
            LISTENING.check()
        except OSError as problem:
            raise ConfigError(f"{whom}{problem.strerror}") from problem


#: What the sockets take that listen for other addresses, or reply from them.
LISTENING = DialOptions(transparent=True)


def listens_transparently(relay: AnyRelay) -> str:
    """What needs that of a relay, as an error begins; empty if nothing does."""
    udp = isinstance(relay, UdpRelay)
    if not uses_tproxy(relay) and not (udp and listens_for_others(relay)):
        return ""
    return "to listen for other addresses: "


def check_own(
    destinations: Iterable[Destination | PortRange],
    dialing: DialOptions,
) -> None:
    """Try how servers are dialled that have a way of their own.

    Here, and not as each is made: those of a name are made while the relay runs.

    :param dialing: of their relay.
    :raises ConfigError: this process or this machine can't.
    """
    for each in destinations:
        own = options_of(each).dialing(dialing)
        if own is not None and own is not dialing:
            try:
                own.check()
            except OSError as problem:
                raise ConfigError(f"{each}: {problem.strerror}") from problem


def check_no_more(checks: ServerCheckService, server: Server) -> None:
    """A server has changed: one that leaves is checked no more."""
    if server.draining:
        checks.checker.remove(server)
