"""Which addresses the kernel sends to as a broadcast: none of them is a host's."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import suppress

#: Why an address is no host's.
BROADCAST = "it is a broadcast address of this machine's networks, and not one host's"


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
    # The port is of no importance; nothing is sent.
    where = host, 9
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(where)
        except OSError as problem:
            if problem.errno != errno.EACCES:
                return False
        else:
            return False
        # Where a route prohibits it, it will be EACCES again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        with suppress(OSError):
            probe.connect(where)
            return True
    return False
