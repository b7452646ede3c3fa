"""The settings of a process as frozen objects; without a reactor.

A :class:`Config` has what concerns the whole process, and a list of relays, each of
which has settings of its own.  :mod:`relayd.configuring.configure` makes it of what was
given, and checks it; :mod:`relayd.operating.relays` builds listeners and relays of it.
Two that are equal describe the same service.

A field has the name that its row of the table of settings says (`Setting.field`), by
which `fill` finds it.  The fields of `StreamSettings`, `UdpSettings` and
`Socks4Settings` are passed to the factories as keywords.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from relayd.admission.client_rules import ClientRule
from relayd.admission.hours import Hours
from relayd.admission.per_client import ClientPrefix, ConnectRate
from relayd.admission.rates import Rates
from relayd.configuring.address_grammar import (
    HostPort,
    OriginalAddress,
    PortRange,
    StreamAddress,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.address_settings import (
    CLIENT_PREFIX,
    MAX_CONNECTS_PER_CLIENT,
    METRICS_ADDRESS,
    METRICS_OPEN,
    SEND_PROXY,
    SOCKS4_LISTENER,
)
from relayd.configuring.bandwidth_settings import (
    BANDWIDTH,
    BANDWIDTH_PER_CLIENT,
    BANDWIDTH_PER_SESSION,
)
from relayd.configuring.control_settings import CONTROL
from relayd.configuring.dial_settings import INTERFACE, KEEPALIVE, MARK, TRANSPARENT
from relayd.configuring.route_settings import ROUTE, SniEntry
from relayd.configuring.server_grammar import ServersOf
from relayd.configuring.server_options import SendProxy
from relayd.core import (
    admission_settings,
    pool_settings,
    process_settings,
    settings,
)
from relayd.core.check_grammar import Check
from relayd.core.filter_spec import FilterSpec
from relayd.core.interception import Intercept
from relayd.core.networks import Network, unmapped
from relayd.core.process_settings import LogFormat, Transport
from relayd.core.route_spec import RouteSpec
from relayd.net.dial_options import DialOptions
from relayd.net.keepalive import Keepalive
from relayd.socks.rules import Rule

Some = TypeVar("Some")

#: What `--demo` listens on.
DEMO_LISTENER = HostPort("127.0.0.1", 8080)


def _kept(given: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(given)


@attrs.frozen(kw_only=True)
class StreamSettings:
    """Settings of every stream relay; see :class:`relayd.tcp.RelayFactory`."""

    accept_proxy: Sequence[Network | str] = attrs.field(default=(), converter=_kept)
    send_proxy: SendProxy | None = SEND_PROXY.default
    handshake_timeout: float = settings.HANDSHAKE_TIMEOUT.default
    connect_timeout: float = settings.CONNECT_TIMEOUT.default
    dial_timeout: float | None = pool_settings.DIAL_TIMEOUT.default
    stall_timeout: float = settings.STALL_TIMEOUT.default
    idle_timeout: float = settings.IDLE_TIMEOUT.default
    half_close_timeout: float = settings.HALF_CLOSE_TIMEOUT.default
    keepalive: Keepalive | None = KEEPALIVE.default
    user_timeout: float = settings.USER_TIMEOUT.default
    half_close: bool = settings.HALF_CLOSE.default


@attrs.frozen(kw_only=True)
class UdpSettings:
    """Settings of UDP relays; see :class:`relayd.udp_nat.UdpNat`."""

    send_proxy: SendProxy | None = SEND_PROXY.default
    timeout: float = settings.UDP_TIMEOUT.default
    unreplied_timeout: float = settings.UDP_UNREPLIED_TIMEOUT.default
    refresh_inbound: bool = settings.REFRESH_INBOUND.default
    max_flows: int | None = settings.MAX_FLOWS.default
    max_flows_per_client: int | None = settings.MAX_FLOWS_PER_CLIENT.default
    reply_cap: float = settings.REPLY_CAP.default
    receive_buffer: int = settings.UDP_RCVBUF.default
    udp_balance: pool_settings.UdpBalance = pool_settings.UDP_BALANCE.default


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
class Dialing:
    """How servers are dialled.

    :ivar sources: from these addresses, one of each family at most.
    """

    sources: Sequence[str] = attrs.field(default=(), converter=_kept)
    interface: str | None = INTERFACE.default
    mark: int | None = MARK.default

    @property
    def options(self) -> DialOptions:
        """As sockets get them."""
        return DialOptions.of(self.sources, self.interface, self.mark)


@attrs.frozen(kw_only=True)
class ServerDialing(Dialing):
    """The same of a relay that has servers.

    :ivar transparent: they are dialled from the client's own address.
    """

    transparent: bool = TRANSPARENT.default

    @property
    def options(self) -> DialOptions:
        """As sockets get them."""
        return attrs.evolve(super().options, transparent=self.transparent)


@attrs.frozen(kw_only=True)
class FlowAdmission:
    """Which clients are served, and how fast.

    :ivar clients: rules, in the operator's order; none: all are.
    :ivar hours: when; none: always.
    """

    clients: Sequence[ClientRule] = attrs.field(default=(), converter=_kept)
    hours: Sequence[Hours] = attrs.field(default=(), converter=_kept)
    hours_end: bool = admission_settings.HOURS_END.default
    max_connects_per_client: ConnectRate | None = MAX_CONNECTS_PER_CLIENT.default
    client_prefix: ClientPrefix | None = CLIENT_PREFIX.default
    bandwidth: Rates | None = BANDWIDTH.default
    bandwidth_per_client: Rates | None = BANDWIDTH_PER_CLIENT.default
    bandwidth_per_session: Rates | None = BANDWIDTH_PER_SESSION.default


@attrs.frozen(kw_only=True)
class Admission(FlowAdmission):
    """The same for streams, and how many there may be."""

    max_sessions: int | None = admission_settings.MAX_SESSIONS.default
    max_sessions_per_client: int | None = (
        admission_settings.MAX_SESSIONS_PER_CLIENT.default
    )
    queue: int | None = admission_settings.QUEUE.default
    queue_timeout: float = admission_settings.QUEUE_TIMEOUT.default
    max_age: float = admission_settings.MAX_AGE.default


@attrs.frozen(kw_only=True)
class ServerChecks:
    """Whether servers are up; of every relay that has servers.

    :ivar check: of each server; None: they are not checked.
    """

    check: Check | None = pool_settings.CHECK.default
    check_every: float = pool_settings.CHECK_EVERY.default
    check_timeout: float = pool_settings.CHECK_TIMEOUT.default
    rise: int = pool_settings.RISE.default
    fall: int = pool_settings.FALL.default


@attrs.frozen(kw_only=True)
class FlowPoolSettings(ServerChecks):
    """The same, which server is chosen, and what if none is fit; for flows, too."""

    balance: pool_settings.Balance = pool_settings.BALANCE.default
    max_fails: int = pool_settings.MAX_FAILS.default
    fail_time: float = pool_settings.FAIL_TIME.default
    fail_max: float = pool_settings.FAIL_MAX.default
    eject_most: int = pool_settings.EJECT_MOST.default
    slow_start: float = pool_settings.SLOW_START.default
    on_down: pool_settings.OnDown = pool_settings.ON_DOWN.default
    when_none: pool_settings.WhenNone = pool_settings.WHEN_NONE.default
    resolve_every: float | None = pool_settings.RESOLVE_EVERY.default
    resolve_grace: float = pool_settings.RESOLVE_GRACE.default


@attrs.frozen(kw_only=True)
class PoolSettings(FlowPoolSettings):
    """The same for streams, and what follows if a server fails."""

    retries: int | None = pool_settings.RETRIES.default


@attrs.frozen
class Relay:
    """A TCP relay.

    :ivar listeners: at least one.
    :ivar destinations: its servers, in turn; none: it is the demo.
    :ivar name: None for `relay` and a number.
    :ivar intercepts: what the kernel is to bring to its listeners.
    :ivar filters: of its sessions, in order.
    :ivar route: decides about each client; None: nothing does.
    :ivar sni: which pool is for which server name.
    :ivar max_deciding: how many clients may be undecided at once; None: as many as
        descriptors allow.
    :ivar server_speaks_first: its servers speak first.
    :ivar enabled: it listens once the process runs; else it is stopped.
    """

    listeners: Sequence[StreamAddress | PortRange] = attrs.field(converter=_kept)
    destinations: Sequence[StreamAddress | ServersOf | OriginalAddress | PortRange] = (
        attrs.field(converter=_kept)
    )
    name: str | None = None
    admission: Admission = attrs.field(factory=Admission, kw_only=True)
    pool: PoolSettings = attrs.field(factory=PoolSettings, kw_only=True)
    stream: StreamSettings = attrs.field(factory=StreamSettings, kw_only=True)
    dialing: ServerDialing = attrs.field(factory=ServerDialing, kw_only=True)
    intercepts: Sequence[Intercept] = attrs.field(
        default=(), converter=_kept, kw_only=True
    )
    filters: Sequence[FilterSpec] = attrs.field(
        default=(), converter=_kept, kw_only=True
    )
    route: RouteSpec | None = attrs.field(default=ROUTE.default, kw_only=True)
    sni: Sequence[SniEntry] = attrs.field(default=(), converter=_kept, kw_only=True)
    max_deciding: int | None = attrs.field(
        default=settings.MAX_DECIDING.default, kw_only=True
    )
    server_speaks_first: bool = attrs.field(
        default=settings.SERVER_SPEAKS_FIRST.default, kw_only=True
    )
    backlog: int = attrs.field(default=settings.BACKLOG.default, kw_only=True)
    enabled: bool = attrs.field(default=settings.ENABLED.default, kw_only=True)


@attrs.frozen
class UdpRelay:
    """A UDP relay; as :class:`Relay`."""

    listeners: Sequence[UdpAddress | PortRange] = attrs.field(converter=_kept)
    destinations: Sequence[UdpAddress | ServersOf | OriginalAddress | PortRange] = (
        attrs.field(converter=_kept)
    )
    name: str | None = None
    admission: FlowAdmission = attrs.field(factory=FlowAdmission, kw_only=True)
    pool: FlowPoolSettings = attrs.field(factory=FlowPoolSettings, kw_only=True)
    udp: UdpSettings = attrs.field(factory=UdpSettings, kw_only=True)
    dialing: ServerDialing = attrs.field(factory=ServerDialing, kw_only=True)
    intercepts: Sequence[Intercept] = attrs.field(
        default=(), converter=_kept, kw_only=True
    )
    filters: Sequence[FilterSpec] = attrs.field(
        default=(), converter=_kept, kw_only=True
    )
    enabled: bool = attrs.field(default=settings.ENABLED.default, kw_only=True)


@attrs.frozen(kw_only=True)
class Socks4Relay:
    """A SOCKS4 proxy.

    :ivar listeners: at least one.
    :ivar name: None for `relay` and a number.
    :ivar open: an open proxy, which serves all clients, is intended.
    :ivar rules: for destinations, in the operator's order.
    :ivar user_ids: the users that are served; empty: all.
    :ivar filters: of its sessions, in order.
    :ivar route: decides about each client; None: nothing does.
    :ivar enabled: as of a :class:`Relay`.
    """

    listeners: Sequence[StreamAddress] = attrs.field(
        default=(SOCKS4_LISTENER,), converter=_kept
    )
    name: str | None = None
    open: bool = settings.OPEN.default
    rules: Sequence[Rule] = attrs.field(default=(), converter=_kept)
    user_ids: Sequence[bytes] = attrs.field(default=(), converter=_kept)
    admission: Admission = attrs.field(factory=Admission)
    stream: StreamSettings = attrs.field(factory=StreamSettings)
    dialing: Dialing = attrs.field(factory=Dialing)
    filters: Sequence[FilterSpec] = attrs.field(default=(), converter=_kept)
    route: RouteSpec | None = ROUTE.default
    socks4: Socks4Settings = attrs.field(factory=Socks4Settings)
    backlog: int = settings.BACKLOG.default
    enabled: bool = settings.ENABLED.default


AnyRelay = Relay | UdpRelay | Socks4Relay


@attrs.frozen(kw_only=True)
class ProcessSettings:
    """What concerns the whole process.

    :ivar manage_netfilter: it installs the rules that relays need, and removes them.
    :ivar netfilter_mark: the bit of the mark in those rules, one of 32.
    :ivar control_uids: users who may do all by the control socket.
    :ivar control_read_uids: users who may see all by it.
    """

    demo: bool = process_settings.DEMO.default
    drain_timeout: float = process_settings.DRAIN_TIMEOUT.default
    shutdown_delay: float = process_settings.SHUTDOWN_DELAY.default
    max_descriptors: int | None = process_settings.MAX_DESCRIPTORS.default
    transport: Transport = process_settings.TRANSPORT.default
    verbose: bool = process_settings.VERBOSE.default
    manage_netfilter: bool = process_settings.MANAGE_NETFILTER.default
    netfilter_mark: int = process_settings.NETFILTER_MARK.default
    quiet: bool = process_settings.QUIET.default
    access_log: str | None = process_settings.ACCESS_LOG.default
    log_format: LogFormat = process_settings.LOG_FORMAT.default
    log_interval: float = process_settings.LOG_INTERVAL.default
    metrics: StreamAddress | None = METRICS_ADDRESS.default
    metrics_open: bool = METRICS_OPEN.default
    control: UnixPath | None = CONTROL.default
    control_uids: Sequence[int] = attrs.field(default=(), converter=_kept)
    control_read_uids: Sequence[int] = attrs.field(default=(), converter=_kept)


@attrs.frozen
class Config(ProcessSettings):
    """All settings of a process.

    :ivar relays: at least one; if `demo`, the only one is DEMO_LISTENER's, to a file
        server of the current folder.
    """

    relays: Sequence[AnyRelay] = attrs.field(converter=_kept)


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


def is_local(address: StreamAddress) -> bool:
    """Whether only programs of this machine can reach a listener there."""
    if isinstance(address, UnixPath):
        return True
    if not isinstance(address, HostPort) or address.host is None:
        return False
    try:
        host = ipaddress.ip_address(address.host)
    except ValueError:
        return address.host == "localhost"
    return unmapped(host).is_loopback


def each_port(
    relay: Relay | UdpRelay,
) -> Iterator[tuple[list[Any], list[Any]]]:
    """The listeners, and their destinations, of each port of a relay's ranges.

    :return: addresses, each with one port.
    """
    ranges = [each for each in relay.listeners if isinstance(each, PortRange)]
    for number in range(len(ranges[0]) if ranges else 1):
        yield tuple(
            [
                each[number] if isinstance(each, PortRange) else each
                for each in addresses
            ]
            for addresses in (relay.listeners, relay.destinations)
        )  # type: ignore[misc]
