"""Whose look-up runs next: against the rules as they are written, step by step."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relayd.net.fair_queue import (
    OWNERS_WORKERS,
    WORKERS,
    WORKERS_PER_OWNER,
    FairQueue,
)


class FairQueueOfMany(RuleBasedStateMachine):
    """Anything may be asked for, by anybody, in any order; and what holds then.

    The model is lists; what it says of fairness is checked whenever one starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue()
        self.waiting: dict[str, list[int]] = {}
        self.running: list[tuple[str, int]] = []
        self.items = itertools.count()
        #: How often others with as few running were served since an owner has waited.
        self.passed: Counter[str] = Counter()

    owners = st.sampled_from(["", "a", "b", "c", "d", "e", "f", "g", "h", "i"])

    @rule(owner=owners, count=st.integers(1, 6))
    def ask(self, owner: str, count: int) -> None:
        for _ in range(count):
            item = next(self.items)
            self.queue.add(owner, item)
            self.waiting.setdefault(owner, []).append(item)
        self.start()

    @precondition(lambda self: self.waiting)
    @rule(owner=owners, data=st.data())
    def ask_for_the_same(self, owner: str, data: st.DataObject) -> None:
        items = sorted({item for each in self.waiting.values() for item in each})
        item = data.draw(st.sampled_from(items))
        self.queue.add(owner, item)
        own = self.waiting.setdefault(owner, [])
        if item not in own:
            own.append(item)
        self.start()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.waiting)))
        item = data.draw(st.sampled_from(self.waiting[owner]))
        self.drop(owner, item)
        self.queue.remove(owner, item)
        self.queue.remove(owner, item)
        self.start()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        owner, item = data.draw(st.sampled_from(self.running))
        self.running.remove((owner, item))
        self.queue.done(owner)
        self.start()

    def drop(self, owner: str, item: int) -> None:
        self.waiting[owner].remove(item)
        if not self.waiting[owner]:
            del self.waiting[owner]
            del self.passed[owner]

    def running_of(self, owner: str) -> int:
        return sum(each == owner for each, _ in self.running)

    def start(self) -> None:
        while (found := self.queue.next()) is not None:
            owner, item = found
            # The first in its own queue.
            assert self.waiting[owner][0] == item
            if owner:
                assert "" not in self.waiting, "the operator's come first"
                own = self.running_of(owner)
                assert own < WORKERS_PER_OWNER
                for other in self.waiting.keys() - {owner}:
                    assert self.running_of(other) >= own, "the fewest come first"
                    if self.running_of(other) == own:
                        self.passed[other] += 1
                        assert self.passed[other] < 10, "in turn"
            self.drop(owner, item)
            del self.passed[owner]
            for other in list(self.waiting):
                if item in self.waiting[other]:
                    self.drop(other, item)
                    self.queue.remove(other, item)
            self.running.append((owner, item))
            theirs = sum(bool(each) for each, _ in self.running)
            assert len(self.running) <= WORKERS
            assert theirs <= OWNERS_WORKERS, "one is the operator's"
            if owner and self.running_of(owner) > 1:
                assert len(self.running) < WORKERS, "one is left"
                assert theirs < OWNERS_WORKERS, "for those with none"

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        free = WORKERS - len(self.running)
        theirs = OWNERS_WORKERS - sum(bool(each) for each, _ in self.running)
        for owner in self.waiting:
            if not owner:
                assert not free
            elif not self.running_of(owner):
                assert min(free, theirs) <= 0
            else:
                assert (
                    min(free, theirs) <= 1
                    or self.running_of(owner) >= WORKERS_PER_OWNER
                )
        assert self.queue.running == len(self.running)
        known = {*self.waiting, *(owner for owner, _ in self.running), ""}
        assert self.queue._owners.keys() == known, "nobody is remembered"


test_queue = FairQueueOfMany.TestCase
FairQueueOfMany.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
