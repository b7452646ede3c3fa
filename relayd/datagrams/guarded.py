"""A flow observer that is called until it raises."""

from __future__ import annotations

from twisted.logger import Logger

from relayd.core.flows import Counters, Flow, FlowFacts, FlowObserver

log = Logger(namespace="relayd.datagrams")


class FailSafeObserver:
    """Notifies an observer until it raises.

    The exception is logged with its traceback, and the observer not called again: in a
    flood, a flow may end for each datagram.
    """

    def __init__(self, observer: FlowObserver) -> None:
        self.observer: FlowObserver | None = observer

    def ended(self, flow: Flow, facts: FlowFacts) -> None:
        """See :meth:`FlowObserver.ended`."""
        if self.observer is not None:
            try:
                self.observer.ended(flow, facts)
            except Exception:
                self._drop()

    def closed(self, relay: str, listeners: str, counters: Counters) -> None:
        """See :meth:`FlowObserver.closed`."""
        if self.observer is not None:
            try:
                self.observer.closed(relay, listeners, counters)
            except Exception:
                self._drop()

    def _drop(self) -> None:
        self.observer = None
        log.failure("the observer of flows failed and is not called again")
