"""A filter by itself: its way, and its bytes in any pieces."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core.filtering import (
    LATER,
    SPLICE,
    Course,
    EndSession,
    FilterFactory,
    IFilter,
)
from relayd.core.session import Session


class FakeWay:
    """A direction of a session, which notes what a filter says.

    :ivar passed: the bytes that came outside of calls, and those of `finish`.
    :ivar finished: the end of data was passed on, by `finish`.
    :ivar ended: why the session is to end, by `end_session`; None: it goes on.
    :ivar reset: whether it is to be reset.
    :ivar left: the filter has left.
    :ivar notes: by name.
    """

    def __init__(
        self,
        course: Course = "up",
        session: Any = None,
        clock: Clock | None = None,
        shared: dict[str, Any] | None = None,
    ) -> None:
        self.course: Course = course
        self.session = (
            Session(1, "192.0.2.1:1000", "192.0.2.2:80", 0.0, ordinal=0)
            if session is None
            else session
        )
        self.clock: Any = Clock() if clock is None else clock
        self.shared: dict[str, Any] = {} if shared is None else shared
        self.passed = b""
        self.finished = False
        self.ended: str | None = None
        self.reset = False
        self.left = False
        self.notes: dict[str, str] = {}

    def pass_on(self, data: bytes) -> None:
        assert not self.finished
        assert self.ended is None
        self.passed += data

    def finish(self, data: bytes = b"") -> None:
        self.pass_on(data)
        self.finished = True

    def end_session(self, why: str, *, reset: bool = True) -> None:
        assert self.ended is None
        self.ended, self.reset = why, reset

    def leave(self) -> None:
        self.left = True

    def note(self, name: str, value: str) -> None:
        self.notes[name] = value


@attrs.define
class Outcome:
    """What became of the bytes of one direction.

    :ivar output: what was passed on.
    :ivar most_held: the most that was held after a call.
    :ivar ended: why the filter has ended the session; None: it has not.
    :ivar spliced: it has said SPLICE.
    """

    output: bytes = b""
    most_held: int = 0
    ended: str | None = None
    spliced: bool = False


def run_filter(
    factory: FilterFactory,
    pieces: Iterable[bytes],
    way: FakeWay | None = None,
    *,
    end: bool = True,
) -> Outcome:
    """Give a new filter these pieces, then the end, and close it.

    What it passes on by its way is put where it comes.  An end that is LATER has come
    by the time that the way's clock needs.

    :param end: whether the source ends.
    """
    way = FakeWay() if way is None else way
    made = factory.build_filter(way)
    assert IFilter.providedBy(made)
    outcome = Outcome()

    def take(answer: bytes) -> None:
        outcome.output += way.passed + answer
        way.passed = b""
        outcome.ended = way.ended

    try:
        for piece in filter(None, pieces):
            answer = piece if outcome.spliced else made.data(piece)
            if answer is SPLICE:
                outcome.spliced = True
                answer = made.end() + piece
            take(answer)
            outcome.most_held = max(outcome.most_held, made.held)
            assert made.held <= made.most_held
            if outcome.ended is not None:
                break
        if end and not outcome.spliced and outcome.ended is None:
            answer = made.end()
            for _ in range(10_000):
                if answer is not LATER or way.finished or way.ended is not None:
                    break
                due = [each.getTime() for each in way.clock.getDelayedCalls()]
                way.clock.advance(max(0, min(due) - way.clock.seconds()))
            take(b"" if answer is LATER else answer)
    except EndSession as done:
        outcome.output += way.passed + done.last
        way.passed = b""
        outcome.ended = done.why
    made.close()
    assert not way.clock.getDelayedCalls()
    return outcome


def splits(data: bytes) -> st.SearchStrategy[Sequence[bytes]]:
    """All ways to cut bytes into pieces."""
    if len(data) < 2:
        return st.just([data])

    def cut(places: set[int]) -> list[bytes]:
        at = [0, *sorted(places), len(data)]
        return [data[a:b] for a, b in itertools.pairwise(at)]

    return st.sets(st.integers(1, len(data) - 1)).map(cut)
