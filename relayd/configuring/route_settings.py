"""The rows of the table of settings for routes, and for server names (SNI).

myroutes:route                       a coroutine function, by module and name
www.example.com=10.0.0.5:443         a server name, and a destination
*.example.com=10.0.0.6:443,weight=2  all names below one, and a destination with options
shop.example.com=web                 a server name, and a pool of the relay
=default                             whatever no other is about

What a name leads to is a destination (:mod:`.server_grammar`), or the name of a pool:
that begins with a letter, has no colon, and is not `original`, and so can't be one.
A server name is a host name (RFC 6066, section 3): addresses are never asked for.
"""

from __future__ import annotations

import re
from typing import Any

import attrs

from relayd.configuring.address_grammar import PortRange
from relayd.configuring.server_grammar import Destination, is_udp, parse_server
from relayd.core.errors import ConfigError
from relayd.core.names import is_address, is_name, is_number
from relayd.core.route_spec import EXPECTED_POOL, RouteSpec, parse_pool
from relayd.core.setting_types import STREAMS, Setting, Written
from relayd.core.settings import ROUTES

EXPECTED_ROUTE = "MODULE:FUNCTION, such as myroutes:route"

EXPECTED_SNI = (
    "NAME=DEST, such as www.example.com=10.0.0.5:443, or *.example.com=web, where web"
    " is a pool of the relay"
)

#: The option whose destinations say to which pool they belong.
_DEST = "dest"

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


@attrs.frozen
class SniEntry:
    """Where clients go that ask for a server name.

    :ivar pattern: the name, in lower case; `*.` and what it ends with; or empty.
    :ivar target: a server, of one port; or the name of a pool.
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
    if module.endswith(".py"):
        raise ValueError(
            f"expected a module, not its file: {module.removesuffix('.py')}:{function}"
        )
    return RouteSpec(module, function)


def parse_sni(text: str) -> SniEntry:
    """Where clients go that ask for a server name.

    :raises ValueError: it is not written so; the message says what is expected.
    """
    name, equals, where = text.partition("=")
    if not equals or not where:
        raise ValueError(f"expected {EXPECTED_SNI}")
    return SniEntry(_pattern(name), _target(where))


def _pattern(name: str) -> str:
    """A server name, or an end of some, as it is compared; empty for any other."""
    plain = name.removeprefix("*.")
    if not name or is_name(plain):
        return name.lower().removesuffix(".")
    if name == "*":
        raise ValueError("for any other name write none: =DEST")
    if is_number(plain) or is_address(plain.strip("[]")):
        raise ValueError(f"clients ask for no address such as {name!r}, but for a name")
    raise ValueError(
        f"{name!r} is no server name; expected www.example.com, or *.example.com for"
        " all names below it (write an international name in its xn-- form)"
    )


def _target(where: str) -> Destination | str:
    """A server, or the name of a pool."""
    try:
        return parse_pool(where)
    except ValueError:
        pass
    try:
        found = parse_server(where)
    except ConfigError as problem:
        if ":" in where:
            raise ValueError(str(problem)) from None
        raise ValueError(
            f"{where!r} is neither an address, such as 10.0.0.5:443, nor the name of a"
            f" pool: {EXPECTED_POOL}"
        ) from None
    if isinstance(found, PortRange):
        raise ValueError(f"{where!r} has several ports: give one")
    if is_udp(found):
        raise ValueError(f"{where!r} is for datagrams, which have no server name")
    if found.options.pool is not None:
        raise ValueError(
            f"pool= is for --{_DEST}: for its servers write {found.options.pool!r} in"
            " place of an address"
        )
    return found


ROUTE = Setting[RouteSpec | None](
    name="route",
    type=Written("MODULE:FUNCTION", parse_route, EXPECTED_ROUTE),
    default=None,
    otherwise="none",
    help="Ask a coroutine function of your own (async def), for each client, where it"
    " goes: to which pool or server, or nowhere. It may look at the first bytes, and"
    " await what it likes.",
    kinds=STREAMS,
    group=ROUTES,
)
SNI = Setting[tuple[SniEntry, ...]](
    name="sni",
    type=Written("NAME=DEST", parse_sni, EXPECTED_SNI),
    default=(),
    help="Relay TLS clients that ask for this server name (SNI) to this server, or to a"
    " pool, of the relay that the --listen before it opens; TLS is not ended. NAME is"
    " www.example.com, *.example.com for all names below it, or empty for any other; a"
    " client is refused if none is about its name. May be repeated.",
    in_file="Relay TLS clients that ask for a server name (SNI) to this server, or to a"
    " pool; TLS is not ended. NAME is www.example.com, *.example.com for all names"
    " below it, or empty for any other; a client is refused if none is about its name."
    " A name may have several servers.",
    kinds=("tcp",),
    group=ROUTES,
    repeatable=True,
)
TABLE: tuple[Setting[Any], ...] = (ROUTE, SNI)
