"""The rows of the table of settings for routes, and for server names (SNI).

myroutes:route                       a coroutine function, by module and name
www.example.com=10.0.0.5:443         a server name, and a destination
*.example.com=10.0.0.6:443,weight=2  all names below one
=default                             whatever no other is about: a pool of the relay

What a name leads to is a destination, with options (:mod:`.server_grammar`), or the
name of a pool: that has a letter first and no colon, and so can't be an address.
"""

from __future__ import annotations

import re
from typing import Any

import attrs

from relayd.configuring.address_grammar import PortRange
from relayd.configuring.server_grammar import Destination, parse_server
from relayd.core.errors import ConfigError
from relayd.core.names import is_name
from relayd.core.route_spec import RouteSpec, parse_pool
from relayd.core.setting_types import STREAMS, Setting, Written
from relayd.core.settings import ROUTES

EXPECTED_ROUTE = "MODULE:FUNCTION, such as myroutes:route"

EXPECTED_SNI = (
    "NAME=DEST, such as www.example.com=10.0.0.5:443 or *.example.com=web, where web is"
    " a pool of the relay; no NAME is any other"
)

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


@attrs.frozen
class SniEntry:
    """Where clients go that ask for a server name.

    :ivar pattern: the name, in lower case; `*.` and what it ends with; or empty.
    :ivar target: a server; or the name of a pool.
    """

    pattern: str
    target: Destination | str

    def __str__(self) -> str:
        return f"{self.pattern}={self.target}"

    @property
    def pool(self) -> str:
        """The name of its pool."""
        if isinstance(self.target, str):
            return self.target
        return self.pattern or "*"


def parse_route(text: str) -> RouteSpec:
    """Where a route is.

    :raises ValueError: it is no such place.
    """
    module, _, function = text.partition(":")
    if not (_DOTTED.fullmatch(module) and _DOTTED.fullmatch(function)):
        raise ValueError(f"expected {EXPECTED_ROUTE}")
    return RouteSpec(module, function)


def parse_sni(text: str) -> SniEntry:
    """Where clients go that ask for a server name.

    :raises ValueError: it is not written so.
    :raises ConfigError: the destination is none.
    """
    name, equals, where = text.partition("=")
    pattern = name.lower().removesuffix(".")
    if not equals or (pattern and not is_name(pattern.removeprefix("*."))):
        raise ValueError(f"expected {EXPECTED_SNI}")
    try:
        return SniEntry(pattern, parse_pool(where))
    except ValueError:
        pass
    found = parse_server(where)
    if isinstance(found, PortRange):
        raise ConfigError(f"{where!r} has several ports: name one")
    return SniEntry(pattern, found)


ROUTE = Setting[RouteSpec | None](
    name="route",
    type=Written("MODULE:FUNCTION", parse_route, EXPECTED_ROUTE),
    default=None,
    otherwise="none",
    help="Ask a coroutine function of your own, for each client, where it goes: it may"
    " look at the first bytes, and await what it likes.",
    kinds=STREAMS,
    group=ROUTES,
)
SNI = Setting[tuple[SniEntry, ...]](
    name="sni",
    type=Written("NAME=DEST", parse_sni, EXPECTED_SNI),
    default=(),
    help="Relay TLS clients that ask for this server name (SNI) to this server, or to"
    " the servers of a pool; TLS is not ended. *.example.com is all names below it; no"
    " name is any other. May be repeated.",
    kinds=("tcp",),
    group=ROUTES,
    repeatable=True,
)
TABLE: tuple[Setting[Any], ...] = (ROUTE, SNI)
