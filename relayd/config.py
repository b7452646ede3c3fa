"""What an operator may set, checked; knows no reactor.

Values come in as they were written on a command line and leave as frozen
objects that :mod:`relayd.service` turns into listeners and relays.  Whatever is
wrong is a :class:`~relayd.errors.ConfigError` with one line that quotes it.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast, get_args

import attrs

from relayd import settings
from relayd.bridge import Timeouts
from relayd.endpoint_strings import hides_clients
from relayd.endpoints import (
    Address,
    EndpointString,
    HostPort,
    StreamAddress,
    UdpAddress,
    UnixPath,
)
from relayd.errors import ConfigError
from relayd.networks import Network, parse_network
from relayd.rules import Rule
from relayd.settings import Transport
from relayd.socks4_wire import MOST_USER_ID

#: A listen(2) backlog; the kernel caps it further (net.core.somaxconn).
BACKLOG_LIMIT = 65535

#: The longest timeout, in seconds: three years, well within any clock.
TIMEOUT_LIMIT = 100_000_000.0

#: What `twistd socks4` listens on, unless it is told.
SOCKS4_LISTENER = HostPort("127.0.0.1", 1080)

#: The largest receive buffer: the kernel doubles it, in an int.
RECEIVE_BUFFER_LIMIT = (1 << 30) - 1

#: What `--demo` listens on.
DEMO_LISTENER = HostPort("127.0.0.1", 8080)


def _addresses(given: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(given)


@attrs.frozen
class Relay:
    """One listener and the servers behind it."""

    listen: StreamAddress
    destinations: Sequence[StreamAddress] = attrs.field(converter=_addresses)


@attrs.frozen
class UdpRelay:
    """One address for datagrams and the servers behind it."""

    listen: UdpAddress
    destinations: Sequence[UdpAddress] = attrs.field(converter=_addresses)


def _relays(given: Iterable[Relay | UdpRelay]) -> tuple[Relay | UdpRelay, ...]:
    return tuple(given)


@attrs.frozen(kw_only=True)
class UdpSettings:
    """How flows are kept; see :class:`relayd.udp_nat.UdpNat`.

    :ivar timeout: seconds that a flow in use lives after something moved.
    :ivar unreplied_timeout: the same, until it is in use, whether it was answered or
        not; if `timeout` is the shorter, an answered flow has that.
    :ivar max_flows: None is what this process can have, shared by its listeners.
    :ivar max_flows_per_client: None is half of those.
    """

    timeout: float = settings.UDP_TIMEOUT.default
    unreplied_timeout: float = settings.UDP_UNREPLIED_TIMEOUT.default
    max_flows: int | None = None
    max_flows_per_client: int | None = None
    refresh_inbound: bool = True
    reply_cap: float = 0.0
    receive_buffer: int = settings.UDP_RCVBUF.default


@attrs.frozen(kw_only=True)
class Common:
    """What `twistd relayd` and `twistd socks4` have in common.

    :ivar drain_timeout: seconds that sessions get to finish when the relay is
        told to stop; 0 for none.
    :ivar transport: whose connections the short forms get.
    :ivar verbose: log when a session opens, dials and connects, too.
    :ivar quiet: log a session's end only when it did not end well.
    """

    timeouts: Timeouts = attrs.Factory(Timeouts)
    drain_timeout: float = settings.DRAIN_TIMEOUT.default
    backlog: int = settings.BACKLOG.default
    transport: Transport = settings.TRANSPORT.default
    verbose: bool = False
    quiet: bool = False


@attrs.frozen
class Config(Common):
    """All settings of one `twistd relayd`.

    :ivar relays: at least one, unless `demo`.
    :ivar demo: relay DEMO_LISTENER to a file server of the current folder.
    """

    relays: Sequence[Relay | UdpRelay] = attrs.field(converter=_relays)
    udp: UdpSettings = attrs.field(factory=UdpSettings, kw_only=True)
    demo: bool = attrs.field(default=False, kw_only=True)


@attrs.frozen(kw_only=True)
class Limits:
    """How many SOCKS4 clients may wait; see :class:`relayd.socks4.Socks4Factory`.

    :ivar max_handshakes: None is what the limit of open files allows.
    :ivar max_handshakes_per_client: None is a quarter of those.
    """

    max_handshakes: int | None = None
    max_handshakes_per_client: int | None = None
    max_binds: int = settings.MAX_BINDS.default
    max_binds_per_client: int = settings.MAX_BINDS_PER_CLIENT.default


def _networks(given: Iterable[Network]) -> tuple[Network, ...]:
    return tuple(given)


def _rules(given: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(given)


def _user_ids(given: Iterable[bytes]) -> tuple[bytes, ...]:
    return tuple(given)


@attrs.frozen(kw_only=True)
class Socks4Config(Common):
    """All settings of one `twistd socks4`.

    :ivar listeners: at least one.
    :ivar clients: the networks whose clients are served; none is all.
    :ivar rules: about destinations, in the operator's order.
    :ivar user_ids: the users that are served; none is all.
    """

    listeners: Sequence[StreamAddress] = attrs.field(
        default=(SOCKS4_LISTENER,), converter=_addresses
    )
    clients: Sequence[Network] = attrs.field(default=(), converter=_networks)
    rules: Sequence[Rule] = attrs.field(default=(), converter=_rules)
    user_ids: Sequence[bytes] = attrs.field(default=(), converter=_user_ids)
    ident: bool = False
    bind: bool = True
    bind_any: bool = False
    bind_address: str | None = None
    external_address: str | None = None
    bind_timeout: float = settings.BIND_TIMEOUT.default
    limits: Limits = attrs.Factory(Limits)


def is_local(address: StreamAddress) -> bool:
    """Whether only this machine's own programs can reach a listener there."""
    if isinstance(address, UnixPath):
        return True
    if not isinstance(address, HostPort) or address.host is None:
        return False
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost"


def check_openness(
    listeners: Sequence[StreamAddress], *, bounded: bool, opened: bool
) -> None:
    """Refuse to be an open proxy by accident.

    :param bounded: it is said whose clients are served.
    :param opened: everybody's are, on purpose.
    :raises ConfigError: neither, and others than this machine can reach a listener; or
        a listener can't tell whose they are.
    """
    if bounded and opened:
        raise ConfigError("--open and --allow-client contradict each other: give one")
    for listener in listeners:
        text = listener.text if isinstance(listener, EndpointString) else ""
        if bounded and hides_clients(text):
            raise ConfigError(
                f"--allow-client can't be kept on --listen {text!r}: what is seen there"
                " is the balancer's address, not the client's.  Let the balancer say"
                " who may connect, let nobody but the balancer reach the listener, and"
                " write --open instead"
            )
        if not (bounded or opened or is_local(listener)):
            raise ConfigError(
                f"--listen '{listener}' would be a proxy for everybody who can reach"
                " it: add --allow-client CIDR for those that it is for (such as"
                " --allow-client 192.168.0.0/16), or --open"
            )


def client_network(text: str) -> Network:
    """A network of clients.

    :raises ConfigError: it is not one.
    """
    try:
        return parse_network(text)
    except ValueError as problem:
        raise ConfigError(
            f"bad --allow-client {text!r}: {problem}; expected an address or a network"
            " such as 192.168.0.0/16"
        ) from None


def user_id(text: str) -> bytes:
    """A user id, as it is on the wire.

    :raises ConfigError: none can be it.
    """
    encoded = os.fsencode(text)
    if not 0 < len(encoded) <= MOST_USER_ID or b"\0" in encoded:
        raise ConfigError(
            f"bad --userid {text!r}: expected 1 to {MOST_USER_ID} bytes, none of them 0"
        )
    return encoded


def ipv4_address(option: str, text: str) -> str:
    """An IPv4 address.

    :raises ConfigError: it is not one.
    """
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ConfigError(
            f"bad {option} {text!r}: expected an IPv4 address such as 192.0.2.1"
        ) from None


def bound(option: str, text: str) -> int:
    """How many of something there may be.

    :raises ConfigError: it is not a number from 1 up.
    """
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0
    if value < 1:
        raise ConfigError(f"bad {option} {text!r}: expected a number from 1 to 9999999")
    return value


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


def lifetime(option: str, text: str) -> float:
    """A timeout that can't be never.

    :raises ConfigError: it is not one.
    """
    value = seconds(option, text)
    if not value:
        raise ConfigError(
            f"bad {option} {text!r}: a flow that never expires keeps its port for ever;"
            " expected more than 0 seconds"
        )
    return value


def ratio(option: str, text: str) -> float:
    """How many times as much; 0 is no limit.

    :raises ConfigError: it is not a number from 0 up.
    """
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"bad {option} {text!r}: expected a number from 0 up")
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


def pair(given: Sequence[Given]) -> tuple[Relay | UdpRelay, ...]:
    """Match listeners with destinations.

    :param given: in the order of the command line.  The destinations after a
        listener are its own; those of a single listener may stand before it.
    :raises ConfigError: a listener or a destination has no partner, or one of another
        kind.
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
    owned: dict[Given, list[Given]] = {each: [] for each in listeners}
    for each in given:
        if each.kind == "--listen":
            owner = each
        else:
            owned[owner].append(each)
    for listener, destinations in owned.items():
        if not destinations:
            raise ConfigError(
                f"--listen {listener.text!r} has no --dest: say where to relay to"
            )
    return tuple(_relay(listener, own) for listener, own in owned.items())


def _relay(listener: Given, owned: Sequence[Given]) -> Relay | UdpRelay:
    datagrams = isinstance(listener.address, UdpAddress)
    for each in owned:
        if isinstance(each.address, UdpAddress) != datagrams:
            raise ConfigError(
                f"--listen {listener.text!r} can't be relayed to --dest {each.text!r}:"
                " datagrams go to datagrams, write udp: before both or neither"
            )
    where: Any = listener.address
    kind = UdpRelay if datagrams else Relay
    return kind(where, [each.address for each in owned])


def receive_buffer(text: str) -> int:
    """Bytes of a socket's receive buffer.

    :raises ConfigError: it is not a number that setsockopt takes.
    """
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 11 else 0
    if not 1 <= value <= RECEIVE_BUFFER_LIMIT:
        raise ConfigError(
            f"bad --udp-rcvbuf {text!r}: expected 1 to {RECEIVE_BUFFER_LIMIT} bytes"
        )
    return value
