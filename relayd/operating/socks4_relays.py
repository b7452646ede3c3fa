"""Builds SOCKS4 proxies from their settings."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import attrs

from relayd.configuring.address_grammar import HostPort, StreamAddress
from relayd.configuring.config import Socks4Relay, is_local
from relayd.core.errors import ConfigError
from relayd.net.own_addresses import is_own
from relayd.operating.admission import Admitting
from relayd.operating.endpoints import dialer, listening_endpoint, string_of
from relayd.operating.filtering import made_filters
from relayd.operating.routing import router_of
from relayd.operating.servers import Maker, dial_options
from relayd.operating.standing import Listening
from relayd.operating.units import Part, Unit, Workshop, session_log, share_totals
from relayd.socks.destinations import ProxyPolicy
from relayd.socks4 import Socks4Factory


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
    shop: Workshop,
    admitting: Admitting,
    filters: Sequence[Any] = (),
    router: Any = None,
) -> Socks4Factory:
    """The proxy of one listener.

    :param admitting: who is served.
    :param filters: of its sessions.
    :param router: asks its route, if it has one.
    :raises ConfigError: the transport is not available, or servers can't be dialled as
        they are to be.
    """
    reactor, transport = shop.reactor, shop.config.transport
    return Socks4Factory(
        reactor,
        dialer=dialer(reactor, transport, dial_options(proxy.dialing)),
        listener=lambda host: listening_endpoint(
            # One peer is expected.
            HostPort(host, 0),
            reactor,
            1,
            transport,
        ),
        policy=proxy_policy(listen, proxy),
        observer=session_log(shop),
        gate=admitting.gate,
        lifetime=admitting.lifetime,
        bandwidth=admitting.bandwidth,
        filters=filters,
        route=router,
        name=proxy.name,
        **attrs.asdict(proxy.stream, recurse=False),
        **attrs.asdict(proxy.socks4),
    )


def socks4_unit(proxy: Socks4Relay, shop: Workshop, before: Unit | None = None) -> Unit:
    """A proxy, whose listeners share its limits.

    :raises ConfigError: Twisted can't use one of the endpoint strings, BIND can't
        listen where it is to, or filters or its route can't be made.
    """
    address = proxy.socks4.bind_address
    if address and not can_listen_on(address):
        raise ConfigError(f"bind-address {address!r} is no address of this machine")
    filters = made_filters(proxy, before)
    made = Maker(shop.reactor, shop.config.transport, dial_options(proxy.dialing))
    router = router_of(proxy, shop.routes, made)
    admitting = shop.admitting(proxy, before)
    factories = [
        socks4_factory(each, proxy, shop, admitting, filters, router)
        for each in proxy.listeners
    ]
    for other in factories[1:]:
        # The limits count the clients of all listeners together.
        other.handshakes, other.binds = factories[0].handshakes, factories[0].binds
    parts = [
        Part(factory, [_listening(listen, factory, proxy, shop)])
        for listen, factory in zip(proxy.listeners, factories, strict=True)
    ]
    share_totals(parts)
    return Unit(proxy, admitting, parts, filters, router)


def _listening(
    listen: StreamAddress, factory: Socks4Factory, proxy: Socks4Relay, shop: Workshop
) -> Listening:
    return Listening(
        listening_endpoint(listen, shop.reactor, proxy.backlog, shop.config.transport),
        factory,
        str(listen),
        f"a SOCKS4 proxy for {_clients_served(listen, proxy)}",
        enabled=proxy.enabled,
        backlog=proxy.backlog,
        text=string_of(listen),
    )


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
