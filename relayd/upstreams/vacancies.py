"""Which servers are not full, as it changes with each session.

Where all servers are at their limits, each session that ends makes room at one, and the
next fills it again.  To go through all of them each time would take a session longer
than all the rest; here a change takes O(1) or O(log n) steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def is_full(candidate: Any) -> bool:
    """Whether a server has as many sessions as it may have.

    :param candidate: what has no limit need not say so.
    """
    full: bool = getattr(candidate, "is_full", False)
    return full


class Vacancies:
    """The places of those servers that are not full.

    :ivar free: their places among all servers, in order at first; later in any.
    """

    def __init__(self, servers: Sequence[Any]) -> None:
        self.free = [n for n, each in enumerate(servers) if not is_full(each)]
        #: Of each place, where it is in `free`.
        self._at = {place: at for at, place in enumerate(self.free)}

    def change(self, place: int, full: bool) -> None:
        """The server at a place has become full, or is so no longer."""
        free, where = self.free, self._at
        if not full:
            if place not in where:
                where[place] = len(free)
                free.append(place)
        elif place in where:
            at, last = where.pop(place), free.pop()
            if last != place:
                free[at], where[last] = last, at


class Sums:
    """Weights with their sums, in a tree: each is the sum of the two below it.

    Sums are made anew along the way up, not added to: no error grows.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        size = 1
        while size < len(weights):
            size *= 2
        self._size = size
        #: The root has the number 1; below n there are 2n and 2n + 1.
        tree = self._tree = [0.0] * (2 * size)
        tree[size : size + len(weights)] = weights
        for n in range(size - 1, 0, -1):
            tree[n] = tree[2 * n] + tree[2 * n + 1]

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return self._tree[1]

    def change(self, place: int, weight: float) -> None:
        """One has another weight."""
        tree, n = self._tree, self._size + place
        tree[n] = weight
        while n > 1:
            n >>= 1
            tree[n] = tree[2 * n] + tree[2 * n + 1]

    def find(self, number: float) -> tuple[int, float]:
        """Whose weight a number falls into, from 0 up to the total.

        :return: its place, and how much of the number is left within its weight.  One
            that weighs nothing is not found unless all do, however numbers are rounded.
        """
        tree, size, n = self._tree, self._size, 1
        while n < size:
            n *= 2
            if number >= tree[n] and tree[n + 1]:
                number -= tree[n]
                n += 1
        return n - size, number
