"""What a destination may say of its server: `10.0.0.5:80,weight=3,backup`.

On a command line options stand behind the address, each after a comma; in a file they
may be a table: `{address = "10.0.0.5:80", weight = 3, backup = true}`.  A comma is one
only before an option that there is, as endpoint strings and paths have commas, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from relayd.configuring.dial_settings import INTERFACE, KEEPALIVE, MARK, SOURCE
from relayd.configuring.nearest import nearest
from relayd.core.check_grammar import Check
from relayd.core.errors import ConfigError
from relayd.core.number_types import CountOrNone
from relayd.core.pool_settings import CHECK
from relayd.core.relay_names import EXPECTED, check_name
from relayd.core.route_spec import EXPECTED_POOL, parse_pool
from relayd.core.setting_types import (
    Choice,
    Count,
    Flag,
    Type,
    Written,
)
from relayd.core.settings import USER_TIMEOUT
from relayd.net.dial_options import DialOptions
from relayd.net.keepalive import Keepalive

#: The versions of PROXY headers that servers can be told: of connections, of datagrams.
StreamProxy = Literal["v1", "v2"]
DatagramProxy = Literal["v2", "v2-first"]
SendProxy = Literal["v1", "v2", "v2-first"]

#: The key of the address in a file's table.
ADDRESS = "address"


@attrs.frozen(kw_only=True)
class ServerOptions:
    """What is said of a server; the fields are options, with dashes.

    :ivar weight: its share of the sessions.
    :ivar backup: it is used while no other is.
    :ivar max: how many sessions it may have at once.
    :ivar name: what the log calls it.
    :ivar pool: the name of the pool that it belongs to, of its relay; None: `default`.
    :ivar disabled: it is not used.
    :ivar send_proxy: the version of the PROXY header for it, if it has its own.
    :ivar check: how it is checked, if that is its own.
    :ivar source: the address from which it is dialled, likewise, and not from a
        client's own; and so on.
    """

    weight: int = 1
    backup: bool = False
    max: int | None = None
    name: str | None = None
    pool: str | None = None
    disabled: bool = False
    send_proxy: SendProxy | None = None
    check: Check | None = None
    source: str | None = None
    interface: str | None = None
    mark: int | None = None
    keepalive: Keepalive | None = None
    user_timeout: float | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """The fields that were given."""
        return tuple(
            field.name
            for field in attrs.fields(ServerOptions)
            if getattr(self, field.name) != field.default
        )

    def says_only(self, *fields: str) -> bool:
        """Whether nothing is said but these."""
        return not set(self.said) - set(fields)

    def dialing(self, options: DialOptions | None) -> DialOptions | None:
        """How it is dialled.

        :param options: of its relay, which hold where it has none of its own.
        """
        own: dict[str, Any] = {
            name: value
            for name in ("interface", "mark", "keepalive", "user_timeout")
            if (value := getattr(self, name)) is not None
        }
        if self.source is not None:
            ipv6 = ":" in self.source
            own |= {"source4": None, "source6": None, "transparent": False}
            own["source6" if ipv6 else "source4"] = self.source
        return attrs.evolve(options or DialOptions(), **own) if own else options


#: Of a server of which nothing is said.
PLAIN = ServerOptions()


def _name(text: str) -> str:
    try:
        return check_name(text)
    except ValueError:
        raise ValueError(f"expected {EXPECTED}") from None


#: How each is written, of a server of connections; send-proxy is another for datagrams.
TYPES: Mapping[str, Type[Any]] = {
    "weight": CountOrNone(256),
    "backup": Flag(),
    "max": Count(),
    "name": Written("NAME", _name, EXPECTED),
    "pool": Written("NAME", parse_pool, EXPECTED_POOL),
    "disabled": Flag(),
    "send-proxy": Choice[StreamProxy](StreamProxy),
    **{row.name: row.type for row in (CHECK, SOURCE, INTERFACE, MARK, KEEPALIVE)},
    USER_TIMEOUT.name: USER_TIMEOUT.type,
}
_DATAGRAM_TYPES: Mapping[str, Type[Any]] = {
    **TYPES,
    "send-proxy": Choice[DatagramProxy](DatagramProxy),
}

_SEPARATOR = re.compile(f",(?=(?:{'|'.join(TYPES)})(?:[=,]|$))")

#: What looks like an option, of whatever name.
_LIKE_OPTION = re.compile(r",([A-Za-z][A-Za-z0-9_-]*)(?=[=,]|$)")


def split(text: str) -> tuple[str, list[str]]:
    """The address in a text, and the options behind it."""
    address, *options = _SEPARATOR.split(text)
    return address, options


def parse_options(written: list[str], text: str, *, datagrams: bool) -> ServerOptions:
    """Options as they stand behind an address.

    :param text: the whole, for an error.
    :param datagrams: the server is one of datagrams.
    :raises ConfigError: one is not valid, or is given twice.
    """
    types = _DATAGRAM_TYPES if datagrams else TYPES
    found: dict[str, Any] = {}
    for each in written:
        name, has_value, value = each.partition("=")
        if name not in types:
            # A flag, and what stands behind it.
            name, _, rest = each.partition(",")
            raise no_option(f",{rest}", text) or ConfigError(
                f"bad address {text!r}: {name} has no value"
            )
        kind = types[name]
        if name in found:
            raise ConfigError(f"bad address {text!r}: {name} is given twice")
        if isinstance(kind, Flag):
            if has_value:
                raise ConfigError(f"bad address {text!r}: {name} has no value")
            found[name] = True
            continue
        try:
            found[name] = kind.parse(value)
        except ValueError:
            raise no_option(value, text, kind.parse) or ConfigError(
                f"bad address {text!r}: expected {name}={kind.describe()}"
            ) from None
    return _made(found)


def no_option(
    written: str, text: str, parse: Callable[[str], object] = str
) -> ConfigError | None:
    """The error of a text in which an option stands that there is not.

    :param written: what is not valid: something, and perhaps options behind it.
    :param text: the whole, for the error.
    :param parse: reads what stands before the options; it raises if that is wrong.
    :return: None if that is wrong, or nothing looks like an option.
    """
    like = _LIKE_OPTION.search(written)
    if like is None:
        return None
    try:
        parse(written[: like.start()])
    except (ConfigError, ValueError):
        return None
    advice = _advice(like[1].lower().replace("_", "-"), [*TYPES])
    return ConfigError(f"bad address {text!r}: {_no(like[1])}; {advice}")


def _no(name: str) -> str:
    return f"there is no {name!r} in a destination"


def _advice(name: str, names: Sequence[str]) -> str:
    """The nearest of several names, or all of them."""
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"it has {', '.join(names)}"


def load_options(table: Mapping[str, Any], *, datagrams: bool) -> ServerOptions:
    """Options as they stand in a file's table, beside its address.

    :raises ValueError: there is no such option, or one is not valid.
    """
    types = _DATAGRAM_TYPES if datagrams else TYPES
    found = {}
    for key, value in table.items():
        if key == ADDRESS:
            continue
        kind = types.get(key.replace("_", "-"))
        if kind is None or "-" in key:
            keys = [ADDRESS, *(name.replace("-", "_") for name in TYPES)]
            advice = _advice(key.lower().replace("-", "_"), keys)
            raise ValueError(f"{_no(key)}; {advice}")
        try:
            found[key] = kind.load(value)
        except ValueError as problem:
            raise ValueError(f"{key}: {problem}") from None
    return _made(found)


def _made(found: Mapping[str, Any]) -> ServerOptions:
    return ServerOptions(**{key.replace("-", "_"): found[key] for key in found})


def text_of(table: Mapping[str, Any]) -> str:
    """A table of a file as one would write it behind `--dest`; for an error."""

    def parts() -> Iterator[str]:
        yield str(table.get(ADDRESS, ""))
        for key, value in table.items():
            if key != ADDRESS and value is not False:
                name = key.replace("_", "-")
                yield name if value is True else f"{name}={value}"

    return ",".join(parts())
