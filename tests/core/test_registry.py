"""The registry: list, abort, drain and reopen, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock

from relayd.core.registry import Registry
from tests.conftest import LoggedFailures


class Owner:
    """Has members that are numbers, and ends them at once, or when told to.

    :ivar lingering: those that were aborted and have not ended yet.
    :ivar drains: how often a drain has left nobody.
    """

    def __init__(self, *, slow: bool = False) -> None:
        self.clock = Clock()
        self.members: dict[int, None] = {}
        self.slow = slow
        self.lingering: list[int] = []
        self.drains = 0
        self.defect: int | None = None
        self.registry: Registry[str, int] = Registry(
            self.members, self.clock, id_of=str, abort=self._abort, drained=self._over
        )

    def _over(self) -> None:
        assert not self.members
        self.drains += 1

    def _abort(self, member: int) -> None:
        if member == self.defect:
            raise ZeroDivisionError("in abort")
        self.lingering.append(member)
        if not self.slow:
            self.end(member)

    def add(self, *members: int) -> None:
        assert not self.registry.draining
        self.members |= dict.fromkeys(members)

    def end(self, member: int) -> None:
        self.members.pop(member, None)
        if self.registry.draining:
            self.registry.check()

    def drain(self, timeout: float) -> list[Any]:
        done: list[Any] = []
        self.registry.drain(timeout).addBoth(done.append)
        return done


def test_those_that_live_are_listed_by_id() -> None:
    owner = Owner()
    owner.add(3, 1)
    assert list(owner.registry.by_id().items()) == [("3", 3), ("1", 1)]
    owner.end(3)
    assert owner.registry.by_id() == {"1": 1}


def test_a_drain_without_members_is_over_at_once() -> None:
    owner = Owner()
    assert owner.drain(10) == [None]
    assert owner.registry.draining
    assert owner.drains == 1
    assert not owner.clock.getDelayedCalls()


def test_a_drain_waits_for_the_last() -> None:
    owner = Owner()
    owner.add(1, 2)
    done, again = owner.drain(10), owner.drain(0.1)
    owner.end(1)
    # The second call has not changed the time.
    owner.clock.advance(9)
    assert not done
    owner.end(2)
    assert done == again == [None]
    assert not owner.lingering
    assert not owner.clock.getDelayedCalls()
    owner.registry.check()
    assert owner.drains == 1


def test_what_has_not_ended_in_time_is_aborted() -> None:
    owner = Owner(slow=True)
    owner.add(1, 2)
    done = owner.drain(10)
    owner.clock.advance(9.9)
    assert not owner.lingering
    owner.clock.advance(0.1)
    assert owner.lingering == [1, 2]
    # Aborted is not ended.
    assert not done
    owner.end(1)
    owner.end(2)
    assert done == [None]


def test_a_second_drain_may_end_the_first() -> None:
    owner = Owner()
    owner.add(1)
    first = owner.drain(10)
    assert owner.drain(0) == first == [None]
    assert not owner.clock.getDelayedCalls()


def test_all_are_aborted_without_a_drain() -> None:
    owner = Owner()
    owner.add(1, 2)
    owner.registry.abort_all()
    assert not owner.members
    assert not owner.registry.draining
    assert not owner.drains
    owner.add(3)


def test_one_that_can_not_be_aborted_keeps_no_other(
    logged_failures: LoggedFailures,
) -> None:
    owner = Owner()
    owner.add(1, 2, 3)
    owner.defect = 2
    done = owner.drain(0)
    logged_failures.take("2 could not be aborted")
    assert owner.lingering == [1, 3]
    assert not done
    owner.end(2)
    assert done == [None]


def test_to_reopen_ends_a_drain() -> None:
    owner = Owner()
    owner.add(1)
    done = owner.drain(10)
    owner.registry.reopen()
    assert done == [None]
    assert owner.drains == 0
    assert not owner.clock.getDelayedCalls()
    owner.add(2)
    owner.clock.advance(20)
    assert list(owner.members) == [1, 2]
    # A drain of its own, with its own time.
    done = owner.drain(5)
    owner.clock.advance(4.9)
    assert not done
    owner.clock.advance(0.2)
    assert done == [None]


def test_who_waits_may_reopen_at_once() -> None:
    owner = Owner()
    owner.add(1)
    owner.registry.drain(10).addCallback(lambda _: owner.registry.reopen())
    last = owner.drain(10)
    owner.end(1)
    assert last == [None]
    owner.add(2)
    assert not owner.registry.draining


def test_who_waits_may_give_up() -> None:
    owner = Owner()
    owner.add(1)
    waiting = owner.registry.drain(10)
    given_up: list[Any] = []
    waiting.addErrback(given_up.append)
    waiting.cancel()
    other = owner.drain(10)
    owner.end(1)
    assert other == [None]
    assert given_up[0].check(CancelledError)


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("drain"), st.sampled_from([0, 1, 3])),
        st.tuples(st.just("time"), st.sampled_from([0.5, 1, 3])),
        st.tuples(st.sampled_from(["abort_all", "reopen"]), st.none()),
    ),
    max_size=30,
)


@given(_STEPS, st.booleans())
def test_any_order(steps: list[tuple[str, Any]], slow: bool) -> None:
    """Who waits hears once, in time; nothing is aborted but for a reason."""
    owner = Owner(slow=slow)
    registry, clock = owner.registry, owner.clock
    waiting: list[list[Any]] = []
    #: When the members of the drain are aborted at the latest.
    limit: float | None = None
    for what, value in steps:
        aborted = len(owner.lingering)
        if what == "add" and not registry.draining:
            owner.add(value)
        elif what == "end":
            owner.end(value)
        elif what == "drain":
            if not registry.draining:
                limit = clock.seconds() + value
            waiting.append(owner.drain(value))
        elif what == "time":
            clock.advance(value)
        elif what == "abort_all":
            registry.abort_all()
        elif what == "reopen":
            registry.reopen()
            limit = None
        late = limit is not None and clock.seconds() >= limit
        if not (late or what == "abort_all" or (what, value) == ("drain", 0)):
            assert len(owner.lingering) == aborted
        if late:
            assert set(owner.members) <= set(owner.lingering)
        over = not owner.members or not registry.draining
        assert all(done in ([], [None]) for done in waiting)
        assert all(waiting) if over else not waiting[-1]
        # The timer of a drain that is under way, and no other.
        assert len(clock.getDelayedCalls()) <= (not over)
