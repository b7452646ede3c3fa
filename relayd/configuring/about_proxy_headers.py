"""Checks of PROXY headers: which can't be read, and which can't be sent.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator

from relayd.configuring.address_grammar import EndpointString
from relayd.configuring.address_settings import (
    ACCEPT_PROXY,
    LISTEN,
    SEND_PROXY,
)
from relayd.configuring.endpoint_strings import ends_tls, has_tls
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import servers_given
from relayd.configuring.server_grammar import options_of
from relayd.core import settings


def about_proxy_headers(section: RelaySection) -> Iterator[str]:
    """PROXY headers that can't be read, or not be sent."""
    accepted, sent = section.all(ACCEPT_PROXY.key), section.one(SEND_PROXY)
    ident = section.one(settings.IDENT)
    if accepted and ident is not None and ident.value:
        names = [each.place.option(each.setting) for each in (ident, accepted[0])]
        yield (
            f"{ident.place.prefix}{names[0]} can't be combined with {names[1]}: the"
            " identd of a client behind a balancer can't be asked"
        )
    for listener in section.all(LISTEN.key):
        address = listener.value
        if accepted and isinstance(address, EndpointString) and ends_tls(address.text):
            yield (
                f"{listener.place.prefix}{accepted[0]} is not possible at {listener}: a"
                " PROXY header comes before TLS, which this listener ends; let the"
                " balancer end it"
            )
    versions = ("v2", "v2-first") if section.kind == "udp" else ("v1", "v2")
    if sent is not None and sent.value not in versions:
        yield (
            f"{sent.place.prefix}{sent} is not for {section.kind}: give"
            f" {' or '.join(versions)}"
        )
    for server in servers_given(section):
        option = "send-proxy" if options_of(server.value).send_proxy else sent
        if option and _is_tls(server):
            yield (
                f"{server.place.prefix}{option} is not possible at {server}: the header"
                " goes before the TLS handshake, with which Twisted begins"
            )


def _is_tls(given: Given) -> bool:
    address = given.value
    return isinstance(address, EndpointString) and has_tls(address.text)
