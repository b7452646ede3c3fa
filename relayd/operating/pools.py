"""Builds a pool of a TCP relay from its destinations and its settings.

A single server of which nothing is said needs no state, and gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from twisted.internet.interfaces import IReactorTime

from relayd.admission.per_client import ClientPrefix
from relayd.configuring.address_grammar import StreamServer
from relayd.configuring.config import FlowPoolSettings, PoolSettings
from relayd.configuring.server_grammar import ServersOf
from relayd.configuring.server_options import PLAIN
from relayd.core.interfaces import ISelector
from relayd.core.pool_settings import Balance
from relayd.core.route_spec import DEFAULT
from relayd.net.monotonic import monotonic
from relayd.net.upstream import Upstream
from relayd.operating.servers import Maker
from relayd.upstreams.balance import (
    First,
    LeastSessions,
    RandomOfTwo,
    RoundRobin,
)
from relayd.upstreams.client_hash import ClientHash
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool, Task
from relayd.upstreams.slow_start import SlowStart


def stream_pool(
    destinations: Sequence[StreamServer | ServersOf],
    settings: PoolSettings,
    reactor: Any,
    made: Maker,
    prefix: ClientPrefix | None = None,
    name: str = DEFAULT,
) -> Pool:
    """The servers of one pool of one listener.

    :param made: makes its servers.
    :param prefix: which clients count as one.
    :param name: of the pool.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    fixed = [each for each in destinations if not isinstance(each, ServersOf)]
    servers: list[Upstream]
    plain = len(destinations) == len(fixed) == 1 and fixed[0].options == PLAIN
    if plain and settings.check is None:
        servers = [made.upstream(fixed[0])]
    else:
        servers = [made.server(each) for each in fixed]
    pool = Pool(
        servers,
        selector_of(settings.balance, prefix),
        try_all=settings.when_none.what == "try-all",
        name=name,
    )
    named = [each for each in destinations if isinstance(each, ServersOf)]
    if pool.servers or named:
        keep_up(pool, named, settings, reactor, made)
    return pool


def keep_up(
    pool: Pool,
    named: Sequence[ServersOf],
    settings: FlowPoolSettings,
    reactor: Any,
    made: Any,
) -> None:
    """Give a pool the tasks that judge its servers, and follow its names.

    :param made: makes servers (:class:`relayd.operating.named_servers.ServerMaker`).
    """
    pool.tasks += _judging(pool, settings, monotonic(reactor))
    if settings.balance == "client-hash":
        pool.tasks.append(Preparation(pool))
    if named:
        # Imports twisted.names, which few relays need.
        from relayd.operating.named_servers import followers

        pool.tasks += followers(named, pool, made, settings, reactor)


class Preparation:
    """Has a pool prepare its choices as its relay starts."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def start(self) -> None:
        """See :class:`Task`."""
        self._pool.prepare()

    def stop(self) -> None:
        """See :class:`Task`."""


def _judging(
    pool: Pool, settings: FlowPoolSettings, clock: IReactorTime
) -> Iterator[Task]:
    """What takes servers out, and gives them time when they have come up."""
    if settings.max_fails:
        limits = FailLimits(
            max_fails=settings.max_fails,
            fail_time=settings.fail_time,
            fail_max=settings.fail_max,
            eject_most=settings.eject_most,
        )
        yield Ejector(pool, clock, limits)
    if settings.slow_start:
        yield SlowStart(pool, settings.slow_start, clock)


def selector_of(balance: Balance, prefix: ClientPrefix | None) -> ISelector:
    """How a server is chosen.

    :param prefix: which clients count as one.
    """
    if balance == "client-hash":
        bits = prefix or ClientPrefix()
        return ClientHash(bits.ipv4, bits.ipv6)
    return _SELECTORS[balance]()


_SELECTORS: Mapping[Balance, Callable[[], ISelector]] = {
    "round-robin": RoundRobin,
    "least-sessions": LeastSessions,
    "random": RandomOfTwo,
    "first": First,
}
