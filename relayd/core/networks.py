"""Networks and addresses as values: how they are written, and what they stand for.

An IPv6 address may carry an IPv4 address: mapped and compatible (RFC 4291), NAT64 (RFC
6052 and 8215), SIIT (RFC 7915), 6to4 (RFC 3056).
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from relayd.core.names import is_address

Ip = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: Stands for the peers of UNIX sockets, where networks are listed.
UNIX = "unix"

#: The prefix that v4-mapped addresses have in common, in bits (RFC 4291).
_MAPPED = 96

_LOOPBACK6 = IPv6Address("::1")

#: IPv6 networks whose addresses stand for an IPv4 address, and where it is in them:
#: bits from the right.
_STAND_INS = (
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::/96"), 0),
    # SIIT, RFC 7915.
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("64:ff9b:1::/48"), 0),
    (IPv6Network("2002::/16"), 80),
)


def unmapped(address: Ip) -> Ip:
    """The IPv4 address that a v4-mapped one stands for; any other as it is.

    Whether `ipaddress` asks that one, for `is_loopback` and the like, and how it writes
    it, depends on the version of Python.
    """
    return getattr(address, "ipv4_mapped", None) or address


class BeyondPrefix(ValueError):
    """A network has bits beyond its prefix, which are a mistake."""


def parse_network(text: str) -> Network:
    """A network, or a single address; v4-mapped ones are those of IPv4.

    :raises BeyondPrefix: it has bits beyond its prefix.
    :raises ValueError: it is neither.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope")
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and is_address(host):
        raise ValueError(
            f"{text!r} may be an address, or one with a port: write brackets"
        )
    network: Network = ipaddress.ip_network(text, strict=False)
    address: Ip = ipaddress.ip_interface(text).ip
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        length = network.prefixlen - _MAPPED
        if length < 0:
            raise ValueError(
                f"{text!r} is v4-mapped, which takes a prefix from {_MAPPED} to"
                " 128: write the IPv4 network"
            )
        network, address = ipaddress.IPv4Network((mapped, length), strict=False), mapped
    if address != network.network_address:
        raise BeyondPrefix(
            f"{text!r} has bits beyond its prefix: you may mean {network}"
        )
    return network


def stands_for(address: Ip) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address carries, or None."""
    if address.version == 4 or address == _LOOPBACK6 or not int(address):
        return None
    for network, shift in _STAND_INS:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    return None
