"""Classes of endpoints whose sockets have options (:mod:`relayd.net.dial_options`)."""

from __future__ import annotations

import functools
from typing import Any

from relayd.net.dial_options import DialOptions
from relayd.net.dialing import SocketEndpoint, WithOptions


def having(
    endpoint: type[SocketEndpoint], options: DialOptions | None
) -> type[SocketEndpoint]:
    """The class of endpoints that have these options; itself, if there are none."""
    if options is None or options == DialOptions():
        return endpoint
    # For mypy, a class hashes as its instances do.
    kind: Any = endpoint
    return _made(kind, options)


# A thousand servers with the same options have one.
@functools.lru_cache(maxsize=1024)
def _made(endpoint: type[SocketEndpoint], options: DialOptions) -> type[SocketEndpoint]:
    first: type[SocketEndpoint] = WithOptions
    if options.transparent:
        # Most relays do not need it.
        from relayd.net.transparent import FromClient

        first = FromClient
    bases = (first,) if endpoint is SocketEndpoint else (first, endpoint)
    return type(f"{endpoint.__name__}WithOptions", bases, {"options": options})
