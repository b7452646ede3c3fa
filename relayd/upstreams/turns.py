"""Whose turn is next: smooth turns of servers with weights.

Each server has a turn every 1 / weight units of a time of its own, and the turn that is
due first is next.  In one unit each has as many turns as its weight says, exactly.  The
first turns are spread over the unit, those of servers of one weight evenly: with the
weights 5, 1 and 1 the turns are `a b a a a c a`.  nginx has them as smooth, `a a b a c
a a` (ngx_stream_upstream_round_robin), and goes through all servers for each; here the
next one is found in a heap.

Servers that stay keep their place in the order when others come and go, or when a
weight changes.  One that comes has its first turn after a whole interval: who leaves
and returns all the time has no more than its share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def weight_of(candidate: Any) -> float:
    """The weight of a server, or of what has none: 1.

    :return: less than its weight says while it starts slowly
        (:attr:`relayd.upstreams.server.Server.share`).
    """
    weight: float = getattr(candidate, "weight", 1)
    share: float = getattr(candidate, "share", 1.0)
    return weight * share


class Turns:
    """When the next turn of each server is due.

    :ivar servers: in the operator's order.
    :ivar weights: of each.
    :ivar dues: when its next turn is due.
    :ivar now: the latest time at which somebody's turn was due that has had it.
    """

    def __init__(self) -> None:
        self.servers: Sequence[Any] = ()
        self.weights: list[float] = []
        self.dues: list[float] = []
        self.now = 0.0

    def fork(self) -> Turns:
        """Others that stand as these do: whoever has a turn there has none here."""
        fork = Turns()
        fork.servers, fork.weights = self.servers, self.weights
        fork.dues, fork.now = list(self.dues), self.now
        return fork

    def change(self, servers: Sequence[Any]) -> None:
        """These are the servers from now on; or their weights have changed."""
        before = {
            server: (due, weight)
            for server, due, weight in zip(
                self.servers, self.dues, self.weights, strict=True
            )
        }
        weights = [weight_of(each) for each in servers]
        if before.keys().isdisjoint(servers):
            self.dues = self._spread(weights)
        else:
            self.dues = [
                self._kept(before.get(server), weight)
                for server, weight in zip(servers, weights, strict=True)
            ]
        self.servers, self.weights = tuple(servers), weights

    def _spread(self, weights: list[float]) -> list[float]:
        """The first turns of servers of which none was there before."""
        sizes, ranks, dues = Counter(weights), Counter[float](), []
        for weight in weights:
            dues.append(self.now + (ranks[weight] + 0.5) / sizes[weight] / weight)
            ranks[weight] += 1
        return dues

    def _kept(self, before: tuple[float, float] | None, weight: float) -> float:
        """The next turn of a server among others that were there before."""
        if before is None:
            return self.now + 1 / weight
        due, old = before
        if due <= self.now or weight == old:
            return due
        return self.now + (due - self.now) * old / weight

    def take(self, index: int) -> float:
        """A server has its turn.

        :return: when its next one is due.
        """
        dues = self.dues
        now = dues[index]
        if now < self.now:
            # Who was passed over for long does not get all turns that it has missed.
            now = self.now
        else:
            self.now = now
        due = dues[index] = now + 1 / self.weights[index]
        return due
