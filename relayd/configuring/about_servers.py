"""Checks of destinations: what is said of their servers.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relayd.configuring.about_dialing import family_of_server
from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    PortRange,
    UdpAddress,
    UnixPath,
    dialled_host,
)
from relayd.configuring.address_settings import SEND_PROXY
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import with_pools
from relayd.configuring.server_grammar import options_of
from relayd.configuring.server_options import ServerOptions
from relayd.core import settings
from relayd.core.names import host_port
from relayd.core.pool_settings import BALANCE, ON_DOWN, UDP_BALANCE, WHEN_NONE
from relayd.net.dial_options import family_of

#: What is set on sockets of connections of ours.
_OF_CONNECTIONS = ("keepalive", "user_timeout")

#: What is not for a server of datagrams.
_OF_STREAMS = ("pool", *_OF_CONNECTIONS)

#: What is set on sockets of ours.
_OF_SOCKETS = ("source", "interface", "mark", *_OF_CONNECTIONS)


def about_servers(section: RelaySection) -> Iterator[str]:
    """What is wrong with the servers of one relay."""
    named: dict[str, Given] = {}
    unnamed: dict[tuple[str, str], Given] = {}
    for pool, each in with_pools(section):
        options = options_of(each.value)
        where = each.place.prefix
        if options.name is not None:
            first = named.setdefault(options.name, each)
            if first is not each:
                yield (
                    f"{where}{each} has the name {options.name!r}, as {first} has: give"
                    " each server its own"
                )
        else:
            same = unnamed.setdefault((pool, _address_of(each.value)), each)
            if same is not each:
                yield (
                    f"{where}{each} is the same server as {same}: leave one out, or"
                    " give each a name of its own (name=)"
                )
        yield from _about_sockets(section, each, options)
        if section.kind == "udp":
            yield from _about_turns(section, each, options)
            for option in options.said:
                if option in _OF_STREAMS:
                    yield f"{where}{each}: {option} is not for a server of udp"


def _address_of(server: Any) -> str:
    """What a server without a name is called."""
    if isinstance(server, PortRange):
        return f"{_address_of(server.first)}-{server.last}"
    if isinstance(server, HostPort | UdpAddress):
        return host_port(dialled_host(server.host), server.port)
    return str(server)


def _about_turns(
    section: RelaySection, server: Given, options: ServerOptions
) -> Iterator[str]:
    """What makes no sense where each datagram goes to the next server."""
    given = section.one(UDP_BALANCE)
    if given is None or given.value != "datagram":
        return
    for option in ("max", "send_proxy"):
        if getattr(options, option) is not None:
            yield f"{server.place.prefix}{server}: {option} is not for {given}"


def about_balance(section: RelaySection) -> Iterator[str]:
    """How datagrams can't be spread over servers."""
    given = section.one(UDP_BALANCE)
    if given is None or given.value != "datagram":
        return
    balance = section.one(BALANCE)
    if balance is not None and balance.value not in ("round-robin", "random"):
        yield (
            f"{given.place.prefix}{given} goes with {given.place.option(BALANCE)}"
            f" round-robin or random, not {balance.value}"
        )
    for row, value in ((ON_DOWN, "cut"), (WHEN_NONE, "wait")):
        other = section.one(row)
        if other is not None and str(other.value).startswith(value):
            yield (
                f"{other.place.prefix}{other} is not for {given}: nothing stays at a"
                " server, or waits for one"
            )
    header = section.one(SEND_PROXY)
    if header is not None and header.value == "v2-first":
        yield (
            f"{given.place.prefix}{given} needs {given.place.option(SEND_PROXY)} v2:"
            " each server is to know whose a datagram is"
        )


def _about_sockets(
    section: RelaySection, server: Given, options: ServerOptions
) -> Iterator[str]:
    """Options of a server's own that can't be set on its sockets."""
    said = [each for each in options.said if each in _OF_SOCKETS]
    address, where = server.value, server.place.prefix
    if said and isinstance(address, EndpointString):
        yield (
            f"{where}{server}: {said[0]} is not possible for an endpoint string, which"
            " Twisted dials: write a short form such as 10.0.0.5:80"
        )
    if said and isinstance(address, UnixPath):
        yield f"{where}{server}: {said[0]} is not for UNIX sockets"
    family = family_of_server(address)
    if options.source is not None and family not in (0, family_of(options.source)):
        yield f"{where}{server}: its source is of the other family"
    if section.kind == "udp" or not options.user_timeout:
        # Others ask nothing of their relay, which takes as long as it has servers.
        return
    row = settings.STALL_TIMEOUT
    stall = section.one(row)
    seconds = row.default if stall is None else stall.value
    if options.user_timeout <= seconds:
        yield (
            f"{where}{server}: user_timeout must be longer than"
            f" {server.place.option(row)}, which is {seconds:g}, or 0"
        )
