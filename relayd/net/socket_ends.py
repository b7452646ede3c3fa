"""The two ends of a stream socket: their names, and whether both are the same."""

from __future__ import annotations

import socket
from typing import Any

from relayd.core.addresses import socket_name

_UNSPECIFIED = ("0.0.0.0", "::", "::ffff:0.0.0.0")


def ends_of(sock: socket.SocketType, towards: Any = None) -> tuple[str, str]:
    """The names of both ends of a connection, as each end sees them.

    The address that was dialled may differ: the kernel takes 0.0.0.0 and `::` for this
    machine.

    :param towards: the address that is dialled, if it is not connected yet.
    :return: the local end, and the other one.
    :raises OSError: the connection is lost.
    """
    here = sock.getsockname()
    try:
        there = sock.getpeername()
    except OSError:
        if towards is None:
            raise
        there = towards
        if there[0] in _UNSPECIFIED:
            there = (here[0], *there[1:])
    return socket_name(here), socket_name(there)


def is_self_connected(sock: socket.SocketType) -> bool:
    """Whether a TCP socket has connected to itself.

    When a port of this machine that has no listener, and is in the range of ephemeral
    ports, is dialled, the kernel may choose the same port for the socket: a
    simultaneous open (RFC 9293, 3.5) with itself, which succeeds.
    """
    ours = sock.getsockname()
    try:
        return bool(ours == sock.getpeername())
    except OSError:
        # Lost meanwhile; a read will report it.
        return False
