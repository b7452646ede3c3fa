"""The Linux data plane: lean transports that speak Twisted's interfaces.

Twisted's own transports serve any program, and pay for it at each event: a log
context, a call into the kernel for each pause and resume, a buffer between a
write and the kernel, a trip through Python for every chunk.  A relay does one
thing with its connections, and these are made for it:

- `poller`: an epoll inside the reactor's.  The reactor sees one reader, however
  many connections stand behind it, and pays its overhead once for a batch of
  events.  Any reactor that has `addReader` will do.
- `transport`: connections that are registered once, edge-triggered, write at
  once, and between two of themselves move bytes without a Protocol, or without
  Python seeing them at all (`splice(2)`).
- `pipes`: what `splice` needs between two sockets, shared and bounded.
- `endpoints`: listening and dialling, as Twisted endpoints.

Protocols and Factories are the same on either kind of transport; nothing above
knows which it got, except the Bridge, which asks for
:class:`~relayd.interfaces.ISpliceable`.  TLS, other platforms and reactors
without `addReader` are served by Twisted's transports, with the same behaviour.
"""

from __future__ import annotations

import select
import sys
from typing import Any

from twisted.internet.interfaces import IReactorFDSet


def is_available(reactor: Any) -> bool:
    """Whether the plane can work here: Linux, and a reactor that watches readers."""
    return (
        sys.platform == "linux"
        and hasattr(select, "epoll")
        and IReactorFDSet.providedBy(reactor)
    )
