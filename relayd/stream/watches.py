"""What few sessions are asked at each check while they are relayed: their `watches`.

Each is a function of the client's leg and the time, and returns whether it has ended
the session.  Who has none is asked nothing.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import INegotiated

from relayd.core.session import Ending
from relayd.net.tls import notifies_handshake
from relayd.stream.legs import Leg


def is_too_old(client: Any, now: float) -> bool:
    """End a session whose own time is over."""
    over = client.own_lifetime.over(client.session, now)
    if over is not None:
        client.abort_session(*over)
    return over is not None


def watch_certificate(client: Any, leg: Leg, until: float) -> None:
    """A server's connection stands, but with TLS it may be none of a server yet.

    Of TLS below a wrapper nobody tells when its handshake is done.

    :param until: by when it is to have shown a certificate.
    """
    if INegotiated.providedBy(leg.transport) and not notifies_handshake(leg.transport):
        if client.unproven is None:
            client.watches = (*client.watches, is_unproven)
        client.unproven = leg, until


def is_unproven(client: Any, now: float) -> bool:
    """End a session whose server has not shown a certificate in time."""
    leg, until = client.unproven
    if now < until:
        return False
    client.unproven = None
    client.watches = tuple(each for each in client.watches if each is not is_unproven)
    if not leg.alive or leg.transport.getPeerCertificate() is not None:
        return False
    client.abort_session(Ending.CONNECT_TIMEOUT, "no TLS handshake in time")
    return True
