"""The Linux data plane: lean transports that speak Twisted's interfaces.

Twisted's own transports serve any program, and pay for it at each event: a log
context, a call into the kernel for each pause and resume, a buffer between a
write and the kernel, a trip through Python for every chunk.  A relay does one
thing with its connections, and these are made for it:

- `poller`: an epoll inside the reactor's.  The reactor sees one reader, however
  many connections stand behind it, and pays its overhead once for a batch of
  events.  Any reactor that has `addReader` will do.
- `connection_base`, `writing`, `connection`: a connection that is registered once,
  edge-triggered, and writes at once.
- `splicing`: two of them that move bytes without a Protocol, or without Python seeing
  them at all (`splice(2)`).
- `pipes`: what `splice` needs between two sockets, shared and bounded.
- `transport`: such connections as Twisted's transports.
- `endpoints`: listening and dialling, as Twisted endpoints.

Protocols and Factories are the same on either kind of transport; nothing above
knows which it got, except the Bridge, which asks for
:class:`~relayd.core.interfaces.ISpliceable`.  TLS, other platforms and reactors
without `addReader` are served by Twisted's transports, with the same behaviour.
"""

from __future__ import annotations

import errno
import select
import socket
import sys
from typing import Any

from twisted.internet.interfaces import IReactorFDSet

#: What there may be enough of at another time.
_SHORT = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC}
)


def obstacle(reactor: Any) -> str:
    """Why the plane can't work here; empty if it can.

    It takes Linux, a reactor that watches readers, and an epoll, which is made and used
    to find out: a sandbox may refuse either.
    """
    if sys.platform != "linux" or not hasattr(select, "epoll"):
        return f"this is {sys.platform}"
    if not IReactorFDSet.providedBy(reactor):
        return f"{type(reactor).__name__} watches no descriptors"
    try:
        with socket.socket(socket.AF_UNIX) as probe, select.epoll() as epoll:
            epoll.register(probe.fileno(), 0)
    except OSError as problem:
        if problem.errno not in _SHORT:
            return f"epoll is refused ({problem.strerror})"
    return ""
