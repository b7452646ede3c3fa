"""What an operator says of servers while their relays run.

An operator names a server, or a label, which several servers may have: of the ports of
a range, of the addresses of a name.  (Of one of several pools of a relay, both begin
with the name of the pool: :func:`relayd.operating.listing.names_of`.)  What was said of
it holds for all of them, and for those that join later, and is said again of the pools
that follow when the settings of their relay change (:meth:`ServerWords.adopt`).

A drain may have a limit: when it is over, the sessions that are left are killed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.control.steering import Conflict, Invalid, Unknown
from relayd.net.monotonic import monotonic
from relayd.operating.health import pools_of
from relayd.operating.killing import kill
from relayd.operating.listing import Shown, is_called
from relayd.operating.listing_servers import by_name, no_server
from relayd.operating.stateful import give_state
from relayd.operating.working import Works
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import MAX_WEIGHT, Server, Word

log = Logger(namespace="relayd.control")


@attrs.frozen
class Said:
    """What an operator says of a server; None: nothing."""

    word: Word | None = None
    weight: int | None = None


NOTHING = Said()


class ServerWords:
    """What was said of the servers of all relays.

    :param clock: of the limits of drains.
    :param find: the relay of a name, as it runs now; None: there is none any more.
    """

    def __init__(
        self, clock: IReactorTime, find: Callable[[str], Shown | None]
    ) -> None:
        self._clock: IReactorTime = monotonic(clock)
        self._works, self._find = Works(self._clock), find
        #: By relay, and by what the operator calls the server.
        self._said: dict[str, dict[str, Said]] = {}
        self._limits: dict[tuple[str, str], IDelayedCall] = {}
        #: Those whose servers that join are told.
        self._adopted: WeakSet[Pool] = WeakSet()

    def said(self, relay: str, server: str) -> Said:
        """What was said of a server, by the name that was used."""
        return self._said.get(relay, {}).get(server, NOTHING)

    def say(
        self,
        shown: Shown,
        server: str,
        word: Word | None,
        weight: int | None,
        within: float | None = None,
    ) -> list[Server]:
        """All that an operator says of a server, from now on.

        :param server: its name or its label.
        :param within: seconds; the sessions that a drained server has then are killed.
        :return: the servers that are meant.
        :raises Unknown: the relay has no such server.
        :raises Conflict: it can have no state.
        :raises Invalid: there is no such weight; or a limit, and no drain.
        """
        self._check(word, weight, within)
        found = self._servers(shown, server)
        self._record(shown.name, server, Said(word, weight))
        for pool in shown.pools:
            self._listen(shown.name, pool)
        for each in found:
            self._repeat(shown.name, each)
        self._limit(shown.name, server, within)
        return found

    def note(self, shown: Shown, server: str, said: Said) -> None:
        """The same, whether or not there is such a server now: it may come back."""
        self._record(shown.name, server, said)
        with suppress(Unknown, Conflict):
            for each in self._servers(shown, server):
                self._repeat(shown.name, each)

    def _record(self, relay: str, server: str, said: Said) -> None:
        own = self._said.setdefault(relay, {})
        own.pop(server, None)
        if said != NOTHING:
            own[server] = said

    def _check(
        self, word: Word | None, weight: int | None, within: float | None
    ) -> None:
        problems = []
        if weight is not None and not 0 <= weight <= MAX_WEIGHT:
            problems.append(f"weight is 0 to {MAX_WEIGHT}, not {weight}")
        if within is not None and word != "drain":
            problems.append("within is for a drain: give state = drain, too")
        elif within is not None and not within >= 0:
            problems.append(f"within must not be negative: {within:g}")
        if problems:
            raise Invalid(*problems)

    def _servers(self, shown: Shown, server: str) -> list[Server]:
        """Those that are meant, of those of older settings, too."""
        now = [
            each
            for same in by_name(shown).values()
            for each in same
            if is_called(each, server)
        ]
        if not now:
            raise no_server(shown, server)
        found: dict[Server, None] = {}
        for each in now:
            one = each if isinstance(each, Server) else give_state(shown, each)
            if one is None:
                raise Conflict(
                    f"{shown.name}: {server} can't be taken out, as a program's own"
                    " relay has it: stop the relay instead"
                )
            found[one] = None
        for pool in _older_pools(shown):
            for one in _servers_of(pool):
                if is_called(one, server):
                    found[one] = None
        return list(found)

    # -- servers that join, and pools that follow

    def adopt(self, relay: str, pool: Any) -> None:
        """A relay has another pool from now on: say again what was said.

        :param pool: None for a relay without one.
        """
        if self._said.get(relay):
            self._listen(relay, pool)
            for each in _servers_of(pool):
                self._repeat(relay, each)

    def forget(self, relay: str) -> None:
        """There is no relay of this name any more, or nothing is to stand of it.

        Servers that are there stay as they are: see :meth:`drop`.
        """
        self._said.pop(relay, None)
        for key in [each for each in self._limits if each[0] == relay]:
            self._limits.pop(key).cancel()

    def drop(self, shown: Shown) -> int:
        """Nothing that was said of a relay's servers stands any more.

        :return: of how many servers something was.
        """
        said = self._said.get(shown.name, {})
        for server in list(said):
            for each in _all_servers(shown):
                if is_called(each, server):
                    _apply(each, NOTHING)
        self.forget(shown.name)
        return len(said)

    def stop(self) -> None:
        """End what is under way."""
        self._works.stop()
        for each in self._limits.values():
            each.cancel()
        self._limits.clear()

    def _listen(self, relay: str, pool: Any) -> None:
        if isinstance(pool, Pool) and pool not in self._adopted:
            self._adopted.add(pool)
            known = set(pool.servers)

            def notice(server: Server) -> None:
                if server.draining:
                    known.discard(server)
                elif server not in known:
                    known.add(server)
                    self._repeat(relay, server)

            pool.listeners.append(notice)

    def _repeat(self, relay: str, server: Server) -> None:
        """Say of a server what was said last of its name, or of its label."""
        said = self._said.get(relay, {})
        last = next((each for each in reversed(said) if is_called(server, each)), None)
        _apply(server, NOTHING if last is None else said[last])

    # -- the limit of a drain

    def _limit(self, relay: str, server: str, within: float | None) -> None:
        before = self._limits.pop((relay, server), None)
        if before is not None:
            before.cancel()
        if within is not None:
            self._limits[relay, server] = self._clock.callLater(
                within, self._over, relay, server, within
            )

    def _over(self, relay: str, server: str, within: float) -> None:
        """The time of a drain is over."""
        del self._limits[relay, server]
        shown = self._find(relay)
        if shown is None or not any(
            each.operator == "drain" and is_called(each, server)
            for each in _all_servers(shown)
        ):
            # It was taken back by another of its names.
            return
        why = f"its server was drained within {within:g} s"
        killing = self._works.begin(kill([shown], relay=relay, server=server, why=why))
        killing.addErrback(
            lambda reason: log.failure(
                "the sessions of a drained server could not be killed", reason
            )
        )


def _apply(server: Server, said: Said) -> None:
    server.operate(said.word)
    server.operate_weight(said.weight)


def _servers_of(pool: Any) -> list[Server]:
    return pool.servers if isinstance(pool, Pool) else []


def _older_pools(shown: Shown) -> list[Any]:
    """Of older settings, those that choose still: no other has taken their place."""
    found = [pool for each in shown.older for pool in pools_of(each)]
    return [pool for pool in found if not isinstance(pool, Pool) or pool.latest is pool]


def _all_servers(shown: Shown) -> list[Server]:
    """Of its pools, and those of older settings that choose still."""
    pools = [*shown.pools, *_older_pools(shown)]
    found = [each for pool in pools for each in _servers_of(pool)]
    return list(dict.fromkeys(found))
