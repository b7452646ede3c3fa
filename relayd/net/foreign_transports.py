"""What relayd does with the sockets of transports that it has not made itself.

A listener or an endpoint that a program brings along has transports of any kind:
Twisted's own, TLS above them, a wrapper.  They are asked by Twisted's interfaces, and
their socket by its descriptor (:func:`lent_socket`).  A transport of ours has
`options_are_set`, and its socket is the listener's or the endpoint's to look after; see
:mod:`relayd.net.transports`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twisted.internet.interfaces import ITCPTransport, IUNIXTransport

from relayd.net import socket_ends
from relayd.net.transports import set_keepalive


@contextmanager
def lent_socket(transport: Any) -> Iterator[socket.SocketType | None]:
    """The socket of any transport that has a descriptor, or None.

    To ask it and to set its options, within the block only.
    """
    try:
        number = transport.fileno()
        if not isinstance(number, int):
            raise TypeError("that would be a socket of its own")
        # The kernel is asked for its family and type.
        sock = socket.SocketType(fileno=number)
    except (AttributeError, OSError, TypeError, ValueError):
        # Not a socket of ours, or closed a moment ago.
        yield None
        return
    try:
        yield sock
    finally:
        sock.detach()


def set_options(transport: Any) -> None:
    """As :func:`relayd.net.transports.set_options`; nothing if that has been done."""
    if getattr(transport, "options_are_set", False):
        return
    is_tcp = _is_tcp(transport)
    if is_tcp or IUNIXTransport.providedBy(transport):
        # Or the peer is gone already, which the next read will tell; or it is a
        # wrapper that claims more than it has.
        with suppress(OSError, AttributeError):
            if is_tcp:
                transport.setTcpNoDelay(True)
            handle = transport.getHandle()
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def keep_alive(transport: Any) -> None:
    """As :func:`relayd.net.transports.set_keepalive`, for any transport, ours too."""
    if getattr(transport, "options_are_set", False):
        # One of ours, whose handle is the socket: half the work, when thousands of
        # sessions have their first look at once.
        set_keepalive(transport.getHandle())
        return
    with lent_socket(transport) as sock:
        if sock is not None:
            set_keepalive(sock)
        elif _is_tcp(transport):
            with suppress(OSError, AttributeError):
                transport.setTcpKeepAlive(True)


def is_its_own_peer(transport: Any) -> bool:
    """Whether a foreign endpoint's socket has connected to itself.

    Our own endpoints see to that as they connect: see :mod:`relayd.net.dialing`.
    """
    if getattr(transport, "options_are_set", False):
        return False
    with lent_socket(transport) as sock:
        # UNIX sockets mostly have no names.
        return (
            sock is not None
            and sock.family != socket.AF_UNIX
            and socket_ends.is_its_own_peer(sock)
        )


def _is_tcp(transport: Any) -> bool:
    is_unix = IUNIXTransport.providedBy(transport)
    return bool(ITCPTransport.providedBy(transport)) and not is_unix
