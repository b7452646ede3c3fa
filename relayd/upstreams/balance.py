"""Which server of a pool a session gets: the selectors.

:class:`RoundRobin`, :class:`LeastSessions`, :class:`RandomOfTwo` and :class:`First` are
here, :class:`~relayd.upstreams.client_hash.ClientHash` in a module of its own.  All of
them follow weights, and take O(log n) steps for a choice of n servers at most: what
they know of the candidates is found once, and anew when they are given others.  Their
sequence is the same object while nothing but loads has changed
(:class:`relayd.core.interfaces.ISelector`).

A load is the number of sessions divided by the weight, as in nginx (`least_conn`) and
LVS (`wlc`); equal ones have turns.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate
from typing import Any, TypeVar

from zope.interface import implementer

from relayd.core.interfaces import ISelector
from relayd.upstreams.turns import Turns, weight_of

Candidate = TypeVar("Candidate")

#: Entries of a heap beyond twice those that count, up to which no others are removed.
UNSWEPT = 64


def _lasting(candidates: Sequence[Any]) -> Sequence[Any] | None:
    """What is the same servers whenever it is the same object; or None.

    A list may have changed.
    """
    return candidates if isinstance(candidates, tuple) else None


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
    #: Of different weights; made when there are such.
    _turns: Any = None
    #: When the next turn of each server is due, and its index.
    _heap: Any = ()

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if not candidates:
            return None
        if candidates is not self._known:
            self._learn(candidates)
        if self._even:
            ordinal: int = session.ordinal
            return candidates[ordinal % len(candidates)]
        heap, turns = self._heap, self._turns
        index: int = heap[0][1]
        heapreplace(heap, (turns.take(index), index))
        return candidates[index]

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known = _lasting(candidates)
        self._even = len({weight_of(each) for each in candidates}) == 1
        if self._even:
            return
        if self._turns is None:
            self._turns = Turns()
        self._turns.change(candidates)
        heap = [(due, index) for index, due in enumerate(self._turns.dues)]
        heapify(heap)
        self._heap = heap


@implementer(ISelector)
class LeastSessions:
    """The server with the fewest sessions for its weight.

    Those of equal loads have turns, as often as their weights say: where each session
    is over before the next begins, this is :class:`RoundRobin`.

    Loads are in a heap.  That one has grown is found when its server comes first; that
    it has become less, :meth:`touched` tells.
    """

    def __init__(self) -> None:
        self._known: Sequence[Any] | None = None
        self._turns = Turns()
        self._index: dict[Any, int] = {}
        #: A load, when the next turn is due, and the index of a server.
        self._heap: list[tuple[float, float, int]] = []
        #: The one entry of the heap that counts, of each server.
        self._entries: list[tuple[float, float, int]] = []

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if not candidates:
            return None
        if candidates is not self._known:
            self._learn(candidates)
        heap, entries, weights = self._heap, self._entries, self._turns.weights
        while True:
            entry = heap[0]
            load, due, index = entry
            if entry is not entries[index]:
                heappop(heap)
                continue
            chosen: Any = candidates[index]
            real = chosen.sessions / weights[index]
            if real == load:
                break
            entries[index] = entry = (real, due, index)
            heapreplace(heap, entry)
        entries[index] = entry = (load, self._turns.take(index), index)
        heapreplace(heap, entry)
        found: Candidate = chosen
        return found

    def touched(self, server: Any) -> None:
        """The number of its sessions has changed."""
        index = self._index.get(server)
        if index is None:
            return
        load = server.sessions / self._turns.weights[index]
        if load < self._entries[index][0]:
            entry = (load, self._turns.dues[index], index)
            self._entries[index] = entry
            heappush(self._heap, entry)
            if len(self._heap) > 2 * len(self._entries) + UNSWEPT:
                self._fill()

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known = _lasting(candidates)
        turns = self._turns
        turns.change(candidates)
        self._index = {server: index for index, server in enumerate(candidates)}
        self._entries = [
            (server.sessions / weight, due, index)
            for index, (server, weight, due) in enumerate(
                zip(candidates, turns.weights, turns.dues, strict=True)
            )
        ]
        self._fill()

    def _fill(self) -> None:
        self._heap = list(self._entries)
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
        self._weights: list[float] = []
        #: Sums of the weights so far; None: all are the same.
        self._sums: list[float] | None = None

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        count = len(candidates)
        if count < 2:
            return candidates[0] if count else None
        if candidates is not self._known:
            self._learn(candidates)
        number, sums, weights = self._random, self._sums, self._weights
        if sums is None:
            first = int(number() * count)
            second = int(number() * (count - 1))
            second += second >= first
        else:
            total, last = sums[-1], count - 1
            first = min(bisect(sums, number() * total), last)
            below, own = sums[first] - weights[first], weights[first]
            # The others in a row, without the first.
            place = number() * (total - own)
            second = min(bisect(sums, place if place < below else place + own), last)
        one: Any = candidates[first]
        two: Any = candidates[second]
        if two.sessions * weights[first] < one.sessions * weights[second]:
            one = two
        found: Candidate = one
        return found

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known = _lasting(candidates)
        self._weights = [weight_of(each) for each in candidates]
        even = len(set(self._weights)) == 1
        self._sums = None if even else list(accumulate(self._weights))


@implementer(ISelector)
class First:
    """The first server in the operator's order, up to its limit, then the next.

    A server that has as many sessions as it may have is no candidate
    (:attr:`relayd.upstreams.server.Server.usable`).
    """

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        return candidates[0] if candidates else None
