"""Which server of a pool a session gets: the selectors.

:class:`RoundRobin`, :class:`LeastSessions`, :class:`RandomOfTwo` and :class:`First` are
here, :class:`~relayd.upstreams.client_hash.ClientHash` in a module of its own.  All of
them follow weights, and take O(log n) steps for a choice of n servers at most: what
they know of the candidates is found once, and anew when they are given others.  Their
sequence is the same object while nothing but loads has changed
(:class:`relayd.core.interfaces.ISelector`).  Servers that are full are among them, are
not chosen, and `room_changed` tells which these are.

A load is the number of sessions divided by the weight, as in nginx (`least_conn`) and
LVS (`wlc`); equal ones have turns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import copy
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, TypeVar

from zope.interface import implementer

from relayd.core.interfaces import ISelector
from relayd.upstreams.turns import Turns, weight_of
from relayd.upstreams.vacancies import Sums, Vacancies, is_full

Candidate = TypeVar("Candidate")

#: Entries of a heap beyond twice those that count, up to which no others are removed.
UNSWEPT = 64

#: A load, when the next turn is due, the place of a server, and how many sessions it
#: had: whole numbers are compared at a fraction of the cost of a division.
_Entry = tuple[float, float, int, int]


def _lasting(candidates: Sequence[Any]) -> Sequence[Any] | None:
    """What is the same servers whenever it is the same object; or None.

    A list may have changed.
    """
    return candidates if isinstance(candidates, tuple) else None


def _places(candidates: Sequence[Any]) -> dict[Any, int]:
    return {server: place for place, server in enumerate(candidates)}


@implementer(ISelector)
class RoundRobin:
    """One server after the other, each as often as its weight says.

    Servers of equal weights are chosen by the session's sequence number.  Those of
    different ones have their turns smoothly, not one server's all in a row
    (:mod:`relayd.upstreams.turns`).
    """

    _known: Sequence[Any] | None = None
    #: All have the same weight.
    _even = True
    #: The places of the candidates among them; found when it is asked for.
    _index: Any = None
    #: Of equal weights, those that are not full.
    _vacancies: Any = None
    #: Of different weights; made when there are such.
    _turns: Any = None
    #: When the next turn of each server is due, and its place, but of full ones.
    _heap: Any = ()
    #: The places of those that were found full, and are not in the heap.
    _out: Any = ()

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if not candidates:
            return None
        if candidates is not self._known:
            self._learn(candidates)
        if self._even:
            ordinal: int = session.ordinal
            free: list[int] = self._vacancies.free
            return candidates[free[ordinal % len(free)]] if free else None
        heap, turns = self._heap, self._turns
        while heap:
            index: int = heap[0][1]
            if not is_full(candidates[index]):
                heapreplace(heap, (turns.take(index), index))
                return candidates[index]
            heappop(heap)
            self._out.add(index)
        return None

    def room_changed(self, server: Any) -> None:
        """See :class:`ISelector`."""
        if self._known is None:
            return
        if self._index is None:
            self._index = _places(self._known)
        place = self._index.get(server)
        if place is None:
            return
        if self._even:
            self._vacancies.change(place, is_full(server))
        elif place in self._out and not is_full(server):
            self._out.remove(place)
            heappush(self._heap, (self._turns.dues[place], place))

    def foretell(
        self, candidates: Sequence[Candidate], session: Any
    ) -> Candidate | None:
        """What :meth:`choose` would return now; nobody has had a turn."""
        fork = copy(self)
        fork._heap, fork._out = list(self._heap), set(self._out)  # noqa: SLF001
        if self._turns is not None:
            fork._turns = self._turns.fork()  # noqa: SLF001
        return fork.choose(candidates, session)

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known, self._index = _lasting(candidates), None
        self._even = len({weight_of(each) for each in candidates}) == 1
        if self._even:
            self._vacancies = Vacancies(candidates)
            return
        if self._turns is None:
            self._turns = Turns()
        self._turns.change(candidates)
        heap = [(due, index) for index, due in enumerate(self._turns.dues)]
        heapify(heap)
        self._heap, self._out = heap, set()


class OwnTurns(RoundRobin):
    """The same for one of several pools of a relay.

    By how often it has chosen, and not by the sequence numbers of sessions: those are
    of all pools, and where every second session is another pool's, one server of two
    would get all of them.

    :ivar ordinal: how often it has chosen before.
    """

    ordinal = -1

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        # A retry takes no turn: with one server of two dead, each session would have
        # two of them, and all would try the dead one first.
        if not getattr(session, "attempts", 0):
            self.ordinal += 1
        return super().choose(candidates, self)

    def room_changed(self, server: Any) -> None:
        """See :class:`ISelector`; it is called if the class of `choose` has it."""
        super().room_changed(server)


@implementer(ISelector)
class LeastSessions:
    """The server with the fewest sessions for its weight.

    Those of equal loads have turns, as often as their weights say: where each session
    is over before the next begins, this is :class:`RoundRobin`.

    A few are looked at one by one.  The loads of more are in a heap: that one has grown
    is found when its server comes first, and so is that it is full; that it has become
    less, :meth:`session_over` tells.
    """

    #: So many are a few: of two, a heap takes 2 µs more.
    few = 6

    def __init__(self) -> None:
        self._known: Sequence[Any] | None = None
        self._turns = Turns()
        self._index: dict[Any, int] = {}
        #: One of them may be full.
        self._limited = False
        self._few = True
        self._heap: list[_Entry] = []
        #: The one entry of the heap that counts, of each server; None: it is full.
        self._entries: list[_Entry | None] = []

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if not candidates:
            return None
        if candidates is not self._known:
            self._learn(candidates)
        if self._few:
            few: Candidate | None = self._choose_of_few(candidates)
            return few
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            load, due, index, before = entry
            if entry is not entries[index]:
                heappop(heap)
                continue
            chosen: Any = candidates[index]
            if self._limited and chosen.is_full:
                heappop(heap)
                entries[index] = None
                continue
            sessions = chosen.sessions
            if sessions == before:
                due = self._turns.take(index)
                entries[index] = entry = (load, due, index, sessions)
                heapreplace(heap, entry)
                found: Candidate = chosen
                return found
            load = sessions / self._turns.weights[index]
            entries[index] = entry = (load, due, index, sessions)
            heapreplace(heap, entry)
        return None

    def _choose_of_few(self, candidates: Sequence[Any]) -> Any:
        weights, dues = self._turns.weights, self._turns.dues
        least, first, chosen = 0.0, 0.0, -1
        for index, server in enumerate(candidates):
            if self._limited and server.is_full:
                continue
            load = server.sessions / weights[index]
            if chosen < 0 or load < least or (load == least and dues[index] < first):
                least, first, chosen = load, dues[index], index
        if chosen < 0:
            return None
        self._turns.take(chosen)
        return candidates[chosen]

    def foretell(
        self, candidates: Sequence[Candidate], session: Any
    ) -> Candidate | None:
        """What :meth:`choose` would return now; nobody has had a turn."""
        fork = copy(self)
        fork._turns = self._turns.fork()  # noqa: SLF001
        fork._heap, fork._entries = list(self._heap), list(self._entries)  # noqa: SLF001
        return fork.choose(candidates, session)

    def session_over(self, server: Any) -> None:
        """See :class:`ISelector`."""
        index = self._index.get(server)
        if index is None:
            # Of few, no loads are known.
            return
        sessions, entry = server.sessions, self._entries[index]
        # Most often it is what it was when the session came.
        if entry is not None and sessions >= entry[3]:
            return
        if not server.is_full:
            turns = self._turns
            load = sessions / turns.weights[index]
            entry = self._entries[index] = (load, turns.dues[index], index, sessions)
            heappush(self._heap, entry)
            if len(self._heap) > 2 * len(self._entries) + UNSWEPT:
                self._fill()

    def room_changed(self, server: Any) -> None:
        """See :class:`ISelector`: that it is full, is found when it comes first."""
        self.session_over(server)

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known = _lasting(candidates)
        turns = self._turns
        turns.change(candidates)
        self._limited = any(
            getattr(each, "max_sessions", None) is not None for each in candidates
        )
        self._few = len(candidates) <= self.few
        if self._few:
            self._index, self._entries, self._heap = {}, [], []
            return
        self._index = _places(candidates)
        self._entries = [
            (server.sessions / weight, due, index, server.sessions)
            for index, (server, weight, due) in enumerate(
                zip(candidates, turns.weights, turns.dues, strict=True)
            )
        ]
        self._fill()

    def _fill(self) -> None:
        self._heap = [each for each in self._entries if each is not None]
        heapify(self._heap)


@implementer(ISelector)
class RandomOfTwo:
    """Of two servers at random, the one with the fewer sessions for its weight.

    The second is another one than the first, which is taken if their loads are equal:
    so without load, each has its share exactly.  Nearly as even as
    :class:`LeastSessions`, and several relays that have the same servers do not all
    choose the same one at the same time (Mitzenmacher, The Power of Two Choices, 2001).

    :param source: of random numbers; unless given, its own.
    """

    def __init__(self, source: random.Random | None = None) -> None:
        self._known: Sequence[Any] | None = None
        #: Balancing is no secret.
        self._random = (source or random.Random()).random  # noqa: S311
        self._index: dict[Any, int] = {}
        self._weights: list[float] = []
        #: Of equal weights, those that are not full.
        self._vacancies: Any = None
        #: Of different ones; those of full servers are 0.
        self._sums: Any = None

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if not candidates:
            return None
        if candidates is not self._known:
            self._learn(candidates)
        number, weights = self._random, self._weights
        if self._sums is None:
            free = self._vacancies.free
            count = len(free)
            if count < 2:
                return candidates[free[0]] if count else None
            first = int(number() * count)
            second = int(number() * (count - 1))
            second += second >= first
            first, second = free[first], free[second]
        else:
            find, total = self._sums.find, self._sums.total
            if not total:
                return None
            drawn = number() * total
            first, within = find(drawn)
            # The others in a row, without the first.
            own = weights[first]
            place = number() * (total - own)
            second, _ = find(place if place < drawn - within else place + own)
        one: Any = candidates[first]
        two: Any = candidates[second]
        if two.sessions * weights[first] < one.sessions * weights[second]:
            one = two
        found: Candidate = one
        return found

    def foretell(
        self, candidates: Sequence[Candidate], session: Any
    ) -> Candidate | None:
        """What :meth:`choose` will return, if that is no matter of chance; or None."""
        free = [each for each in candidates if not is_full(each)]
        return free[0] if len(free) == 1 else None

    def room_changed(self, server: Any) -> None:
        """See :class:`ISelector`."""
        place = self._index.get(server)
        if place is None:
            return
        full = is_full(server)
        if self._sums is None:
            self._vacancies.change(place, full)
        else:
            self._sums.change(place, 0.0 if full else self._weights[place])

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known = _lasting(candidates)
        self._index = _places(candidates)
        self._weights = [weight_of(each) for each in candidates]
        if len(set(self._weights)) == 1:
            self._sums, self._vacancies = None, Vacancies(candidates)
        else:
            rooms = zip(candidates, self._weights, strict=True)
            self._sums = Sums([0.0 if is_full(each) else w for each, w in rooms])


@implementer(ISelector)
class First:
    """The first server in the operator's order, up to its limit, then the next."""

    def __init__(self) -> None:
        self._known: Sequence[Any] | None = None
        self._index: dict[Any, int] = {}
        #: The places of those that are not full, as a heap; and of those that are out.
        self._heap: list[int] = []
        self._out: set[int] = set()

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if candidates is not self._known:
            self._known, self._index = _lasting(candidates), _places(candidates)
            self._heap, self._out = list(range(len(candidates))), set()
        heap = self._heap
        while heap:
            if not is_full(candidates[heap[0]]):
                return candidates[heap[0]]
            self._out.add(heappop(heap))
        return None

    def foretell(
        self, candidates: Sequence[Candidate], session: Any
    ) -> Candidate | None:
        """What :meth:`choose` would return now; nothing is remembered of it."""
        fork = copy(self)
        fork._heap, fork._out = list(self._heap), set(self._out)  # noqa: SLF001
        return fork.choose(candidates, session)

    def room_changed(self, server: Any) -> None:
        """See :class:`ISelector`."""
        place = self._index.get(server)
        if place in self._out and not is_full(server):
            self._out.remove(place)
            heappush(self._heap, place)
