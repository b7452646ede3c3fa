"""The table of a UDP NAT relay: the flow of each client.

The mapping is endpoint-independent (RFC 4787): all that one client sends to the
listener goes through the same port of the relay.

A flow is *in use* when datagrams have gone both ways and one of them, either way, came
later than two seconds after the first: the rule by which Linux's conntrack calls a UDP
flow assured.  A request and its answer are not that; a conversation is, and so is a
subscriber that sent one datagram and receives a stream.

A flow expires when nothing has moved for its timeout: a long one if it is in use, a
short one until then.  The time is an argument; there is no timer here.

Cost.  A datagram of a flow that was answered costs one look-up and two stores.  A flow
is in the bucket of the time at which it would expire if nothing moved; then it is
checked, and moved to a later bucket if something has moved.  So a flow is checked once
in its timeout, however busy it is, and expires at most one step late.  The order of
eviction is updated only when a flow has to be evicted.

Limits.  Flows in all, and for each client key.  When the table is full, the flow that
is not in use and has been idle longest is evicted.  A flow in use is never evicted.
One answer is no protection: a client that gets an answer to one datagram can have as
many answered flows as the table holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from math import ceil, floor, inf, log2
from typing import Generic, TypeVar

from relayd.core.errors import RelayError
from relayd.core.flows import Flow

#: Seconds after a flow's first datagram after which another shows that it is in use.
#: Linux: `stream_ts` of nf_conntrack_proto_udp.c.
IN_USE_AFTER = 2.0

#: Seconds between two checks of the buckets, and so how late a flow may expire: the
#: shorter timeout divided by this, within these limits.
STEP_PART, MIN_STEP, MAX_STEP = 20, 1 / 128, 1.0


class TableFull(RelayError):
    """The table is full, and no flow in it may be evicted."""


AnyFlow = TypeVar("AnyFlow", bound=Flow)


class NatTable(Generic[AnyFlow]):
    """The flows of a relay.  Iterating yields the open flows.

    :param max_flows: flows in all.
    :param max_flows_per_client: flows of one client key.
    :param timeout: idle timeout of a flow in use, in seconds.
    :param unreplied_timeout: the same, until it is in use.  If `timeout` is shorter, it
        holds from the first answer on.
    :param refresh_inbound: datagrams of the server keep the flow alive, too.
    :raises ValueError: a limit is less than 1, or a timeout is not more than 0.

    :ivar step: seconds; a flow expires at most this late.
    :ivar flows: the open flows, by key; read-only.
    :ivar evicted: how many flows were evicted.
    :ivar refused: how many flows were refused.
    :ivar hits: how often there were as many flows as there may be; `client_hits`, as
        many of one client.
    """

    def __init__(
        self,
        max_flows: int,
        max_flows_per_client: int,
        *,
        timeout: float,
        unreplied_timeout: float,
        refresh_inbound: bool,
    ) -> None:
        if max_flows < 1 or max_flows_per_client < 1:
            raise ValueError("a table must hold at least one flow")
        if not (timeout > 0 and unreplied_timeout > 0):
            raise ValueError("timeouts must be more than 0")
        self.max_flows = max_flows
        self.max_flows_per_client = max_flows_per_client
        self.timeout = timeout
        self.unreplied_timeout = unreplied_timeout
        self.refresh_inbound = refresh_inbound
        self.step = _step(min(timeout, unreplied_timeout))
        self.flows: dict[Hashable, AnyFlow] = {}
        self.evicted = 0
        self.refused = 0
        self.hits = self.client_hits = 0
        #: Flows that are not in use, in the order of `placed`.
        self._evictable: dict[AnyFlow, None] = {}
        #: By client key: its flows, and those of them not in use.
        self._hosts: dict[str, tuple[dict[AnyFlow, None], dict[AnyFlow, None]]] = {}
        #: Flows to check, by the number of the step.
        self._buckets: dict[int, dict[AnyFlow, None]] = {}
        #: Every bucket up to this one has been checked.
        self._checked: int | None = None

    def change(self, to: NatTable[AnyFlow]) -> None:
        """Take over the limits and the timeouts of another table, for all flows.

        Nothing is evicted: flows beyond a limit stay until they end.
        """
        self.max_flows = to.max_flows
        self.max_flows_per_client = to.max_flows_per_client
        self.refresh_inbound = to.refresh_inbound
        if (self.timeout, self.unreplied_timeout) == (to.timeout, to.unreplied_timeout):
            return
        self.timeout, self.unreplied_timeout = to.timeout, to.unreplied_timeout
        checked = self._checked
        if checked is not None:
            self._checked = int(checked * self.step // to.step)
        self.step = to.step
        self._buckets.clear()
        for flow in self:
            self._schedule(flow, self.expires_at(flow))

    def __len__(self) -> int:
        return len(self.flows)

    def __iter__(self) -> Iterator[AnyFlow]:
        return iter(self.flows.values())

    def outbound(self, flow: AnyFlow, now: float) -> None:
        """The client of a flow has sent something.

        Before `flow.due`, `flow.seen = now` is all there is to do.
        """
        flow.seen = now
        if now < flow.due:
            return
        if flow.replied and now - flow.began > IN_USE_AFTER:
            self._protect(flow)

    def inbound(self, flow: AnyFlow, now: float) -> None:
        """The server of a flow has answered.

        Before `flow.due`, all there is to do is `flow.seen = now`, if what a server
        sends refreshes.
        """
        if self.refresh_inbound:
            flow.seen = now
        if now < flow.due:
            return
        if not flow.replied:
            flow.replied = True
            # If its timeout is longer from now on, the check of its bucket applies it.
            if self.timeout < self.unreplied_timeout:
                self._unschedule(flow)
                self._schedule(flow, flow.seen + self.timeout)
            flow.due = flow.began + IN_USE_AFTER
            if self.refresh_inbound:
                # It is the latest, even if the clock's resolution does not show it.
                self._move_back(flow)
        if now - flow.began > IN_USE_AFTER:
            self._protect(flow)

    def expires_at(self, flow: AnyFlow) -> float:
        """The time at which a flow expires, unless something moves before."""
        if flow.in_use:
            return flow.seen + self.timeout
        if flow.replied:
            return flow.seen + min(self.timeout, self.unreplied_timeout)
        return flow.seen + self.unreplied_timeout

    def to_evict(self, host: str) -> AnyFlow | None:
        """The flow that must be evicted before another one of this client key.

        :return: the flow, or None: nothing is full.
        :raises TableFull: none may be evicted.
        """
        known = self._hosts.get(host)
        if known is not None and len(known[0]) >= self.max_flows_per_client:
            evictable = known[1]
        elif len(self.flows) >= self.max_flows:
            evictable = self._evictable
        else:
            return None
        idlest = self._idlest(evictable)
        if idlest is None:
            raise self.full(host)
        return idlest

    def note_hit(self, host: str) -> None:
        """A new flow of this client key finds a limit reached."""
        known = self._hosts.get(host)
        if known is not None and len(known[0]) >= self.max_flows_per_client:
            self.client_hits += 1
        else:
            self.hits += 1

    @property
    def by_client(self) -> list[int]:
        """How many flows each client has; a new list."""
        return [len(own) for own, _ in self._hosts.values()]

    def full(self, host: str) -> TableFull:
        """Count a refused flow of this client key.

        :return: the exception to raise.
        """
        self.refused += 1
        return TableFull(f"the flow table is full: no flow for {host}")

    def idlest(self, but: AnyFlow | None = None) -> AnyFlow | None:
        """The flow not in use that has been idle longest, if any.

        :param but: not this one, which is sending; the table hears of it later.
        """
        idlest = self._idlest(self._evictable)
        if idlest is not None and idlest is but:
            self._move_back(idlest)
            idlest = self._idlest(self._evictable)
        return None if idlest is but else idlest

    def add(self, flow: AnyFlow) -> None:
        """Add a new flow; :meth:`to_evict` has returned None before."""
        self.flows[flow.key] = flow
        flow.placed = flow.seen
        self._evictable[flow] = None
        known = self._hosts.get(flow.host)
        if known is None:
            known = self._hosts[flow.host] = ({}, {})
        known[0][flow] = known[1][flow] = None
        if self._checked is None:
            self._checked = int(flow.seen // self.step)
        self._schedule(flow, flow.seen + self.unreplied_timeout)

    def remove(self, flow: AnyFlow, *, evicted: bool = False) -> None:
        """Forget a flow that has ended."""
        del self.flows[flow.key]
        self._evictable.pop(flow, None)
        own, evictable = self._hosts[flow.host]
        del own[flow]
        evictable.pop(flow, None)
        if not own:
            del self._hosts[flow.host]
        self._unschedule(flow)
        self.evicted += evicted

    def expire(self, now: float) -> list[AnyFlow]:
        """The flows that have expired by `now`, for the caller to remove or keep.

        A flow that is kept is checked again in the next step.
        """
        expired: list[AnyFlow] = []
        if self._checked is None:
            return expired
        last = int(now // self.step)
        # Empty steps are skipped, however many there were.
        if last - self._checked > len(self._buckets):
            due = sorted(number for number in self._buckets if number <= last)
        else:
            due = [n for n in range(self._checked + 1, last + 1) if n in self._buckets]
        self._checked = max(self._checked, last)
        for number in due:
            for flow in self._buckets.pop(number):
                expires_at = self.expires_at(flow)
                if expires_at <= now:
                    expired.append(flow)
                    self._schedule(flow, now)
                else:
                    self._schedule(flow, expires_at)
        return expired

    def _idlest(self, evictable: dict[AnyFlow, None]) -> AnyFlow | None:
        """Which of these flows, none of them in use, to evict.

        The first in which nothing has moved since it was placed; those before it are
        moved to the end.  So flows are reordered here only, and not at each datagram:
        at most once for one of them.
        """
        while evictable:
            flow = next(iter(evictable))
            if flow.seen <= flow.placed:
                return flow
            self._move_back(flow)
        return None

    def _move_back(self, flow: AnyFlow) -> None:
        """Move a flow to the end of the order of eviction."""
        flow.placed = flow.seen
        for order in (self._evictable, self._hosts[flow.host][1]):
            del order[flow]
            order[flow] = None

    def _protect(self, flow: AnyFlow) -> None:
        """A flow is in use: it is never evicted."""
        flow.in_use = True
        flow.due = inf
        del self._evictable[flow]
        del self._hosts[flow.host][1][flow]

    def _unschedule(self, flow: AnyFlow) -> None:
        bucket = self._buckets.get(flow.bucket)
        if bucket is not None:
            bucket.pop(flow, None)
            if not bucket:
                del self._buckets[flow.bucket]

    def _schedule(self, flow: AnyFlow, when: float) -> None:
        number = max(ceil(when / self.step), (self._checked or 0) + 1)
        flow.bucket = number
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = {flow: None}
        else:
            bucket[flow] = None


def _step(shortest: float) -> float:
    """A power of two: sums are exact, so steps begin exactly when timers are due."""
    wanted = min(max(shortest / STEP_PART, MIN_STEP), MAX_STEP)
    step: float = 2.0 ** floor(log2(wanted))
    return step
