"""The same server for the same client: rendezvous hashing, with weights.

A client's address gives one of 65,536 slots, and each slot has a server: the one with
the least score there, which depends on the slot, on the server's name and on its
weight, and on nothing else (:mod:`relayd.upstreams.rendezvous`).  So a server that goes
moves its own clients only, one that comes takes its share of each other's and moves
nobody else, and all relays and all starts agree, on every machine.

**Many servers.**  Asking a thousand for their scores takes 0.1 ms.  So of each server
those slots are entered in a table where its score is below a limit, which is such that
a slot has :data:`NEAR` of them on average; they are the first ranks of its order.  If
a slot has any, the least of all scores is among them; of the others (0.7 %) all servers
are asked.  The table is filled as the relay starts (0.1 s for a thousand), and later
little by little, with each slot that is asked for.

**Full servers.**  While the server of a slot is full its clients have the one with the
least score of those that are not: the best of the table, or if all there are full, of
all others.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any, TypeVar

from zope.interface import implementer

from relayd.core.addresses import host_of
from relayd.core.interfaces import ISelector
from relayd.upstreams.rendezvous import MASK, SLOTS, Members, Order, tables
from relayd.upstreams.vacancies import Vacancies, is_full

Candidate = TypeVar("Candidate")

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
            slot = mix[place & MASK] ^ mask
            follow(heads[slot])
            heads[slot] = entry
            entry += 1
        self.entries.extend(array("i", [number]) * (end - begin))
        self._reached[number] = end
        return end - begin


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
        #: Who is not full, and the places of all; once somebody is.
        self._vacancies: Vacancies | None = None
        self._index: dict[Any, int] = {}
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
            return int(session.ordinal) * 40503 & MASK
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
                free: Sequence[Any] = [c for c in candidates if not is_full(c)]
                return Members(free, self._orders).owner(slot) if free else None
            self._learn(candidates)
        there = self._owners.get(slot)
        if there is None:
            there = self._owners[slot] = self._find(slot)
        found = self._elsewhere(slot) if is_full(there) else there
        return found

    def foretell(
        self, candidates: Sequence[Candidate], session: Any
    ) -> Candidate | None:
        """What :meth:`choose` would return now; nothing is remembered of it."""
        # A list is for once.
        return self.choose(list(candidates), session)

    def _elsewhere(self, slot: int) -> Any:
        """The server of a slot among those that are not full, or None."""
        vacancies = self._vacancies
        if vacancies is None:
            vacancies = self._vacancies = Vacancies(self._members.servers)
            self._index = {each: n for n, each in enumerate(self._members.servers)}
        free = vacancies.free
        if not free:
            return None
        found = None
        if self._near is not None and not self._lacking and len(free) > FEW:
            found = self._nearest(self._near, slot, full=False)
        return self._members.owner(slot, free) if found is None else found

    def room_changed(self, server: Any) -> None:
        """See :class:`ISelector`."""
        place = self._index.get(server)
        if self._vacancies is not None and place is not None:
            self._vacancies.change(place, is_full(server))

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
        self._vacancies, self._index = None, {}
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

    def prepare(self, candidates: Sequence[Any]) -> None:
        """See :class:`ISelector`: enter all of them in the table."""
        self._learn(candidates)
        if self._near is not None:
            self._enter_some(self._near, math.inf)

    def _enter_some(self, near: Near, most: float) -> None:
        made = 0
        while self._lacking and made < most:
            server, order, weight = self._lacking.pop()
            made += near.enter(order, weight)
            self._place(near, server, order, weight)

    def _find(self, slot: int) -> Any:
        near = self._near
        if near is None:
            return self._members.owner(slot)
        if self._lacking:
            self._enter_some(near, AT_A_TIME)
            return self._members.owner(slot)
        found = self._nearest(near, slot, full=True)
        return self._members.owner(slot) if found is None else found

    def _nearest(self, near: Near, slot: int, *, full: bool) -> Any:
        """The server of a slot, if it is in the table there.

        :param full: those that are full count.
        """
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
            score = ranked[(unmix[slot ^ mask] - offset) * inverse & MASK] * each
            if not full and is_full(server):
                continue
            if score < least:
                least, found, first = score, server, (slot ^ mask, key)
            elif score == least and first is not None and (slot ^ mask, key) < first:
                found, first = server, (slot ^ mask, key)
        return found
