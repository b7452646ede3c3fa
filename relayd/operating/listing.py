"""What a running relay tells of its sessions: who is served, and what has moved.

A list is made in parts: a generator yields after each, some 2 ms of work, so that the
reactor goes on.  Those that live are taken at one moment; who ends while the list is
made is left out.  Nothing is kept for it with a session: all is read from its record
(:mod:`relayd.core.session`), and from what its deadlines compare anyway.

:func:`listed` chooses and sorts, for sessions here, for flows and the NAT table in
:mod:`relayd.operating.listing_flows`; each kind of relay is a :class:`Source` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush, heappushpop
from typing import Any, Literal, Protocol

import attrs

from relayd.control.steering import Invalid, SessionQuery, Sort, Unknown, Work
from relayd.core.peers import Peers
from relayd.core.stage import Stage
from relayd.upstreams.pool import Pool

#: Records that are read in one part of the work: some 0.2 ms, for which a request that
#: is relayed meanwhile may wait in each of its turns.
PART = 50

#: How many names a line lists.
NAMED = 10

Kind = Literal["tcp", "udp", "socks4"]


@attrs.frozen(eq=False)
class Shown:
    """A relay, as it runs.

    :ivar factories: what serves its clients; several listeners may share one.
    :ivar older: those of before its settings changed, while they have sessions.
    :ivar pools: the servers of `factories`; none if its clients choose them, or if
        nothing is said of a server of datagrams.
    """

    name: str
    kind: Kind
    factories: Sequence[Any]
    older: Sequence[Any] = ()
    pools: Sequence[Pool] = ()

    @property
    def generations(self) -> Iterator[tuple[Any, bool]]:
        """Each factory, and whether it is an older one."""
        for each in self.factories:
            yield each, False
        for each in self.older:
            yield each, True


@attrs.frozen
class Wanted:
    """Which sessions, or flows, are meant: those that match all that is given.

    :ivar peers: the clients.
    :ivar server: its name, label or address.
    :ivar ids: of sessions; flows have none.
    """

    peers: Peers | None = None
    server: str | None = None
    ids: frozenset[int] | None = None

    @classmethod
    def of(
        cls,
        client: str | None,
        server: str | None,
        ids: Iterable[int] | None = None,
    ) -> Wanted:
        """What was asked for.

        :raises Invalid: the client is no address and no network, or the server empty.
        """
        peers = None
        if client is not None:
            try:
                peers = Peers([client])
            except ValueError as problem:
                raise Invalid(f"client {client!r}: {problem}") from problem
        if server == "":
            raise Invalid("server is empty: give a name, a label or an address")
        return cls(peers, server, None if ids is None else frozenset(ids))

    def is_of(self, client: str) -> bool:
        """Whether a client, by its address as text, is meant."""
        return self.peers is None or client in self.peers


class Source(Protocol):
    """What lives in one relay.

    :ivar living: taken when it was made.
    """

    living: Sequence[Any]

    def lives(self, member: Any) -> bool:
        """Whether it still does, and is to be listed."""

    def matches(self, member: Any, wanted: Wanted) -> bool:
        """Whether it is meant."""

    def figures(self, member: Any) -> tuple[int, int, float, int]:
        """Bytes up and down, its age in seconds, and its place among those of one
        age."""

    def row(self, member: Any, up: int, down: int, age: float) -> dict[str, Any] | None:
        """What is told of it; None: it has ended meanwhile."""


def parts(living: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Those that live, some at a time."""
    return (living[at : at + PART] for at in range(0, len(living), PART))


def relays_of(shown: Iterable[Shown], name: str | None) -> list[Shown]:
    """All, or the one of that name.

    :raises Unknown: there is none.
    """
    found = list(shown)
    if name is None:
        return found
    named = [each for each in found if each.name == name]
    if not named:
        raise Unknown(
            f"there is no relay {name!r}: there {listing_of(s.name for s in found)}"
        )
    return named


def listing_of(names: Iterable[str]) -> str:
    """Names for a line: `is web`, `are a, b and 12 more`, `is none`."""
    found = sorted(set(names))
    if not found:
        return "is none"
    if len(found) > NAMED:
        more = f" and {len(found) - NAMED} more"
        return f"are {', '.join(found[:NAMED])}{more}"
    return f"{'is' if len(found) == 1 else 'are'} {', '.join(found)}"


def _by_bytes(moved: int, age: float) -> float:
    return moved


def _by_age(moved: int, age: float) -> float:
    return age


def rate_of(moved: int, age: float) -> float:
    """Bytes a second over its age."""
    return moved / age if age > 0 else 0.0


_KEYS: dict[Sort | None, Callable[[int, float], float]] = {
    "bytes": _by_bytes,
    "age": _by_age,
    "rate": rate_of,
    # The order in which they came.
    None: _by_age,
}


def listed(
    what: str, sources: Sequence[Source], wanted: Wanted, query: SessionQuery
) -> Work:
    """Choose, sort and tell.

    :param what: the key of the list in the answer.
    """
    matched = total = number = 0
    key, limit = _KEYS[query.sort], query.limit
    # Of those that come first, `limit`: the last of them is on top.
    heap: list[Any] = []
    for source in sources:
        lives, matches, figures = source.lives, source.matches, source.figures
        for part in parts(source.living):
            for member in part:
                if not lives(member):
                    continue
                total += 1
                if not matches(member, wanted):
                    continue
                matched += 1
                number -= 1
                up, down, age, place = figures(member)
                entry = (
                    *(key(up + down, age), place, number),
                    *(source, member, up, down, age),
                )
                if len(heap) < limit:
                    heappush(heap, entry)
                elif limit:
                    heappushpop(heap, entry)
            yield
    chosen: list[Any] = []
    while heap:
        chosen += [heappop(heap) for _ in range(min(PART, len(heap)))]
        yield
    chosen.reverse()
    rows = []
    for part in parts(chosen):
        for *_, source, member, up, down, age in part:
            row = source.row(member, up, down, age)
            if row is not None:
                rows.append(row)
        yield
    return {what: rows, "matched": matched, "total": total}


_OVER = Stage.OVER


class StreamSource:
    """The sessions of one factory.

    :param relay: its name.
    :param older: see :attr:`Shown.older`.
    """

    def __init__(self, relay: str, factory: Any, older: bool) -> None:
        self.living = factory.registry.living()
        self._relay = relay
        self._older = older
        self._factory = factory
        self._now: float = factory.now()

    def lives(self, member: Any) -> bool:
        """See :class:`Source`; so the others."""
        return member.session.stage is not _OVER

    def matches(self, member: Any, wanted: Wanted) -> bool:
        session = member.session
        if wanted.ids is not None and session.id not in wanted.ids:
            return False
        if wanted.server is not None and not _is_at(session, wanted.server):
            return False
        return wanted.is_of(session.client)

    def figures(self, member: Any) -> tuple[int, int, float, int]:
        session = member.session
        age = self._now - session.opened_at
        return session.up.read, session.down.read, age, -session.id

    def row(self, member: Any, up: int, down: int, age: float) -> dict[str, Any] | None:
        session = member.session
        if session.stage is _OVER:
            return None
        return {
            "id": session.id,
            "relay": self._relay,
            "client": session.client,
            "peer": session.peer,
            "listener": session.listener,
            "upstream": session.upstream or None,
            "stage": session.stage.value,
            "age": age,
            "idle": self.idle(member),
            "bytes_up": up,
            "bytes_down": down,
            "rate": rate_of(up + down, age),
            "attempts": session.attempts,
            "older": self._older,
            "filters": list(member.filtered),
        }

    def idle(self, member: Any) -> float | None:
        """Seconds for which nothing has moved, by the last check of its deadlines: to a
        tick; None before it is relayed."""
        bridge = member.bridge
        if bridge is None:
            return None
        since = bridge.moved_at
        return max(self._factory.now() - since, 0.0) if since is not None else 0.0


def _is_at(session: Any, text: str) -> bool:
    """Whether a session's server has this name, label or address."""
    server, upstream = session.server, session.upstream
    if server is None:
        return bool(upstream == text)
    if text in (upstream, server.name):
        return True
    label, pool = getattr(server, "label", ""), getattr(server, "pool", "")
    if not (label or pool):
        return False
    # In whichever pool: others may have the label, too, and the address.
    bare = upstream.removeprefix(f"{pool}/").removeprefix(f"{label}/")
    return text in (bare, *names_of(server), label or bare)


def is_called(upstream: Any, text: str) -> bool:
    """Whether this is what a server is called: see :func:`names_of`."""
    return bool(text) and text in names_of(upstream)


def names_of(upstream: Any) -> tuple[str, ...]:
    """What a server is called: its name, and its label if it has one.

    Of one of several pools both begin with the name of the pool, but for that of the
    default one: so whoever names a server means those of one pool.
    """
    label: str = getattr(upstream, "label", "")
    if not label:
        return (upstream.name,)
    pool: str = getattr(upstream, "pool", "")
    return upstream.name, f"{pool}/{label}" if pool else label


def stream_sources(shown: Iterable[Shown]) -> list[StreamSource]:
    """The sessions of relays of streams."""
    return [
        StreamSource(relay.name, factory, older)
        for relay in shown
        if relay.kind != "udp"
        for factory, older in relay.generations
    ]


def sessions(shown: Iterable[Shown], query: SessionQuery) -> Work:
    """The sessions of streams.

    :return: `{sessions: […], matched, total}`, the last of the relays that were asked
        for; `idle` and `upstream` are None for one
        that is not relayed, or has no server yet.
    :raises Unknown: there is no such relay.
    :raises Invalid: the client is no address and no network.
    """
    wanted = Wanted.of(query.client, query.server)
    sources = stream_sources(relays_of(shown, query.relay))
    return (yield from listed("sessions", sources, wanted, query))
