"""A destination that a 4a client names: looked up once, judged, and dialled.

Decisions are made about addresses, and what was decided is dialled: nothing looks the
name up again, so a name whose addresses change in between (DNS rebinding) gains
nothing.

The first attempt of a session looks the name up and dials its first address.  If that
fails, the next address is another attempt, as another server of a pool is
(:mod:`relayd.stream.retries`), with the time of an attempt and within that of all of
them; the client hears of the last one only.  An address that has not answered in time
goes behind the others of its name for a while, so that one client has waited for it
and not all.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from zope.interface import implementer

from relayd.core.errors import Refused
from relayd.core.interfaces import IProxyPolicy
from relayd.core.session import Ending, Session
from relayd.net.resolving import MAX_ADDRESSES, SocketAddress
from relayd.net.upstream import Upstream
from relayd.preludes.socks4 import Request
from relayd.stream.retries import Retries
from relayd.stream.server_attempt import ServerAttempt

#: Seconds for which an address that did not answer goes behind others, and how many
#: such addresses are remembered.
BEHIND_FOR, MAX_SILENT = 60.0, 1024

#: Makes what connects to an address that was permitted, the only one of the list.
AddressDialer = Callable[[Sequence[SocketAddress]], IStreamClientEndpoint]


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
    """Looks a name up once, and connects to the first address that is permitted.

    :param look_up: starts the look-up.
    :param judge: returns the addresses that are permitted, or raises Refused.
    :param dialer: makes an endpoint for an address.

    :ivar addresses: those that are permitted, the best first, once they are known.
    """

    def __init__(
        self,
        look_up: Callable[[], Deferred[list[SocketAddress]]],
        judge: Callable[[Sequence[SocketAddress]], list[SocketAddress]],
        dialer: AddressDialer,
    ) -> None:
        self.addresses: Sequence[SocketAddress] = ()
        self._look_up = look_up
        self._judge = judge
        self._dialer = dialer

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        def dial(found: list[SocketAddress]) -> Deferred[IProtocol]:
            self.addresses = self._judge(found)
            return self._dialer(self.addresses[:1]).connect(factory)

        return self._look_up().addCallback(dial)


class _OtherAddresses:
    """Chooses the addresses of a session's name, each once, in their order."""

    def __init__(self, dialer: AddressDialer) -> None:
        self._dialer = dialer

    def choose(self, session: Any, tried: Collection[Upstream] = ()) -> Upstream | None:
        """See :class:`relayd.stream.retries.Choosing`."""
        first = next(iter(tried), None)
        if first is None:
            return None
        # One that was asked for by its address has none.
        left = getattr(first.endpoint, "addresses", ())[len(tried) :]
        return Upstream(self._dialer(left[:1]), first.name) if left else None


class AddressRetries(Retries):
    """Tries the addresses of a name, one after the other.

    A destination with a single address is tried once.

    :param dialer: makes an endpoint for an address.
    :param dial_timeout: seconds for all of a session's attempts; 0 is for ever.
    """

    def __init__(self, dialer: AddressDialer, dial_timeout: float) -> None:
        super().__init__(_OtherAddresses(dialer), MAX_ADDRESSES - 1, dial_timeout)
        #: Until when each goes behind others; the latest last.
        self._silent: OrderedDict[SocketAddress, float] = OrderedDict()

    def again(self, client: Any, attempt: Any) -> bool:
        """See :meth:`relayd.stream.retries.Retries.again`."""
        if not isinstance(attempt, ServerAttempt):
            # A BIND has one peer, and no server.
            return False
        if attempt.ending is Ending.CONNECT_TIMEOUT:
            first = client.tried[0] if client.tried else attempt.upstream
            addresses = getattr(first.endpoint, "addresses", ())
            if len(addresses) > 1:
                self._note(addresses[len(client.tried)], client.factory.now())
        return super().again(client, attempt)

    def same_again(self, client: Any, attempt: Any, left: float) -> bool:
        """See :meth:`relayd.stream.retries.Retries.same_again`: nothing is."""
        return False

    def _note(self, silent: SocketAddress, now: float) -> None:
        self._silent[silent] = now + BEHIND_FOR
        self._silent.move_to_end(silent)
        if len(self._silent) > MAX_SILENT:
            self._silent.popitem(last=False)

    def in_order(self, found: list[SocketAddress], now: float) -> list[SocketAddress]:
        """The addresses of a name, those last that have not answered of late."""
        silent = self._silent
        if not silent or len(found) < 2:
            return found
        return sorted(found, key=lambda each: silent.get(each, now) > now)
