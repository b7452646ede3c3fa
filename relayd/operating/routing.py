"""Makes what asks the route of a relay, and the servers that a route names as text.

The text is that of a destination: `10.0.0.5:80,send-proxy=v2`.  It may say how the
server is dialled, and what it is told first, but nothing that makes sense in a pool
alone; nothing is looked up, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from relayd.configuring.about_dialing import family_of_server
from relayd.configuring.address_grammar import (
    EndpointString,
    OriginalAddress,
    PortRange,
    StreamServer,
    UnixPath,
)
from relayd.configuring.config import AnyRelay, Relay, Socks4Relay, UdpRelay
from relayd.configuring.endpoint_strings import has_tls
from relayd.configuring.interceptions import takes_original
from relayd.configuring.pools_of_relay import pools_of
from relayd.configuring.server_grammar import (
    ServersOf,
    is_udp,
    options_of,
    parse_server,
)
from relayd.configuring.server_options import ServerOptions
from relayd.core.errors import ConfigError
from relayd.net.dial_options import DialOptions, family_of
from relayd.net.upstream import Upstream
from relayd.operating.route_modules import Routes, check_pools
from relayd.operating.servers import Maker, check_own

#: What may be said of a server that is in no pool.
OPTIONS = (
    *("name", "send_proxy", "source", "interface", "mark", "keepalive"),
    "user_timeout",
)


class NamedByRoutes:
    """The servers that a route names.

    :param made: makes them.
    :param dialing: how servers of the relay are dialled.
    :param told: the version of the PROXY header that they are told, if any.
    :param original: clients are brought to the relay that meant to go elsewhere.
    """

    def __init__(
        self,
        made: Maker,
        dialing: DialOptions,
        told: str | None = None,
        *,
        original: bool = False,
    ) -> None:
        self._made, self._dialing, self._told = made, dialing, told
        self._original = original

    def __call__(self, text: str) -> Upstream:
        """The server of a text.

        :raises ConfigError: there can be none; one line.
        """
        address = server_address(text)
        if isinstance(address, OriginalAddress) and not self._original:
            raise ConfigError(
                f"{text!r} is where clients meant to go, and none are brought here:"
                " give the relay --intercept"
            )
        _check_socket(text, address, self._dialing, self._told)
        check_own([address], self._dialing)
        return self._made.upstream(address)


def server_address(text: str) -> StreamServer:
    """Where a server is that a route names.

    :raises ConfigError: it can't be one; one line.
    """
    found = parse_server(text)
    if isinstance(found, PortRange):
        raise ConfigError(f"{text!r} has several ports: name one")
    if is_udp(found):
        raise ConfigError(f"{text!r} is for datagrams: a route is about connections")
    if isinstance(found, ServersOf):
        raise ConfigError(
            f"{text!r} stands for several servers: have it be a pool's (--dest"
            f" {text},pool=NAME), or name one of them"
        )
    _check_options(text, options_of(found))
    return cast(StreamServer, found)


def _check_options(text: str, options: ServerOptions) -> None:
    if not options.says_only(*OPTIONS):
        said = next(each for each in options.said if each not in OPTIONS)
        raise ConfigError(
            f"{text!r}: {said} is for a server of a pool: give it to a --dest with"
            " pool=NAME, and name that pool"
        )


def _check_socket(
    text: str, address: StreamServer, dialing: DialOptions, told: str | None
) -> None:
    """Whether a server can be dialled as it is to be.

    The same is told of a --dest as the settings are read: `configuring.about_dialing`,
    `about_servers` and `about_proxy_headers`.
    """
    options = address.options
    own = [each for each in options.said if each not in ("name", "send_proxy")]
    if isinstance(address, EndpointString):
        of_all = {
            "source": dialing.source4 or dialing.source6,
            "interface": dialing.interface,
            "mark": dialing.mark,
            "transparent": dialing.transparent or None,
        }
        own += [name for name, value in of_all.items() if value is not None]
        if own:
            raise ConfigError(
                f"{text!r}: {own[0]} is not possible for an endpoint string, which"
                " Twisted dials: write a short form such as 10.0.0.5:80"
            )
        if (options.send_proxy or told) and has_tls(address.text):
            raise ConfigError(
                f"{text!r}: send-proxy is not possible: the header goes before the TLS"
                " handshake, with which Twisted begins"
            )
    if own and isinstance(address, UnixPath):
        raise ConfigError(f"{text!r}: {own[0]} is not for UNIX sockets")
    family = family_of_server(address)
    if options.source is not None and family not in (0, family_of(options.source)):
        raise ConfigError(f"{text!r}: its source is of the other family")


def pool_names(relay: Relay | Socks4Relay) -> Sequence[str]:
    """The names of a relay's pools."""
    if isinstance(relay, Socks4Relay):
        return ()
    return [name for name, its in pools_of(relay.destinations).items() if its]


def route_of(relay: AnyRelay, routes: Routes) -> Any:
    """The function of a relay's route; None if it has none.

    :raises ConfigError: it can't be imported, or can't be a route, or names a pool that
        the relay does not have; one line.
    """
    if isinstance(relay, UdpRelay) or relay.route is None:
        return None
    function = routes.function(relay.route)
    check_pools(relay.route, routes, pool_names(relay))
    return function


def router_of(relay: Relay | Socks4Relay, routes: Routes, made: Maker) -> Any:
    """What asks a relay's route; None if it has none.

    :param made: makes the servers that it names.
    :raises ConfigError: see :func:`route_of`.
    """
    function = route_of(relay, routes)
    if function is None:
        return None
    # Imports what most relays do not need.
    from relayd.routing.router import Router

    is_proxy = isinstance(relay, Socks4Relay)
    return Router(
        function,
        server=NamedByRoutes(
            made,
            relay.dialing.options,
            relay.stream.send_proxy,
            original=takes_original(relay),
        ),
        kind="socks4" if is_proxy else "tcp",
        server_speaks_first=getattr(relay, "server_speaks_first", False),
        pools=pool_names(relay),
    )
