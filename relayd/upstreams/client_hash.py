"""The same server for the same client: rendezvous hashing, with weights.

A client's address gives one of 65,536 slots, and each slot has a server: the one with
the least score there, which depends on the slot, on the server's name and on its
weight, and on nothing else.  So a server that goes moves its own clients only, one that
comes takes its share of each other's and moves nobody else, and all relays and all
starts agree, on every machine.

**Scores.**  Each server has an order of its own of all slots, made from its name: a
slot's rank in it, r, gives the score -ln(1 - (r + 1/2) / 65536) / weight.  If ranks are
random that is an exponential distribution with the weight as its rate, and the least
of several belongs to each in proportion to its weight.  (Thaler and Ravishankar, Using
Name-Based Mappings to Increase Hit Rates, 1998; Schindelhauer and Schomaker, Weighted
Distributed Hash Tables, 2005.)

The order is slot = mix[factor * rank + offset] ^ mask, modulo 65,536: a table that is
the same for all, between two steps that depend on the name.  It can be asked both ways
at little cost.

**Many servers.**  Asking a thousand for their scores takes 0.1 ms.  So of each server
those slots are entered in a table where its score is below a limit, which is such that
a slot has :data:`NEAR` of them on average; they are the first ranks of its order.  If
a slot has any, the least of all scores is among them; of the others (0.7 %) all servers
are asked.  The table is filled little by little, with each slot that is asked for.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from hashlib import blake2b, shake_128
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any, NamedTuple, TypeVar

from zope.interface import implementer

from relayd.core.addresses import host_of
from relayd.core.interfaces import ISelector
from relayd.upstreams.turns import weight_of

Candidate = TypeVar("Candidate")

#: How many slots there are.
SLOTS = 65536
_MASK = SLOTS - 1

#: Servers up to which all are asked for each slot.
FEW = 48

#: How many servers are entered for each slot, on average: the time for the entries, and
#: for the slots that have none, is least at 5 for 10,000 clients of 1,000 servers.
NEAR = 5.0

#: Entries that are made at a time, at least: some 0.15 ms.
AT_A_TIME = 2000

#: Of how many sets of candidates it is known that they came once: a choice among the
#: whole pool has so many retries, at most, before the next one.
SEEN = 8

#: IPv4 addresses within IPv6: ::ffff:192.0.2.1.
_MAPPED = bytes(10) + b"\xff\xff"


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


class Near:
    """For each slot, the servers that have a score below a limit there.

    Lists that are linked, in arrays: a thousand small lists of Python's for each
    thousand slots would take five times as long to make, and longer pauses for the
    garbage collector.

    :param total: of all weights.

    :ivar limit: of the scores.
    :ivar heads: of each slot, the place of its last entry; -1: none.
    :ivar nexts: of each entry, the place of the one before it in its slot.
    :ivar entries: the number of the server.
    :ivar numbers: of the servers, by their keys.
    """

    def __init__(self, total: float) -> None:
        self.limit = NEAR / total
        self.heads = array("i", [-1]) * SLOTS
        self.nexts = array("i")
        self.entries = array("i")
        self.numbers: dict[str, int] = {}
        #: How many ranks are entered, of each server.
        self._reached: list[int] = []
        #: How many are to be, of each weight.
        self._reaches: dict[float, int] = {}

    def fits(self, total: float) -> bool:
        """Whether slots have about as many entries as they should, and not too many.

        Those of servers that have left stay until they are too many: there are never
        more than 4 * NEAR * SLOTS, which is 1.3 million, in 10 MB.
        """
        mean = self.limit * total
        return NEAR / 2 < mean < NEAR * 2 and len(self.entries) < 2 * NEAR * SLOTS

    def lacks(self, order: Order, weight: float) -> bool:
        """Whether a server is to be entered, or more of its slots."""
        number = self.numbers.get(order.key)
        return number is None or self._reached[number] < self._reach(weight)

    def _reach(self, weight: float) -> int:
        """How many ranks have a score below the limit; one more, for rounding."""
        reach = self._reaches.get(weight)
        if reach is None:
            reach = min(bisect_left(tables().scores, self.limit * weight) + 1, SLOTS)
            self._reaches[weight] = reach
        return reach

    def enter(self, order: Order, weight: float) -> int:
        """Enter a server.

        :return: how many entries were made.
        """
        key, mask, offset, _, factor = order
        number = self.numbers.setdefault(key, len(self.numbers))
        if number == len(self._reached):
            self._reached.append(0)
        begin, end = self._reached[number], self._reach(weight)
        mix, heads, follow = tables().mix, self.heads, self.nexts.append
        entry = len(self.nexts)
        for place in range(offset + factor * begin, offset + factor * end, factor):
            slot = mix[place & _MASK] ^ mask
            follow(heads[slot])
            heads[slot] = entry
            entry += 1
        self.entries.extend(array("i", [number]) * (end - begin))
        self._reached[number] = end
        return end - begin


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

    def owner(self, slot: int) -> Any:
        """The server of a slot, by the scores of all."""
        _, unmix, ranked = tables()
        scores = [
            ranked[(unmix[slot ^ mask] - offset) * inverse & _MASK] * each
            for mask, offset, inverse, each in self._constants
        ]
        least = min(scores)
        index = scores.index(least)
        if least in scores[index + 1 :]:
            # Of equal ones, another one for each slot.
            orders = self.orders
            _, _, index = min(
                (slot ^ orders[i].mask, orders[i].key, i)
                for i, score in enumerate(scores)
                if score == least
            )
        return self.servers[index]


@implementer(ISelector)
class ClientHash:
    """The same server for the same client, as long as it is there.

    Clients count as one whose addresses begin alike.  Those without an address, of UNIX
    sockets, have turns.

    :param ipv4: bits of an IPv4 address that count; `ipv6` of an IPv6 one: a host has a
        whole /64 to choose from (RFC 4291).
    """

    def __init__(self, ipv4: int = 32, ipv6: int = 64) -> None:
        if not (1 <= ipv4 <= 32 and 1 <= ipv6 <= 128):
            raise ValueError(f"prefixes are 1 to 32 and 1 to 128, not {ipv4}, {ipv6}")
        self._ignored = {4: 32 - ipv4, 16: 128 - ipv6}
        # Now, and not when the first client waits.
        tables()
        self._known: Sequence[Any] | None = None
        #: Others that were given meanwhile.
        self._seen: deque[Sequence[Any]] = deque(maxlen=SEEN)
        self._members = Members((), {})
        self._orders: dict[Any, Order] = {}
        #: The servers of slots that were asked for.
        self._owners: dict[int, Any] = {}
        self._near: Near | None = None
        #: Of each number in it, constants of the score, the key and the server; None
        #: if that has left.
        self._present: list[tuple[int, int, int, float, str, Any] | None] = []
        #: Those that are still to be entered.
        self._lacking: list[tuple[Any, Order, float]] = []

    def slot_of(self, session: Any) -> int:
        """The slot of a session's client."""
        host = host_of(session.client)
        if not host:
            # Prime to the number of slots: all of them have turns.
            return int(session.ordinal) * 40503 & _MASK
        try:
            packed = inet_pton(AF_INET6 if ":" in host else AF_INET, host)
        except (OSError, ValueError):
            packed = host.encode("utf-8", "surrogatepass")
        else:
            if packed[:12] == _MAPPED:
                packed = packed[12:]
            size = len(packed)
            ignored = self._ignored[size]
            if ignored:
                number = int.from_bytes(packed, "big") >> ignored
                packed = number.to_bytes(size, "big")
        digest = blake2b(packed, digest_size=2).digest()
        return digest[0] << 8 | digest[1]

    def choose(self, candidates: Sequence[Candidate], session: Any) -> Candidate | None:
        """See :meth:`ISelector.choose`."""
        if not candidates:
            return None
        slot = self.slot_of(session)
        found: Candidate
        if candidates is not self._known:
            if self._is_for_once(candidates):
                found = Members(candidates, self._orders).owner(slot)
                return found
            self._learn(candidates)
        there = self._owners.get(slot)
        if there is None:
            there = self._owners[slot] = self._find(slot)
        found = there
        return found

    def _is_for_once(self, candidates: Sequence[Any]) -> bool:
        """Whether they are most likely what a retry has left, and the others return."""
        if not isinstance(candidates, tuple):
            return True
        if self._known is None or any(each is candidates for each in self._seen):
            return False
        self._seen.append(candidates)
        return True

    def _learn(self, candidates: Sequence[Any]) -> None:
        self._known = candidates
        self._seen.clear()
        self._owners = {}
        members = self._members = Members(candidates, self._orders)
        self._orders = dict(zip(candidates, members.orders, strict=True))
        self._present, self._lacking = [], []
        if len(candidates) <= FEW:
            self._near = None
            return
        total = math.fsum(members.weights)
        near = self._near
        if near is None or not near.fits(total):
            near = self._near = Near(total)
        self._present = [None] * len(near.numbers)
        for each in zip(candidates, members.orders, members.weights, strict=True):
            if near.lacks(*each[1:]):
                self._lacking.append(each)
            else:
                self._place(near, *each)

    def _place(self, near: Near, server: Any, order: Order, weight: float) -> None:
        """A server is entered."""
        key, mask, offset, inverse, _ = order
        constants = mask, offset, inverse, 1 / weight, key, server
        number = near.numbers[key]
        if number == len(self._present):
            self._present.append(constants)
        else:
            self._present[number] = constants

    def _find(self, slot: int) -> Any:
        near = self._near
        if near is None:
            return self._members.owner(slot)
        if self._lacking:
            made = 0
            while self._lacking and made < AT_A_TIME:
                server, order, weight = self._lacking.pop()
                made += near.enter(order, weight)
                self._place(near, server, order, weight)
            return self._members.owner(slot)
        _, unmix, ranked = tables()
        present, entries, nexts = self._present, near.entries, near.nexts
        least, found = near.limit, None
        first: tuple[int, str] | None = None
        place = near.heads[slot]
        while place >= 0:
            constants = present[entries[place]]
            place = nexts[place]
            if constants is None:
                continue
            mask, offset, inverse, each, key, server = constants
            score = ranked[(unmix[slot ^ mask] - offset) * inverse & _MASK] * each
            if score < least:
                least, found, first = score, server, (slot ^ mask, key)
            elif score == least and first is not None and (slot ^ mask, key) < first:
                found, first = server, (slot ^ mask, key)
        return self._members.owner(slot) if found is None else found
