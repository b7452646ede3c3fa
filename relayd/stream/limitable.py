"""Limits of one session alone, as a route says: its bytes, its time, those of its key.

What limits it is made by its relay's :class:`relayd.stream.relay.OwnLimits`.  A session
of which nothing is said has no more than it had: what is asked once a tick about one
that has a time of its own stands in its `watches`.
"""

from __future__ import annotations

from typing import Any

from relayd.core.interfaces import ILease
from relayd.core.leases import Leases
from relayd.core.routing import NO_LIMITS, RouteLimits
from relayd.stream.filterable import Filterable
from relayd.stream.relay import OwnLimits
from relayd.stream.watches import is_too_old


class Limitable(Filterable):
    """A client's leg whose session may have limits of its own."""

    def count_for(self, lease: ILease) -> None:
        """It holds this lease as well, until it is over."""
        held = self._lease
        if isinstance(held, Leases):
            # Not one in the other: a limit may be new time and again.
            held.add(lease)
        else:
            self._lease = lease if held is None else Leases([held, lease])

    def limit_alone(self, limits: RouteLimits) -> None:
        """Limit this session alone, beside what limits those of its relay.

        To be called once it is admitted, and before a server is dialled.  Nothing, if
        it is ending.

        - its `bandwidth`, beside that of its relay: what is less holds;
        - its `max_age`, as `--max-age` has it, if its relay does not end it before;
        - how many `sessions` of its `key` this relay may have.

        :raises relayd.core.errors.Refused: it has so many: it is not counted then.
        :raises RuntimeError: it is relayed already.
        :raises TypeError: its relay can't limit one session alone.
        :raises ValueError: a number is too small.
        """
        if limits == NO_LIMITS or self.session.ending is not None:
            return
        own = self.factory.own_limits
        if self.bridge is not None:
            raise RuntimeError(f"session {self.session.id} is relayed already")
        if own is None:
            raise TypeError(f"{type(self.factory).__name__} limits no single sessions")
        if limits.sessions is not None:
            self.count_for(own.enter(limits.key, limits.sessions))
        if limits.bandwidth is not None:
            self._limit_bytes_alone(own, limits.bandwidth)
        if limits.max_age:
            self.own_lifetime = own.lifetime(limits.max_age)
            self.watches = (*self.watches, is_too_old)

    def _limit_bytes_alone(self, own: OwnLimits, rates: Any) -> None:
        if self._limits is None:
            bandwidth = own.bandwidth
            self.factory.totals.count_waits(bandwidth)
            self.limit_bytes(bandwidth)
        limited: Any = self._limits
        if not hasattr(limited, "add"):
            raise TypeError(f"{type(limited).__name__} limits no single sessions")
        limited.add(self.session, rates)
