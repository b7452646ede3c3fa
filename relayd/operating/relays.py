"""Builds listeners and relays from settings.

One function for each kind of relay: a TCP relay, a UDP relay, a SOCKS4 proxy.  Nothing
is opened here: :mod:`relayd.operating.running` does that.
"""

from __future__ import annotations

import errno
from typing import Any

import attrs

from relayd.admission.policy import ClientGate
from relayd.configuring.address_grammar import HostPort, StreamAddress, dialled_host
from relayd.configuring.config import (
    Common,
    Config,
    Relay,
    Socks4Config,
    UdpRelay,
    is_local,
)
from relayd.core.errors import ConfigError
from relayd.datagrams.endpoint import UdpListener
from relayd.datagrams.sockets import default_max_flows
from relayd.net.broadcast import BROADCAST, is_broadcast
from relayd.net.own_addresses import is_own
from relayd.net.upstream import Upstream
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog
from relayd.operating.endpoints import (
    dialer,
    dialing_endpoint,
    listening_endpoint,
    server_identity,
    watcher,
)
from relayd.operating.running import Listening
from relayd.socks.destinations import ProxyPolicy
from relayd.socks4 import Socks4Factory
from relayd.tcp import RelayFactory
from relayd.udp_nat import Server, UdpNat
from relayd.upstreams.pool import Pool


def relay_listening(
    relay: Relay, config: Config, reactor: Any, lines: LineLog
) -> Listening:
    """A listener with its relay.

    :param lines: for the lines of its sessions.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    pool = Pool(
        [
            Upstream(
                dialing_endpoint(address, reactor, config.transport),
                _server_name(address),
                server_identity(address),
            )
            for address in relay.destinations
        ]
    )
    return pool_listening(relay.listen, pool, config, reactor, lines, relay.name)


def udp_listening(
    relay: UdpRelay, config: Config, reactor: Any, lines: LineLog
) -> Listening:
    """A datagram listener with its relay.

    :param lines: for the lines of its flows.
    :raises ConfigError: the transport is not available, a server's interface does not
        exist, or the process can't have so many flows.
    """
    # The UDP relays of a process divide its descriptors and ports.
    relays = sum(isinstance(each, UdpRelay) for each in config.relays) or 1
    max_flows, affordable = config.udp.max_flows, default_max_flows() // relays or 1
    if max_flows is None:
        max_flows = affordable
    elif max_flows > affordable:
        each = f" for each of {relays} listeners" if relays > 1 else ""
        raise ConfigError(
            f"--max-flows {max_flows} is more than this process can have, which is"
            f" {affordable}{each}: raise the limit of open files (ulimit -n), or the"
            " kernel's range of ports (net.ipv4.ip_local_port_range)"
        )
    servers = []
    for server in relay.destinations:
        try:
            host = dialled_host(server.host)
            servers.append(Server(host, server.port))
            if not servers[-1].named and is_broadcast(host):
                raise OSError(errno.EACCES, BROADCAST)
        except OSError as problem:
            # An IPv6 address has a scope that this machine lacks.
            raise ConfigError(f"can't use {server}: {problem.strerror}") from problem
    nat = UdpNat(
        reactor,
        servers,
        watcher=watcher(reactor, config.transport),
        observer=QuietFlowLog(lines) if config.quiet else FlowLog(lines),
        name=relay.name,
        **attrs.asdict(attrs.evolve(config.udp, max_flows=max_flows)),
    )
    names = ", ".join(server.name for server in servers)
    return Listening(
        UdpListener(relay.listen.host, relay.listen.port),
        nat,
        str(relay.listen),
        f"relaying datagrams to {names}",
        flows=True,
    )


def pool_listening(
    listen: StreamAddress,
    pool: Pool,
    config: Config,
    reactor: Any,
    lines: LineLog,
    name: str | None = None,
) -> Listening:
    """A listener with a relay to a pool.

    :raises ConfigError: Twisted can't use the listener's endpoint string.
    """
    factory = RelayFactory(
        pool,
        clock=reactor,
        observer=_session_log(config, lines),
        name=name,
        **attrs.asdict(config.stream),
    )
    return Listening(
        listening_endpoint(listen, reactor, config.backlog, config.transport),
        factory,
        str(listen),
        f"relaying to {pool.names}",
    )


def _session_log(config: Common, lines: LineLog) -> SessionLog:
    if config.verbose:
        return VerboseSessionLog(lines)
    return QuietSessionLog(lines) if config.quiet else SessionLog(lines)


def socks4_factory(
    listen: StreamAddress, config: Socks4Config, reactor: Any, lines: LineLog
) -> Socks4Factory:
    """The proxy of one listener.

    :raises ConfigError: the transport is not available.
    """
    external = config.socks4.external_address
    return Socks4Factory(
        reactor,
        dialer=dialer(reactor, config.transport),
        listener=lambda host: listening_endpoint(
            # One peer is expected.
            HostPort(host, 0),
            reactor,
            1,
            config.transport,
        ),
        policy=ProxyPolicy(
            config.rules,
            guarded=not is_local(listen),
            user_ids=config.user_ids or None,
            own=lambda address: str(address) == external or is_own(address),
        ),
        observer=_session_log(config, lines),
        gate=ClientGate(config.clients) if config.clients else None,
        name=config.name,
        **attrs.asdict(config.stream),
        **attrs.asdict(config.socks4),
    )


def socks4_listenings(
    config: Socks4Config, reactor: Any, lines: LineLog
) -> list[Listening]:
    """The listeners of one proxy, which share its limits.

    :param lines: for the lines of its sessions.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    factories = [
        socks4_factory(each, config, reactor, lines) for each in config.listeners
    ]
    for other in factories[1:]:
        # The limits count the clients of all listeners together.
        other.handshakes, other.binds = factories[0].handshakes, factories[0].binds
    return [
        Listening(
            listening_endpoint(listen, reactor, config.backlog, config.transport),
            factory,
            str(listen),
            f"a SOCKS4 proxy for {_clients_served(listen, config)}",
        )
        for listen, factory in zip(config.listeners, factories, strict=True)
    ]


def _clients_served(listen: StreamAddress, config: Socks4Config) -> str:
    if config.clients:
        return ", ".join(map(str, config.clients))
    return "this machine" if is_local(listen) else "everybody"


def _server_name(address: StreamAddress) -> str:
    if isinstance(address, HostPort) and address.host is None:
        return f"127.0.0.1:{address.port}"
    return str(address)
