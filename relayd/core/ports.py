"""The kernel's ephemeral ports: those of sockets that ask for none (ip(7)).

A socket that connects to one of them on this machine, where nothing listens, may be
given that very port, and is then connected to itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

#: Linux: the file with the first and the last of them.
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

#: The range that IANA has reserved for this (RFC 6335).
_DYNAMIC = range(49152, 65536)


def handed_out() -> range | None:
    """The ephemeral ports, or None if the kernel does not say."""
    try:
        first, last = map(int, PORT_RANGE.read_text().split())
    except (OSError, ValueError):
        return None
    return range(first, last + 1)


@functools.cache
def may_be_handed_out(port: int) -> bool:
    """Whether the kernel may give this port to a socket that asks for none.

    By the setting at the first call for this port.
    """
    ports = handed_out()
    return ports is None or port in ports


def count() -> int:
    """The number of ephemeral ports; IANA's range where the kernel does not say."""
    return len(handed_out() or _DYNAMIC)
