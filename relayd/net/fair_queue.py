"""Whose look-up runs next; pure, and no step takes longer for more owners.

An *owner* is whom a look-up is for: a client that chooses its own names, such as a
proxy's, or the operator, whose owner is "".

- The operator's come before all others.
- Of the other owners, the one with the fewest running; among those, in turn.
- One worker is left to owners with none running: who has one gets no other if that
  would be the last.  So two owners whose names never resolve stop nobody else; more of
  them do, until the resolver gives up, and then the others are next.

What several owners ask for waits in the queue of each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

#: How many look-ups run at a time.
WORKERS = 8

#: How many of those owners have in all: one is never theirs, but the operator's.
OWNERS_WORKERS = WORKERS - 1

#: How many one owner has.
WORKERS_PER_OWNER = WORKERS // 2

Item = TypeVar("Item")


class _Owner(Generic[Item]):
    """What waits for one owner, in order, and how many of it run."""

    __slots__ = ("name", "running", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: dict[Item, None] = {}
        self.running = 0


class FairQueue(Generic[Item]):
    """What waits for a worker, by owner, and how many of each owner's run."""

    def __init__(self) -> None:
        self._owners: dict[str, _Owner[Item]] = {}
        self._operator = self._owner("")
        # Owners with something that waits, by how many of theirs run.
        self._levels: list[dict[str, _Owner[Item]]] = [
            {} for _ in range(WORKERS_PER_OWNER)
        ]
        self.running = 0

    def add(self, owner: str, item: Item) -> None:
        """Let it wait; it may wait already."""
        found = self._owner(owner)
        found.waiting[item] = None
        self._place(found)

    def remove(self, owner: str, item: Item) -> None:
        """It does not wait any longer, if it does."""
        found = self._owners.get(owner)
        if found is not None:
            found.waiting.pop(item, None)
            self._place(found)

    def next(self) -> tuple[str, Item] | None:
        """What is to run now, and for whom; None: nothing yet.

        It runs from here on, until :meth:`done`; remove it for its other owners.
        """
        owner = self._next_owner()
        if owner is None:
            return None
        item = next(iter(owner.waiting))
        del owner.waiting[item]
        self._count(owner, 1)
        return owner.name, item

    def done(self, owner: str) -> None:
        """One that ran for this owner has ended."""
        self._count(self._owners[owner], -1)

    def evictable(self, owner: str) -> Iterator[Item]:
        """What may be evicted for one more of `owner`: the newest first.

        Of the owner with the most that waits.  Nothing, if with one more `owner` would
        have more than that one with one less.
        """
        most = max(
            (each for each in self._owners.values() if each is not self._operator),
            key=lambda each: len(each.waiting),
            default=self._operator,
        )
        found = self._owners.get(owner)
        own = len(found.waiting) if found is not None else 0
        if most is not self._operator and len(most.waiting) > own + 1:
            yield from reversed(most.waiting)

    def _next_owner(self) -> _Owner[Item] | None:
        operator = self._operator
        if self.running < WORKERS and operator.waiting:
            return operator
        owners_running = self.running - operator.running
        for running, level in enumerate(self._levels):
            if level:
                left = 1 if running else 0
                if (
                    self.running + left < WORKERS
                    and owners_running + left < OWNERS_WORKERS
                ):
                    return next(iter(level.values()))
                return None
        return None

    def _owner(self, name: str) -> _Owner[Item]:
        if name not in self._owners:
            self._owners[name] = _Owner(name)
        return self._owners[name]

    def _count(self, owner: _Owner[Item], change: int) -> None:
        if owner.running < WORKERS_PER_OWNER:
            self._levels[owner.running].pop(owner.name, None)
        owner.running += change
        self.running += change
        self._place(owner)

    def _place(self, owner: _Owner[Item]) -> None:
        """Put it at the end of its level, if it is not there; or forget it."""
        if owner is self._operator:
            return
        if owner.running < WORKERS_PER_OWNER:
            level = self._levels[owner.running]
            if owner.waiting:
                level[owner.name] = owner
            else:
                level.pop(owner.name, None)
        if not (owner.waiting or owner.running):
            del self._owners[owner.name]
