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

from collections.abc import Iterable, Sequence
from typing import Any

from twisted.internet.interfaces import (
    IReactorTime,
    IStreamClientEndpoint,
)

from relayd.admission.own_limits import OwnLimits
from relayd.core import pool_settings, settings
from relayd.core.filtering import IFilterFactory
from relayd.core.interfaces import IGate, IObserver
from relayd.core.networks import Network
from relayd.net.keepalive import KEEPALIVE, Keepalive, checked_user_timeout
from relayd.net.monotonic import monotonic
from relayd.net.upstream import Upstream
from relayd.observing.session_log import SessionLog
from relayd.preludes.proxy_protocol import introduced_by, preamble_of
from relayd.stream.closing_bridge import ClosingBridge
from relayd.stream.cutting import Cutting
from relayd.stream.deadlines import Timeouts
from relayd.stream.factory import StreamFactory, StreamProtocol
from relayd.stream.relay import Bandwidth, Lifetime
from relayd.stream.retries import NEVER, RETRIES, Retries, time_for_all
from relayd.stream.standby import StandBy
from relayd.upstreams.pool import Pool

__all__ = ["RelayFactory", "RelayProtocol"]


class RelayProtocol(StreamProtocol):
    """A client of the TCP relay: dials as soon as it is let in."""

    factory: RelayFactory

    def decide(self, *said: Any) -> None:
        factory = self.factory
        server, standby = factory.pool.choose(self.session), factory.standby
        if server is None and standby is not None and factory.waits:
            standby.wait(self)
        else:
            self.dial(server)


class RelayFactory(StreamFactory):
    """Relays each connection to a server.

    :param upstream: the server, as an endpoint, an
        :class:`~relayd.net.upstream.Upstream`, or a
        :class:`~relayd.upstreams.pool.Pool` of several.
    :param retries: how many servers more a client is tried with, if one can't be
        reached; the same one again after a pause, if there is no other.  Unless given,
        2, or none where there is a single server.
    :param dial_timeout: seconds for all of a client's attempts; 0 for ever.  Unless
        given, 30, or `connect_timeout` if that is longer.
    :param wait_for_server: seconds for which new clients wait while no server can be
        chosen; 0: they are refused.
    :param cut: reset the sessions of a server that checks find down.
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
    :param name: what the log calls this relay; `relay1`, `relay2` and so on, unless
        given (:mod:`relayd.core.relay_names`).
    :raises ValueError: a timeout is negative or too short, the name can't be one, a
        network is none, or there is no such version.
    :raises TypeError: `upstream` can't be dialled.
    """

    protocol = RelayProtocol

    #: Where clients wait for a server, if they do.
    standby: StandBy | None = None

    def __init__(
        self,
        upstream: Pool | Upstream | IStreamClientEndpoint,
        *,
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
        name: str | None = None,
    ) -> None:
        if clock is None:
            from twisted.internet import reactor

            clock = monotonic(reactor)
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
        self.pool = Pool.of(upstream)
        self.pool.belong_to(self.name)
        if retries is None:
            retries = RETRIES if len(self.pool.upstreams) > 1 else 0
        dial_timeout = time_for_all(dial_timeout, connect_timeout)
        if retries < 0 or not wait_for_server >= 0:
            raise ValueError("retries and times must not be negative")
        if retries or 0 < dial_timeout < (connect_timeout or NEVER):
            self.retries = Retries(self.pool, retries, dial_timeout)
            self.retries.tally = self.totals.retried
        if cut:
            self.pool.listeners.append(Cutting(self).server_changed)
        self._waits_always = bool(wait_for_server)
        if wait_for_server or self.pool.pending:
            seconds = wait_for_server or connect_timeout
            self.standby = StandBy(self.pool, seconds, self.clock)
            self.pool.listeners.append(self.standby.server_changed)
        if wait_for_server and self.retries is not None:
            self.retries.standby = self.standby
        if not half_close:
            self.bridge = ClosingBridge
        self.filter_by(filters)
        self.introduction = introduced_by(accept_proxy)
        self.preamble = preamble_of(send_proxy)

    @property
    def waits(self) -> bool:
        """Whether clients wait now, if there is no server for them.

        Always, if they are to; else while nobody knows yet which servers there are.
        """
        return self._waits_always or self.pool.pending > 0
