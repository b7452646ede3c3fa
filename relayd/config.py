"""What an operator may set, checked; knows no reactor.

Values come in as they were written on a command line and leave as frozen
objects that :mod:`relayd.service` turns into listeners and relays.  Whatever is
wrong is a :class:`~relayd.errors.ConfigError` with one line that quotes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

import attrs

from relayd.bridge import Timeouts
from relayd.endpoints import Address, HostPort, Transport
from relayd.errors import ConfigError

#: A listen(2) backlog; the kernel caps it further (net.core.somaxconn).
BACKLOG_LIMIT = 65535

#: The longest timeout, in seconds: three years, well within any clock.
TIMEOUT_LIMIT = 100_000_000.0

#: What `--demo` listens on.
DEMO_LISTENER = HostPort("127.0.0.1", 8080)


def _addresses(given: Iterable[Address]) -> tuple[Address, ...]:
    return tuple(given)


@attrs.frozen
class Relay:
    """One listener and the servers behind it."""

    listen: Address
    destinations: Sequence[Address] = attrs.field(converter=_addresses)


def _relays(given: Iterable[Relay]) -> tuple[Relay, ...]:
    return tuple(given)


@attrs.frozen
class Config:
    """All settings of one `twistd relayd`.

    :ivar relays: at least one, unless `demo`.
    :ivar drain_timeout: seconds that sessions get to finish when the relay is
        told to stop; 0 for none.
    :ivar transport: whose connections the short forms get.
    :ivar verbose: log when a session opens, dials and connects, too.
    :ivar quiet: log a session's end only when it did not end well.
    :ivar demo: relay DEMO_LISTENER to a file server of the current folder.
    """

    relays: Sequence[Relay] = attrs.field(converter=_relays)
    timeouts: Timeouts = attrs.Factory(Timeouts)
    drain_timeout: float = 10.0
    backlog: int = 4096
    transport: Transport = "auto"
    verbose: bool = False
    quiet: bool = False
    demo: bool = False


def seconds(option: str, text: str) -> float:
    """A timeout: a number of seconds, fractions allowed.

    :raises ConfigError: it is not one.
    """
    try:
        # Python would take 1_000 as well.
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= TIMEOUT_LIMIT:
        raise ConfigError(
            f"bad {option} {text!r}: expected seconds from 0 to {TIMEOUT_LIMIT:.0f}"
        )
    return value


def backlog(text: str) -> int:
    """A listen backlog.

    :raises ConfigError: it is not one.
    """
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    if not 1 <= value <= BACKLOG_LIMIT:
        raise ConfigError(
            f"bad --backlog {text!r}: expected a number from 1 to {BACKLOG_LIMIT}"
        )
    return value


def transport(text: str) -> Transport:
    """A kind of transport.

    :raises ConfigError: it is not one.
    """
    if text in get_args(Transport):
        return cast(Transport, text)
    raise ConfigError(
        f"bad --transport {text!r}: expected {', '.join(get_args(Transport))}"
    )


@attrs.frozen(eq=False)
class Given:
    """An address on the command line: what for, as written, and understood."""

    kind: Literal["--listen", "--dest"]
    text: str
    address: Address


def pair(given: Sequence[Given]) -> tuple[Relay, ...]:
    """Match listeners with destinations.

    :param given: in the order of the command line.  The destinations after a
        listener are its own; those of a single listener may stand before it.
    :raises ConfigError: a listener or a destination has no partner.
    """
    if not given:
        raise ConfigError(
            "nothing to relay: give --listen and --dest, or try --demo (see --help)"
        )
    listeners = [each for each in given if each.kind == "--listen"]
    first = given[0]
    if not listeners:
        raise ConfigError(
            f"--dest {first.text!r} has no --listen: say where clients connect"
        )
    if first.kind == "--dest" and len(listeners) > 1:
        raise ConfigError(
            f"--dest {first.text!r} stands before the first of several --listen: "
            "put each --dest after the --listen that it belongs to"
        )
    owner = listeners[0]
    owned: dict[Given, list[Address]] = {each: [] for each in listeners}
    for each in given:
        if each.kind == "--listen":
            owner = each
        else:
            owned[owner].append(each.address)
    for listener, destinations in owned.items():
        if not destinations:
            raise ConfigError(
                f"--listen {listener.text!r} has no --dest: say where to relay to"
            )
    return tuple(Relay(each.address, own) for each, own in owned.items())
