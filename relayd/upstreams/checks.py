"""Active checks: asks servers from time to time whether they are up.

One :class:`Checker` has the servers of all pools of a process, one timer for all of
them, and a limit of checks at once.  A server is asked every so many seconds, 10 % more
or less, and the servers are spread over that time.  All are asked within the first
second, and what the first check of a server finds is what it is.  From then on it goes
down after `fall` failures in a row, and comes up after `rise` successes;
`server.checked` is told of each change, once.

A check is a function that returns a Deferred (:mod:`relayd.upstreams.check_kinds`).  In
time it fires with a :class:`Verdict`; when its time is over it is cancelled, and may
still give one.  A check that does not end though it was cancelled keeps nobody waiting:
its server is not asked again before it has ended, and counts as failed.

Nothing piles up: there is one check of a server at a time; those that are due while too
many are under way wait in a queue, each once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.net.log_throttle import FailureLog, LogThrottle
from relayd.net.monotonic import monotonic
from relayd.upstreams.judging import (
    CannotCheck,
    Checked,
    Schedule,
    Verdict,
    Watched,
)

log = Logger(namespace="relayd.checks")

#: Checks at once, each of which has a connection.
AT_ONCE = 256

#: Seconds within which all servers are asked at first.
FIRST = 1.0

#: How many characters of an exception's message are quoted.
QUOTED = 80

#: By how much a period differs from another, up and down.
JITTER = 0.1

#: Entries of the heap beside those of the servers, until it is made anew.
OUTDATED = 64


class Checker:
    """Checks servers, from :meth:`start` to :meth:`stop`.

    :param clock: seconds, and the timer.
    :param at_once: limit of checks under way.
    :param chance: returns a number from 0 to 1; for tests.

    :ivar running: how many checks are under way.
    :ivar count: how many have ended; `failed` of them found a server down, `overdue` of
        these did not end in time.
    :ivar unable: how many were not possible, for which no server is to blame.
    :ivar late: how many began more than a period too late.
    """

    def __init__(
        self,
        clock: IReactorTime,
        at_once: int = AT_ONCE,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._clock: IReactorTime = monotonic(clock)
        self._at_once = at_once
        self._chance = chance
        self._targets: dict[Any, Watched] = {}
        #: `(at, number, target)`; outdated if the target's `at` is another.
        self._heap: list[tuple[float, int, Watched]] = []
        self._number = 0
        self._queue: deque[Watched] = deque()
        self._timer: IDelayedCall | None = None
        self._is_pumping = False
        self.started = False
        self.running = 0
        self.count = self.failed = self.overdue = self.unable = self.late = 0
        self._failures = FailureLog(log, self._clock)
        self._throttle = LogThrottle(self._clock)

    def __len__(self) -> int:
        """How many servers are checked."""
        return len(self._targets)

    def add(
        self, server: Checked, check: Callable[[], Any], schedule: Schedule
    ) -> None:
        """Check a server from now on, if this has started.

        :param check: returns a Deferred of a :class:`Verdict`, or a coroutine.
        :raises ValueError: it is checked already.
        """
        if server in self._targets:
            raise ValueError(f"{server!r} is checked already")
        weight = getattr(server, "own_weight", getattr(server, "weight", 1))
        up = getattr(server, "checked_up", True)
        target = Watched(server, check, schedule, weight, up=up)
        self._targets[server] = target
        if target.note is not None:
            cast(Any, server).has_checks = True
        if self.started:
            self._begin(target, self._chance())

    def remove(self, server: Checked) -> None:
        """Check it no more; its check that is under way is given up."""
        target = self._targets.pop(server, None)
        if target is not None:
            if target.note is not None:
                cast(Any, server).has_checks = False
            self._give_up(target)

    def start(self) -> None:
        """Begin, or begin again."""
        if not self.started:
            self.started = True
            for i, target in enumerate(self._targets.values()):
                self._begin(target, (i + self._chance()) / len(self._targets))

    def stop(self) -> None:
        """Check no more.  Servers stay as they are."""
        self.started = False
        for target in self._targets.values():
            self._give_up(target)
        self._heap.clear()
        self._queue.clear()
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    # -- when

    def _begin(self, target: Watched, phase: float) -> None:
        """Set the time of its first check; `phase` is its place within a period."""
        every = target.schedule.every
        now = self._clock.seconds()
        # The second is due within one period, too: half of one later at least.
        target.due = now + (phase - 0.5) * every
        self._set(target, now + phase * min(every, FIRST))

    def _set_next(self, target: Watched) -> None:
        """Set the time of its next check."""
        now = self._clock.seconds()
        period = target.schedule.every * (1 + JITTER * (2 * self._chance() - 1))
        target.due += period
        if target.due <= now:
            # It was late, or took longer than a period.
            target.due = now + period
        self._set(target, target.due)

    def _set(self, target: Watched, at: float) -> None:
        target.at = at
        self._number += 1
        heappush(self._heap, (at, self._number, target))
        if len(self._heap) > 2 * len(self._targets) + OUTDATED:
            self._heap = [each for each in self._heap if self._is_current(each)]
            heapify(self._heap)
        self._arm()

    def _is_current(self, entry: tuple[float, int, Watched]) -> bool:
        at, _, target = entry
        return target.at == at and self._has(target)

    def _has(self, target: Watched) -> bool:
        return self._targets.get(target.server) is target

    def _arm(self) -> None:
        """Have the timer wake this for the first of the heap, or before."""
        if self._is_pumping or not self._heap:
            return
        first, timer = self._heap[0][0], self._timer
        if timer is not None and timer.active() and timer.getTime() <= first:
            return
        if timer is not None and timer.active():
            timer.cancel()
        delay = max(first - self._clock.seconds(), 0.0)
        self._timer = self._clock.callLater(delay, self._woken)

    def _woken(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        found = []
        while self._heap and self._heap[0][0] <= now:
            entry = heappop(self._heap)
            if self._is_current(entry):
                found.append(entry[2])
        for target in found:
            # What one of them did may have removed another.
            if self.started and self._has(target):
                self._came(target)
        self._pump()

    def _came(self, target: Watched) -> None:
        """Its time has come: for a check, or for the end of one."""
        if target.stuck:
            self._end(target, Verdict(False, "its last check has not ended"))
        elif target.run is not None:
            self._cut(target)
        elif not target.is_waiting:
            target.is_waiting = True
            self._queue.append(target)

    # -- one check

    def _pump(self) -> None:
        """Begin what is due, as long as there may be more at once."""
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            while self._queue and self.running < self._at_once:
                target = self._queue.popleft()
                target.is_waiting = False
                self._run(target)
        finally:
            self._is_pumping = False
        self._arm()

    def _run(self, target: Watched) -> None:
        now = self._clock.seconds()
        if now - target.at > target.schedule.every:
            self.late += 1
            if self._throttle.is_due():
                log.warn(
                    "checks are late: {count} servers wait for {limit} checks at once",
                    count=len(self._queue) + 1,
                    limit=self._at_once,
                )
        self.running += 1
        run = target.run = maybeDeferred(target.check)
        if not run.called:
            self._set(target, now + target.schedule.timeout)
        run.addBoth(self._ended, target, run)

    def _cut(self, target: Watched) -> None:
        """The time of a check is over."""
        run = cast(Deferred[Any], target.run)
        # Before it is cancelled, which may give a verdict.
        target.stuck = True
        self.running -= 1
        self._cancel(run)
        if target.run is run and target.stuck:
            self._end(target, self._too_slow(target))

    def _too_slow(self, target: Watched) -> Verdict:
        self.overdue += 1
        return Verdict(False, f"no answer in {target.schedule.timeout:g} s")

    def _ended(self, result: Any, target: Watched, run: Deferred[Any]) -> None:
        """A check has ended, of itself or since it was cancelled."""
        if target.run is not run:
            # It was given up.
            return
        was_cut, target.stuck, target.run = target.stuck, False, None
        if not was_cut:
            self.running -= 1
        elif target.at > self._clock.seconds():
            # Late: it was judged, and is due again some time.
            return
        verdict: Verdict | None
        if isinstance(result, Verdict):
            verdict = result
        elif was_cut:
            verdict = self._too_slow(target)
        elif isinstance(result, Failure) and result.check(CannotCheck):
            verdict = None
            self.unable += 1
            if self._throttle.is_due():
                log.warn("a server can't be checked: {why}", why=str(result.value))
        else:
            verdict = self._defect(target, result)
        self._end(target, verdict)
        self._pump()

    def _defect(self, target: Watched, result: Any) -> Verdict:
        """A check has raised what none should, or returned what is no verdict."""
        if not isinstance(result, Failure):
            result = Failure(TypeError(f"a check gave {result!r}, not a Verdict"))
        name = getattr(target.server, "name", target.server)
        self._failures.add(f"the check of {name} failed", result)
        kind, said = type(result.value).__name__, ascii(str(result.value))[1:-1]
        return Verdict(False, f"its check raised {kind}: {said[:QUOTED]}".rstrip(": "))

    def _end(self, target: Watched, verdict: Verdict | None) -> None:
        """Judge a server by a check, and set the time of the next."""
        if verdict is not None:
            self.count += 1
            self.failed += not verdict.up
            log.debug(
                "check of {server}: {how}: {why}",
                server=getattr(target.server, "name", target.server),
                how="up" if verdict.up else "down",
                why=verdict.why,
            )
            try:
                if target.note is not None:
                    target.note(self._clock.seconds(), verdict.up, verdict.why)
                target.judge(verdict)
            except Exception:
                self._failures.add("a server could not be told of its check")
        if self.started and self._has(target):
            self._set_next(target)

    def _give_up(self, target: Watched) -> None:
        run, target.run = target.run, None
        if run is not None and not target.stuck:
            self.running -= 1
            self._cancel(run)
        target.stuck = False
        target.is_waiting = False
        if self._queue and target in self._queue:
            self._queue.remove(target)

    def _cancel(self, run: Deferred[Any]) -> None:
        try:
            run.cancel()
        except Exception:
            self._failures.add("a check could not be cancelled")
