"""Checks of the checks of servers: which server can't be checked so.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relayd.configuring.address_grammar import (
    EndpointString,
    OriginalAddress,
    PortRange,
    UnixPath,
)
from relayd.configuring.endpoint_strings import host_in
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import servers_given
from relayd.configuring.server_grammar import options_of
from relayd.core.check_grammar import Check, HttpCheck, TcpCheck, UdpCheck
from relayd.core.pool_settings import CHECK

#: What servers of connections can be asked.
TCP_KINDS = "tcp, http://:PORT/PATH or python:MODULE:FUNCTION"


def about_checks(section: RelaySection) -> Iterator[str]:
    """Servers of one relay that can't be checked as is said."""
    given = section.one(CHECK)
    check: Check | None = given.value if given is not None else None
    yield from _about_original(section, given)
    if section.kind == "udp":
        if given is not None:
            yield from _needs_port(check, given.place.prefix, str(given))
        for server in servers_given(section):
            own = options_of(server.value).check
            yield from _needs_port(own, server.place.prefix, f"{server}: check={own}")
        return
    if given is not None and isinstance(check, UdpCheck):
        yield f"{given.place.prefix}{given} is not for tcp: give {TCP_KINDS}"
        check = None
    for server in servers_given(section):
        own = options_of(server.value).check
        where = server.place.prefix
        if isinstance(own, UdpCheck):
            yield f"{where}{server}: a check by udp is not for tcp: give {TCP_KINDS}"
            continue
        port = getattr(own or check, "port", None)
        if port is not None and _has_one_port(server.value):
            what = f"check={own}" if own is not None else given
            yield (
                f"{where}{what} is not possible at {server}, which has no other port:"
                " leave it out"
            )


def _about_original(section: RelaySection, given: Given | None) -> Iterator[str]:
    """Servers that are wherever their clients meant to go."""
    for server in servers_given(section):
        own = options_of(server.value).check
        if isinstance(server.value, OriginalAddress) and (own or given) is not None:
            what = f"check={own}" if own is not None else given
            where = (server if own is not None or given is None else given).place
            yield (
                f"{where.prefix}{what} is not possible at {server}, which has no"
                " address of its own to check: leave it out, or give other servers a"
                " check= of their own"
            )


def _needs_port(check: Check | None, where: str, what: str) -> Iterator[str]:
    """A check of a server of datagrams, which has no port of that kind itself."""
    if isinstance(check, TcpCheck | HttpCheck) and check.port is None:
        such = "port=8008" if isinstance(check, TcpCheck) else "http://:8008/"
        yield f"{where}{what} needs a port for udp, such as {such}"


def _has_one_port(address: Any) -> bool:
    """Whether there is no other way to a server's host."""
    if isinstance(address, PortRange):
        address = address.first
    if isinstance(address, EndpointString):
        return not host_in(address.text, listens=False)
    return isinstance(address, UnixPath)
