"""Checks of the checks of servers: which server can't be checked so.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relayd.configuring.address_grammar import (
    EndpointString,
    PortRange,
    UnixPath,
)
from relayd.configuring.address_settings import DEST
from relayd.configuring.endpoint_strings import host_in
from relayd.configuring.given import RelaySection
from relayd.core.check_grammar import HttpCheck, TcpCheck, UdpCheck
from relayd.core.pool_settings import CHECK

#: What servers of connections can be asked.
TCP_KINDS = "tcp, http://:PORT/PATH or python:MODULE:FUNCTION"


def about_checks(section: RelaySection) -> Iterator[str]:
    """Servers of one relay that can't be checked as is said."""
    given = section.one(CHECK)
    if given is None:
        return
    check, where = given.value, given.place.prefix
    port = getattr(check, "port", None)
    if section.kind == "udp":
        if isinstance(check, TcpCheck | HttpCheck) and port is None:
            such = "port=8008" if isinstance(check, TcpCheck) else "http://:8008/"
            yield f"{where}{given} needs a port for udp, such as {such}"
        return
    if isinstance(check, UdpCheck):
        yield f"{where}{given} is not for tcp: give {TCP_KINDS}"
        return
    for server in section.all(DEST.key):
        if port is not None and _has_one_port(server.value):
            yield (
                f"{server.place.prefix}{given} is not possible at {server}, which has"
                " no other port: leave it out"
            )


def _has_one_port(address: Any) -> bool:
    """Whether there is no other way to a server's host."""
    if isinstance(address, PortRange):
        address = address.first
    if isinstance(address, EndpointString):
        return not host_in(address.text, listens=False)
    return isinstance(address, UnixPath)
