"""Addresses as text, one way everywhere: `127.0.0.1:80`, `[::1]:80`, `unix:/run/x`."""

from __future__ import annotations

import os

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress

_MAPPED = "::ffff:"


def host_port(host: str, port: int) -> str:
    """A host and a port as text, the host in brackets if it is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_name(address: IAddress | None) -> str:
    """What the log calls an address; `-` where there is none to name.

    An IPv4 client of a dual-stack socket is called by its IPv4 address.
    """
    if isinstance(address, IPv4Address):
        return f"{address.host}:{address.port}"
    if isinstance(address, IPv6Address):
        if address.host.startswith(_MAPPED) and "." in address.host:
            return f"{address.host[len(_MAPPED) :]}:{address.port}"
        return f"[{address.host}]:{address.port}"
    if isinstance(address, UNIXAddress):
        # A client's UNIX socket mostly has no name.
        return "unix:" + (os.fsdecode(address.name) if address.name else "")
    return "-" if address is None else str(address)
