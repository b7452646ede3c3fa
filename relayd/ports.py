"""Which ports the kernel hands out to sockets that ask for none (ip(7)).

A socket that is connected to one of them on this machine, where nobody listens, may be
given that very port, and is then connected to itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

#: Linux: the first and the last of them.
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

#: What IANA has set aside for that (RFC 6335).
_DYNAMIC = range(49152, 65536)


def handed_out() -> range | None:
    """The ports that the kernel hands out, or None: it does not say."""
    try:
        first, last = map(int, PORT_RANGE.read_text().split())
    except (OSError, ValueError):
        return None
    return range(first, last + 1)


@functools.cache
def may_be_handed_out(port: int) -> bool:
    """Whether the kernel may give this port to a socket that asks for none.

    As its setting was when this was first asked.
    """
    ports = handed_out()
    return ports is None or port in ports


def count() -> int:
    """How many there are; what is usual where the kernel does not say."""
    return len(handed_out() or _DYNAMIC)
