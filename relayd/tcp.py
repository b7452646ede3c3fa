"""The TCP relay: every client that connects gets a connection to the server.

Three lines embed it in a Twisted program::

    relay = RelayFactory(HostnameEndpoint(reactor, "example.com", 80))
    listening = TCP4ServerEndpoint(reactor, 8080).listen(relay)
    reactor.run()

and these shut it down: stop listening, then `relay.drain(10)`, whose Deferred
fires when the last session has ended.

Any client endpoint and any listening endpoint will do: TCP, TLS, UNIX, one of
your own.  A connection whose transport can't half-close still relays; only the
end of data can't be passed on to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.interfaces import (
    IReactorTime,
    IStreamClientEndpoint,
)

from relayd.admission.limits import Waiting, undecided
from relayd.admission.own_limits import OwnLimits
from relayd.core import pool_settings, settings
from relayd.core.filtering import IFilterFactory, speaks_first
from relayd.core.interfaces import IGate, IObserver
from relayd.core.networks import Network
from relayd.core.own_listeners import OwnListeners
from relayd.core.route_spec import DEFAULT
from relayd.core.routing import IRouter
from relayd.net.keepalive import KEEPALIVE, Keepalive, checked_user_timeout
from relayd.net.monotonic import monotonic
from relayd.net.upstream import Upstream
from relayd.observing.session_log import SessionLog
from relayd.preludes.client_hello import HELLO, UNRECOGNIZED_NAME, ClientHello
from relayd.preludes.proxy_protocol import introduced_by, preamble_of
from relayd.stream.closing_bridge import ClosingBridge
from relayd.stream.cutting import Cutting
from relayd.stream.deadlines import Timeouts
from relayd.stream.factory import StreamFactory
from relayd.stream.pools_of import Failing, PoolOf, RetriesOfPools
from relayd.stream.relay import Bandwidth, Lifetime, StreamRelay
from relayd.stream.retries import time_for_all
from relayd.stream.routable import Routable
from relayd.stream.standby import StandBy
from relayd.upstreams.pool import Pool
from relayd.upstreams.server_names import ServerNames

if TYPE_CHECKING:
    from relayd.routing.router import Route

    #: What a pool may be made of.
    Where = Pool | Upstream | IStreamClientEndpoint

__all__ = ["RelayFactory", "RelayProtocol"]


class RelayProtocol(Routable):
    """A client of the TCP relay: dials as soon as it is let in."""

    factory: RelayFactory

    def decide(self, *said: Any) -> None:
        factory = self.factory
        if factory.chooses is not None:
            factory.chooses(self, *said)
            return
        server, standby = factory.pool.choose(self.session), factory.standby
        if server is None and standby is not None and factory.waits:
            standby.wait(self)
        else:
            self.dial(server)

    def go_by_name(self, hello: ClientHello) -> None:
        """Go to the pool of the server name that the client asks for."""
        asked = hello.server_name
        if asked:
            self.session.note("sni", asked)
        place = self.factory.names.find(asked)
        if place is not None:
            self.go_to(place)
        else:
            what = f"the name {asked!r}" if asked else "a client that names none"
            self.turn_away(f"no server for {what}", UNRECOGNIZED_NAME)


class RelayFactory(StreamFactory):
    """Relays each connection to a server.

    :param upstream: the server, as an endpoint, an
        :class:`~relayd.net.upstream.Upstream`, or a
        :class:`~relayd.upstreams.pool.Pool` of several.  With `sni` or a `route` it is
        the pool `default`; None: that has no server.
    :param pools: more of them, by the names that `sni` and the route have for them.
    :param sni: which pool is for the clients of TLS that ask for a server name, by
        name: `www.example.com`, `*.example.com`, or empty for all others.  TLS is not
        ended.
    :param route: asked where each client goes: a coroutine function, which is given a
        :class:`~relayd.routing.connection.Connection`; or a
        :class:`~relayd.routing.router.Router` of one.
    :param max_deciding: how many clients may be undecided at once, by the route or as
        their server name has not come; a quarter for one client.  Unless given, a
        quarter of the limit of open files.
    :param server_speaks_first: the servers speak first; a route, if it is a function,
        is given no first bytes.
    :param retries: how many servers more a client is tried with, if one can't be
        reached; the same one again after a pause, if there is no other.  Unless given,
        2, or none where there is a single server.
    :param dial_timeout: seconds for all of a client's attempts; 0 for ever.  Unless
        given, 30, or `connect_timeout` if that is longer.
    :param wait_for_server: seconds for which new clients wait while no server can be
        chosen; 0: they are refused.
    :param cut: reset the sessions of a server that checks, or an operator, take down.
    :param connect_timeout: seconds until the server must have answered, and done its
        TLS handshake if it has one; of each attempt.
    :param stall_timeout: seconds that bytes may wait for a peer that takes none.
    :param idle_timeout: seconds without data in either direction.
    :param half_close_timeout: the same, once one direction has ended.
    :param half_close: pass an end of data on, and relay the other direction until its
        own; if not, the first end ends the session, once what was read is delivered.
    :param handshake_timeout: seconds until a client of a TLS listener must have done
        its handshake, and a balancer have sent its header; nothing is dialled before.
        Each of the five: fractions allowed, 0 for never.
    :param keepalive: probes of both connections of a session that lasts; unless given,
        as :class:`~relayd.net.keepalive.Keepalive` has them.
    :param user_timeout: seconds that sent data may stay unacknowledged, or wait for a
        peer that takes none, until the kernel ends a connection; 0 leaves it to the
        other timeouts.  Longer than `stall_timeout`.
    :param clock: where time comes from; the running reactor unless given.  A reactor
        of Twisted's is not asked itself: see :mod:`relayd.net.monotonic`.
    :param observer: hears of sessions (:class:`~relayd.core.interfaces.IObserver`);
        unless given, one that logs a line for each.
    :param gate: decides who is served (:class:`~relayd.core.interfaces.IGate`);
        everyone, unless given.
    :param lifetime: decides how long sessions may last
        (:class:`~relayd.admission.lifetimes.Lifetime`); for ever, unless given.
    :param bandwidth: limits how many bytes pass in a second
        (:class:`~relayd.admission.bandwidth.Bandwidth`); relays may share it.
    :param filters: see, and may change, the bytes (:mod:`relayd.filters`), each behind
        the one before.
    :param accept_proxy: the balancers: networks whose peers must begin with a PROXY
        header, version 1 or 2, which names their client; such as `["10.0.0.0/8"]`, or
        `"unix"` for peers of UNIX sockets.  Others are served as themselves.
    :param send_proxy: the version of the PROXY header that servers are told first,
        `v1` or `v2`; none unless given.  A single server can have its own
        (:attr:`relayd.net.upstream.Upstream.preamble`).
    :param redirected: its listeners are given connections that were meant for others,
        by rules of the kernel's (REDIRECT, DNAT or TPROXY, nft(8)): as one must whose
        server is where each client meant to go
        (:class:`relayd.endpoints.OriginalEndpoint`).  Its listeners are made
        transparent, which takes CAP_NET_RAW; without it TPROXY brings nothing.
    :param translated: likewise, but by REDIRECT or DNAT alone, which takes no right.
        Either has the sessions' `listener`, and what `send_proxy` tells, name what each
        client has asked for.
    :param name: what the log calls this relay; `relay1`, `relay2` and so on, unless
        given (:mod:`relayd.core.relay_names`).
    :raises ValueError: a timeout is negative or too short, the name can't be one, a
        network is none, there is no such version, or no such pool; or two do not go
        together.
    :raises TypeError: `upstream` can't be dialled, or the route is none.
    """

    protocol = RelayProtocol

    #: What decides where its clients go, if not the pool alone does.
    chooses: Callable[..., object] | None = None
    #: What follows for the servers that its route names.
    named: PoolOf
    #: Its pools, by the server names that clients ask for.
    names: ServerNames[PoolOf]
    #: Where clients wait for a server, if they do.
    standby: StandBy | None = None

    def __init__(
        self,
        upstream: Where | None,
        *,
        pools: Mapping[str, Where] | None = None,
        sni: Mapping[str, str] | None = None,
        route: Route | IRouter | None = None,
        max_deciding: int | None = settings.MAX_DECIDING.default,
        server_speaks_first: bool = settings.SERVER_SPEAKS_FIRST.default,
        retries: int | None = None,
        dial_timeout: float | None = pool_settings.DIAL_TIMEOUT.default,
        wait_for_server: float = 0.0,
        cut: bool = False,
        connect_timeout: float = settings.CONNECT_TIMEOUT.default,
        stall_timeout: float = settings.STALL_TIMEOUT.default,
        idle_timeout: float = settings.IDLE_TIMEOUT.default,
        half_close_timeout: float = settings.HALF_CLOSE_TIMEOUT.default,
        half_close: bool = settings.HALF_CLOSE.default,
        handshake_timeout: float = settings.HANDSHAKE_TIMEOUT.default,
        keepalive: Keepalive | None = None,
        user_timeout: float = settings.USER_TIMEOUT.default,
        clock: IReactorTime | None = None,
        observer: IObserver | None = None,
        gate: IGate | None = None,
        lifetime: Lifetime | None = None,
        bandwidth: Bandwidth | None = None,
        filters: Sequence[IFilterFactory] = (),
        accept_proxy: Iterable[Network | str] = (),
        send_proxy: str | None = None,
        redirected: bool = False,
        translated: bool = False,
        name: str | None = None,
    ) -> None:
        dials: Any = clock
        if clock is None:
            from twisted.internet import reactor

            dials, clock = reactor, monotonic(reactor)
        super().__init__(
            timeouts=Timeouts(
                connect=connect_timeout,
                stall=stall_timeout,
                idle=idle_timeout,
                half_close=half_close_timeout,
                handshake=handshake_timeout,
            ),
            clock=clock,
            observer=observer if observer is not None else SessionLog(),
            gate=gate,
            lifetime=lifetime,
            bandwidth=bandwidth,
            name=name,
        )
        self.own_limits = OwnLimits(self.clock)
        self.keepalive = KEEPALIVE if keepalive is None else keepalive
        self.user_timeout = checked_user_timeout(user_timeout, stall_timeout)
        if not ((retries or 0) >= 0 and wait_for_server >= 0):
            raise ValueError("retries and times must not be negative")
        failing = Failing(
            retries=retries,
            dial_timeout=time_for_all(dial_timeout, connect_timeout),
            connect_timeout=connect_timeout,
            wait=wait_for_server,
        )
        given: dict[str, Where] = {DEFAULT: Pool([]), **(pools or {})}
        if upstream is not None:
            if pools and DEFAULT in pools:
                raise ValueError("pools has a 'default', which is what stands first")
            given[DEFAULT] = upstream
        self.pools = {
            each: failing.of(each, Pool.of(where), self.clock)
            for each, where in given.items()
        }
        self.pool = self.all_pools[0]
        own = self.pools[DEFAULT]
        self.retries, self.standby = own.retries, own.standby
        for each in self.all_pools:
            each.belong_to(self.name)
            if cut:
                each.followers.append(Cutting(self).server_changed)
        # Of the instance, where the interpreter finds it faster.
        self.chooses = None
        if sni is not None and route is not None:
            raise ValueError("a route asks for server names itself: leave out sni")
        if server_speaks_first and route is None:
            why = "server_speaks_first is for a route"
            if sni is not None:
                why = "no sni where the server speaks first: clients say nothing before"
            raise ValueError(why)
        if max_deciding is not None and sni is None and route is None:
            raise ValueError("max_deciding is for a relay with sni, or a route")
        if sni is not None:
            if any(map(speaks_first, filters)):
                raise ValueError("no sni with a filter whose server speaks first")
            self._go_by_name(sni)
        elif route is not None:
            # Imports what most relays do not need.
            from relayd.routing.making import router_of

            self.router = router_of(
                route,
                dials,
                pools=self.pools,
                server_speaks_first=server_speaks_first,
            )
            self.chooses = Routable.ask_route
        elif len(self.pools) > 1:
            raise ValueError("several pools take a route, or sni, that chooses one")
        elif upstream is None:
            raise TypeError("a relay without sni and without a route has an upstream")
        if self.chooses is not None:
            for each in self.all_pools:
                each.be_one_of_several()
            self.named = failing.of_named()
            each_retries = [each.retries for each in (*self.pools.values(), self.named)]
            self.retries = RetriesOfPools(each_retries, failing.dial_timeout)
            self.handshakes = undecided(max_deciding, self.clock)
        if self.retries is not None:
            self.retries.count_in(self.totals.retried)
        if not half_close:
            self.bridge = ClosingBridge
        self.filter_by(filters)
        self.introduction = introduced_by(accept_proxy)
        self.preamble = preamble_of(send_proxy)
        self.translated = redirected or translated
        if redirected:
            self.intercepts = OwnListeners()

    def _go_by_name(self, sni: Mapping[str, str]) -> None:
        """Have the server name that a client asks for say which pool it is for.

        :raises ValueError: there is no such pool.
        """
        missing = sorted(set(sni.values()) - set(self.pools))
        if missing:
            raise ValueError(f"sni names pools that are not given: {missing}")
        self.preludes = (HELLO,)
        self.names = ServerNames(
            {name: self.pools[where] for name, where in sni.items()}
        )
        self.chooses = RelayProtocol.go_by_name

    def succeed(self, other: StreamRelay) -> None:
        """See :meth:`relayd.stream.relay.StreamRelay.succeed`.

        The undecided clients are limited together with the other one's.
        """
        super().succeed(other)
        if isinstance(self.handshakes, Waiting) and isinstance(
            other.handshakes, Waiting
        ):
            self.handshakes = other.handshakes.limited_as(self.handshakes)

    @property
    def all_pools(self) -> list[Pool]:
        """Its pools: `default`, which may be empty, and the others."""
        return [cast(Pool, each.pool) for each in self.pools.values()]

    @property
    def waits(self) -> bool:
        """Whether clients wait now, if there is no server for them.

        Always, if they are to; else while nobody knows yet which servers there are.
        """
        return self.pools[DEFAULT].waits
