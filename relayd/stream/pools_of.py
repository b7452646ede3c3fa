"""The pools of a relay that has several, and what follows for the sessions of each.

A route, or the server name that a client asks for, says which of them a session is for
(:mod:`relayd.stream.routable`).  Each has retries of its own, and its own waiting room.
A server that a route names itself is in no pool: there is nobody else to try, and
nothing is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import attrs
from twisted.internet.interfaces import IReactorTime

from relayd.core.counts import Tally
from relayd.net.upstream import Upstream
from relayd.stream.retries import NEVER, Choosing, Retries
from relayd.stream.standby import StandBy


@attrs.frozen(eq=False)
class PoolOf:
    """A pool of a relay.

    :ivar name: what routes call it.
    :ivar pool: its servers.
    :ivar retries: what follows a dial that has failed, if anything does.
    :ivar standby: where clients wait for a server, if they do,
    :ivar waits_always: whenever there is none; else only while nobody knows yet which
        servers there are.
    """

    name: str
    pool: Choosing
    retries: Retries | None = None
    standby: StandBy | None = None
    waits_always: bool = False

    @property
    def waits(self) -> bool:
        """Whether clients wait now, if there is no server for them."""
        if self.standby is None or self.waits_always:
            return self.waits_always
        pool: Any = self.pool
        return bool(pool.latest.pending)


@attrs.frozen(kw_only=True)
class Failing:
    """What follows where servers can't be reached, or can't be chosen.

    :ivar retries: how many servers more a client is tried with; None: as many as there
        are unless they are given (:data:`relayd.stream.retries.RETRIES`).
    :ivar dial_timeout: seconds for all of a client's attempts, 0 for ever,
    :ivar connect_timeout: and for each.
    :ivar wait: seconds for which new clients wait while no server can be chosen.
    """

    retries: int | None
    dial_timeout: float
    connect_timeout: float
    wait: float

    def of(self, name: str, pool: Any, clock: IReactorTime) -> PoolOf:
        """A pool of a relay, and that.

        :param pool: a :class:`relayd.upstreams.pool.Pool`.
        """
        # Names that are followed may bring it any number.
        several = len(pool.upstreams) > 1 or bool(pool.followed)
        again = self._retries(pool, None if several else 0)
        standby = None
        if self.wait or pool.pending:
            standby = StandBy(pool, self.wait or self.connect_timeout, clock)
            pool.followers.append(standby.server_changed)
            if self.wait and again is not None:
                again.standby = standby
        return PoolOf(name, pool, again, standby, bool(self.wait))

    def of_named(self) -> PoolOf:
        """What stands in place of the pool of a server that a route has named."""
        server = NamedServer()
        return PoolOf("", server, self._retries(server, 0))

    def _retries(self, pool: Choosing, unless_given: int | None) -> Retries | None:
        count = unless_given if self.retries is None else self.retries
        in_time = 0 < self.dial_timeout < (self.connect_timeout or NEVER)
        if count != 0 or in_time:
            return Retries(pool, count, self.dial_timeout)
        return None


class NamedServer:
    """In place of a pool: the server that a route has named, for its session."""

    def choose(self, session: Any, tried: Collection[Upstream] = ()) -> Upstream | None:
        """See :meth:`Choosing.choose`: it is the session's server already."""
        server: Upstream | None = session.server
        return None if tried else server


#: Of a session that is for no pool of its relay, as somebody else has decided.
NOWHERE = PoolOf("", NamedServer())


class RetriesOfPools(Retries):
    """The retries of a relay with several pools: those of each session's own.

    :param each: of the pools.
    :param dial_timeout: of all of them.
    """

    def __init__(self, each: Iterable[Retries | None], dial_timeout: float) -> None:
        super().__init__(NamedServer(), 0, dial_timeout)
        self._each = [one for one in each if one is not None]

    def count_in(self, tally: Tally) -> None:
        """See :meth:`Retries.count_in`."""
        super().count_in(tally)
        for one in self._each:
            one.count_in(tally)

    def again(self, client: Any, attempt: Any) -> bool:
        """See :meth:`Retries.again`."""
        own = client.going_to.retries
        return own is not None and own.again(client, attempt)

    def has_more(self, client: Any) -> bool:
        """See :meth:`Retries.has_more`."""
        own = client.going_to.retries
        return own is not None and own.has_more(client)

    def limit(self, client: Any, connect: float) -> float:
        """See :meth:`Retries.limit`."""
        own = client.going_to.retries
        return connect if own is None else own.limit(client, connect)
