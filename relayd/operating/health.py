"""Whether the relays of a command are ready to serve.

A command is ready when all its listeners stand and it was not told to stop.  A server
that does not answer is no reason to send no more clients to the other relays, so it
counts for its own relay only.  That is not ready

- if it is stopped, which is no reason for the others either;
- if none of its servers can have a new client: checks find them down, they are out or
  disabled, or its names bring it none.  That they are full at the moment is left out,
  and so is a relay that tries all of them then;
- or if dials to all of its servers have failed of late.  Without a client there is no
  dial, so this is forgotten after :data:`DOWN` seconds; else nobody would ever find out
  that a server is back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relayd.core.counts import SessionCounts
from relayd.operating.running import RelayService
from relayd.upstreams.pool import Pool

#: Seconds for which a server is thought to be down after a dial to it has failed.
DOWN = 30.0


def pool_of(relay: Any) -> Pool | None:
    """The servers of a relay of any kind, if they have a state."""
    for name in ("pool", "balance"):
        pool = getattr(relay, name, None)
        if isinstance(pool, Pool):
            return pool
    return None


def pools_of(relay: Any) -> list[Pool]:
    """All of its pools, of a relay of any kind."""
    several: list[Pool] | None = getattr(relay, "all_pools", None)
    if several is not None:
        return several
    pool = pool_of(relay)
    return [] if pool is None else [pool]


def _can_serve(relay: Any) -> bool:
    """Whether a client may have a server: of one of its pools at least.

    Which pool a client needs is not known before it comes.  A route may name servers
    that are in none: one without any pool can serve always.
    """
    pools = pools_of(relay)
    if getattr(relay, "router", None) is not None:
        pools = [each for each in pools if each.upstreams or each.followed]
    return not pools or any(each.can_serve for each in pools)


class Health:
    """The health of a command's relays.

    :param service: their service.
    :param now: returns the time in seconds, on the relays' clock.
    """

    def __init__(self, service: RelayService, now: Callable[[], float]) -> None:
        self._service = service
        self._now = now

    def why_not(self) -> str:
        """Why the command is not ready; empty if it is."""
        if self._service.stopping:
            return "stopping"
        if not self._service.all_listening:
            return "not all listeners are open"
        return ""

    def why_not_each(self) -> dict[str, str]:
        """By the name of each relay: why it is not ready; empty if it is."""
        service = self._service
        if service.stopping:
            return {each.factory.name: "stopping" for each in service.listenings}
        found: dict[str, str] = {}
        for each in service.listenings:
            factory: Any = each.factory
            why = ""
            if not each.enabled:
                why = "stopped"
            elif each not in service.standing:
                why = "not all of its listeners are open"
            elif not _can_serve(factory):
                why = "none of its servers can have a client"
            elif not each.flows and self._all_down(factory.counts):
                why = "dials to all of its servers have failed"
            found[factory.name] = found.get(factory.name) or why
        return found

    def _all_down(self, counts: SessionCounts | None) -> bool:
        servers = counts.servers.values() if counts is not None else ()
        recently = self._now() - DOWN
        return bool(servers) and all(
            each.failed_at is not None and each.failed_at > recently for each in servers
        )
