"""The filters of one direction of one session, between its source and its sink.

A :class:`Chain` takes what the source leg reads, gives it to its filters
(:mod:`relayd.core.filtering`) one after the other, and writes what comes out to the
other leg's transport.  It is the leg's sink, and that transport's producer:

    leg.dataReceived -> chain -> link -> link -> the other transport's write

- What filters keep back is counted in `Direction.kept`, and the source is not read
  while one holds more than half of what it may (pause FILTERS).
- What may grow is taken in pieces, and the rest waits while the sink is full: a chain
  never makes more than some MOST_HELD bytes at once.  So is what may take long: after
  TURN seconds the rest waits for the reactor's next turn.
- An end of data passes through the filters in order: each may put it off.
- A filter that has seen enough leaves.  A chain without filters tells its bridge, which
  splices that direction.

What a filter raises never leaves a chain: the session ends, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.filtering import (
    LATER,
    MOST_HELD,
    SPLICE,
    EndSession,
    IFilterFactory,
    name_of,
)
from relayd.core.pauses import FILTERS
from relayd.stream.links import PIECE, Link, Links, checked

#: Seconds that slow filters of a direction may take in a turn of the reactor.
TURN = 0.002

#: Bytes that a flush may make in addition to those that it passes on.
MOST_FLUSHED = 2 * MOST_HELD

#: How far an end of data has got: there is none; the rest comes first; the filters are
#: told; all is passed on at once; the chain is not used any more.
_OPEN, _ASKED, _ENDING, _FLUSHING, _CLOSED = range(5)


@implementer(IPushProducer)
class Chain(Links):
    """The filters of one direction.

    :param bridge: joins the two legs.
    :param source: the leg whose bytes these are.
    :ivar write: takes what has passed.
    """

    __slots__ = (
        "_call",
        "_full",
        "_is_fed",
        "_rest",
        "_stage",
        "write",
    )

    def __init__(self, bridge: Any, source: Any) -> None:
        Links.__init__(self, bridge, source)
        self.write: Any = None
        #: What waits to be filtered.
        self._rest = b""
        #: The rest goes on in the reactor's next turn.
        self._call: IDelayedCall | None = None
        #: The sink is full.
        self._full = False
        #: The rest is being filtered, further up in the stack.
        self._is_fed = False
        self._stage = _OPEN

    def add(
        self, factory: IFilterFactory, shared: dict[str, Any], *, own: bool = False
    ) -> None:
        """Ask for a filter, behind the others.

        :param own: it is of this session alone.
        :raises Exception: what the factory raises.
        """
        link = Link(self, factory, shared)
        link.is_own = own
        made = factory.build_filter(link)
        if made is not None:
            link.filter = made
            self._links += (link,)
            self._check_held(made)
            self._find_piece()
        else:
            link.close()

    def remove(self, factories: Iterable[IFilterFactory]) -> None:
        """Take filters off, of each that is equal one; what they hold is passed on.

        Those of this session alone stay.
        """
        for factory in factories:
            for link in self._links:
                if link.is_own or link.factory != factory or self._stage == _CLOSED:
                    continue
                self._take_off(link)
                break

    def _take_off(self, link: Link) -> None:
        if link.filter is None:
            # It has left, by what another one has passed on.
            return
        try:
            # No more comes behind what is flushed.
            left = link.take(ends=self._stage == _FLUSHING)
        except Exception as problem:
            link.failed(problem)
            return
        self._leave_with(link, left)

    def _leave_with(self, link: Link, left: bytes) -> None:
        """Drop a link; what it has left passes the ones behind."""
        if link not in self._links:
            return
        was_ending, place = link.is_ending, self._links.index(link)
        self._drop(link)
        if left:
            self._pass(place, left)
        if was_ending:
            self._end_from(place)
        elif self._stage != _CLOSED:
            self._go_on()
            self._seen()

    def _drop(self, link: Link) -> None:
        self._links = tuple(each for each in self._links if each is not link)
        self._find_piece()
        link.close()

    def close(self) -> None:
        """The session, or this direction, is over: filters are called no more."""
        links, self._links = self._links, ()
        self._stage, self._rest = _CLOSED, b""
        if self._call is not None:
            self._call.cancel()
            self._call = None
        for link in links:
            link.close()

    # -- bytes

    def __call__(self, data: bytes) -> None:
        """The source has read something."""
        if self._stage == _CLOSED:
            return
        source, size = self.source, len(data)
        source.direction.kept += size
        if (
            self._rest
            or size > self._piece
            or source.paused & FILTERS
            or (size > PIECE and not self._fits(size))
        ):
            self._rest += data
            self._feed()
        else:
            self._pass(0, data)
        if not self._links:
            self._seen()

    def _feed(self) -> None:
        """Filter the rest, piece by piece, until the sink is full."""
        if self._is_fed or self._call is not None:
            # Further up in the stack, or soon.
            return
        self._is_fed = True
        clock = self.clock
        until = clock.seconds() + TURN
        try:
            while self._rest and not (self._full or self._holds_much()):
                self._pass_piece()
                if self._rest and clock.seconds() >= until:
                    # Others have their turn.
                    self._call = clock.callLater(0, self._next)
                    break
        finally:
            self._is_fed = False
        if self._rest:
            self.source.pause(FILTERS)
        elif self._stage == _ASKED:
            self._stage = _ENDING
            self._end_from(0)

    def _pass_piece(self) -> None:
        size = min(self._piece, PIECE)
        piece, self._rest = self._rest[:size], self._rest[size:]
        self._pass(0, piece)

    def _next(self) -> None:
        self._call = None
        self._go_on()

    def _pass(self, place: int, data: bytes) -> None:
        """Have bytes pass the filters from this one on, and write what comes out."""
        link = None
        try:
            for link in self._links[place:]:
                if not data:
                    return
                held_by = link.filter
                if held_by is None:
                    # It was taken off a moment ago.
                    continue
                link.is_called = True
                out = held_by.data(data)
                if out is SPLICE and link.filter is not None:
                    out = checked(held_by.end(), "end, after SPLICE") + data
                    link.leaves = True
                if link.filter is None and self.session.ending is not None:
                    # It has ended the session; or else it was taken off.
                    return
                link.is_called = False
                data = out if isinstance(out, bytes) else checked(out, "data")
                if link.leaves:
                    self._drop(link)
                    continue
                if held_by.held:
                    self._check_held(held_by)
                    if self._holds_much():
                        self.source.pause(FILTERS)
        except Exception as problem:
            if link is not None:
                link.failed(problem)
            return
        if data:
            self.source.direction.kept -= len(data)
            self.write(data)

    @property
    def has_more(self) -> bool:
        """Whether something, or an end of data, is still to be passed on."""
        if self._rest or self.is_ending:
            return True
        return any(link.filter.held for link in self._links)

    def _go_on(self) -> None:
        """Something was passed on: filter the rest, and read on."""
        if self._stage == _CLOSED:
            return
        if self._rest or self._stage == _ASKED:
            self._feed()
            self._seen()
        if not self._rest and self.source.paused & FILTERS and not self._holds_much():
            self.source.resume(FILTERS)

    def check(self) -> None:
        """About once a tick: a filter may hold less without having passed it on."""
        self._go_on()

    def _seen(self) -> None:
        """All filters have left, maybe."""
        if not self._links and not self._rest and self._stage == _OPEN:
            self._stage = _CLOSED
            self._bridge.unfiltered(self.source)

    # -- what filters ask for

    def pass_on(self, link: Link, data: bytes) -> None:
        """See :meth:`relayd.core.filtering.Way.pass_on`."""
        if link in self._links:
            if data:
                self._pass(self._links.index(link) + 1, data)
            self._go_on()

    def finish(self, link: Link, data: bytes) -> None:
        """See :meth:`relayd.core.filtering.Way.finish`."""
        if link in self._links and link.is_ending:
            self._leave_with(link, data)

    def leave(self, link: Link) -> None:
        """See :meth:`relayd.core.filtering.Way.leave`."""
        self._leave_with(link, b"")

    def end_session(self, link: Link, problem: EndSession) -> None:
        """A filter has ended the session."""
        if link not in self._links:
            return
        # What those behind it hold has passed it; what those before it hold has not.
        place = self._links.index(link)
        for each in self._links[: place + 1]:
            self._drop(each)
        self._rest = b""
        if self._stage != _FLUSHING or self.session.ending is None:
            self._stage = _OPEN
        if problem.last:
            self._pass(0, problem.last)
        if self._stage != _CLOSED:
            why = f"{name_of(link.factory)}: {problem.why}"
            self._bridge.end_by_filter(self.source, why, problem.reset)

    def failed(self, link: Link) -> None:
        """Called in an `except`: a filter has raised."""
        if self._stage == _CLOSED:
            return
        self._bridge.filter_failed(link.factory, Failure())

    # -- the end of data

    def end(self) -> None:
        """The source has ended: pass that on, behind all that the filters hold."""
        if self._stage == _OPEN:
            self._stage = _ASKED
            self._feed()

    @property
    def is_ending(self) -> bool:
        """Its source has ended, and something is still to be passed on."""
        return self._stage in (_ASKED, _ENDING)

    def _end_from(self, place: int) -> None:
        """Tell the filters from this one on of the end."""
        while self._stage == _ENDING and place < len(self._links):
            link = self._links[place]
            if link.is_ending:
                return
            try:
                link.is_called = True
                left = link.filter.end()
                if left is not LATER:
                    left = checked(left, "end")
            except Exception as problem:
                link.failed(problem)
                return
            link.is_called = False
            if link.filter is None:
                # It has ended the session.
                return
            if left is not LATER:
                self._drop(link)
                self._pass(place, left)
            elif link.leaves:
                self._drop(link)
            else:
                link.is_ending = True
                return
        if self._stage == _ENDING:
            self._stage = _CLOSED
            self._bridge.end_passed(self.source)

    def flush(self) -> None:
        """Pass on at once what waits and what is held, and close."""
        if self._stage == _CLOSED:
            return
        self._stage, self._is_fed = _FLUSHING, True
        # It can't wait for the sink: what grows is bounded by this.
        most = self.source.direction.written + len(self._rest) + MOST_FLUSHED
        while self._rest and self._stage == _FLUSHING:
            for link in self._links:
                if link.holds_much:
                    self._take_off(link)
            self._pass_piece()
            if self.source.direction.written > most:
                why = "its filters make more of it than can wait"
                self._rest = b""
                if self.session.ending is None:
                    self._stage = _OPEN
                    self._bridge.end_by_filter(self.source, why, True)
        self._is_fed = False
        for link in self._links:
            if self._stage == _FLUSHING:
                self._take_off(link)
        if self._stage == _FLUSHING:
            self.close()
        elif self._stage == _ASKED:
            # A filter has ended the session.
            self._feed()

    # -- the producer of the sink

    def pauseProducing(self) -> None:
        self._full = True
        self.source.pauseProducing()

    def resumeProducing(self) -> None:
        self._full = False
        self._go_on()
        if not self._full:
            self.source.resumeProducing()

    def stopProducing(self) -> None:
        """The other connection is lost; the bridge hears of it and decides."""
