"""Builds relays from their settings; TCP relays here, the others beside.

A relay may have several listeners, and several factories, which share its name and its
limits.  Nothing is opened here: :mod:`relayd.operating.running` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs

from relayd.configuring.address_grammar import StreamAddress
from relayd.configuring.config import AnyRelay, Relay, Socks4Relay, UdpRelay, each_port
from relayd.operating.admission import Admitting
from relayd.operating.endpoints import listening_endpoint, string_of
from relayd.operating.filtering import made_filters
from relayd.operating.pools import stream_pool
from relayd.operating.servers import Maker, check_no_more, check_own, dial_options
from relayd.operating.socks4_relays import socks4_unit
from relayd.operating.standing import Listening
from relayd.operating.udp_relays import udp_unit
from relayd.operating.units import Part, Unit, Workshop, session_log, share_totals
from relayd.tcp import RelayFactory
from relayd.upstreams.pool import Pool


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
        imported, servers can't be dialled as they are to be, or filters can't be made.
    """
    parts = []
    filters = made_filters(relay, before)
    reactor, checks = shop.reactor, shop.checks_of(relay)
    admitting = shop.admitting(relay, before)
    options = dial_options(relay.dialing)
    check_own(relay.destinations, options)
    for number, (listeners, destinations) in enumerate(each_port(relay)):
        pool = None if before is None else before.pool(number, relay)
        if pool is None:
            made = Maker(reactor, shop.config.transport, options)
            if checks is not None:
                told = relay.stream.send_proxy
                made.checked = partial(checks.add, relay.pool, options, told)
            pool = stream_pool(
                destinations, relay.pool, reactor, made, relay.admission.client_prefix
            )
            if checks is not None:
                pool.listeners.append(partial(check_no_more, checks))
        parts.append(pool_part(listeners, pool, relay, shop, admitting, filters))
    share_totals(parts)
    return Unit(relay, admitting, parts, filters)


def pool_part(
    listeners: Sequence[StreamAddress],
    pool: Pool,
    relay: Relay,
    shop: Workshop,
    admitting: Admitting,
    filters: Sequence[Any] = (),
) -> Part:
    """Listeners that share a factory, which relays to a pool.

    :param admitting: who is served.
    :param filters: of its sessions.
    :raises ConfigError: Twisted can't use a listener's endpoint string.
    """
    # What can't be made is found before the pool is told of anything.
    endpoints = [
        listening_endpoint(each, shop.reactor, relay.backlog, shop.config.transport)
        for each in listeners
    ]
    heard = len(pool.listeners)
    factory = RelayFactory(
        pool,
        clock=shop.reactor,
        observer=session_log(shop),
        gate=admitting.gate,
        lifetime=admitting.lifetime,
        bandwidth=admitting.bandwidth,
        filters=filters,
        name=relay.name,
        retries=relay.pool.retries,
        cut=relay.pool.on_down == "cut",
        wait_for_server=relay.pool.when_none.limit,
        **attrs.asdict(relay.stream, recurse=False),
    )
    listenings = [
        Listening(
            endpoint,
            factory,
            str(listen),
            f"relaying to {pool.names}",
            enabled=relay.enabled,
            backlog=relay.backlog,
            text=string_of(listen),
        )
        for listen, endpoint in zip(listeners, endpoints, strict=True)
    ]
    return Part(factory, listenings, pool, pool.listeners[heard:])
