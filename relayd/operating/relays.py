"""Builds relays from their settings; TCP relays here, the others beside.

A relay may have several listeners, and several factories, which share its name and its
limits.  Nothing is opened here: :mod:`relayd.operating.running` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from relayd.configuring.address_grammar import StreamAddress, StreamServer
from relayd.configuring.config import AnyRelay, Relay, Socks4Relay, UdpRelay, each_port
from relayd.configuring.interceptions import listens_for_others
from relayd.configuring.pools_of_relay import pools_of, servers_of, sni_table
from relayd.configuring.server_grammar import ServersOf
from relayd.core.route_spec import DEFAULT
from relayd.net.dial_options import DialOptions
from relayd.operating.admission import Admitting
from relayd.operating.endpoints import listening_endpoint, string_of
from relayd.operating.filtering import made_filters
from relayd.operating.pools import stream_pool
from relayd.operating.routing import router_of
from relayd.operating.servers import Maker, check_no_more, check_own, dial_options
from relayd.operating.socks4_relays import socks4_unit
from relayd.operating.standing import Listening
from relayd.operating.udp_relays import udp_unit
from relayd.operating.units import Part, Unit, Workshop, session_log, share_totals
from relayd.tcp import RelayFactory
from relayd.upstreams.pool import Pool

#: The pools whose servers are named in the lines about a relay's listeners.
MOST_NAMED = 10


def unit_of(relay: AnyRelay, shop: Workshop, before: Unit | None = None) -> Unit:
    """A relay, as its settings say.

    :param before: the one of the same name and kind that it is to follow.
    :raises ConfigError: it can't be made.
    """
    if isinstance(relay, UdpRelay):
        return udp_unit(relay, shop, before)
    if isinstance(relay, Socks4Relay):
        return socks4_unit(relay, shop, before)
    return relay_unit(relay, shop, before)


def relay_unit(relay: Relay, shop: Workshop, before: Unit | None = None) -> Unit:
    """A TCP relay, with a factory for each port.

    :raises ConfigError: Twisted can't use one of the endpoint strings, a check can't be
        imported, servers can't be dialled as they are to be, or filters or its route
        can't be made.
    """
    parts = []
    filters = made_filters(relay, before)
    admitting = shop.admitting(relay, before)
    options = dial_options(relay.dialing)
    router = router_of(
        relay, shop.routes, Maker(shop.reactor, shop.config.transport, options)
    )
    check_own(servers_of(relay), options)
    kept = [] if before is None else before.kept(relay)
    for number, (listeners, destinations) in enumerate(each_port(relay)):
        same = kept[number] if number < len(kept) else {}
        pools = {
            name: same.get(name) or _pool(name, servers, relay, shop, options)
            for name, servers in pools_of(destinations, relay.sni).items()
        }
        parts.append(
            pool_part(listeners, pools, relay, shop, admitting, filters, router)
        )
    if relay.route is not None or relay.sni:
        for other in parts[1:]:
            # The undecided clients of all ports are limited together.
            other.served.handshakes = parts[0].served.handshakes
    share_totals(parts)
    return Unit(relay, admitting, parts, filters, router)


def _pool(
    name: str,
    servers: Sequence[StreamServer | ServersOf],
    relay: Relay,
    shop: Workshop,
    options: DialOptions,
) -> Pool:
    """A pool of one of a relay's ports."""
    checks = shop.checks_of(relay)
    made = Maker(shop.reactor, shop.config.transport, options, name)
    if checks is not None:
        told = relay.stream.send_proxy
        made.checked = partial(checks.add, relay.pool, options, told)
    prefix = relay.admission.client_prefix
    pool = stream_pool(servers, relay.pool, shop.reactor, made, prefix, name)
    if checks is not None:
        pool.listeners.append(partial(check_no_more, checks))
    return pool


def pool_part(
    listeners: Sequence[StreamAddress],
    pools: Mapping[str, Pool],
    relay: Relay,
    shop: Workshop,
    admitting: Admitting,
    filters: Sequence[Any] = (),
    router: Any = None,
) -> Part:
    """Listeners that share a factory, which relays to its pools.

    :param pools: by name; one is `default`, and may be empty.
    :param admitting: who is served.
    :param filters: of its sessions.
    :param router: asks its route, if it has one.
    :raises ConfigError: Twisted can't use a listener's endpoint string.
    """
    # What can't be made is found before the pool is told of anything.
    endpoints = [
        listening_endpoint(each, shop.reactor, relay.backlog, shop.config.transport)
        for each in listeners
    ]
    heard = {name: len(pool.followers) for name, pool in pools.items()}
    factory = RelayFactory(
        pools[DEFAULT],
        clock=shop.reactor,
        observer=session_log(shop),
        gate=admitting.gate,
        lifetime=admitting.lifetime,
        bandwidth=admitting.bandwidth,
        filters=filters,
        route=router,
        redirected=listens_for_others(relay),
        translated=bool(relay.intercepts),
        name=relay.name,
        retries=relay.pool.retries,
        cut=relay.pool.on_down == "cut",
        wait_for_server=relay.pool.when_none.limit,
        **attrs.asdict(relay.stream, recurse=False),
        **_decides(relay, pools),
    )
    listenings = [
        Listening(
            endpoint,
            factory,
            str(listen),
            _purpose(relay, pools),
            enabled=relay.enabled,
            backlog=relay.backlog,
            text=string_of(listen),
        )
        for listen, endpoint in zip(listeners, endpoints, strict=True)
    ]
    hears = [each for n, pool in pools.items() for each in pool.followers[heard[n] :]]
    return Part(factory, listenings, pools, hears)


def _decides(relay: Relay, pools: Mapping[str, Pool]) -> dict[str, Any]:
    """What a factory needs that decides for each client where it goes: keywords.

    None for others, which relay to the pool `default`.
    """
    if relay.route is None and not relay.sni:
        return {}
    return {
        "pools": {name: each for name, each in pools.items() if name != DEFAULT},
        "sni": sni_table(relay) or None,
        "max_deciding": relay.max_deciding,
        "server_speaks_first": relay.server_speaks_first,
    }


def _purpose(relay: Relay, pools: Mapping[str, Pool]) -> str:
    """What its listeners are for, for the log."""
    there = [each.names for each in pools.values() if each.names]
    names = ", ".join(there[:MOST_NAMED])
    if len(there) > MOST_NAMED:
        names += f" and {len(there) - MOST_NAMED} other pools"
    if relay.route is not None:
        return f"relaying as {relay.route} says" + (f", to {names}" if names else "")
    return f"relaying {'by server name ' if relay.sni else ''}to {names}"
