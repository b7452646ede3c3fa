"""Connecting to the first of a name's addresses that answers.

The addresses are tried one after the other, the next one after a quarter of a second or
as soon as one fails, and the first that connects is kept (RFC 8305, "happy eyeballs").
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.errors import SHORTAGE
from relayd.net.dialing import SocketEndpoint
from relayd.net.monotonic import monotonic
from relayd.net.resolving import Resolver, SocketAddress

#: Seconds after which the next address is tried as well (RFC 8305, section 5, the
#: connection attempt delay).
HEAD_START = 0.25

#: Endpoints that a Dialer caches.
REMEMBERED = 1024


@implementer(IStreamClientEndpoint)
class NameEndpoint:
    """Connects to a name, which is looked up for each connection.

    :param resolver: unless given, the one that the reactor's endpoints share.
    :param endpoint: the class that dials each address.
    """

    def __init__(
        self,
        reactor: Any,
        host: str,
        port: int,
        resolver: Resolver | None = None,
        endpoint: type[SocketEndpoint] = SocketEndpoint,
    ) -> None:
        self._reactor = reactor
        self._host, self._port = host, port
        self._resolver = resolver
        self._endpoint = endpoint

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`.  There is no timeout; cancel it."""
        resolver = self._resolver or Resolver.of(self._reactor)
        return resolver.addresses(self._host, self._port).addCallback(
            lambda found: dial_first(self._reactor, found, factory, self._endpoint)
        )


class Dialer:
    """Makes endpoints for addresses that need no look-up.

    :param endpoint: the class that dials each address.
    """

    def __init__(
        self, reactor: Any, endpoint: type[SocketEndpoint] = SocketEndpoint
    ) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        # Destinations repeat, and an endpoint has no state but its address; saves
        # 5,800 instructions of a SOCKS4 session.
        self._one = functools.lru_cache(maxsize=REMEMBERED)(self._make)

    def _make(self, family: int, address: Any) -> SocketEndpoint:
        return self._endpoint(self._reactor, family, address)

    def __call__(self, addresses: Sequence[SocketAddress]) -> IStreamClientEndpoint:
        """An endpoint that connects to an address.

        :param addresses: this one alone.
        """
        [address] = addresses
        return self._one(*address)


def dial_first(
    reactor: Any,
    addresses: Sequence[SocketAddress],
    factory: IProtocolFactory,
    endpoint: type[SocketEndpoint] = SocketEndpoint,
) -> Deferred[IProtocol]:
    """Connect to the first of `addresses` that answers.

    :param addresses: at least one, the best first.
    :param endpoint: the class that dials each.
    :return: fires with the protocol, or fails with the error of the last attempt that
        was not for want of something on this machine; or of the first, if all were.
    """
    race = _Race(reactor, addresses, factory, endpoint)
    race.next()
    return race.done


class _Race:
    """Dials that start one after the other; the first connection is kept."""

    def __init__(
        self,
        reactor: Any,
        addresses: Sequence[SocketAddress],
        factory: IProtocolFactory,
        endpoint: type[SocketEndpoint],
    ) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        self._left = list(reversed(addresses))
        self._factory = factory
        self._dials: list[Deferred[IProtocol]] = []
        self._timer: IDelayedCall | None = None
        self._problem: Failure | None = None
        self.done: Deferred[IProtocol] = Deferred(lambda _: self._stop())

    def next(self) -> None:
        self._timer = None
        endpoint = self._endpoint(self._reactor, *self._left.pop())
        if self._left:
            clock = monotonic(self._reactor)
            self._timer = clock.callLater(HEAD_START, self.next)
        dial = endpoint.connect(self._factory)
        self._dials.append(dial)
        dial.addCallbacks(self._won, self._lost, errbackArgs=(dial,))

    def _won(self, protocol: IProtocol) -> None:
        self._stop()
        self.done.callback(protocol)

    def _lost(self, reason: Failure, dial: Deferred[IProtocol]) -> None:
        if dial not in self._dials:
            return  # cancelled by `_stop`
        self._dials.remove(dial)
        is_ours = getattr(reason.value, "osError", None) in SHORTAGE
        if self._problem is None or not is_ours:
            self._problem = reason
        if self._left:
            if self._timer is not None:
                self._timer.cancel()
            self.next()
        elif not self._dials:
            self.done.errback(self._problem)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._left.clear()
        dials, self._dials = self._dials, []
        for dial in dials:
            dial.cancel()
