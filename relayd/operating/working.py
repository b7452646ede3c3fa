"""Does what may be long in parts, one in each turn of the reactor."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall

from relayd.control.steering import Json, Work


class Works:
    """What is under way.

    :param clock: of the turns.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        #: The next step of each.
        self._steps: dict[Work, IDelayedCall] = {}

    def begin(self, work: Work) -> Deferred[Json]:
        """Do all of some work, its first part now.

        :return: its answer, or what it has raised; neither once it is stopped.
        """
        done: Deferred[Json] = Deferred()
        self._go_on(work, done)
        return done

    def _go_on(self, work: Work, done: Deferred[Json]) -> None:
        self._steps.pop(work, None)
        try:
            next(work)
        except StopIteration as end:
            done.callback(end.value)
        except Exception:
            done.errback()
        else:
            self._steps[work] = self._clock.callLater(0, self._go_on, work, done)

    def stop(self) -> None:
        """Do no more of any."""
        for each in self._steps.values():
            each.cancel()
        self._steps.clear()
