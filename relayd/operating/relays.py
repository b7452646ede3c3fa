"""Builds listeners and relays from settings.

One function for each kind of relay: a TCP relay, a UDP relay, a SOCKS4 proxy.  A relay
may have several listeners, and several factories, which share its name and its limits.
Nothing is opened here: :mod:`relayd.operating.running` does that.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import attrs

from relayd.configuring.address_grammar import (
    HostPort,
    PortRange,
    StreamAddress,
    UdpAddress,
)
from relayd.configuring.config import (
    Config,
    Dialing,
    Relay,
    Socks4Relay,
    UdpRelay,
    each_port,
    is_local,
)
from relayd.configuring.server_grammar import ServersOf, options_of
from relayd.core.errors import ConfigError
from relayd.datagrams.sockets import default_max_flows
from relayd.net.dial_options import DialOptions
from relayd.net.own_addresses import is_own
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog
from relayd.operating.admission import Admitting
from relayd.operating.checks import ServerCheckService
from relayd.operating.endpoints import (
    datagram_endpoint,
    dialer,
    listening_endpoint,
    watcher,
)
from relayd.operating.flow_pools import FlowMaker, flow_servers
from relayd.operating.pools import stream_pool
from relayd.operating.servers import Maker
from relayd.operating.standing import Listening
from relayd.socks.destinations import ProxyPolicy
from relayd.socks4 import Socks4Factory
from relayd.tcp import RelayFactory
from relayd.udp_nat import FlowServer, UdpNat
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


def relay_listenings(
    relay: Relay,
    config: Config,
    reactor: Any,
    lines: LineLog,
    checks: ServerCheckService | None = None,
) -> list[Listening]:
    """The listeners of a TCP relay, with the relay of each port.

    :param lines: for the lines of its sessions.
    :param checks: what checks the servers; unless given, nobody does.
    :raises ConfigError: Twisted can't use one of the endpoint strings, a check can't be
        imported, or servers can't be dialled as they are to be.
    """
    found = []
    admitting = Admitting.of(relay.admission, reactor)
    options = _dial_options(relay.dialing)
    _check_own(relay.destinations, options)
    for listeners, destinations in each_port(relay):
        made = Maker(reactor, config.transport, options)
        if checks is not None:
            made.checked = partial(_check, checks, relay, options)
        pool = stream_pool(
            destinations, relay.pool, reactor, made, relay.admission.client_prefix
        )
        if checks is not None:
            pool.listeners.append(partial(_check_no_more, checks))
        found += pool_listenings(
            listeners, pool, relay, config, reactor, lines, admitting
        )
    _share_totals(each.factory for each in found)
    return found


def _share_totals(factories: Iterable[Any]) -> None:
    """Have the factories of one relay count together."""
    first, *others = dict.fromkeys(factories)
    for other in others:
        other.share_totals(first)


def _check(
    checks: ServerCheckService,
    relay: Relay,
    dialing: DialOptions | None,
    address: StreamAddress,
    server: Server,
) -> None:
    """Check a server, if its relay or its destination says so."""
    options = address.options
    settings = relay.pool
    if options.check is not None:
        settings = attrs.evolve(settings, check=options.check)
    send_proxy, dialing = relay.stream.send_proxy, options.dialing(dialing)
    checks.add([(address, server)], settings, send_proxy, dialing)


def _check_no_more(checks: ServerCheckService, server: Server) -> None:
    """A server has changed: one that leaves is checked no more."""
    if server.draining:
        checks.checker.remove(server)


def pool_listenings(
    listeners: Sequence[StreamAddress],
    pool: Pool,
    relay: Relay,
    config: Config,
    reactor: Any,
    lines: LineLog,
    admitting: Admitting,
) -> list[Listening]:
    """Listeners that share a relay to a pool.

    :param admitting: who is served.
    :raises ConfigError: Twisted can't use a listener's endpoint string.
    """
    factory = RelayFactory(
        pool,
        clock=reactor,
        observer=_session_log(config, lines),
        gate=admitting.gate,
        lifetime=admitting.lifetime,
        bandwidth=admitting.bandwidth,
        name=relay.name,
        retries=relay.pool.retries,
        dial_timeout=relay.pool.dial_timeout,
        cut=relay.pool.on_down == "cut",
        wait_for_server=relay.pool.when_none.limit,
        **attrs.asdict(relay.stream, recurse=False),
    )
    return [
        Listening(
            listening_endpoint(listen, reactor, relay.backlog, config.transport),
            factory,
            str(listen),
            f"relaying to {pool.names}",
            enabled=relay.enabled,
        )
        for listen in listeners
    ]


@attrs.frozen
class FlowLimit:
    """How the UDP relays of a process divide its descriptors and ports.

    :ivar tables: the tables of flows: one for each relay, and each port of a range.
    :ivar each: the flows that each of them can have.
    """

    tables: int
    each: int

    @classmethod
    def of(cls, config: Config) -> FlowLimit:
        relays = [each for each in config.relays if isinstance(each, UdpRelay)]
        tables = sum(1 for relay in relays for _ in each_port(relay))
        return cls(tables, default_max_flows() // (tables or 1) or 1)


def udp_listenings(
    relay: UdpRelay,
    config: Config,
    reactor: Any,
    lines: LineLog,
    limit: FlowLimit,
    checks: ServerCheckService | None = None,
) -> list[Listening]:
    """The listeners of a UDP relay, with the relay of each port.

    :param lines: for the lines of its flows.
    :param limit: of the process.
    :param checks: what checks the servers; unless given, nobody does.
    :raises ConfigError: the transport is not available, a server's interface does not
        exist, the process can't have so many flows, or servers can't be dialled as they
        are to be.
    """
    max_flows = relay.udp.max_flows
    if max_flows is None:
        max_flows = limit.each
    elif max_flows > limit.each:
        each = f" for each of {limit.tables} listeners" if limit.tables > 1 else ""
        raise ConfigError(
            f"max-flows {max_flows} is more than this process can have, which is"
            f" {limit.each}{each}: raise the limit of open files (ulimit -n), or the"
            " kernel's range of ports (net.ipv4.ip_local_port_range)"
        )
    found = []
    admitting = Admitting.of(relay.admission, reactor)
    lifetime = admitting.lifetime
    options = _dial_options(relay.dialing)
    _check_own(relay.destinations, options)
    for listeners, destinations in each_port(relay):
        made = FlowMaker(options)
        if checks is not None:
            made.checked = partial(_check_flows, checks, relay, options)
        prefix = relay.admission.client_prefix
        servers = flow_servers(destinations, relay.pool, reactor, made, prefix)
        if checks is not None and isinstance(servers, Pool):
            servers.listeners.append(partial(_check_no_more, checks))
        nat = UdpNat(
            reactor,
            servers,
            watcher=watcher(reactor, config.transport),
            observer=QuietFlowLog(lines) if config.quiet else FlowLog(lines),
            gate=admitting.gate,
            closes=lifetime.flows_end if lifetime is not None else None,
            dialing=options,
            bandwidth=admitting.bandwidth,
            cut=relay.pool.on_down == "cut",
            wait_for_server=relay.pool.when_none.limit,
            name=relay.name,
            **attrs.asdict(attrs.evolve(relay.udp, max_flows=max_flows)),
        )
        names = (
            servers.names
            if isinstance(servers, Pool)
            else ", ".join(each.name for each in servers)
        )
        found += [
            Listening(
                datagram_endpoint(listen),
                nat,
                str(listen),
                f"relaying datagrams to {names}",
                flows=True,
                enabled=relay.enabled,
            )
            for listen in listeners
        ]
    return found


def _check_flows(
    checks: ServerCheckService,
    relay: UdpRelay,
    dialing: DialOptions | None,
    address: UdpAddress,
    server: FlowServer,
) -> None:
    """Check a server of datagrams, if its relay or its destination says so."""
    settings = relay.pool
    if address.options.check is not None:
        settings = attrs.evolve(settings, check=address.options.check)
    checks.add_datagrams(
        [(address, server)], settings, address.options.dialing(dialing)
    )


def _session_log(config: Config, lines: LineLog) -> SessionLog:
    if config.verbose:
        return VerboseSessionLog(lines)
    return QuietSessionLog(lines) if config.quiet else SessionLog(lines)


def proxy_policy(listen: StreamAddress, proxy: Socks4Relay) -> ProxyPolicy:
    """Where the clients of one of a proxy's listeners may go."""
    external = proxy.socks4.external_address
    return ProxyPolicy(
        proxy.rules,
        guarded=not is_local(listen) or bool(proxy.stream.accept_proxy),
        user_ids=proxy.user_ids or None,
        own=lambda address: str(address) == external or is_own(address),
    )


def socks4_factory(
    listen: StreamAddress,
    proxy: Socks4Relay,
    config: Config,
    reactor: Any,
    lines: LineLog,
    admitting: Admitting,
) -> Socks4Factory:
    """The proxy of one listener.

    :param admitting: who is served.
    :raises ConfigError: the transport is not available, or servers can't be dialled as
        they are to be.
    """
    return Socks4Factory(
        reactor,
        dialer=dialer(reactor, config.transport, _dial_options(proxy.dialing)),
        listener=lambda host: listening_endpoint(
            # One peer is expected.
            HostPort(host, 0),
            reactor,
            1,
            config.transport,
        ),
        policy=proxy_policy(listen, proxy),
        observer=_session_log(config, lines),
        gate=admitting.gate,
        lifetime=admitting.lifetime,
        bandwidth=admitting.bandwidth,
        name=proxy.name,
        **attrs.asdict(proxy.stream, recurse=False),
        **attrs.asdict(proxy.socks4),
    )


def socks4_listenings(
    proxy: Socks4Relay, config: Config, reactor: Any, lines: LineLog
) -> list[Listening]:
    """The listeners of one proxy, which share its limits.

    :param lines: for the lines of its sessions.
    :raises ConfigError: Twisted can't use one of the endpoint strings, or BIND can't
        listen where it is to.
    """
    address = proxy.socks4.bind_address
    if address and not can_listen_on(address):
        raise ConfigError(f"bind-address {address!r} is no address of this machine")
    admitting = Admitting.of(proxy.admission, reactor)
    factories = [
        socks4_factory(each, proxy, config, reactor, lines, admitting)
        for each in proxy.listeners
    ]
    for other in factories[1:]:
        # The limits count the clients of all listeners together.
        other.handshakes, other.binds = factories[0].handshakes, factories[0].binds
    _share_totals(factories)
    return [
        Listening(
            listening_endpoint(listen, reactor, proxy.backlog, config.transport),
            factory,
            str(listen),
            f"a SOCKS4 proxy for {_clients_served(listen, proxy)}",
            enabled=proxy.enabled,
        )
        for listen, factory in zip(proxy.listeners, factories, strict=True)
    ]


def _dial_options(dialing: Dialing) -> DialOptions:
    """The options of sockets, which this process and this machine can set, now.

    :raises ConfigError: they can't.
    """
    options = dialing.options
    try:
        options.check()
    except OSError as problem:
        raise ConfigError(str(problem.strerror)) from problem
    return options


def _check_own(
    destinations: Iterable[StreamAddress | UdpAddress | ServersOf | PortRange],
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


def can_listen_on(address: str) -> bool:
    """Whether a listener can be opened on an IPv4 address, now."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _clients_served(listen: StreamAddress, proxy: Socks4Relay) -> str:
    rules = proxy.admission.clients
    near = is_local(listen) and not proxy.stream.accept_proxy
    who = "this machine" if near else "everybody"
    if any(each.allow for each in rules):
        who = ", ".join(each.text for each in rules if each.allow)
    return f"{who}, with exceptions" if any(not r.allow for r in rules) else who
