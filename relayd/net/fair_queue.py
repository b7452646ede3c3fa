"""Which look-up runs next.  Pure; the cost of a step does not grow with the owners.

An *owner* is the client that a look-up is for, if it chooses its own names as a proxy's
clients do.  The owner of the operator's look-ups is "".

- The operator's look-ups come before all others.
- Of the other owners, the one with the fewest running is next; among equals, round
  robin.
- One worker is reserved for owners with no look-up running: an owner that has one gets
  no other if that would take the last worker.  So two owners whose names never resolve
  block no other owner.  More of them do, until the resolver gives up; then the others
  are next.

A look-up that several owners ask for waits in the queue of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

#: Look-ups that run at a time.
WORKERS = 8

#: Of these, how many owners may use in all: one is reserved for the operator.
OWNERS_WORKERS = WORKERS - 1

#: How many one owner may use.
WORKERS_PER_OWNER = WORKERS // 2

Item = TypeVar("Item")


class _Owner(Generic[Item]):
    """The waiting look-ups of one owner, in order, and how many run."""

    __slots__ = ("name", "running", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: dict[Item, None] = {}
        self.running = 0


class FairQueue(Generic[Item]):
    """What waits for a worker, by owner, and how many run of each owner."""

    def __init__(self) -> None:
        self._owners: dict[str, _Owner[Item]] = {}
        self._operator = self._owner("")
        # Owners with waiting items, by how many of their items run.
        self._levels: list[dict[str, _Owner[Item]]] = [
            {} for _ in range(WORKERS_PER_OWNER)
        ]
        self.running = 0

    def add(self, owner: str, item: Item) -> None:
        """Queue an item for an owner; it may be queued already."""
        found = self._owner(owner)
        found.waiting[item] = None
        self._place(found)

    def remove(self, owner: str, item: Item) -> None:
        """Remove an item from the queue of an owner, if it is there."""
        found = self._owners.get(owner)
        if found is not None:
            found.waiting.pop(item, None)
            self._place(found)

    def next(self) -> tuple[str, Item] | None:
        """The owner and item to run now; None: nothing yet.

        It counts as running until :meth:`done`; the caller removes it from the queues
        of its other owners.
        """
        owner = self._next_owner()
        if owner is None:
            return None
        item = next(iter(owner.waiting))
        del owner.waiting[item]
        self._count(owner, 1)
        return owner.name, item

    def done(self, owner: str) -> None:
        """An item that ran for this owner has ended."""
        self._count(self._owners[owner], -1)

    def evictable(self, owner: str) -> Iterator[Item]:
        """Items that may be evicted for another one of `owner`, the newest first.

        They are those of the owner with the most waiting.  None, if `owner` would then
        have more than that owner.
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
        """Put an owner at the end of its level, or forget it if it has no items."""
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
