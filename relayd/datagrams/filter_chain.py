"""The filters of one flow: what each is given, what comes out, and what is counted.

A flow that has filters has a :class:`Chain`, with a :class:`Way` for each filter of
each direction.  The filter first in the list is nearest to the source, in both
directions: what comes out of one goes into the next, and what comes out of the last is
sent.

Each datagram is accounted for.  A filter says how many it keeps back (`held`; one that
does not say keeps none): what went in, did not come out and is not kept was dropped, as
`filtered`; what it has no room for, it counts itself, as `filter_full`.  What it makes
in addition (a duplicate) is only in what was sent.

A filter that raises, in a call or in a timer of its way's clock, is broken, and so is
the flow: it ends as soon as the call that was under way is over
(:mod:`relayd.datagrams.filtered`), and what comes meanwhile is dropped, as
`filter_failed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from twisted.internet.interfaces import IReactorTime

from relayd.core.addresses import socket_name
from relayd.core.filtering import Course, IFilterFactory, name_of
from relayd.datagrams.ledger import Ledger
from relayd.net.watched_clock import WatchedClock

#: Why datagrams are dropped: a filter has kept them from going on, has no room for
#: them, or is broken.  The last one is the ending of its flow, too.
FILTERED, FILTER_FULL, FILTER_FAILED = "filtered", "filter_full", "filter_failed"


class Filterable(Protocol):
    """A flow, as its filters see it."""

    ledger: Ledger[Any]
    source: Any

    def emit(self, course: Course, datagrams: Sequence[bytes]) -> None:
        """Send what has come out of the filters of a direction."""

    def guarded(self, work: Callable[..., None], *args: Any) -> None:
        """Do some work, and then end the flow if a filter has failed."""


class Way:
    """One filter of one direction: a :class:`relayd.core.filtering.DatagramWay`.

    :ivar factory: has made the filter.
    :ivar filter: the :class:`relayd.core.filtering.IDatagramFilter`; None once it is
        closed.
    :ivar kept: how many were given to it, and are neither passed on nor dropped.
    """

    __slots__ = ("direction", "factory", "filter", "kept", "shared")

    def __init__(
        self, direction: Direction, factory: IFilterFactory, shared: dict[str, Any]
    ) -> None:
        self.direction = direction
        self.factory = factory
        self.shared = shared
        self.filter: Any = None
        self.kept = 0

    @property
    def client(self) -> str:
        return socket_name(self.direction.chain.source)

    @property
    def ordinal(self) -> int:
        return self.direction.chain.ordinal

    @property
    def course(self) -> Course:
        return self.direction.course

    @property
    def clock(self) -> IReactorTime:
        return WatchedClock(self.direction.chain.ledger.clock, self.run)

    def send(self, datagram: bytes) -> None:
        """See :meth:`relayd.core.filtering.DatagramWay.send`."""
        direction = self.direction
        if self not in direction.ways:
            # The flow is over, or the filter was taken off.
            return
        [datagram] = _checked([datagram])
        self._settle(1)
        behind = direction.ways[direction.ways.index(self) + 1 :]
        flow: Any = direction.chain.flow
        flow.guarded(direction.send, flow, [datagram], behind)

    def count_drop(self) -> None:
        """See :meth:`relayd.core.filtering.DatagramWay.count_drop`."""
        self.kept -= 1
        self.direction.drop(FILTER_FULL)

    def take(self, datagrams: Sequence[bytes]) -> list[bytes]:
        """Give the filter datagrams, one after the other; what comes out."""
        out: list[bytes] = []
        direction = self.direction
        chain = direction.chain
        for place, datagram in enumerate(datagrams):
            if chain.failed or self.filter is None:
                why = FILTER_FAILED if chain.failed else FILTERED
                direction.drop(why, len(datagrams) - place)
                break
            self.kept += 1
            try:
                made = _checked(self.filter.datagram(datagram))
                if self.filter is None:
                    # It has ended the flow, or was taken off: this one is dropped.
                    continue
                self._settle(len(made))
            except Exception:
                if self.filter is not None:
                    self.kept -= 1
                    direction.drop(FILTER_FAILED)
                chain.fail(name_of(self.factory))
            else:
                out += made
        return out

    def run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """A timer of the filter's is due."""
        if self in self.direction.ways:
            flow: Any = self.direction.chain.flow
            flow.guarded(self._run, call, args, kwargs)

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception:
            self.direction.chain.fail(name_of(self.factory))

    def _settle(self, came_out: int) -> None:
        """So many came out: those that it does not keep were dropped."""
        held = getattr(self.filter, "held", 0)
        dropped = self.kept - came_out - held
        self.kept = held
        self.direction.keep(-came_out)
        if dropped > 0:
            self.direction.drop(FILTERED, dropped)

    def close(self) -> None:
        """It is not called any more; what it keeps is dropped."""
        made, self.filter = self.filter, None
        try:
            made.close()
        except Exception:
            self.direction.chain.log_failure(
                name_of(self.factory), "goes on without it"
            )
        kept, self.kept = self.kept, 0
        if kept > 0:
            self.direction.drop(FILTERED, kept)


class Direction:
    """The filters of one direction of a flow.

    :ivar ways: of its filters, the one nearest to the source first.
    """

    __slots__ = ("_counts", "_dropped", "chain", "course", "ways")

    def __init__(self, chain: Chain, course: Course) -> None:
        counters = chain.ledger.counters
        self._counts = chain.ledger.counts
        self.chain = chain
        self.course = course
        self.ways: list[Way] = []
        self._dropped = counters.dropped if course == "up" else counters.replies_dropped

    def through(
        self, datagrams: Sequence[bytes], ways: Sequence[Way] | None = None
    ) -> Sequence[bytes]:
        """What comes out of some filters; unless given, of all."""
        for way in self.ways if ways is None else ways:
            self.keep(len(datagrams))
            datagrams = way.take(datagrams)
        return datagrams

    def send(
        self, flow: Filterable, datagrams: Sequence[bytes], behind: Sequence[Way]
    ) -> None:
        """A filter has passed some on by itself: send what comes out behind it."""
        flow.emit(self.course, self.through(datagrams, behind))

    def keep(self, count: int) -> None:
        """So many more are with the filters."""
        if self.course == "up":
            self._counts.kept += count
        else:
            self._counts.replies_kept += count

    def drop(self, reason: str, count: int = 1) -> None:
        """So many, which were with the filters, are dropped."""
        self._dropped[reason] += count
        self.keep(-count)


class _Over:
    """A direction of a flow that is over: what still comes passes."""

    ways: Sequence[Way] = ()

    @staticmethod
    def through(datagrams: Sequence[bytes]) -> Sequence[bytes]:
        return datagrams


_OVER: Any = _Over()


class Chain:
    """The filters of a flow, and what its flow remembers of them.

    :ivar flow: None once it is over.
    :ivar transmit: sends a datagram to the server.
    :ivar ordinal: its number among the flows of its relay that have had filters.
    :ivar up: the filters of what its client sends.
    :ivar down: of what its server sends.
    :ivar depth: how many calls are under way that may fail a filter.
    :ivar beyond: what is sent now is through the filters.
    :ivar failed: a filter is broken.
    """

    __slots__ = (
        "beyond",
        "depth",
        "down",
        "failed",
        "flow",
        "ledger",
        "ordinal",
        "source",
        "transmit",
        "up",
    )

    def __init__(self, flow: Filterable, transmit: Callable[[bytes], Any]) -> None:
        self.flow: Filterable | None = flow
        self.ledger, self.source = flow.ledger, flow.source
        self.transmit = transmit
        self.ordinal = next(self.ledger.filtered_flows)
        self.up, self.down = Direction(self, "up"), Direction(self, "down")
        self.depth = 0
        self.beyond = self.failed = False

    def __iter__(self) -> Iterator[Way]:
        """The ways of its filters."""
        yield from self.up.ways
        yield from self.down.ways

    @property
    def names(self) -> tuple[str, ...]:
        """The filters' names, in their order; one in both directions is there once."""
        made = {id(way.factory): name_of(way.factory) for way in self}
        return tuple(made.values())

    def add(self, factories: Sequence[IFilterFactory]) -> None:
        """Ask factories for filters, behind those that there are.

        One that raises has failed.
        """
        for factory in factories:
            shared: dict[str, Any] = {}
            for direction in (self.up, self.down):
                way = Way(direction, factory, shared)
                try:
                    way.filter = factory.build_datagram_filter(way)
                except Exception:
                    self.fail(name_of(factory))
                    return
                if way.filter is not None:
                    direction.ways.append(way)

    def remove(self, factories: Sequence[IFilterFactory]) -> None:
        """Take the filters of factories off: of each that is equal, the first."""
        for factory in factories:
            found = next((way.factory for way in self if way.factory == factory), None)
            for direction in (self.up, self.down):
                gone = [way for way in direction.ways if way.factory is found]
                direction.ways = [way for way in direction.ways if way not in gone]
                for way in gone:
                    way.close()

    def close(self) -> None:
        """The flow is over."""
        both = self.up, self.down
        # Its directions know the chain: no cycle of references is left.
        self.flow, self.up, self.down = None, _OVER, _OVER
        for direction in both:
            ways, direction.ways = direction.ways, []
            for way in ways:
                way.close()

    def fail(self, name: str) -> None:
        """Called in an `except`: a filter has failed."""
        self.failed = True
        self.log_failure(name, "ends")

    def log_failure(self, name: str, what: str) -> None:
        """Log the exception that is being handled, once a second at most."""
        client = socket_name(self.source)
        self.ledger.log_failure(f"filter {name} failed; the flow of {client} {what}")


def _checked(datagrams: Sequence[bytes]) -> Sequence[bytes]:
    """What a filter has made.

    :raises TypeError: these are no datagrams.
    """
    made = tuple(datagrams)
    for each in made:
        if not isinstance(each, bytes):
            raise TypeError(f"a filter passes on bytes, not {type(each).__name__}")
    return made
