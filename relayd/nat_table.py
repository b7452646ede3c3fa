"""The table of a UDP NAT relay: which client has which of the relay's ports.

UDP has no connections, so a *flow* stands for one: a client's address, as it speaks to
one of the relay's, and the socket that the relay opened for it.  The mapping is
endpoint-independent (RFC 4787): all that one client sends to the listener goes through
the same port of the relay.

A flow is *in use* when datagrams have gone both ways and one of them, either way, came
later than two seconds after the first: the rule by which Linux's conntrack calls a UDP
flow assured.  A request and its answer are not that; a conversation is, and so is a
subscriber that spoke once and is sent a stream.

A flow ends when nothing has moved for a while: a long while if it is in use, a short
one until then.  The time is an argument, and nothing here waits for it.

What it costs.  A datagram of a flow that was answered is one look-up and two stores.  A
flow stands in the bucket of the moment at which it would expire if nothing moved; when
that moment comes it is looked at, and put into a later bucket if something has.  So a
flow is looked at once in its timeout, however busy it is, and expires at most one step
late.  Those that may make room are put in order only when one of them has to.

What is bounded.  Flows in all, and of one client host.  When there is no room, the flow
that is not in use and has been quiet longest makes some.  A flow in use is never ended
for another's sake.  To be answered once is no protection: whoever can have an answer to
one datagram can have as many flows that were answered as the table has room for.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import ceil, floor, inf, log2
from typing import Generic, TypeVar

from relayd import settings
from relayd.errors import RelayError

#: Seconds after a flow's first datagram from which on another shows that it is in use.
#: Linux: `stream_ts` of nf_conntrack_proto_udp.c.
IN_USE_AFTER = 2.0

#: Seconds between two looks at the buckets, and so how late a flow may expire: a part
#: of the shorter timeout, within these limits.
STEP_PART, STEP_LEAST, STEP_MOST = 20, 1 / 128, 1.0


class TableFull(RelayError):
    """There is no room for another flow, and none that may be ended for it."""


class Flow:
    """A client, the relay's port for it, and what went through.

    :ivar key: what tells the flow from others of the table.
    :ivar host: the client's address without its port, whose flows are bounded.
    :ivar began: when its first datagram came, in seconds.
    :ivar seen: when something last moved that keeps it alive.
    :ivar replied: its server has answered.
    :ivar in_use: and it is more than a request with its answer.
    :ivar due: from when on the table is to be told of a datagram.
    :ivar placed: when something had last moved as it got its place among those that
        may make room.
    :ivar up: datagrams and bytes from the client that the server was sent.
    :ivar down: the same, back.
    """

    __slots__ = (
        "began",
        "bucket",
        "down_bytes",
        "down_datagrams",
        "due",
        "host",
        "in_use",
        "key",
        "placed",
        "replied",
        "seen",
        "up_bytes",
        "up_datagrams",
    )

    def __init__(self, key: Hashable, host: str, now: float) -> None:
        self.key = key
        self.host = host
        self.began = self.seen = now
        self.replied = self.in_use = False
        self.placed = now
        # At once, until it is answered.
        self.due = -inf
        self.up_datagrams = self.up_bytes = 0
        self.down_datagrams = self.down_bytes = 0
        self.bucket = -1


AnyFlow = TypeVar("AnyFlow", bound=Flow)


class NatTable(Generic[AnyFlow]):
    """The flows of a relay.

    :param most: flows in all.
    :param most_each: flows of one client host.
    :param timeout: seconds that a flow in use lives after something moved.
    :param unreplied_timeout: the same, until it is in use.  If `timeout` is the
        shorter, a flow that was answered has that.
    :param refresh_inbound: what a server sends keeps its flow alive, too.

    :ivar step: seconds; a flow expires at most this late.
    :ivar flows: those that live, by key.  Not to be changed from outside.
    :ivar evicted: how many made room for others.
    :ivar refused: how many could not be had.
    """

    def __init__(
        self,
        most: int,
        most_each: int,
        *,
        timeout: float = settings.UDP_TIMEOUT.default,
        unreplied_timeout: float = settings.UDP_UNREPLIED_TIMEOUT.default,
        refresh_inbound: bool = settings.REFRESH_INBOUND.default,
    ) -> None:
        if most < 1 or most_each < 1:
            raise ValueError("a table has room for one flow at least")
        if not (timeout > 0 and unreplied_timeout > 0):
            raise ValueError("timeouts must be more than 0")
        self.most = most
        self.most_each = most_each
        self.timeout = timeout
        self.unreplied_timeout = unreplied_timeout
        self.refresh_inbound = refresh_inbound
        self.step = _step(min(timeout, unreplied_timeout))
        self.flows: dict[Hashable, AnyFlow] = {}
        self.evicted = 0
        self.refused = 0
        #: Flows that are not in use, in the order of `placed`.
        self._spare: dict[AnyFlow, None] = {}
        #: By client host: its flows, and those of them that are not in use.
        self._hosts: dict[str, tuple[dict[AnyFlow, None], dict[AnyFlow, None]]] = {}
        #: Flows to look at, by the number of the step in which to.
        self._buckets: dict[int, dict[AnyFlow, None]] = {}
        #: Every bucket up to this one has been looked at.
        self._hand: int | None = None

    def __len__(self) -> int:
        return len(self.flows)

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
            # If it lives longer from now on, the look at its bucket will see that.
            if self.timeout < self.unreplied_timeout:
                self._unschedule(flow)
                self._schedule(flow, flow.seen + self.timeout)
            flow.due = flow.began + IN_USE_AFTER
            if self.refresh_inbound:
                # It has just been heard of, whatever the clock's resolution.
                self._move_back(flow)
        if now - flow.began > IN_USE_AFTER:
            self._protect(flow)

    def ends(self, flow: AnyFlow) -> float:
        """When a flow expires, unless something moves before."""
        if flow.in_use:
            return flow.seen + self.timeout
        if flow.replied:
            return flow.seen + min(self.timeout, self.unreplied_timeout)
        return flow.seen + self.unreplied_timeout

    def room(self, host: str) -> AnyFlow | None:
        """Which flow would have to end for a new one of this host.

        :return: the flow, or None: there is room as it is.
        :raises TableFull: there is none that may.
        """
        known = self._hosts.get(host)
        if known is not None and len(known[0]) >= self.most_each:
            spare = known[1]
        elif len(self.flows) >= self.most:
            spare = self._spare
        else:
            return None
        quietest = self._quietest(spare)
        if quietest is None:
            raise self.full(host)
        return quietest

    def full(self, host: str) -> TableFull:
        """A flow of this host is refused, and counted.

        :return: what to raise.
        """
        self.refused += 1
        return TableFull(f"no room for another flow of {host}")

    def oldest(self) -> AnyFlow | None:
        """The flow not in use that has been quiet longest, if there is one."""
        return self._quietest(self._spare)

    def add(self, flow: AnyFlow) -> None:
        """Take in a new flow; :meth:`room` has said that there is room."""
        self.flows[flow.key] = flow
        flow.placed = flow.seen
        self._spare[flow] = None
        known = self._hosts.get(flow.host)
        if known is None:
            known = self._hosts[flow.host] = ({}, {})
        known[0][flow] = known[1][flow] = None
        if self._hand is None:
            self._hand = int(flow.seen // self.step)
        self._schedule(flow, flow.seen + self.unreplied_timeout)

    def remove(self, flow: AnyFlow, *, evicted: bool = False) -> None:
        """Forget a flow that has ended."""
        del self.flows[flow.key]
        self._spare.pop(flow, None)
        own, spare = self._hosts[flow.host]
        del own[flow]
        spare.pop(flow, None)
        if not own:
            del self._hosts[flow.host]
        self._unschedule(flow)
        self.evicted += evicted

    def expire(self, now: float) -> list[AnyFlow]:
        """The flows that have expired by `now`; the caller removes them, or keeps them.

        One that is kept is looked at again in the next step.
        """
        expired: list[AnyFlow] = []
        if self._hand is None:
            return expired
        last = int(now // self.step)
        # Steps with nothing to look at are skipped, however many there were.
        if last - self._hand > len(self._buckets):
            due = sorted(number for number in self._buckets if number <= last)
        else:
            due = [n for n in range(self._hand + 1, last + 1) if n in self._buckets]
        self._hand = max(self._hand, last)
        for number in due:
            for flow in self._buckets.pop(number):
                ends = self.ends(flow)
                if ends <= now:
                    expired.append(flow)
                    self._schedule(flow, now)
                else:
                    self._schedule(flow, ends)
        return expired

    def _quietest(self, spare: dict[AnyFlow, None]) -> AnyFlow | None:
        """Which of these flows, that are not in use, is to make room.

        The first in which nothing has moved since it got its place; those before it
        get another, behind all others.  So a flow is moved when it matters, and not at
        each of its datagrams: at most once for one of them.
        """
        while spare:
            flow = next(iter(spare))
            if flow.seen <= flow.placed:
                return flow
            self._move_back(flow)
        return None

    def _move_back(self, flow: AnyFlow) -> None:
        """Give it the place of the one in which something has moved last."""
        flow.placed = flow.seen
        for order in (self._spare, self._hosts[flow.host][1]):
            del order[flow]
            order[flow] = None

    def _protect(self, flow: AnyFlow) -> None:
        """It is in use: it is ended for nobody's sake."""
        flow.in_use = True
        flow.due = inf
        del self._spare[flow]
        del self._hosts[flow.host][1][flow]

    def _unschedule(self, flow: AnyFlow) -> None:
        bucket = self._buckets.get(flow.bucket)
        if bucket is not None:
            bucket.pop(flow, None)
            if not bucket:
                del self._buckets[flow.bucket]

    def _schedule(self, flow: AnyFlow, when: float) -> None:
        number = max(ceil(when / self.step), (self._hand or 0) + 1)
        flow.bucket = number
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = {flow: None}
        else:
            bucket[flow] = None


def _step(shortest: float) -> float:
    """A binary fraction: sums of them are exact, and steps begin where timers end."""
    wanted = min(max(shortest / STEP_PART, STEP_LEAST), STEP_MOST)
    step: float = 2.0 ** floor(log2(wanted))
    return step
