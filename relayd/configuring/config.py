"""The settings of a command as frozen objects, checked; without a reactor.

The rows of the table of settings (:mod:`relayd.core.settings`,
:mod:`relayd.configuring.address_settings`) have parsed the values; here they become
frozen objects, from which :mod:`relayd.operating.relays` builds listeners and relays.
What concerns several rows is checked here: which settings contradict each other, and
which servers belong to which listener.  Errors are
:class:`~relayd.core.errors.ConfigError`, with one line that quotes what is wrong.

A field has the name that its row says (`Setting.field`), by which `fill` finds it.  The
fields of `StreamSettings`, `UdpSettings` and `Socks4Settings` are passed to the
factories as keywords.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    StreamAddress,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.address_settings import (
    ALLOW_CLIENT,
    DEST,
    LISTEN,
    NAME,
    SOCKS4_LISTEN,
    SOCKS4_LISTENER,
    Given,
)
from relayd.configuring.endpoint_strings import hides_clients
from relayd.core import settings
from relayd.core.errors import ConfigError
from relayd.core.networks import Network
from relayd.core.settings import Transport
from relayd.socks.rules import Rule

Some = TypeVar("Some")

#: What `--demo` listens on.
DEMO_LISTENER = HostPort("127.0.0.1", 8080)


def _addresses(given: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(given)


@attrs.frozen
class Relay:
    """One listener and its servers.

    :ivar name: in the log; None for `relay` and a number.
    """

    listen: StreamAddress
    destinations: Sequence[StreamAddress] = attrs.field(converter=_addresses)
    name: str | None = None


@attrs.frozen
class UdpRelay:
    """One datagram listener and its servers; `name` as in :class:`Relay`."""

    listen: UdpAddress
    destinations: Sequence[UdpAddress] = attrs.field(converter=_addresses)
    name: str | None = None


def _relays(given: Iterable[Relay | UdpRelay]) -> tuple[Relay | UdpRelay, ...]:
    return tuple(given)


@attrs.frozen(kw_only=True)
class StreamSettings:
    """Settings of every stream relay; see :class:`relayd.tcp.RelayFactory`."""

    handshake_timeout: float = settings.HANDSHAKE_TIMEOUT.default
    connect_timeout: float = settings.CONNECT_TIMEOUT.default
    stall_timeout: float = settings.STALL_TIMEOUT.default
    idle_timeout: float = settings.IDLE_TIMEOUT.default
    half_close_timeout: float = settings.HALF_CLOSE_TIMEOUT.default


@attrs.frozen(kw_only=True)
class UdpSettings:
    """Settings of UDP relays; see :class:`relayd.udp_nat.UdpNat`."""

    timeout: float = settings.UDP_TIMEOUT.default
    unreplied_timeout: float = settings.UDP_UNREPLIED_TIMEOUT.default
    refresh_inbound: bool = settings.REFRESH_INBOUND.default
    max_flows: int | None = settings.MAX_FLOWS.default
    max_flows_per_client: int | None = settings.MAX_FLOWS_PER_CLIENT.default
    reply_cap: float = settings.REPLY_CAP.default
    receive_buffer: int = settings.UDP_RCVBUF.default


@attrs.frozen(kw_only=True)
class Socks4Settings:
    """Settings of SOCKS4 proxies; see :class:`relayd.socks4.Socks4Factory`."""

    ident: bool = settings.IDENT.default
    bind: bool = settings.BIND.default
    bind_any: bool = settings.BIND_ANY.default
    bind_address: str | None = settings.BIND_ADDRESS.default
    external_address: str | None = settings.EXTERNAL_ADDRESS.default
    bind_timeout: float = settings.BIND_TIMEOUT.default
    max_handshakes: int | None = settings.MAX_HANDSHAKES.default
    max_handshakes_per_client: int | None = settings.MAX_HANDSHAKES_PER_CLIENT.default
    max_binds: int = settings.MAX_BINDS.default
    max_binds_per_client: int = settings.MAX_BINDS_PER_CLIENT.default


@attrs.frozen(kw_only=True)
class Common:
    """Settings of both `twistd relayd` and `twistd socks4`."""

    stream: StreamSettings = attrs.field(factory=StreamSettings)
    drain_timeout: float = settings.DRAIN_TIMEOUT.default
    shutdown_delay: float = settings.SHUTDOWN_DELAY.default
    backlog: int = settings.BACKLOG.default
    max_descriptors: int | None = settings.MAX_DESCRIPTORS.default
    transport: Transport = settings.TRANSPORT.default
    verbose: bool = settings.VERBOSE.default
    quiet: bool = settings.QUIET.default
    access_log: str | None = settings.ACCESS_LOG.default


@attrs.frozen
class Config(Common):
    """All settings of one `twistd relayd`.

    :ivar relays: at least one, unless `demo`.
    :ivar demo: relay DEMO_LISTENER to a file server of the current folder.
    """

    relays: Sequence[Relay | UdpRelay] = attrs.field(converter=_relays)
    udp: UdpSettings = attrs.field(factory=UdpSettings, kw_only=True)
    demo: bool = attrs.field(default=settings.DEMO.default, kw_only=True)


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
    :ivar name: in the log; None for `relay` and a number.
    :ivar open: an open proxy, which serves all clients, is intended.
    :ivar clients: the networks whose clients are served; empty: all.
    :ivar rules: for destinations, in the operator's order.
    :ivar user_ids: the users that are served; empty: all.
    """

    listeners: Sequence[StreamAddress] = attrs.field(
        default=(SOCKS4_LISTENER,), converter=_addresses
    )
    name: str | None = None
    open: bool = settings.OPEN.default
    clients: Sequence[Network] = attrs.field(default=(), converter=_networks)
    rules: Sequence[Rule] = attrs.field(default=(), converter=_rules)
    user_ids: Sequence[bytes] = attrs.field(default=(), converter=_user_ids)
    socks4: Socks4Settings = attrs.field(factory=Socks4Settings)


def fill(kind: type[Some], values: Mapping[str, Any]) -> Some:
    """An object of a class of settings, and its groups, filled from `values`.

    :param values: by field name; a field that is missing gets its default.
    """
    made = {}
    fields: Any = attrs.fields(kind)  # type: ignore[arg-type]
    for field in fields:
        group = getattr(field.default, "factory", None)
        if group is not None:
            made[field.name] = fill(group, values)
        elif field.name in values:
            made[field.name] = values[field.name]
    return kind(**made)


def relayd_config(
    values: Mapping[str, Any], given: Sequence[Given], kind: type[Config] = Config
) -> Config:
    """The settings of one `twistd relayd`.

    :param values: of the settings that are not repeatable, by field name.
    :param given: the repeatable ones, in their order.
    :raises ConfigError: they contradict each other, a listener has no server, or a
        server no listener.
    """
    _check_common(values)
    demo = values[settings.DEMO.field]
    if demo and given:
        raise ConfigError(
            "--demo brings its own listener and destination: leave out"
            f" --{given[0].setting.name} {given[0].text!r}"
        )
    return fill(kind, {**values, LISTEN.field: () if demo else pair(given)})


def socks4_config(
    values: Mapping[str, Any],
    given: Sequence[Given],
    kind: type[Socks4Config] = Socks4Config,
) -> Socks4Config:
    """The settings of one `twistd socks4`; see :func:`relayd_config`.

    :raises ConfigError: they contradict each other, or it would be an open proxy by
        accident.
    """
    _check_common(values)
    repeated: dict[str, list[Any]] = {}
    for each in given:
        repeated.setdefault(each.setting.field, []).append(each.value)
    refuse_open_proxy(
        repeated.get(SOCKS4_LISTEN.field, SOCKS4_LISTEN.default),
        bounded=ALLOW_CLIENT.field in repeated,
        opened=values[settings.OPEN.field],
    )
    if not values[settings.BIND.field]:
        for row in (
            settings.BIND_ANY,
            settings.BIND_ADDRESS,
            settings.EXTERNAL_ADDRESS,
        ):
            if values[row.field]:
                raise _contradiction(settings.BIND.option, row.option)
    external = values[settings.EXTERNAL_ADDRESS.field]
    if external == "0.0.0.0":
        raise ConfigError(
            f"bad --external-address {external!r}: expected the address that BIND's"
            " peers connect to"
        )
    return fill(kind, {**values, **repeated})


def _check_common(values: Mapping[str, Any]) -> None:
    if values[settings.VERBOSE.field] and values[settings.QUIET.field]:
        raise _contradiction(settings.VERBOSE.option, settings.QUIET.option)


def _contradiction(one: str, other: str) -> ConfigError:
    return ConfigError(f"--{one} and --{other} contradict each other: give one")


def is_local(address: StreamAddress) -> bool:
    """Whether only programs of this machine can reach a listener there."""
    if isinstance(address, UnixPath):
        return True
    if not isinstance(address, HostPort) or address.host is None:
        return False
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost"


def refuse_open_proxy(
    listeners: Sequence[StreamAddress], *, bounded: bool, opened: bool
) -> None:
    """Refuse an open proxy, unless --open is given.

    :param bounded: --allow-client is given.
    :param opened: --open is given.
    :raises ConfigError: both; or neither, and other machines can reach a listener; or
        --allow-client, and a listener does not see its clients' addresses.
    """
    if bounded and opened:
        raise _contradiction(settings.OPEN.option, ALLOW_CLIENT.option)
    for listener in listeners:
        text = listener.text if isinstance(listener, EndpointString) else ""
        if bounded and hides_clients(text):
            raise ConfigError(
                f"--allow-client can't be applied to --listen {text!r}: the relay sees"
                " the balancer's address there, not the client's. Let the balancer"
                " decide who may connect, let only the balancer reach the listener, and"
                " use --open instead"
            )
        if not (bounded or opened or is_local(listener)):
            raise ConfigError(
                f"--listen '{listener}' would be an open proxy, for everybody who can"
                " reach it. Add --allow-client CIDR for your clients (such as"
                " --allow-client 192.168.0.0/16), or --open"
            )


def pair(given: Sequence[Given]) -> tuple[Relay | UdpRelay, ...]:
    """Assign destinations and names to listeners.

    :param given: in the order of the command line.  Destinations and a name belong to
        the listener before them; if there is one listener only, they may precede it.
    :raises ConfigError: a listener has no destination, or a destination or a name no
        listener; a listener and its destination are of different kinds; a listener has
        two names; two relays have the same name.
    """
    listeners = [each for each in given if each.setting is LISTEN]
    if not given:
        raise ConfigError(
            "nothing to relay: give --listen and --dest, or try --demo (see --help)"
        )
    first = given[0]
    option = f"--{first.setting.name} {first.text!r}"
    if not listeners:
        raise ConfigError(f"{option} has no --listen: say where clients connect")
    if first.setting is not LISTEN and len(listeners) > 1:
        raise ConfigError(
            f"{option} stands before the first of several --listen: put each"
            f" --{first.setting.name} after the --listen that it belongs to"
        )
    owner = listeners[0]
    owned: dict[Given, list[Given]] = {each: [] for each in listeners}
    names: dict[Given, Given] = {}
    for each in given:
        if each.setting is LISTEN:
            owner = each
        elif each.setting is DEST:
            owned[owner].append(each)
        elif owner in names:
            raise ConfigError(
                f"--listen {owner.text!r} has two names, {names[owner].text!r} and"
                f" {each.text!r}: give one"
            )
        else:
            names[owner] = each
    for listener, destinations in owned.items():
        if not destinations:
            raise ConfigError(
                f"--listen {listener.text!r} has no --dest: say where to relay to"
            )
    _check_names([name.value for name in names.values()])
    return tuple(
        _relay(listener, own, names[listener].value if listener in names else None)
        for listener, own in owned.items()
    )


def _check_names(names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(
                f"bad --{NAME.name} {name!r}: another relay has it already; give each"
                " relay its own name"
            )


def _relay(
    listener: Given, owned: Sequence[Given], name: str | None
) -> Relay | UdpRelay:
    datagrams = isinstance(listener.value, UdpAddress)
    for each in owned:
        if isinstance(each.value, UdpAddress) != datagrams:
            raise ConfigError(
                f"--listen {listener.text!r} can't be relayed to --dest {each.text!r}:"
                " datagrams go to datagrams, write udp: before both or neither"
            )
    where: Any = listener.value
    kind = UdpRelay if datagrams else Relay
    return kind(where, [each.value for each in owned], name)
