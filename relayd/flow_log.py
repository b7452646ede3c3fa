"""What the log says of datagrams: a line for each flow, and one for each relay.

:class:`Counters` says what has become of every datagram; whoever embeds a relay reads
them at any time, and the log has them when it ends.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import attrs
from twisted.logger import Logger

from relayd.log_fields import as_fields
from relayd.nat_table import Flow

log = Logger(namespace="relayd.flow_log")
flow_log = Logger(namespace="relayd.flow")

#: Flows that were never in use whose end is logged in a second.
MOST_LINES = 100


@attrs.frozen
class FlowFacts:
    """Who a flow was between, and why it ended.

    :ivar port: the relay's own address towards the server.
    :ivar age: seconds.
    :ivar ending: `expired`, `unreplied` (it expired without a reply), `evicted`,
        `drained`, or `failed`.
    :ivar by: whose arrival has evicted it; empty if it was not evicted.
    """

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

    :ivar received: from clients; each was sent on or is in `dropped`.
    :ivar sent: to servers.
    :ivar replies_received: from servers; each was sent on or is in `replies_dropped`.
    :ivar replies_sent: to clients.
    :ivar dropped: by reason: `no_flow` (the table is full, or no descriptor is left),
        `no_server` (its name has no address yet), `no_local_address` (the kernel did
        not say what the client spoke to), `source_port_0`, `source_loops` (what would
        be answered there would come back), `loop` (they come from the relay itself,
        by another of this process), `truncated`, `draining`, `failed` (a defect
        of ours, whose traceback is in the log), or `send_` and the name of the error.
    :ivar replies_dropped: likewise: `reply_cap`, `truncated`, `failed`, `send_…`.
    :ivar icmp_errors: how often a server's host refused what had been sent.
    :ivar sent_again: how many datagrams were sent to the next address of a server's
        name as well, after one had refused; each is in `sent` once.
    :ivar not_sent_again: how many of those could not be sent there.
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
    sent_again: int = 0
    not_sent_again: int = 0

    def balance(self) -> None:
        """Count as `failed` what was received and is nowhere else: a defect's doing."""
        missing = self.received - self.sent - self.dropped.total()
        if missing > 0:
            self.dropped["failed"] += missing
        missing = self.replies_received - self.replies_sent
        missing -= self.replies_dropped.total()
        if missing > 0:
            self.replies_dropped["failed"] += missing

    @property
    def line(self) -> str:
        """All of them, as the log has it."""
        return " ".join(
            f"{name}={_counted(n)}" for name, n in attrs.asdict(self).items()
        )


def _counted(count: int | Counter[str]) -> str:
    if isinstance(count, int):
        return str(count)
    return ",".join(f"{reason}:{n}" for reason, n in sorted(count.items())) or "-"


class FlowObserver(Protocol):
    """Hears what becomes of flows."""

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """A flow has ended."""

    def closed(self, listeners: str, counters: Counters) -> None:
        """The relay has ended.

        :param listeners: where it listened, as text.
        """


class UntilItFails:
    """Passes on what it hears to an observer, until that raises.

    It is logged with its traceback, and called no more: there may be a flow's end for
    each datagram that somebody sends.
    """

    def __init__(self, observer: FlowObserver) -> None:
        self._observer: FlowObserver | None = observer

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :meth:`FlowObserver.ended`."""
        if self._observer is not None:
            try:
                self._observer.ended(flow, facts)
            except Exception:
                self._drop()

    def closed(self, listeners: str, counters: Counters) -> None:
        """See :meth:`FlowObserver.closed`."""
        if self._observer is not None:
            try:
                self._observer.closed(listeners, counters)
            except Exception:
                self._drop()

    def _drop(self) -> None:
        self._observer = None
        log.failure("the observer of flows failed and is not called again")


class FlowLog:
    """Writes one line when a flow ends, and one when the relay does.

    Whoever floods a listener with clients that say one thing each ends flows as fast as
    it can send, whether a server answers them or not.  So of flows that were never in
    use, :data:`MOST_LINES` in a second have a line.

    :ivar left_out: how many flows had none.
    """

    def __init__(self) -> None:
        self._second = 0
        self._lines = 0
        self.left_out = 0

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :meth:`FlowObserver.ended`."""
        if not flow.in_use and not self._room(int(flow.began + facts.age)):
            return
        by = f" by={facts.by}" if facts.by else ""
        flow_log.info(
            "{line}",
            line=(
                f"flow client={facts.client} listener={facts.listener}"
                f" port={facts.port} server={facts.server} age={facts.age:.3f}"
                f" up={flow.up_datagrams}/{flow.up_bytes}"
                f" down={flow.down_datagrams}/{flow.down_bytes} ending={facts.ending}"
                f"{by}"
            ),
            **as_fields(attrs.asdict(facts)),
        )

    def closed(self, listeners: str, counters: Counters) -> None:
        """See :meth:`FlowObserver.closed`."""
        flow_log.info(
            "{line}",
            line=f"datagrams listener={listeners} {counters.line}",
            **as_fields(attrs.asdict(counters)),
        )

    def _room(self, second: int) -> bool:
        """Whether this second has room for another line; says so once if not."""
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        if self._lines <= MOST_LINES:
            return True
        if self._lines == MOST_LINES + 1:
            flow_log.warn(
                "{most} flows that were never in use ended in a second: the rest of"
                " them have no line ({left_out} left out so far)",
                most=MOST_LINES,
                left_out=self.left_out,
            )
        self.left_out += 1
        return False


class QuietFlowLog(FlowLog):
    """Writes a line only for a flow that did not end by itself, with a reply.

    And at the end only if a datagram was dropped.
    """

    def closed(self, listeners: str, counters: Counters) -> None:
        """See :meth:`FlowObserver.closed`."""
        if counters.dropped or counters.replies_dropped or counters.kernel_dropped:
            super().closed(listeners, counters)

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :meth:`FlowObserver.ended`."""
        if facts.ending != "expired":
            super().ended(flow, facts)
