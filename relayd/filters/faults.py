"""Faults: what those of streams and of datagrams have in common.

Their names and meanings are Toxiproxy's (https://github.com/Shopify/toxiproxy#toxics,
where they are called toxics): a fault is on one direction, `down` unless told, and on
a part of the sessions, by its `toxicity`.  Where one differs, its class says so.  For
all of them:

- One direction may end while the other goes on; Toxiproxy closes both.
- When a fault resets a session, what was passed on before is delivered, and what any
  filter still holds is dropped; Toxiproxy drops both.
- A fault that is taken off passes on at once what it holds, as in Toxiproxy.

Numbers are drawn for each session and direction from a generator of its own: with a
`seed`, sessions of two runs with the same sequence number have the same faults,
whatever other sessions do meanwhile.

A filter has one timer at most, however much it holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Annotated, Any

import attrs
from twisted.internet.interfaces import IDelayedCall

from relayd.core.filtering import LATER, Answer, Course, Filter, FilterFactory, Way
from relayd.filters.option_types import Probability


@attrs.frozen
class Fault(FilterFactory):
    """A fault with the options that all have.

    :ivar direction: whose data it is about: the client's (`up`), or the server's.
    :ivar toxicity: the probability that a session has it.
    :ivar seed: any number; runs with the same seed have the same faults.  None: they
        are different each time.
    """

    direction: Course = attrs.field(default="down", kw_only=True)
    toxicity: Annotated[float, Probability()] = attrs.field(default=1.0, kw_only=True)
    seed: int | None = attrs.field(default=None, kw_only=True)

    joins = True

    def draw(self, course: Course, ordinal: int) -> random.Random | None:
        """Whether one direction of a session, or of a flow, has the fault.

        :param ordinal: the sequence number of the session.
        :return: the generator of its numbers; None: it does not have it.
        """
        if course != self.direction:
            return None
        own = f"{self.seed}:{ordinal}:{course}:{self.name}"
        # Faults are no secret.
        numbers = random.Random(None if self.seed is None else own)  # noqa: S311
        return numbers if numbers.random() < self.toxicity else None


class StreamFault(Fault):
    """A fault of streams."""

    def build_filter(self, way: Way) -> Any:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_filter`."""
        numbers = self.draw(way.course, way.session.ordinal)
        return None if numbers is None else self.build_fault(way, numbers)

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        """The filter of a direction that has the fault."""
        raise NotImplementedError


class TimedFilter(Filter):
    """A filter with one timer.

    :param way: the direction that it is on.
    :param due: called when the timer is due.
    """

    def __init__(self, way: Way, due: Callable[[], None]) -> None:
        self._way = way
        self._on_due = due
        self._timer: IDelayedCall | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the timer is set."""
        return self._timer is not None

    def wait(self, seconds: float) -> None:
        """Set the timer, unless it is set."""
        if self._timer is None:
            self._timer = self._way.clock.callLater(max(seconds, 0.0), self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._on_due()

    def close(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


class HoldingFilter(TimedFilter):
    """One that holds bytes, and passes them on little by little.

    Subclasses have `pass_due`, which passes on what is due and sets the timer for the
    rest, and `take_all`.  Either may find that the filter was closed by what it has
    passed on: then nothing is held.
    """

    def __init__(self, way: Way) -> None:
        TimedFilter.__init__(self, way, self._run)
        self._ends = False

    def pass_due(self) -> None:
        raise NotImplementedError

    def take_all(self) -> bytes:
        """All that is held, which is not held any more."""
        raise NotImplementedError

    def _run(self) -> None:
        self.pass_due()
        if self._ends and not self.held:
            self._ends = False
            self._way.finish()

    def end(self) -> bytes | Answer:
        """The end follows the last byte that is held at once."""
        if not self.held:
            return b""
        self._ends = True
        return LATER

    def remove(self) -> bytes:
        TimedFilter.close(self)
        self._ends = False
        return self.take_all()

    def close(self) -> None:
        TimedFilter.close(self)
        self._ends = False
        self.take_all()


def take(held: bytearray, count: int) -> bytes:
    """Take the first bytes of those that are held."""
    piece = bytes(held[:count])
    del held[:count]
    return piece
