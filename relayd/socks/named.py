"""A destination that a 4a client names: looked up once, judged, and dialled.

Decisions are made about addresses, and what was decided is dialled: nothing looks the
name up again, so a name whose addresses change in between (DNS rebinding) gains
nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from zope.interface import implementer

from relayd.core.errors import Refused
from relayd.core.interfaces import IProxyPolicy
from relayd.core.session import Session
from relayd.net.resolving import SocketAddress
from relayd.preludes.socks4 import Request


def socket_address(address: str, port: int) -> SocketAddress:
    """An IPv4 or IPv6 address and a port, as the socket module has it."""
    if ":" in address:
        return socket.AF_INET6, (address, port, 0, 0)
    return socket.AF_INET, (address, port)


def permitted(
    policy: IProxyPolicy,
    request: Request,
    found: Sequence[SocketAddress],
    session: Session,
) -> list[SocketAddress]:
    """Those of a name's addresses to which a client may go.

    :raises Refused: to none of them.
    """
    kept = []
    refusal: Refused | None = None
    for family, address in found:
        try:
            policy.permit(address[0], request.port, request.host, session)
        except Refused as problem:
            refusal = refusal or problem
        else:
            kept.append((family, address))
    if not kept and refusal is not None:
        raise refusal
    return kept


@implementer(IStreamClientEndpoint)
class NamedDestination:
    """Looks a name up once, and connects to an address of it that is permitted.

    :param look_up: starts the look-up.
    :param judge: returns the addresses that are permitted, or raises Refused.
    :param dialer: makes an endpoint for some addresses.
    """

    def __init__(
        self,
        look_up: Callable[[], Deferred[list[SocketAddress]]],
        judge: Callable[[Sequence[SocketAddress]], list[SocketAddress]],
        dialer: Callable[[Sequence[SocketAddress]], IStreamClientEndpoint],
    ) -> None:
        self._look_up = look_up
        self._judge = judge
        self._dialer = dialer

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        def dial(addresses: list[SocketAddress]) -> Deferred[IProtocol]:
            return self._dialer(self._judge(addresses)).connect(factory)

        return self._look_up().addCallback(dial)
