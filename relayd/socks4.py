"""A SOCKS4 and 4a proxy: CONNECT, and BIND.

Three lines embed it in a Twisted program::

    proxy = Socks4Factory(reactor)
    listening = TCP4ServerEndpoint(reactor, 1080, interface="127.0.0.1").listen(proxy)
    reactor.run()

What is decided elsewhere: who may connect (:class:`relayd.core.interfaces.IGate`), who
may go where (:class:`relayd.core.interfaces.IProxyPolicy`), and how one gets there (a
*dialer*, which is given addresses that were permitted, and returns a client endpoint).

What a client goes through: :mod:`relayd.socks.session`.  Sources: see
:mod:`relayd.preludes.socks4`; RFC 1413 for ident.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relayd.admission.limits import (
    Waiting,
    default_max_handshakes,
    default_max_handshakes_per_client,
)
from relayd.admission.own_limits import OwnLimits
from relayd.core import pool_settings, settings
from relayd.core.filtering import IFilterFactory
from relayd.core.interfaces import IGate, IObserver, IProxyPolicy, IShedsClients
from relayd.core.networks import Network
from relayd.core.routing import IRouter
from relayd.core.session import Ending
from relayd.net.happy_eyeballs import REMEMBERED, Dialer
from relayd.net.keepalive import KEEPALIVE, Keepalive, checked_user_timeout
from relayd.net.listening import TCPListenerEndpoint
from relayd.net.resolving import Resolver, SocketAddress
from relayd.net.upstream import Upstream
from relayd.observing.session_log import SessionLog
from relayd.preludes.proxy_protocol import introduced_by, preamble_of
from relayd.socks import ident
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.named import AddressDialer, AddressRetries, socket_address
from relayd.socks.session import REQUEST, Socks4Protocol, Socks4Session
from relayd.stream.closing_bridge import ClosingBridge
from relayd.stream.deadlines import Timeouts
from relayd.stream.factory import StreamFactory
from relayd.stream.relay import Bandwidth, Lifetime, StreamRelay
from relayd.stream.retries import time_for_all

if TYPE_CHECKING:
    from relayd.routing.router import Route

__all__ = ["Socks4Factory", "Socks4Protocol", "Socks4Session"]

#: Seconds after which a handshake may be ended for want of descriptors: those who mean
#: it are done by then.
LONG_HANDSHAKE = 1.0

#: How many are, each time that a listener finds none; it looks ten times a second.
SHED_AT_ONCE = 32

#: Makes what listens on a port of its own choice on one of this machine's addresses.
AnyListener = Callable[[str], IStreamServerEndpoint]


class AnyResolver(Protocol):
    """What finds the addresses of a name, as :class:`relayd.net.resolving.Resolver`."""

    def addresses(
        self, host: str, port: int, owner: str
    ) -> Deferred[list[SocketAddress]]:
        """Fires with at least one, or fails with DNSLookupError.

        :param owner: whose wish it is: the client key that limits count by.
        """


@implementer(IShedsClients)
class Socks4Factory(StreamFactory):
    """Serves SOCKS4 and 4a clients.

    :param reactor: provides `IReactorTime`, `IReactorFDSet`, `IReactorThreads`, and
        for ident `IReactorTCP`.
    :param dialer: makes the client endpoint for an address that was permitted: the only
        (family, socket address) of a list.
    :param listener: makes the server endpoint for BIND, for an address of this
        machine; it chooses the port.
    :param resolver: finds the addresses of 4a's names.
    :param policy: decides who may go where.  Unless given, everybody may go where any
        machine can, and not to what only this one can reach
        (:class:`relayd.socks.destinations.ProxyPolicy`).
    :param ident: ask each client's host for its user id, and refuse those that differ.
    :param ident_port: where that host's identd listens.
    :param bind: serve BIND.
    :param bind_any: serve BIND for whichever peer comes.
    :param bind_address: the IPv4 address that BIND listens on; unless given, the one
        on the way to the expected peer.
    :param external_address: the IPv4 address that BIND's reply names, if another.
    :param handshake_timeout: seconds until a client must have said what it wants, with
        its TLS handshake if it has one; 0 for never.
    :param connect_timeout: seconds until a server must have answered, of each address
        that a name has; the first one's look-up included.
    :param bind_timeout: seconds that BIND waits for its peer, 0 for ever.
    :param max_handshakes: clients in a handshake; the one that has been in it longest
        is evicted.  None is a quarter of the limit of open files, 4,096 at most.
    :param max_handshakes_per_client: those of one client address, likewise.  None is a
        quarter of `max_handshakes`, 1,024 at most.
    :param max_binds: clients that wait for a peer; more are refused.  And of one
        client address.

    The other parameters are those of :class:`relayd.tcp.RelayFactory`.

    :ivar handshakes: the clients in a handshake; several proxies may share them,
    :ivar binds: and those that wait for a peer.
    :raises ValueError: a timeout is negative or too short, a limit is less than 1, an
        address is no IPv4 address, or the name can't be one.
    """

    protocol = Socks4Protocol
    #: Its route names servers, and no pools.
    pools: Mapping[str, Any] = MappingProxyType({})
    preludes = (REQUEST,)
    handshakes: Waiting[Socks4Protocol]

    def __init__(
        self,
        reactor: Any,
        *,
        dialer: AddressDialer | None = None,
        listener: AnyListener | None = None,
        resolver: AnyResolver | None = None,
        policy: IProxyPolicy | None = None,
        ident: bool = settings.IDENT.default,
        ident_port: int = ident.PORT,
        bind: bool = settings.BIND.default,
        bind_any: bool = settings.BIND_ANY.default,
        bind_address: str | None = settings.BIND_ADDRESS.default,
        external_address: str | None = settings.EXTERNAL_ADDRESS.default,
        handshake_timeout: float = settings.HANDSHAKE_TIMEOUT.default,
        bind_timeout: float = settings.BIND_TIMEOUT.default,
        connect_timeout: float = settings.CONNECT_TIMEOUT.default,
        dial_timeout: float | None = pool_settings.DIAL_TIMEOUT.default,
        stall_timeout: float = settings.STALL_TIMEOUT.default,
        idle_timeout: float = settings.IDLE_TIMEOUT.default,
        half_close_timeout: float = settings.HALF_CLOSE_TIMEOUT.default,
        keepalive: Keepalive | None = None,
        user_timeout: float = settings.USER_TIMEOUT.default,
        half_close: bool = settings.HALF_CLOSE.default,
        max_handshakes: int | None = settings.MAX_HANDSHAKES.default,
        max_handshakes_per_client: int
        | None = settings.MAX_HANDSHAKES_PER_CLIENT.default,
        max_binds: int = settings.MAX_BINDS.default,
        max_binds_per_client: int = settings.MAX_BINDS_PER_CLIENT.default,
        observer: IObserver | None = None,
        gate: IGate | None = None,
        lifetime: Lifetime | None = None,
        bandwidth: Bandwidth | None = None,
        filters: Sequence[IFilterFactory] = (),
        route: Route | IRouter | None = None,
        accept_proxy: Iterable[Network | str] = (),
        send_proxy: str | None = None,
        name: str | None = None,
    ) -> None:
        timeouts = Timeouts(
            connect=connect_timeout,
            stall=stall_timeout,
            idle=idle_timeout,
            half_close=half_close_timeout,
            handshake=handshake_timeout,
        )
        if not bind_timeout >= 0:
            raise ValueError(f"bind_timeout must not be negative: {bind_timeout!r}")
        if max_handshakes is None:
            max_handshakes = default_max_handshakes()
        if max_handshakes_per_client is None:
            max_handshakes_per_client = default_max_handshakes_per_client(
                max_handshakes
            )
        for limit, most in (
            ("max_handshakes", max_handshakes),
            ("max_handshakes_per_client", max_handshakes_per_client),
            ("max_binds", max_binds),
            ("max_binds_per_client", max_binds_per_client),
        ):
            if most < 1:
                raise ValueError(f"{limit} must be at least 1: {most!r}")
        for address in (bind_address, external_address):
            if address is not None:
                ipaddress.IPv4Address(address)
        tick = timeouts.tick
        super().__init__(
            timeouts=timeouts,
            clock=reactor,
            observer=observer if observer is not None else SessionLog(),
            gate=gate,
            lifetime=lifetime,
            bandwidth=bandwidth,
            name=name,
            tick=max(min(tick, bind_timeout / 8 or tick), 0.01),
        )
        self.own_limits = OwnLimits(self.clock)
        self.keepalive = KEEPALIVE if keepalive is None else keepalive
        self.user_timeout = checked_user_timeout(user_timeout, stall_timeout)
        if not half_close:
            self.bridge = ClosingBridge
        self.filter_by(filters)
        if route is not None:
            # Imports what most proxies do not need.
            from relayd.routing.making import router_of

            self.router = router_of(
                route,
                reactor,
                kind="socks4",
                pools=self.pools,
                server_speaks_first=False,
            )
        self.introduction = introduced_by(accept_proxy)
        self.preamble = preamble_of(send_proxy)
        self.reactor = reactor
        self.dialer = dialer if dialer is not None else Dialer(reactor)
        self.upstream_at: Callable[[str, int, str], Upstream] = self._at
        if type(self.dialer) is Dialer:
            # The same destinations are asked for again and again; another dialer may
            # have another answer each time.
            self.upstream_at = functools.lru_cache(maxsize=REMEMBERED)(self._at)
        self.retries = AddressRetries(
            self.dialer, time_for_all(dial_timeout, connect_timeout)
        )
        self.retries.count_in(self.totals.retried)
        self.listener = listener if listener is not None else self._listener
        self.resolver = resolver if resolver is not None else Resolver.of(reactor)
        self.policy = policy if policy is not None else ProxyPolicy()
        self.ident = ident
        self.ident_port = ident_port
        self.bind = bind
        self.bind_any = bind_any
        self.bind_address = bind_address
        self.external_address = external_address
        self.bind_timeout = bind_timeout
        self._shedding: IDelayedCall | None = None
        self.handshakes = Waiting(
            "handshakes", max_handshakes, max_handshakes_per_client, reactor
        )
        self.binds: Waiting[Socks4Protocol] = Waiting(
            "BINDs", max_binds, max_binds_per_client, reactor
        )

    def succeed(self, other: StreamRelay) -> None:
        """See :meth:`relayd.stream.relay.StreamRelay.succeed`.

        The clients in a handshake, and those that wait for a peer, are limited together
        with the other one's, as is said here.
        """
        super().succeed(other)
        if isinstance(other, Socks4Factory):
            self.handshakes = other.handshakes.limited_as(self.handshakes)
            self.binds = other.binds.limited_as(self.binds)

    def _at(self, address: str, port: int, name: str) -> Upstream:
        """What is at an IP address.

        :param name: what the log calls it.
        """
        return Upstream(self.dialer([socket_address(address, port)]), name)

    def shed_clients(self) -> None:
        """See :meth:`IShedsClients.shed_clients`."""
        # Not now: what they have said may have arrived, and is read in this turn.
        if self._shedding is None:
            self._shedding = self.clock.callLater(0, self._shed)

    def _shed(self) -> None:
        self._shedding = None
        long_ago = self.now() - LONG_HANDSHAKE
        for protocol in self.handshakes.oldest(SHED_AT_ONCE):
            if protocol.session.opened_at <= long_ago:
                protocol.end(Ending.EVICTED, "descriptors run out")

    def _listener(self, host: str) -> IStreamServerEndpoint:
        return TCPListenerEndpoint(self.reactor, host, 0, 1)
