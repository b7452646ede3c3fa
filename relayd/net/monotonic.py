"""A monotonic clock, and the timers that run on it.

`reactor.seconds` is `time.time`, and `callLater` runs on it: when the machine's clock
is set by two hours, either all deadlines of the next two hours expire at once, or none
expires for two hours.  The reactor itself can't be changed (other code reads its time,
as twisted.web does for dates), so this is a second `IReactorTime` beside it, on
CLOCK_MONOTONIC.  Code that is given a clock calls :func:`monotonic` with it.

The calls are in a heap.  A timer (:mod:`relayd.net.timers`) wakes the reactor for the
first of them, and is open only while a call is pending.

**Events that have arrived are handled before deadlines are checked.**  A call that is
due waits until the reactor has handled the events of its current turn.  If it is late
(the machine was paused, a turn took long), more events are pending: whole turns are
taken first, while one of :attr:`MonotonicClock.sources` has left events unread, within
a limit.  As the machine may also be paused between polling and the check, deadlines are
compared with the time of polling (:func:`poll_time`).
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

from twisted.internet.base import DelayedCall, ReactorBase
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from relayd.net.timers import Timer, open_timer

log = Logger(namespace="relayd.monotonic")

#: Seconds that a call may be late without whole turns being taken first.
LATE = 0.25

#: How many turns at least, and at most: the plane reads from 1,024 connections in one.
TURNS = 2
MAX_TURNS = 128

#: Entries of the heap up to which outdated ones are not searched for.
UNSWEPT = 64

#: Seconds by which a call of the reactor is moved into the past, so that it is due
#: even if the reactor's clock is set back.
AGES = 1e12

_NEVER = math.inf


class Source(Protocol):
    """Handles a part of the pending events in each turn of the reactor."""

    #: The last turn has left some of them.
    has_more_events: bool


def monotonic(clock: Any) -> Any:
    """The clock to use where `clock` was given.

    :param clock: an `IReactorTime`.
    :return: for a Twisted reactor, its :class:`MonotonicClock`.  Anything else, such as
        a test's clock, is returned as it is.
    """
    return MonotonicClock.of(clock) if isinstance(clock, ReactorBase) else clock


def poll_time(clock: Any) -> Callable[[], float]:
    """The function that returns the time to compare deadlines with.

    :param clock: made by :func:`monotonic`.
    :return: returns when events were last polled; of another kind of clock, its time.
    """
    return clock.poll_time if isinstance(clock, MonotonicClock) else clock.seconds


@implementer(IReactorTime)
class MonotonicClock:
    """The timers of one reactor on CLOCK_MONOTONIC; see :meth:`of`.

    The value of `seconds` has no meaning but in differences.

    Twisted's connections may be given it in place of their reactor: it has the methods
    that they use, and an abort, which they make a call of zero delay, is on this clock.

    :param seconds: returns the time; `seconds` of `IReactorTime`.
    :param open_timer: see :func:`relayd.net.timers.open_timer`.
    :ivar sources: those whose pending events are handled before late calls are made.
    """

    _all: weakref.WeakKeyDictionary[Any, MonotonicClock] = weakref.WeakKeyDictionary()

    def __init__(
        self,
        reactor: Any,
        *,
        seconds: Callable[[], float] = time.monotonic,
        open_timer: Callable[..., Timer] = open_timer,
    ) -> None:
        # A C function, and no method around it: each session calls it five times.
        self.seconds = seconds
        self._open_timer = open_timer
        # A weak reference: `_all` is keyed by the reactor, which must not be kept.
        self._reactor = weakref.ref(reactor)
        #: The time, a number that keeps the order, and the call.  An entry is outdated
        #: if its call was cancelled, or moved.
        self._calls: list[tuple[float, int, DelayedCall]] = []
        #: Calls for the next turn, with their times.
        self._next: deque[tuple[float, DelayedCall]] = deque()
        self._numbers = itertools.count()
        #: Calls neither made nor cancelled.
        self._pending = 0
        self._timer: Timer | None = None
        #: The time for which the timer is set.  While calls are made, or about to be,
        #: it is minus infinity, so that new calls do not set it: it is set after that.
        self._armed = _NEVER
        #: :meth:`_turn` is scheduled.
        self._scheduled = False
        #: Turns left before the due calls are made; 0: no call is due.
        self._turns = 0
        #: How many turns may be added.
        self._extra_turns = 0
        #: When the polling began that comes before those calls.
        self._poll_time = self.seconds()
        self.sources: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def of(cls, reactor: Any) -> MonotonicClock:
        """The clock of this reactor."""
        found = cls._all.get(reactor)
        if found is None:
            found = cls._all[reactor] = cls(reactor)
        return found

    # -- IReactorTime

    def callLater(
        self,
        delay: float,
        callable: Callable[..., Any],  # noqa: A002 (as the interface has it)
        *args: object,
        **kwargs: object,
    ) -> DelayedCall:
        """See `IReactorTime.callLater`.

        An exception of the call is logged.

        :raises ValueError: the delay is negative.
        """
        if not delay >= 0:
            raise ValueError(f"a delay must not be negative: {delay!r}")
        due = self.seconds() + delay
        made = DelayedCall(
            due, callable, args, kwargs, self._cancelled, self._sooner, self.seconds
        )
        self._pending += 1
        if delay:
            self._push(due, made)
        else:
            self._next.append((due, made))
            self._ask()
        return made

    def getDelayedCalls(self) -> list[DelayedCall]:
        """See `IReactorTime.getDelayedCalls`."""
        found = [*(call for _, call in self._next), *(call for *_, call in self._calls)]
        return [call for call in dict.fromkeys(found) if call.active()]

    def poll_time(self) -> float:
        """See :func:`poll_time`."""
        return self._poll_time

    # -- what Twisted's connections ask of a reactor

    def addReader(self, reader: Any) -> None:
        self._reactor().addReader(reader)  # type: ignore[union-attr]

    def removeReader(self, reader: Any) -> None:
        self._reactor().removeReader(reader)  # type: ignore[union-attr]

    def addWriter(self, writer: Any) -> None:
        self._reactor().addWriter(writer)  # type: ignore[union-attr]

    def removeWriter(self, writer: Any) -> None:
        self._reactor().removeWriter(writer)  # type: ignore[union-attr]

    # -- the heap

    def _push(self, due: float, call: DelayedCall) -> None:
        heappush(self._calls, (due, next(self._numbers), call))
        if due < self._armed:
            self._arm()

    def _cancelled(self, call: DelayedCall) -> None:
        self._pending -= 1
        if self._pending:
            self._sweep()
            return
        self._calls.clear()
        self._next.clear()
        if self._timer is not None:
            # In that turn it is closed.
            self._ask()

    def _sooner(self, call: DelayedCall) -> None:
        """A call was moved forward: its old entry is too late."""
        self._push(call.time, call)
        self._sweep()

    def _sweep(self) -> None:
        """Remove outdated entries, once they are more than half."""
        calls = self._calls
        if len(calls) > UNSWEPT and len(calls) > 2 * self._pending:
            calls[:] = [
                (due, number, call)
                for due, number, call in calls
                if call.active() and call.time == due
            ]
            heapify(calls)

    # -- waking up

    def _arm(self) -> None:
        """Set the timer for the first call."""
        due = self._armed = self._calls[0][0]
        if self._timer is not None:
            try:
                self._timer.arm(due)
                return
            except OSError:
                # Refused by a sandbox that was entered meanwhile.
                self._timer.close()
        self._timer = self._open_timer(self._reactor(), due, self._woken, self._lost)

    def _woken(self) -> None:
        """The timer's callback: a call is due, or was."""
        if self._turns:
            return
        calls, now = self._calls, self.seconds()
        # The current turn does not count: it is not a whole one.
        self._turns, self._extra_turns = 1, 0
        if calls and now - calls[0][0] > LATE:
            self._turns, self._extra_turns = TURNS + 1, MAX_TURNS - TURNS
        self._poll_time, self._armed = now, -_NEVER
        self._ask()

    def _lost(self) -> None:
        """The timer's callback: the reactor stops, and has dropped it."""
        self._timer, self._armed = None, _NEVER

    # -- turns of the reactor

    def _ask(self) -> None:
        """Have :meth:`_turn` called between two turns of the reactor.

        By a call of the reactor that is moved into the past: if the reactor's clock is
        set back by a day, a call of zero delay is due a day later.  The next cheapest
        way, `callFromThread`, is a call of zero delay with asyncio.
        """
        if not self._scheduled:
            self._scheduled = True
            reactor: Any = self._reactor()
            reactor.callLater(0, self._turn).delay(-AGES)

    def _turn(self) -> None:
        self._scheduled = False
        for _ in range(len(self._next)):
            if self._next:  # one of them may have cancelled the others
                self._make(*self._next.popleft())
        if self._turns:
            self._turns -= 1
            if not self._turns and self._extra_turns and self._has_more_events():
                self._turns = 1
                self._extra_turns -= 1
            if self._turns:
                self._poll_time = self.seconds()
            else:
                self._make_due()
        elif not self._pending:
            self._wait()
        if self._turns or self._next:
            self._ask()

    def _has_more_events(self) -> bool:
        return any(source.has_more_events for source in self.sources)

    def _make_due(self) -> None:
        """Make the calls that are due, and wait for the first that is not."""
        calls, until = self._calls, self._poll_time
        while calls and calls[0][0] <= until:
            due, _, call = heappop(calls)
            self._make(due, call)
        self._wait()

    def _wait(self) -> None:
        """Set the timer for the first pending call; close it if there is none.

        Called within :meth:`_turn` only, not while the reactor handles events: one of
        them may be for the descriptor that is closed, and its number be reused.
        """
        calls = self._calls
        while calls and not calls[0][2].active():
            heappop(calls)
        if calls:
            self._arm()
            return
        timer, self._timer, self._armed = self._timer, None, _NEVER
        if timer is not None:
            timer.close()

    def _make(self, due: float, call: DelayedCall) -> None:
        """Make a call, unless its entry is outdated."""
        if not call.active() or call.time != due:
            return
        if call.getTime() > due:
            # It was delayed, which shows only here.
            call.activate_delay()
            self._push(call.time, call)
            return
        self._pending -= 1
        call.called = 1
        try:
            call.func(*call.args, **call.kw)
        except BaseException:  # as reactors do
            log.failure("a timed call failed")
