"""What may see, change, delay or end the bytes of a session: filters.

A relay has filter factories, in the operator's order.  For each session every factory
is asked for a filter for each of its two directions, and may decline.  What a direction
reads goes through its filters, one after the other, to the other side:

- the filter nearest to the source is the first of the list, in both directions;
- what a filter keeps back, it passes on later, or at the end;
- one that answers SPLICE has seen enough, and leaves.  A direction without filters is
  spliced as in a relay that has none.

Filters are called in the reactor's thread and must not block.  One that raises ends its
session, and nothing else.  Of UDP flows the same is done for each datagram.

:mod:`relayd.filters` has those that come with relayd, and these names for programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, Protocol

from twisted.internet.interfaces import IReactorTime
from zope.interface import Attribute, Interface, implementer

from relayd.core.errors import RelayError

#: The directions: client to server, and back.
Course = Literal["up", "down"]

#: Bytes that a filter may hold, unless it declares less.
MOST_HELD = 256 << 10


class Answer:
    """What a filter may answer instead of bytes; there are two."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


#: `data` answers so: it has seen enough.  What it holds is asked for (`end`) and passed
#: on, then this chunk as it is, and then all that follows.
SPLICE: Final = Answer("SPLICE")

#: `end` answers so: its end comes later, by :meth:`Way.finish`.
LATER: Final = Answer("LATER")


class EndSession(RelayError):
    """A filter ends its session.

    :ivar why: for the log, in a few words.
    :ivar last: passed on before the end, through the filters behind.
    :ivar reset: whether both connections are reset, the other side's once it has what
        was passed on; if not, both are closed, and nothing that was passed on is lost.
    """

    def __init__(self, why: str, last: bytes = b"", *, reset: bool = True) -> None:
        if not isinstance(last, bytes):
            raise TypeError(f"what is passed on last is bytes, not {last!r:.40}")
        super().__init__(why)
        self.why = why
        self.last = last
        self.reset = reset


class Way(Protocol):
    """One direction of one session, as a filter knows it.

    :ivar session: the :class:`relayd.core.session.Session`, to be read.
    :ivar course: `up`, from the client, or `down`, from the server.
    :ivar clock: for timers; those of a filter are cancelled in its `close`, and one
        that raises ends the session as any call of the filter.
    :ivar shared: for what the two filters of one factory have together in one session;
        one that has none in the other direction may use it as well.
    """

    @property
    def session(self) -> Any: ...

    @property
    def course(self) -> Course: ...

    @property
    def clock(self) -> IReactorTime: ...

    @property
    def shared(self) -> dict[str, Any]: ...

    def pass_on(self, data: bytes) -> None:
        """Pass bytes on now, outside of a call of `data` or `end`.

        Nothing, once the filter was closed.
        """

    def finish(self, data: bytes = b"") -> None:
        """After `end` has answered LATER: pass bytes on, and then the end of data."""

    def end_session(self, why: str, *, reset: bool = True) -> None:
        """As :class:`EndSession`, outside of a call."""

    def leave(self) -> None:
        """As SPLICE, outside of a call: the filter has seen enough.

        Nothing may be held by it.  In a call, what that answers is passed on before.
        """

    def note(self, name: str, value: str) -> None:
        """Add a fact to the line of the access log.

        :param name: of lower-case letters, digits and underscores; later notes of one
            name replace earlier ones.
        """


class IFilter(Interface):
    """Sees the bytes of one direction of one session."""

    held = Attribute("""How many bytes it keeps back now.  The source is not read while
        that is more than half of `most_held`.""")

    most_held = Attribute("""How many that may be: MOST_HELD, or less.  One that holds
        more has failed.""")

    growth = Attribute("""At most so many bytes come out for one that goes in: a whole
        number, 1 for most.  Chunks are cut accordingly.""")

    most_at_once = Attribute("""How many bytes it is given in one call: 256 KiB, or less
        for one that may take long.  Between two calls others have their turn.""")

    def data(data: bytes) -> bytes | Answer:
        """Bytes were read.

        :param data: at least one.
        :return: what to pass on, maybe nothing; or SPLICE.
        :raises EndSession: to end the session.
        """

    def end() -> bytes | Answer:
        """The source has ended, by an end of data or by a reset; or SPLICE was said.

        :return: what is left to pass on; or LATER, but not after SPLICE.
        :raises EndSession: to end the session.
        """

    def remove() -> bytes:
        """An operator takes the filter off; the session goes on.

        :return: what is left to pass on.
        """

    def close() -> None:
        """It is not called any more: cancel timers.  Called exactly once."""


class IFilterFactory(Interface):
    """A filter of a relay, with its options."""

    name = Attribute("""What the log calls it.""")

    server_speaks_first = Attribute("""Whether it takes for granted that the server
        does, and the client says nothing before.  May be left out.""")

    joins = Attribute("""Whether it may be put on sessions that go on, and taken off
        them, as its relay's settings change (faults).  Factories that are equal are
        one and the same then.""")

    def build_filter(way: Way) -> Any:
        """Called for each direction of each stream session, up first.

        :return: an :class:`IFilter`; None: this one passes unseen.
        """

    def build_datagram_filter(way: DatagramWay) -> Any:
        """The same for each direction of each UDP flow.

        :return: an :class:`IDatagramFilter`, or None.
        """


def name_of(factory: Any) -> str:
    """What the log calls the filters of a factory."""
    return str(getattr(factory, "name", "") or type(factory).__name__)


@implementer(IFilter)
class Filter:
    """A filter that passes everything on; subclasses do more."""

    held = 0
    most_held = MOST_HELD
    growth = 1
    most_at_once = MOST_HELD

    def data(self, data: bytes) -> bytes | Answer:
        """See :meth:`IFilter.data`."""
        return data

    def end(self) -> bytes | Answer:
        """See :meth:`IFilter.end`."""
        return b""

    def remove(self) -> bytes:
        """See :meth:`IFilter.remove`."""
        left = self.end()
        return left if isinstance(left, bytes) else b""

    def close(self) -> None:
        """See :meth:`IFilter.close`."""


@implementer(IFilterFactory)
class FilterFactory:
    """A filter of a relay; a subclass overrides one of the two methods, or both.

    What serves streams overrides `build_filter`, what serves UDP flows
    `build_datagram_filter`; a relay of the other kind refuses it.
    """

    #: Unless given, its class.
    name = ""
    joins = False
    #: What no other filter of a relay may have, too: the file of a capture.
    owns = ""
    #: As of the filters that it makes, where that is known.
    growth = 1
    server_speaks_first = False

    def build_filter(self, way: Way) -> Any:
        """See :meth:`IFilterFactory.build_filter`."""
        raise NotImplementedError

    def build_datagram_filter(self, way: DatagramWay) -> Any:
        """See :meth:`IFilterFactory.build_datagram_filter`."""
        raise NotImplementedError


def check_factories(filters: Sequence[IFilterFactory], *, datagrams: bool) -> None:
    """Whether a relay may have these filters.

    :param datagrams: it is one of UDP flows, and not of streams.
    :raises TypeError: one is no factory of filters.
    :raises ValueError: one is for relays of the other kind.
    """
    builds = ("build_filter", "build_datagram_filter")
    kinds = ("streams", "UDP flows")
    for each in filters:
        if isinstance(each, type) or not any(hasattr(each, it) for it in builds):
            raise TypeError(f"{each!r} is no factory of filters")
        build = getattr(each, builds[datagrams], None)
        inherited = getattr(FilterFactory, builds[datagrams])
        if build is None or getattr(build, "__func__", None) is inherited:
            name = getattr(each, "name", "") or type(each).__name__
            is_for, is_not = kinds[not datagrams], kinds[datagrams]
            raise ValueError(f"filter {name} is for {is_for}, not for {is_not}")


def speaks_first(factory: IFilterFactory) -> bool:
    """Whether a filter takes for granted that the server speaks first."""
    return bool(getattr(factory, "server_speaks_first", False))


def clashes(filters: Sequence[IFilterFactory], whose: str = "a relay") -> Iterator[str]:
    """What is wrong with filters beside each other: a line for each.

    :param whose: they are, for those lines.
    """
    owned: set[str] = set()
    growth = 1
    for factory in filters:
        owns = getattr(factory, "owns", "")
        if owns and owns in owned:
            yield f"two filters of {whose} have {owns}: give each its own"
        owned.add(owns)
        growth *= getattr(factory, "growth", 1)
    if growth > MOST_HELD:
        yield (
            f"the filters of {whose} may make {growth:,} bytes of one, one behind the"
            f" other; {MOST_HELD:,} at most: replace less by so much"
        )


# -- datagrams


class DatagramWay(Protocol):
    """One direction of one UDP flow, as a filter knows it.

    :ivar client: its client's address, as text.
    :ivar ordinal: its number among the flows of its relay, from 0 up.
    :ivar course: `up` or `down`.
    :ivar clock: for timers.
    :ivar shared: as of a :class:`Way`.
    """

    @property
    def client(self) -> str: ...

    @property
    def ordinal(self) -> int: ...

    @property
    def course(self) -> Course: ...

    @property
    def clock(self) -> IReactorTime: ...

    @property
    def shared(self) -> dict[str, Any]: ...

    def send(self, datagram: bytes) -> None:
        """Pass a datagram on now, outside of a call of `datagram`."""

    def count_drop(self) -> None:
        """One was dropped for want of room, which its factory did not mean."""


class IDatagramFilter(Interface):
    """Sees the datagrams of one direction of one UDP flow."""

    held = Attribute("""How many datagrams it keeps back now; one less before each that
        it sends.  May be left out by one that keeps none.""")

    def datagram(data: bytes) -> Sequence[bytes]:
        """A datagram has come.

        :return: those to pass on now; none: it is dropped, or comes later.
        """

    def close() -> None:
        """The flow is over, or the filter was taken off: cancel timers.

        What it keeps back is dropped.  Called exactly once.
        """
