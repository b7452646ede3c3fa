"""The record of a UDP flow, and what is counted of datagrams; no I/O.

UDP has no connections.  A *flow* stands for one: a client's address, as it sends to
one of the relay's, and the socket that the relay opened for it.  :class:`Flow` is its
record, :class:`FlowFacts` what is reported when it has ended, and :class:`Counters`
what has become of every datagram of a relay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from math import inf
from typing import Protocol

import attrs


class Flow:
    """The record of a flow.

    :ivar key: what tells it from others of the table.
    :ivar host: the client key (:func:`relayd.core.addresses.client_key`) that its limit
        counts by.
    :ivar began: when its first datagram came, in seconds.
    :ivar seen: when something last moved that keeps it alive.
    :ivar replied: its server has answered.
    :ivar in_use: datagrams went both ways, one of them two seconds after the first.
    :ivar due: from when on the table must be notified of each datagram.
    :ivar placed: what `seen` was when it got its place in the order of eviction.
    :ivar bucket: the number of the table's step in which its expiry is checked.
    :ivar up_datagrams: sent to the server; `up_bytes` is what they hold.
    :ivar down_datagrams: sent to the client; `down_bytes` likewise.
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


@attrs.frozen
class NewFlow:
    """What gates and pools are asked about: a client without a flow.

    :ivar client: its address as text, as a session's (without `udp:`).
    :ivar peer: the same.
    :ivar listener: the address that it has sent to, as text.
    :ivar relay: the name of the relay.
    :ivar ordinal: a number of its own.
    """

    client: str
    peer: str
    listener: str
    relay: str
    ordinal: int = 0


@attrs.frozen
class FlowFacts:
    """Who a flow was between, and why it ended.

    :ivar relay: the name of its relay (:mod:`relayd.core.relay_names`).
    :ivar port: the relay's own address towards the server, or its client's, if the
        server sees that.
    :ivar age: seconds.
    :ivar ending: `expired`, `unreplied` (it expired without a reply), `evicted`,
        `drained`, `killed` (by its operator), `hours` (those of its relay were over),
        `upstream_down` (checks found that its server is down, and no other could be
        chosen), `filter_failed`, or `failed`.
    :ivar by: the client for which it was evicted; empty if it was not.
    """

    relay: str
    client: str
    listener: str
    port: str
    server: str
    age: float
    ending: str
    by: str = ""


@attrs.define(eq=False)
class Counters:
    """What has become of datagrams.

    :ivar received: from clients; each was sent on or is in `dropped`, but for what
        filters keep.  What waits for a server is counted when it has one, or has waited
        in vain.
    :ivar sent: to servers.
    :ivar replies_received: from servers; each was sent on or is in `replies_dropped`.
    :ivar replies_sent: to clients.
    :ivar dropped: by reason: `no_flow` (the table is full, or no descriptor is left),
        `no_server` (none can be chosen, or its name has no address yet),
        `no_source` (it can't be sent on with its client's address, or be answered from
        where it was sent to),
        `waiting_full` (so much waits for a server already), `no_local_address` (the
        kernel did not say which address the client sent to), a gate's word (`client`,
        `hours` and others of :data:`relayd.core.errors.REASONS`), `source_port_0`,
        `source_loops` (a reply there would come back), `loop` (they come from the relay
        itself, by another relay of this process), `truncated`, `draining`, `stopped`
        (so is its listener), `bandwidth` (they come faster than its limit), `filtered`
        (a filter has them go no further), `filter_full` (one that keeps some back has
        no room), `filter_failed` (one is broken), `failed` (a defect of ours, whose
        traceback is in the log), or `send_` and the name of the error.
    :ivar replies_dropped: likewise: `reply_cap`, `bandwidth`, `truncated`, `filtered`,
        `filter_full`, `filter_failed`, `failed`, `one_way` (its datagrams go to one
        server after the other), `send_…`.
    :ivar icmp_errors: how often a server's host refused what had been sent.
    :ivar resent: how many datagrams were sent to the next address of a server's
        name as well, after one had refused; each is in `sent` once.
    :ivar not_resent: how many of those could not be sent there.
    :ivar kernel_dropped: how many the kernel dropped because they were not read in
        time; they are in no other counter.
    """

    received: int = 0
    sent: int = 0
    replies_received: int = 0
    replies_sent: int = 0
    dropped: Counter[str] = attrs.Factory(Counter)
    replies_dropped: Counter[str] = attrs.Factory(Counter)
    icmp_errors: int = 0
    kernel_dropped: int = 0
    resent: int = 0
    not_resent: int = 0

    def balance(self, kept: int = 0, replies_kept: int = 0) -> None:
        """Count as `failed` what was received and is nowhere else, after a defect.

        :param kept: see :class:`relayd.core.counts.FlowCounts`.
        """
        missing = self.received - self.sent - self.dropped.total() - kept
        if missing > 0:
            self.dropped["failed"] += missing
        missing = self.replies_received - self.replies_sent - replies_kept
        missing -= self.replies_dropped.total()
        if missing > 0:
            self.replies_dropped["failed"] += missing

    @property
    def line(self) -> str:
        """All of them, as the log has them."""
        return " ".join(
            f"{name}={_counted(n)}" for name, n in attrs.asdict(self).items()
        )


def _counted(count: int | Counter[str]) -> str:
    if isinstance(count, int):
        return str(count)
    return ",".join(f"{reason}:{n}" for reason, n in sorted(count.items())) or "-"


class FlowObserver(Protocol):
    """Is notified of what becomes of flows."""

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """A flow has ended."""

    def closed(self, relay: str, listeners: str, counters: Counters) -> None:
        """The relay has closed its listeners, and all of its flows have ended.

        :param relay: its name.
        :param listeners: where it listened, as text.
        """
