"""The two ends of a stream socket: their names, and whether both are the same."""

from __future__ import annotations

import socket
from typing import Any

from relayd.core.addresses import socket_name

_UNSPECIFIED = ("0.0.0.0", "::", "::ffff:0.0.0.0")


def ends_of(sock: socket.SocketType, towards: Any = None) -> tuple[str, str]:
    """The names of both ends of a connection, which are the same at either of them.

    Where it was dialled to may have another name: the kernel takes 0.0.0.0 and `::` for
    this machine.

    :param towards: where it leads, if it is not connected yet.
    :return: this end, as the kernel has it, and the other one.
    :raises OSError: it is lost.
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


def is_its_own_peer(sock: socket.SocketType) -> bool:
    """Whether a TCP socket has connected to itself.

    A port of the kernel's own range on this machine, where nobody listens, may be the
    very port that the kernel chose for the socket: a simultaneous open (RFC 9293, 3.5)
    with itself, which succeeds.
    """
    ours = sock.getsockname()
    try:
        return bool(ours == sock.getpeername())
    except OSError:
        # Lost again by now, which a read will tell.
        return False
