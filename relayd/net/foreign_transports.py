"""Socket options and checks for transports that relayd did not make.

The listeners and endpoints of an embedder have transports of any kind: Twisted's own,
TLS above them, a wrapper.  These are used by Twisted's interfaces, and their sockets by
the descriptor (:func:`lent_socket`).  A transport of relayd has `options_are_set`: its
listener or endpoint has set the options; see :mod:`relayd.net.transports`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import ITCPTransport, IUNIXTransport

from relayd.core import settings
from relayd.core.hops import file_of, streams
from relayd.net import socket_ends
from relayd.net.keepalive import KEEPALIVE, Keepalive, watch_peer


@contextmanager
def lent_socket(transport: Any) -> Iterator[socket.SocketType | None]:
    """The socket of any transport that has a descriptor, or None.

    For reading and setting its options, within the block only.
    """
    try:
        number = transport.fileno()
        if not isinstance(number, int):
            raise TypeError("SocketType would open a new socket")
        # Without a family and a type, the kernel is asked for them.
        sock = socket.SocketType(fileno=number)
    except (AttributeError, OSError, TypeError, ValueError):
        # It has no socket, or is closed.
        yield None
        return
    try:
        yield sock
    finally:
        sock.detach()


def set_options(transport: Any) -> None:
    """As :func:`relayd.net.transports.set_options`, unless they are set already."""
    if getattr(transport, "options_are_set", False):
        return
    is_tcp = _is_tcp(transport)
    if is_tcp or IUNIXTransport.providedBy(transport):
        # OSError: the peer is gone, which the next read will report.  AttributeError:
        # a wrapper lacks what its interface says.
        with suppress(OSError, AttributeError):
            if is_tcp:
                transport.setTcpNoDelay(True)
            handle = transport.getHandle()
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def keep_alive(
    transport: Any,
    keepalive: Keepalive = KEEPALIVE,
    user_timeout: float = settings.USER_TIMEOUT.default,
    *,
    dialled: bool = False,
) -> None:
    """As :func:`relayd.net.keepalive.watch_peer`, for any transport."""
    if getattr(transport, "options_are_set", False):
        # One of ours, whose handle is the socket: half the work, when thousands of
        # sessions have their first check at once.
        watch_peer(transport.getHandle(), keepalive, user_timeout, dialled=dialled)
        return
    with lent_socket(transport) as sock:
        if sock is not None:
            watch_peer(sock, keepalive, user_timeout, dialled=dialled)
        elif _is_tcp(transport):
            with suppress(OSError, AttributeError):
                transport.setTcpKeepAlive(True)


def is_self_connected(transport: Any) -> bool:
    """Whether the socket of an embedder's endpoint has connected to itself.

    Our own endpoints check that as they connect: see :mod:`relayd.net.dialing`.
    """
    if getattr(transport, "options_are_set", False):
        return False
    with lent_socket(transport) as sock:
        # UNIX sockets mostly have no names.
        return (
            sock is not None
            and sock.family != socket.AF_UNIX
            and socket_ends.is_self_connected(sock)
        )


def _is_tcp(transport: Any) -> bool:
    is_unix = IUNIXTransport.providedBy(transport)
    return bool(ITCPTransport.providedBy(transport)) and not is_unix


def note_listener(here: Any) -> None:
    """Note the address of a listener that has accepted a client, if it is not ours.

    Our listeners note that they open and close.  Others do not report their close: what
    they had stays noted, once for each port and for each socket's file.
    """
    if isinstance(here, UNIXAddress):
        if here.name and not streams.listens_at(here.name):
            streams.opens_file(file_of(here.name))
    elif getattr(here, "port", 0) not in streams.ports:
        streams.listens(getattr(here, "port", 0))
