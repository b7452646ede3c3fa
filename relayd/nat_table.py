"""The table of a UDP NAT relay: which client has which of the relay's ports.

UDP has no connections, so a *flow* stands for one: a client's address, as it speaks to
one of the relay's, and the socket that the relay opened for it.  The mapping is
endpoint-independent (RFC 4787): all that one client sends to the listener goes through
the same port of the relay.

A flow ends when nothing has moved for a while: a short while before its server has
replied, a long one after.  The time is an argument, and nothing here waits for it.

What it costs.  A datagram of a flow that is known is one look-up and two stores.  A
flow stands in the bucket of the moment at which it would expire if nothing moved; when
that moment comes it is looked at, and put into a later bucket if something has.  So a
flow is looked at once in its timeout, however busy it is, and expires at most one step
late.

What is bounded.  Flows in all, and of one client host.  When there is no room, the flow
without a reply whose client has been quiet longest makes some: spoofed datagrams never
get past that, and a flow that was answered is never ended for another's sake.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import ceil
from typing import Generic, TypeVar

from relayd.errors import RelayError

#: Seconds between two looks at the buckets, and so how late a flow may expire.
STEP = 1.0


class TableFull(RelayError):
    """There is no room for another flow, and none that may be ended for it."""


class Flow:
    """A client, the relay's port for it, and what went through.

    :ivar key: what tells the flow from others of the table.
    :ivar host: the client's address without its port, whose flows are bounded.
    :ivar began: when its first datagram came, in seconds.
    :ivar seen: when something last moved that keeps it alive.
    :ivar replied: its server has answered.
    :ivar up: datagrams and bytes from the client that the server was sent.
    :ivar down: the same, back.
    """

    __slots__ = (
        "began",
        "bucket",
        "down_bytes",
        "down_datagrams",
        "host",
        "key",
        "replied",
        "seen",
        "up_bytes",
        "up_datagrams",
    )

    def __init__(self, key: Hashable, host: str, now: float) -> None:
        self.key = key
        self.host = host
        self.began = self.seen = now
        self.replied = False
        self.up_datagrams = self.up_bytes = 0
        self.down_datagrams = self.down_bytes = 0
        self.bucket = -1


AnyFlow = TypeVar("AnyFlow", bound=Flow)


class NatTable(Generic[AnyFlow]):
    """The flows of a relay.

    :param most: flows in all.
    :param most_each: flows of one client host.
    :param timeout: seconds that a flow lives after something moved.
    :param unreplied_timeout: the same, until its server has answered.
    :param refresh_inbound: what a server sends keeps its flow alive, too.
    :param step: seconds; a flow expires at most this late.

    :ivar flows: those that live, by key.  Not to be changed from outside.
    :ivar evicted: how many made room for others.
    :ivar refused: how many could not be had.
    """

    def __init__(
        self,
        most: int,
        most_each: int,
        *,
        timeout: float = 300.0,
        unreplied_timeout: float = 30.0,
        refresh_inbound: bool = True,
        step: float = STEP,
    ) -> None:
        if most < 1 or most_each < 1:
            raise ValueError("a table has room for one flow at least")
        if not (timeout > 0 and unreplied_timeout > 0 and step > 0):
            raise ValueError("timeouts and the step must be more than 0")
        self.most = most
        self.most_each = most_each
        self.timeout = timeout
        self.unreplied_timeout = unreplied_timeout
        self.refresh_inbound = refresh_inbound
        self.step = step
        self.flows: dict[Hashable, AnyFlow] = {}
        self.evicted = 0
        self.refused = 0
        #: Flows without a reply, the one that was quiet longest first.
        self._unreplied: dict[AnyFlow, None] = {}
        #: By client host: how many flows, and those of them without a reply.
        self._hosts: dict[str, tuple[dict[AnyFlow, None], dict[AnyFlow, None]]] = {}
        #: Flows to look at, by the number of the step in which to.
        self._buckets: dict[int, dict[AnyFlow, None]] = {}
        #: Every bucket up to this one has been looked at.
        self._hand: int | None = None

    def __len__(self) -> int:
        return len(self.flows)

    def outbound(self, flow: AnyFlow, now: float) -> None:
        """The client of a flow has sent something."""
        flow.seen = now
        if not flow.replied:
            # The last to be ended for another's sake.
            unreplied = self._unreplied
            del unreplied[flow]
            unreplied[flow] = None
            own = self._hosts[flow.host][1]
            del own[flow]
            own[flow] = None

    def inbound(self, flow: AnyFlow, now: float) -> None:
        """The server of a flow has answered."""
        if not flow.replied:
            flow.replied = True
            # If it lives longer from now on, the look at its bucket will see that.
            if self.timeout < self.unreplied_timeout:
                self._unschedule(flow)
                self._schedule(flow, flow.seen + self.timeout)
            del self._unreplied[flow]
            del self._hosts[flow.host][1][flow]
        if self.refresh_inbound:
            flow.seen = now

    def room(self, host: str) -> AnyFlow | None:
        """Which flow would have to end for a new one of this host.

        :return: the flow, or None: there is room as it is.
        :raises TableFull: there is none that may.
        """
        known = self._hosts.get(host)
        if known is not None and len(known[0]) >= self.most_each:
            waiting = known[1]
        elif len(self.flows) >= self.most:
            waiting = self._unreplied
        else:
            return None
        if not waiting:
            self.refused += 1
            raise TableFull(f"no room for another flow of {host}")
        return next(iter(waiting))

    def oldest(self) -> AnyFlow | None:
        """The flow without an answer that has been quiet longest, if there is one."""
        return next(iter(self._unreplied), None)

    def add(self, flow: AnyFlow) -> None:
        """Take in a new flow; :meth:`room` has said that there is room."""
        self.flows[flow.key] = flow
        self._unreplied[flow] = None
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
        self._unreplied.pop(flow, None)
        own, waiting = self._hosts[flow.host]
        del own[flow]
        waiting.pop(flow, None)
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
                ends = flow.seen + (
                    self.timeout if flow.replied else self.unreplied_timeout
                )
                if ends <= now:
                    expired.append(flow)
                    self._schedule(flow, now)
                else:
                    self._schedule(flow, ends)
        return expired

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
