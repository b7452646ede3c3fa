"""Time that only goes forward, and the timers that run on it.

`reactor.seconds` is `time.time`, and `callLater` runs on it: when somebody sets the
machine's clock by two hours, every deadline of the last two hours is over, or none
ends for the next two.  The reactor is not ours to change (others read it, and so do
the dates of twisted.web), so this is a second `IReactorTime` beside it, on
CLOCK_MONOTONIC.  Whoever takes a clock calls :func:`monotonic` with what it was given.

The calls are in a heap.  A timer (:mod:`relayd.net.timers`) wakes the reactor for the
first of them, and is open only while a call is pending.

**What has arrived is looked at before anybody is judged.**  A call that is due waits
until the reactor has gone through the events that it has at hand.  If it is late (the
machine was paused, a turn took long), there is more than that: whole turns are taken
first, as long as one of :attr:`MonotonicClock.sources` says that it has left something
unread, within a bound.  And the machine may be paused at any time, between a look and
a judgement, too: so deadlines are judged by the time of the look (:func:`looked_at`).
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

#: How many those are at least, and at most: the plane reads from 1,024 connections in
#: a turn.
TURNS = 2
MAX_TURNS = 128

#: Entries of the heap that are not worth looking for those that nobody waits for.
UNSWEPT = 64

#: Seconds by which a call of the reactor is moved into the past: it is due then,
#: whatever becomes of the reactor's clock.
AGES = 1e12

_NEVER = math.inf


class Source(Protocol):
    """Takes what has arrived, a part of it in each turn of the reactor."""

    #: The last turn has left some of it.
    has_more_events: bool


def monotonic(clock: Any) -> Any:
    """The clock to use where `clock` was given.

    :param clock: an `IReactorTime`.
    :return: for a reactor of Twisted's, its :class:`MonotonicClock`.  Anything else,
        such as a test's clock, is used as it is.
    """
    return MonotonicClock.of(clock) if isinstance(clock, ReactorBase) else clock


def looked_at(clock: Any) -> Callable[[], float]:
    """What tells a timed call the time to judge by.

    :param clock: made by :func:`monotonic`.
    :return: tells when the events that have arrived were last looked at; of another
        kind of clock, its time.
    """
    return clock.looked_at if isinstance(clock, MonotonicClock) else clock.seconds


@implementer(IReactorTime)
class MonotonicClock:
    """The timers of one reactor on CLOCK_MONOTONIC; see :meth:`of`.

    What `seconds` says is good for differences, and for nothing else.

    Twisted's connections may be given it in place of their reactor: what they ask of
    that is here, and an abort, which they make a call of zero delay, is on this clock.

    :param seconds: tells the time; `seconds` of `IReactorTime`.
    :param open_timer: see :func:`relayd.net.timers.open_timer`.
    :ivar sources: are asked whether they have left something unread.
    """

    _all: weakref.WeakKeyDictionary[Any, MonotonicClock] = weakref.WeakKeyDictionary()

    def __init__(
        self,
        reactor: Any,
        *,
        seconds: Callable[[], float] = time.monotonic,
        open_timer: Callable[..., Timer] = open_timer,
    ) -> None:
        # A plain function of C, which sessions call five times.
        self.seconds = seconds
        self._open_timer = open_timer
        # Weakly, as the table of all clocks is keyed by it.
        self._reactor = weakref.ref(reactor)
        #: When, in which order, and what.  An entry may be out of date: its call was
        #: cancelled, or moved.
        self._calls: list[tuple[float, int, DelayedCall]] = []
        #: Those for the next turn.
        self._next: deque[tuple[float, DelayedCall]] = deque()
        self._numbers = itertools.count()
        #: How many calls are neither made nor cancelled.
        self._pending = 0
        self._timer: Timer | None = None
        #: When the timer wakes us.  While calls are made, or about to be, whoever is
        #: scheduled need not set it: it is set after that.
        self._armed = _NEVER
        #: The reactor was asked for a turn.
        self._asked = False
        #: Turns to take before the calls that are due; 0: none is.
        self._turns = 0
        #: How many more there may be.
        self._more_turns = 0
        #: When the look began that comes before those calls.
        self._looked_at = self.seconds()
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

        One that raises is logged.

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

    def looked_at(self) -> float:
        """See :func:`looked_at`."""
        return self._looked_at

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
            # It is closed then.
            self._ask()

    def _sooner(self, call: DelayedCall) -> None:
        """It was moved: the entry that it has comes too late."""
        self._push(call.time, call)
        self._sweep()

    def _sweep(self) -> None:
        """Drop what is out of date, once it is more than half."""
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
        """Be woken for the first."""
        due = self._armed = self._calls[0][0]
        if self._timer is not None:
            try:
                self._timer.arm(due)
                return
            except OSError:
                # A sandbox that was shut meanwhile.
                self._timer.close()
        self._timer = self._open_timer(self._reactor(), due, self._woken, self._lost)

    def _woken(self) -> None:
        """A call is due, or was."""
        if self._turns:
            return
        calls, now = self._calls, self.seconds()
        # The turn that is under way is not a whole one.
        self._turns, self._more_turns = 1, 0
        if calls and now - calls[0][0] > LATE:
            self._turns, self._more_turns = TURNS + 1, MAX_TURNS - TURNS
        self._looked_at, self._armed = now, -_NEVER
        self._ask()

    def _lost(self) -> None:
        """The reactor stops, and has dropped the timer."""
        self._timer, self._armed = None, _NEVER

    # -- turns of the reactor

    def _ask(self) -> None:
        """Have :meth:`_turn` called between two turns of the reactor.

        By a call of the reactor's that is moved into the past: one of zero delay is not
        due until tomorrow if the reactor's clock is set back by a day just now.  The
        next cheapest way, `callFromThread`, is a call of zero delay with asyncio.
        """
        if not self._asked:
            self._asked = True
            reactor: Any = self._reactor()
            reactor.callLater(0, self._turn).delay(-AGES)

    def _turn(self) -> None:
        self._asked = False
        for _ in range(len(self._next)):
            if self._next:  # one of them may have cancelled the others
                self._make(*self._next.popleft())
        if self._turns:
            self._turns -= 1
            if not self._turns and self._more_turns and self._has_more_events():
                self._turns = 1
                self._more_turns -= 1
            if self._turns:
                self._looked_at = self.seconds()
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
        calls, until = self._calls, self._looked_at
        while calls and calls[0][0] <= until:
            due, _, call = heappop(calls)
            self._make(due, call)
        self._wait()

    def _wait(self) -> None:
        """Be woken for the first call that is pending; hold nothing if none is.

        Within a turn that was asked for, and so not while events are worked through:
        one of them may be for whoever gets a descriptor's number next.
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
        """Make a call, if the entry that it had is right."""
        if not call.active() or call.time != due:
            return
        if call.getTime() > due:
            # It was put off, which is noticed here only.
            call.activate_delay()
            self._push(call.time, call)
            return
        self._pending -= 1
        call.called = 1
        try:
            call.func(*call.args, **call.kw)
        except BaseException:  # as reactors do
            log.failure("a timed call failed")
