"""One filter of a direction, and what the filter knows of that.

A :class:`Link` is the :class:`relayd.core.filtering.Way` of its filter: it is asked by
the chain (:mod:`relayd.stream.chain`), and asks it.  :class:`Links` are those of a
chain, and what is bounded of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from relayd.core.filtering import (
    LATER,
    MOST_HELD,
    Answer,
    Course,
    EndSession,
    IFilterFactory,
    name_of,
)
from relayd.core.session import FACT_NAME, Session
from relayd.net.watched_clock import WatchedClock, plainly

log = Logger(namespace="relayd.filters")

#: How many characters the value of a fact of the log's line may have.
MOST_NOTED = 8192

#: Bytes that any filter may be given that is not paused.  More at once only if it could
#: hold all of it.
PIECE = 65536


class Linked(Protocol):
    """What links are a part of: :class:`relayd.stream.chain.Chain`."""

    @property
    def session(self) -> Session: ...

    @property
    def course(self) -> Course: ...

    @property
    def clock(self) -> IReactorTime: ...

    def pass_on(self, link: Link, data: bytes) -> None: ...

    def finish(self, link: Link, data: bytes) -> None: ...

    def end_session(self, link: Link, problem: EndSession) -> None: ...

    def leave(self, link: Link) -> None: ...

    def failed(self, link: Link) -> None: ...


class FilterError(Exception):
    """A filter has broken a rule of :class:`relayd.core.filtering.IFilter`."""


def checked(answer: object, to: str) -> bytes:
    """What a filter has answered.

    :param to: what it was asked.
    :raises FilterError: these are no bytes.
    """
    if isinstance(answer, bytes):
        return answer
    what = repr(answer) if isinstance(answer, Answer) else type(answer).__name__
    raise FilterError(f"{to}: found {what}, expected bytes")


class Link:
    """One filter of a chain, and what the filter knows of its direction.

    It is a :class:`relayd.core.filtering.Way`.

    :ivar filter: None once it is closed.
    :ivar is_ending: it has answered LATER.
    :ivar is_called: a call of it is under way.
    :ivar leaves: it has said so in that call.
    :ivar is_own: it is of this session alone, and not of its relay.
    """

    __slots__ = (
        "_chain",
        "_timers",
        "factory",
        "filter",
        "is_called",
        "is_ending",
        "is_own",
        "leaves",
        "shared",
    )

    def __init__(
        self, chain: Linked, factory: IFilterFactory, shared: dict[str, Any]
    ) -> None:
        self._chain = chain
        self.factory = factory
        self.shared = shared
        self._timers: WatchedClock | None = None
        self.is_ending = self.is_called = self.leaves = self.is_own = False
        self.filter: Any = None

    def __repr__(self) -> str:
        return f"<{name_of(self.factory)}, {self.course}>"

    @property
    def session(self) -> Session:
        return self._chain.session

    @property
    def course(self) -> Course:
        return self._chain.course

    @property
    def clock(self) -> IReactorTime:
        timers = self._timers
        if timers is None:
            timers = self._timers = WatchedClock(self._chain.clock, self._run)
        return timers

    @property
    def holds_much(self) -> bool:
        """Its filter holds more than half of what it may."""
        made = self.filter
        return made is not None and made.held > min(made.most_held, MOST_HELD) // 2

    def take(self, ends: bool) -> bytes:
        """What its filter has left, as it is taken off.

        :param ends: it was not taken off by anybody: that was all.
        """
        self.is_called = True
        left = LATER if self.is_ending or not ends else self.filter.end()
        if left is LATER and self.filter is not None:
            left = self.filter.remove()
        return checked(left, "end, or remove")

    def pass_on(self, data: bytes) -> None:
        """:raises FilterError: these are no bytes."""
        self._chain.pass_on(self, checked(data, "pass_on"))

    def finish(self, data: bytes = b"") -> None:
        """:raises FilterError: these are no bytes; or it has not answered LATER."""
        if self.filter is not None and not self.is_ending:
            raise FilterError("finish is for one that has answered LATER to end")
        self._chain.finish(self, checked(data, "finish"))

    def end_session(self, why: str, *, reset: bool = True) -> None:
        self._chain.end_session(self, EndSession(why, reset=reset))

    def leave(self) -> None:
        if self.is_called:
            # What it answers comes first.
            self.leaves = True
        else:
            self._chain.leave(self)

    def note(self, name: str, value: str) -> None:
        """:raises ValueError: there can be no such fact.
        :raises FilterError: it is no text.
        """
        if not isinstance(value, str):
            raise FilterError(f"note: found {type(value).__name__}, expected text")
        if not FACT_NAME.fullmatch(name) or len(value) > MOST_NOTED:
            raise ValueError(f"no fact of the access log: {name[:40]!r}")
        self.session.note(name, value)

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Make a call of a timer of the filter."""
        try:
            call(*args, **kwargs)
        except Exception as problem:
            self.failed(problem)

    def failed(self, problem: Exception) -> None:
        """Called in an `except`: the filter, or a timer of it, has raised."""
        if isinstance(problem, EndSession):
            self._chain.end_session(self, problem)
        else:
            self._chain.failed(self)

    def close(self) -> None:
        """The filter is called no more; or there is none."""
        # They hold each other.
        made, self.filter = self.filter, None
        if made is not None:
            try:
                made.close()
            except Exception:
                log.failure("a filter could not be closed: {link}", link=self)
        if self._timers is not None:
            # What outlives the filter, as the file of a capture, may have this clock.
            self._timers.run = plainly


class Links:
    """The links of a direction, and how much their filters hold and may be given."""

    __slots__ = ("_bridge", "_links", "_piece", "source")

    def __init__(self, bridge: Any, source: Any) -> None:
        self._bridge = bridge
        self.source = source
        self._links: tuple[Link, ...] = ()
        #: How much they are given at once.
        self._piece = MOST_HELD

    @property
    def session(self) -> Session:
        session: Session = self._bridge.session
        return session

    @property
    def course(self) -> Course:
        return "up" if self.source is self._bridge.downstream else "down"

    @property
    def clock(self) -> IReactorTime:
        clock: IReactorTime = self._bridge.clock
        return clock

    @property
    def names(self) -> Sequence[str]:
        """Its filters."""
        return [name_of(each.factory) for each in self._links]

    def __len__(self) -> int:
        return len(self._links)

    def _find_piece(self) -> None:
        growth = 1
        for link in self._links:
            growth *= max(int(link.filter.growth), 1)
        least = min((each.filter.most_at_once for each in self._links), default=PIECE)
        self._piece = min(max(MOST_HELD // growth, 1), max(least, 1), MOST_HELD)

    def _fits(self, size: int) -> bool:
        """Whether each filter could hold so much more."""
        for link in self._links:
            held_by = link.filter
            if size > min(held_by.most_held, MOST_HELD) - held_by.held:
                return False
        return True

    def _check_held(self, held_by: Any) -> None:
        """:raises FilterError: a filter holds more than it may."""
        held, most = held_by.held, min(held_by.most_held, MOST_HELD)
        if held > most:
            raise FilterError(f"it holds {held} bytes, {most} are allowed")

    def _holds_much(self) -> bool:
        """One holds more than half of what it may, or all together do.

        What one passes on at once, the next may have to hold.
        """
        total = 0
        for link in self._links:
            held, most = link.filter.held, min(link.filter.most_held, MOST_HELD)
            total += held
            if held > most // 2 or total > MOST_HELD // 2:
                return True
        return False
