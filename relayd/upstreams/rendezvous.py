"""Rendezvous hashing: which of several servers a slot belongs to.

**Scores.**  Each server has an order of its own of all slots, made from its name: a
slot's rank in it, r, gives the score -ln(1 - (r + 1/2) / 65536) / weight.  If ranks are
random that is an exponential distribution with the weight as its rate, and the least
of several belongs to each in proportion to its weight.  (Thaler and Ravishankar, Using
Name-Based Mappings to Increase Hit Rates, 1998; Schindelhauer and Schomaker, Weighted
Distributed Hash Tables, 2005.)

The order is slot = mix[factor * rank + offset] ^ mask, modulo 65,536: a table that is
the same for all, between two steps that depend on the name.  It can be asked both ways
at little cost.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b, shake_128
from typing import Any, NamedTuple

from relayd.upstreams.turns import weight_of

#: How many slots there are.
SLOTS = 65536
MASK = SLOTS - 1


class Tables(NamedTuple):
    """What all servers share.

    Arrays: numbers of Python's own are all over the memory, and take five times as long
    to look up.

    :ivar mix: all slots in an order that is random, and always the same.
    :ivar unmix: the place of a slot in it.
    :ivar scores: of each rank, for the weight 1; ascending.
    """

    mix: array[int]
    unmix: array[int]
    scores: array[float]


@functools.cache
def tables() -> Tables:
    """Made once in a process: 40 ms, 0.8 MB."""
    drawn = shake_128(b"relayd client-hash").digest(8 * SLOTS)
    keys = struct.unpack(f"<{SLOTS}Q", drawn)
    mix = sorted(range(SLOTS), key=keys.__getitem__)
    unmix = sorted(range(SLOTS), key=mix.__getitem__)
    scores = [-math.log1p(-(rank + 0.5) / SLOTS) for rank in range(SLOTS)]
    return Tables(array("H", mix), array("H", unmix), array("d", scores))


class Order(NamedTuple):
    """A server's own order of all slots.

    :ivar key: its name, and which of those of one name it is.
    :ivar inverse: of the factor, modulo SLOTS.
    """

    key: str
    mask: int
    offset: int
    inverse: int
    factor: int

    @classmethod
    def of(cls, key: str) -> Order:
        """The order that belongs to a name."""
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest()
        mask, offset, factor = struct.unpack("<3H", digest)
        factor |= 1
        return cls(key, mask, offset, pow(factor, -1, SLOTS), factor)


class Members:
    """Servers with their orders and weights: one set of candidates.

    :param known: the orders of some of them.
    """

    def __init__(self, servers: Sequence[Any], known: dict[Any, Order]) -> None:
        self.servers = servers
        self.weights = [weight_of(each) for each in servers]
        found = [known.get(each) for each in servers]
        self.orders = self._complete(found)
        self._constants = [
            (order.mask, order.offset, order.inverse, 1 / weight)
            for order, weight in zip(self.orders, self.weights, strict=True)
        ]

    def _complete(self, found: list[Order | None]) -> list[Order]:
        """With the orders that are not known."""
        used = {order.key for order in found if order is not None}
        counts = Counter[str]()
        orders = []
        for server, order in zip(self.servers, found, strict=True):
            if order is None:
                name = key = server.name
                while key in used:
                    # Another one of that name.
                    counts[name] += 1
                    key = f"{name}\0{counts[name]}"
                used.add(key)
                order = Order.of(key)
            orders.append(order)
        return orders

    def owner(self, slot: int, among: Sequence[int] | None = None) -> Any:
        """The server of a slot, by the scores of all.

        :param among: the places of those that count; unless given, all do.
        """
        _, unmix, ranked = tables()
        constants = self._constants
        places = range(len(constants)) if among is None else among
        if among is not None:
            constants = [constants[place] for place in among]
        scores = [
            ranked[(unmix[slot ^ mask] - offset) * inverse & MASK] * each
            for mask, offset, inverse, each in constants
        ]
        least = min(scores)
        index = scores.index(least)
        if least in scores[index + 1 :]:
            # Of equal ones, another one for each slot.
            orders = self.orders
            _, _, place = min(
                (slot ^ orders[i].mask, orders[i].key, i)
                for i, score in zip(places, scores, strict=True)
                if score == least
            )
            return self.servers[place]
        return self.servers[places[index]]
