"""Builds UDP relays from their settings."""

from __future__ import annotations

from functools import partial

import attrs

from relayd.configuring.config import UdpRelay, each_port
from relayd.configuring.interceptions import listens_for_others
from relayd.core.errors import ConfigError
from relayd.core.route_spec import DEFAULT
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.operating.endpoints import datagram_endpoint, watcher
from relayd.operating.filtering import made_filters
from relayd.operating.flow_pools import FlowMaker, flow_servers
from relayd.operating.servers import check_no_more, check_own, dial_options
from relayd.operating.standing import Listening
from relayd.operating.units import FlowLimit, Part, Unit, Workshop, takes_ports
from relayd.udp_nat import Server, UdpNat
from relayd.upstreams.pool import Pool

#: The setting of the kernel that says which ports are ephemeral.
PORT_RANGE = "net.ipv4.ip_local_port_range"


def udp_unit(relay: UdpRelay, shop: Workshop, before: Unit | None = None) -> Unit:
    """A UDP relay, with a table of flows for each port.

    :param before: the one that it is to follow, of the same kind.
    :raises ConfigError: the transport is not available, a server's interface does not
        exist, the process can't have so many flows, servers can't be dialled as they
        are to be, or filters can't be made.
    """
    max_flows = most_flows(relay, shop.flows)
    filters = made_filters(relay, before)
    parts = []
    config, reactor, checks = shop.config, shop.reactor, shop.checks_of(relay)
    admitting = shop.admitting(relay, before)
    lifetime = admitting.lifetime
    options = dial_options(relay.dialing)
    check_own(relay.destinations, options)
    kept = [] if before is None else before.kept(relay)
    for number, (listeners, destinations) in enumerate(each_port(relay)):
        servers: Pool | list[Server] | None
        servers = kept[number].get(DEFAULT) if number < len(kept) else None
        if servers is None:
            made = FlowMaker(options)
            if checks is not None:
                made.checked = partial(checks.add_datagrams, relay.pool, options)
            prefix = relay.admission.client_prefix
            servers = flow_servers(destinations, relay.pool, reactor, made, prefix)
            if checks is not None and isinstance(servers, Pool):
                servers.listeners.append(partial(check_no_more, checks))
        pool = servers if isinstance(servers, Pool) else None
        # What can't be made is found before the pool is told of anything.
        endpoints = list(map(datagram_endpoint, listeners))
        heard = 0 if pool is None else len(pool.listeners)
        nat = UdpNat(
            reactor,
            servers,
            watcher=watcher(reactor, config.transport),
            observer=QuietFlowLog(shop.lines) if config.quiet else FlowLog(shop.lines),
            gate=admitting.gate,
            closes=lifetime.flows_end if lifetime is not None else None,
            dialing=options,
            bandwidth=admitting.bandwidth,
            filters=filters,
            cut=relay.pool.on_down == "cut",
            wait_for_server=relay.pool.when_none.limit,
            redirected=listens_for_others(relay),
            name=relay.name,
            **attrs.asdict(attrs.evolve(relay.udp, max_flows=max_flows)),
        )
        names = (
            ", ".join(each.name for each in nat.servers) if pool is None else pool.names
        )
        # It goes on with another one's settings, as its flows do.
        serving = nat
        if before is not None and number < len(before.parts):
            serving = before.parts[number].served
        made_listenings = [
            Listening(
                endpoint,
                serving,
                str(listen),
                f"relaying datagrams to {names}",
                flows=True,
                enabled=relay.enabled,
            )
            for listen, endpoint in zip(listeners, endpoints, strict=True)
        ]
        hears = () if pool is None else pool.listeners[heard:]
        pools = {} if pool is None else {DEFAULT: pool}
        parts.append(Part(serving, made_listenings, pools, hears, nat))
    return Unit(relay, admitting, parts, filters)


def most_flows(relay: UdpRelay, limit: FlowLimit) -> int:
    """How many flows each listener of a relay can have.

    :param limit: for all UDP relays of the process.
    :raises ConfigError: it is to have more.
    """
    possible = limit.each_on_ports if takes_ports(relay) else limit.each
    most = relay.udp.max_flows
    if most is None:
        return min(possible, limit.most_by_default)
    if most > possible:
        tables, what = limit.tables, "limit of open files (ulimit -n)"
        if possible < limit.each:
            tables, what = limit.on_ports, f"kernel's range of ports ({PORT_RANGE})"
        each = f" for each of {tables} listeners" if tables > 1 else ""
        raise ConfigError(
            f"max-flows {most} is more than this process can have, which is"
            f" {possible}{each}: raise the {what}"
        )
    return most
