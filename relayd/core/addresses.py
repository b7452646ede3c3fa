"""Addresses as text, one way everywhere: `127.0.0.1:80`, `[::1]:80`, `unix:/run/x`."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress

from relayd.core.names import host_port

_MAPPED = "::ffff:"


def address_name(address: IAddress | None) -> str:
    """What the log calls an address; `-` where there is none to name.

    An IPv4 client of a dual-stack socket is called by its IPv4 address.
    """
    if isinstance(address, IPv4Address):
        name = f"{address.host}:{address.port}"
        return name if address.type == "TCP" else f"udp:{name}"
    if isinstance(address, IPv6Address):
        if address.type != "TCP":
            return f"udp:[{address.host}]:{address.port}"
        if address.host.startswith(_MAPPED) and "." in address.host:
            return f"{address.host[len(_MAPPED) :]}:{address.port}"
        return f"[{address.host}]:{address.port}"
    if isinstance(address, UNIXAddress):
        return "unix:" + _path_text(address.name)
    return "-" if address is None else str(address)


def host_of(name: str) -> str:
    """The host in what :func:`address_name` has made, without its scope.

    :return: empty if it has none: a UNIX socket's name.
    """
    if name.startswith("unix:") or ":" not in name:
        return ""
    return name.rpartition(":")[0].strip("[]").partition("%")[0]


def is_loopback(host: str) -> bool:
    """Whether an address, as text, never leaves this machine."""
    return host == "::1" or host.startswith("127.")


def _path_text(path: bytes | None) -> str:
    """A UNIX socket's path on one line and without blanks, whatever it is.

    A client chooses the name of its own socket; mostly it has none.
    """
    text = (path or b"").decode("utf-8", "backslashreplace")
    if text.isprintable() and " " not in text:
        return text
    return text.encode("unicode_escape").decode("ascii").replace(" ", "\\x20")


def socket_address(
    family: int, address: Any
) -> IPv4Address | IPv6Address | UNIXAddress:
    """Twisted's form of an address as the socket module has it."""
    if family == socket.AF_INET:
        return IPv4Address("TCP", *address)
    if family == socket.AF_INET6:
        host, port, flow, scope = address
        if scope:
            # With its interface, which Python leaves out since 3.7.
            host = numeric_host(address)
        return IPv6Address("TCP", host, port, flow, scope)
    return UNIXAddress(address or None)


def numeric_host(address: tuple[Any, ...]) -> str:
    """The host of a socket address, with its scope if it has one."""
    return socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def socket_name(address: Any) -> str:
    """What the log calls an address that is as the socket module has it.

    The same as :func:`address_name` of Twisted's form, for TCP.  A link-local IPv6
    address has its interface, without which it says nothing.
    """
    if not isinstance(address, tuple):
        return "unix:" + _path_text(os.fsencode(address or b""))
    host, port = address[:2]
    if len(address) == 4:
        if address[3]:
            host = numeric_host(address)
        elif host.startswith(_MAPPED) and "." in host:
            host = host[len(_MAPPED) :]
    return host_port(host, port)


def bare_end(address: tuple[Any, ...]) -> tuple[str, int, int]:
    """The host, the port and the interface of a socket address, to be compared.

    An IPv4 address that is written as an IPv6 one (`::ffff:192.0.2.1`) is the former.
    The interface is 0 but for addresses that need one.
    """
    if len(address) == 2:
        return address[0], address[1], 0
    host, port = address[0].partition("%")[0], address[1]
    if host.startswith(_MAPPED) and "." in host:
        return host[len(_MAPPED) :], port, 0
    link_local = host[:3] in ("fe8", "fe9", "fea", "feb")
    return host, port, address[3] if link_local else 0


def client_key(host: str) -> str:
    """Whose limit a client counts towards: its address, or the /64 of an IPv6 one.

    A host has a whole /64 to choose its addresses from (RFC 4291).

    :param host: an address without its port, or empty.
    """
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
