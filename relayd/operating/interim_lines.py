"""Lines about sessions and flows that go on: `--log-interval`.

A session that lasts for days has no line before its end.  With an interval, each
session and each flow has one whenever it has lasted for another interval, with its
totals so far.

No session has a timer, nor a note of its last line.  A sweep goes over all that lives,
:data:`SWEEPS` times in an interval, and writes a line where the age has passed a
multiple of the interval since the sweep before.  So a line comes an eighth of the
interval late at most, and sessions that were not opened together have theirs at times
of their own.  A sweep looks at :data:`LOOKS` of them, and writes :data:`LINES` lines,
in one turn of the reactor; what happens meanwhile is handled in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.datagrams.relay import DatagramRelay
from relayd.net.log_throttle import LogThrottle
from relayd.net.monotonic import monotonic
from relayd.observing.flow_lines import FlowLog
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import SessionLog

log = Logger(namespace="relayd.log")

#: Sweeps in an interval; and the least seconds between two.
SWEEPS, SHORTEST = 8, 0.25

#: How many sessions or flows are looked at in a turn, and how many lines are written.
LOOKS, LINES = 2_000, 64

#: One that may be due: when it began, and what writes its line.
_Looked = tuple[float, Callable[[], None]]


class InterimLines(Service):
    """Writes lines about what goes on, from its start to its stop.

    :param clock: of the relays.
    :param interval: seconds, more than 0.
    :param relays: returns what has sessions or flows now: factories of streams, and UDP
        relays; asked at each sweep.
    :param lines: where the lines go.
    """

    def __init__(
        self,
        clock: IReactorTime,
        interval: float,
        relays: Callable[[], Iterable[Any]],
        lines: LineLog,
    ) -> None:
        self._clock = monotonic(clock)
        self._interval = interval
        self._step = max(interval / SWEEPS, SHORTEST)
        self._relays = relays
        self._sessions, self._flows = SessionLog(lines), FlowLog(lines)
        self._throttle = LogThrottle(self._clock)
        self._timer: IDelayedCall | None = None
        #: When the sweep that is under way began, and the one before it.
        self._began = self._before = 0.0
        self._left: Iterator[_Looked] | None = None

    def startService(self) -> None:
        super().startService()
        self._began = self._clock.seconds()
        self._timer = self._clock.callLater(self._step, self._turn)

    def stopService(self) -> None:
        super().stopService()
        timer, self._timer, self._left = self._timer, None, None
        if timer is not None and timer.active():
            timer.cancel()

    def _turn(self) -> None:
        """Go on with a sweep, or begin one."""
        if self._left is None:
            self._before, self._began = self._began, self._clock.seconds()
            self._left = self._living()
        left, lines = self._left, 0
        for _ in range(LOOKS):
            try:
                looked = next(left, None)
                if looked is None:
                    self._left = None
                    break
                began, write = looked
                if self._is_due(began):
                    lines += 1
                    write()
            except Exception:
                if self._throttle.is_due():
                    log.failure("a session or flow that goes on could not be logged")
            if lines == LINES:
                break
        later = 0.0
        if self._left is None:
            later = max(self._began + self._step - self._clock.seconds(), 0.0)
        self._timer = self._clock.callLater(later, self._turn)

    def _is_due(self, began: float) -> bool:
        """Whether an age has passed a multiple of the interval since the last sweep."""
        # Towards 0: one that began after the last sweep had no age then.
        before = int((self._before - began) / self._interval)
        return int((self._began - began) / self._interval) > before

    def _living(self) -> Iterator[_Looked]:
        """What lives, a relay at a time, each as it is when its turn comes."""
        # Listeners of one proxy may share a factory.
        for relay in dict.fromkeys(self._relays()):
            if isinstance(relay, DatagramRelay):
                for flow in relay.registry.living():
                    if relay.table.flows.get(flow.key) is flow:
                        yield flow.began, partial(self._flow, relay, flow)
            else:
                for protocol in relay.registry.living():
                    session = protocol.session
                    if session.ended_at is None and session.ending is None:
                        yield session.opened_at, partial(self._session, relay, session)

    def _session(self, relay: Any, session: Any) -> None:
        self._sessions.interim(session, relay.now())

    def _flow(self, relay: DatagramRelay, flow: Any) -> None:
        self._flows.interim(flow, relay.facts(flow))
