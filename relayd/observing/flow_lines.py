"""The log lines of flows: one for each flow, and one for each relay."""

from __future__ import annotations

import attrs
from twisted.logger import Logger

from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.observing.line_limit import MAX_LINES, LineLimit
from relayd.observing.line_log import EVENTS, LineLog
from relayd.observing.log_fields import as_fields

_NAMESPACE = "relayd.flow"
flow_log = Logger(namespace=_NAMESPACE)


class FlowLog:
    """Writes one line when a flow ends, and one when the relay does.

    They go to `lines`; or they are events, with the same facts as fields.

    A flood from many sources ends flows as fast as it can be sent, whether a server
    answers or not.  So of the flows that were never in use, only :data:`MAX_LINES` a
    second get a line.
    """

    def __init__(self, lines: LineLog = EVENTS) -> None:
        self._lines = lines
        self._format = lines.format
        self._limit = LineLimit(_warn)

    @property
    def left_out(self) -> int:
        """How many flows got no line."""
        return self._limit.left_out

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :meth:`relayd.core.flows.FlowObserver.ended`."""
        if not flow.in_use and not self._limit.allows(int(flow.began + facts.age)):
            return
        self._write(self._format.flow_closed(flow, facts), facts)

    def interim(self, flow: Flow, facts: FlowFacts) -> None:
        """Write a line about a flow that goes on, with its totals so far.

        :param facts: `ending` is empty.
        """
        if flow.in_use or self._limit.allows(int(flow.began + facts.age)):
            self._write(self._format.flow_interim(flow, facts), facts)

    def closed(self, relay: str, listeners: str, counters: Counters) -> None:
        """See :meth:`relayd.core.flows.FlowObserver.closed`."""
        line = self._format.datagrams(relay, listeners, counters)
        if not self._lines.takes(_NAMESPACE, line):
            text, fields = self._lines.event_text(line), attrs.asdict(counters)
            flow_log.info("{line}", line=text, relay=relay, **as_fields(fields))

    def _write(self, line: str, facts: FlowFacts) -> None:
        if not self._lines.takes(_NAMESPACE, line):
            text, fields = self._lines.event_text(line), attrs.asdict(facts)
            flow_log.info("{line}", line=text, **as_fields(fields))


def _warn(left_out: int) -> None:
    flow_log.warn(
        "{max_lines} flows that were never in use ended in a second: the rest"
        " of them get no line ({left_out} left out so far)",
        max_lines=MAX_LINES,
        left_out=left_out,
    )


class QuietFlowLog(FlowLog):
    """Writes a line only for a flow that ended otherwise than `expired`.

    And one at the end of the relay only if a datagram was dropped.
    """

    def closed(self, relay: str, listeners: str, counters: Counters) -> None:
        """See :meth:`relayd.core.flows.FlowObserver.closed`."""
        if counters.dropped or counters.replies_dropped or counters.kernel_dropped:
            super().closed(relay, listeners, counters)

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :meth:`relayd.core.flows.FlowObserver.ended`."""
        if facts.ending != "expired":
            super().ended(flow, facts)
