"""The last segment of a dial's handshake, which travels with the first bytes.

Whoever connects answers the server's SYN-ACK with an ACK of its own, and sends its
request right after.  If the request is at hand when connect(2) is called, one segment
will do for both, and the server is woken once.  Linux does so while TCP_QUICKACK is 0
(tcp(7)): the ACK waits up to 200 ms for bytes to go with.

So :func:`hold_back` is called only where there are bytes to send: a server that speaks
first would learn of the connection 200 ms late.  And :func:`go_on` is called as soon as
they were sent, or when there turn out to be none: an ACK that is due goes out then, and
later ones wait for nothing, as on any new connection.  Otherwise a server that answers
in two writes, with Nagle's algorithm, would wait 40 ms for the ACK of the first.

Neither matters to the bytes: where the option is refused (by a sandbox), or does not
exist (on another system), the ACK goes ahead of them.
"""

from __future__ import annotations

import socket

_TCP = int(socket.IPPROTO_TCP)

#: None: this system has none.
QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)


def hold_back(sock: socket.SocketType) -> None:
    """Have the ACK wait for the first bytes.

    :param sock: TCP, not connected yet.
    """
    if QUICKACK is not None:
        try:  # noqa: SIM105 - suppress() costs more than the call
            sock.setsockopt(_TCP, QUICKACK, 0)
        except OSError:
            # Refused: it goes ahead.
            pass


def go_on(sock: socket.SocketType) -> None:
    """Send an ACK that is due, and let later ones wait for nothing."""
    if QUICKACK is not None:
        try:  # noqa: SIM105 - as above
            sock.setsockopt(_TCP, QUICKACK, 1)
        except OSError:
            # A UNIX socket; or refused, as the first.
            pass
