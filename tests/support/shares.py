"""The selectors, and whether counts are what chance would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from random import Random
from typing import Any

from relayd.upstreams.balance import First, LeastSessions, RandomOfTwo, RoundRobin
from relayd.upstreams.client_hash import ClientHash


class OfMany(LeastSessions):
    """Also of a few servers it looks as it does of many."""

    few = 0


class OfSome(LeastSessions):
    """A pool has few servers, or many, as they come and go."""

    few = 3


#: Each is made as `SELECTORS[name]()`; none is random.
SELECTORS: dict[str, Callable[[], Any]] = {
    "round-robin": RoundRobin,
    "least-sessions": LeastSessions,
    "least-sessions-of-many": OfMany,
    "least-sessions-of-some": OfSome,
    "random": lambda: RandomOfTwo(Random(19)),
    "client-hash": ClientHash,
    "first": First,
}


def chi_squared(counts: Sequence[float], expected: Sequence[float]) -> float:
    """How far counts are from what is expected of them (Pearson)."""
    return sum(
        (count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True)
    )


def is_by_chance(counts: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether counts are as near to the expected ones as 99.9 % of those by chance.

    The limit is Wilson and Hilferty's (1931), right within 1 %.
    """
    free = len(counts) - 1
    limit = free * (1 - 2 / (9 * free) + 3.09 * sqrt(2 / (9 * free))) ** 3
    return chi_squared(counts, expected) <= limit
