"""A clock whose calls are made by whoever watches over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

#: Makes a call, given its function and arguments.
Run = Callable[[Callable[..., Any], Any, Any], object]


@implementer(IReactorTime)
class WatchedClock:
    """A clock of something that may fail, as a filter.

    :param clock: has the time.
    :ivar run: makes the calls; may be changed.
    """

    __slots__ = ("_clock", "run")

    def __init__(self, clock: IReactorTime, run: Run) -> None:
        self._clock: Any = clock
        self.run = run

    def seconds(self) -> float:
        """See `IReactorTime.seconds`."""
        now: float = self._clock.seconds()
        return now

    def callLater(
        self,
        delay: float,
        callable: Callable[..., Any],  # noqa: A002 (as the interface has it)
        *args: object,
        **kwargs: object,
    ) -> IDelayedCall:
        """See `IReactorTime.callLater`."""
        made: IDelayedCall = self._clock.callLater(
            delay, self._run, callable, args, kwargs
        )
        return made

    def getDelayedCalls(self) -> Sequence[IDelayedCall]:
        """See `IReactorTime.getDelayedCalls`."""
        found: Sequence[IDelayedCall] = self._clock.getDelayedCalls()
        return found

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.run(call, args, kwargs)


def plainly(call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Make a call that nobody watches over any more."""
    call(*args, **kwargs)
