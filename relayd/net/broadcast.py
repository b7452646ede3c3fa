"""Which addresses the kernel treats as broadcast, and so belong to no host."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import suppress

#: Why such an address can't be used.
BROADCAST = "it is a broadcast address of this machine's networks, and not one host's"

#: That of every network (RFC 919), whatever the routes say: with none that leads there
#: connect(2) says so, and bind(2) takes it for a broadcast all the same.
LIMITED = "255.255.255.255"


def is_host(host: str) -> bool:
    """Whether an address is that of one host, and can be that of a socket.

    For a multicast or a broadcast address the kernel would take one of its own, and say
    nothing (inet_bind(), net/ipv4/af_inet.c).

    :param host: an address, with its scope if it has one.
    """
    address = ipaddress.ip_address(host)
    # "This network", RFC 1122, 3.2.1.3.
    this = address.version == 4 and address.packed[0] == 0
    alone = not (address.is_multicast or address.is_unspecified or this)
    return alone and not is_broadcast(host)


def is_broadcast(host: str) -> bool:
    """Whether the kernel sends to an address as a broadcast (ip(7)).

    connect(2) fails with EACCES then, unless SO_BROADCAST is set.

    :param host: an address.
    """
    if ":" in host:
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
        if mapped is None:
            return False
        host = str(mapped)
    if host == LIMITED:
        return True
    # Any port does: nothing is sent.
    where = host, 9
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(where)
        except OSError as problem:
            if problem.errno != errno.EACCES:
                return False
        else:
            return False
        # A route that prohibits the address (ip-route(8)) gives EACCES again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        with suppress(OSError):
            probe.connect(where)
            return True
    return False
