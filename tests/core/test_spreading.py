"""Idle members in a drain: ended one after another, those in use not at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core import spreading
from relayd.core.registry import Registry
from relayd.core.spreading import IDLE_AFTER, LOOKS, STEPS, Idleness
from tests.conftest import LoggedFailures


class Member:
    """One that lives.

    :ivar moved: when something moved last.
    :ivar waits: it is quiet, but in use.
    :ivar unsure: whether it is can't be told.
    """

    def __init__(
        self, moved: float, *, waits: bool = False, unsure: bool = False
    ) -> None:
        self.moved, self.waits, self.unsure = moved, waits, unsure
        self.asked = 0


class Owner:
    """Has members, and notes when each ended.

    :ivar idle_ends: those that were idle, with the time.
    :ivar aborts: those that were aborted at the limit, with the time.
    """

    def __init__(self, *members: Member) -> None:
        self.clock = Clock()
        self.clock.advance(100)
        self.members = dict.fromkeys(members)
        self.idle_ends: list[tuple[Member, float]] = []
        self.aborts: list[tuple[Member, float]] = []
        self.broken: list[Member] = []
        self.registry: Registry[int, Member] = Registry(
            self.members,
            self.clock,
            id_of=id,
            abort=self._abort,
            idleness=Idleness(lambda each: each.moved, self._end),
        )

    @property
    def now(self) -> float:
        return self.clock.seconds() - 100

    def _abort(self, member: Member) -> None:
        self.aborts.append((member, self.now))
        self.gone(member)

    def _end(self, member: Member, idle_after: float, in_doubt: bool) -> bool:
        member.asked += 1
        if member not in self.members or (member.unsure and not in_doubt):
            return False
        if member in self.broken:
            raise ZeroDivisionError("in end")
        if member.waits or self.clock.seconds() - member.moved < idle_after:
            return False
        self.idle_ends.append((member, self.now))
        self.gone(member)
        return True

    def gone(self, member: Member) -> None:
        del self.members[member]
        self.registry.check()

    def drain(self, limit: float) -> list[Any]:
        done: list[Any] = []
        self.registry.drain(limit).addBoth(done.append)
        return done

    def run(self, seconds: float, step: float = 0.01) -> None:
        for _ in range(round(seconds / step)):
            self.clock.advance(step)


def quiet(count: int) -> list[Member]:
    """Idle for long, each for a second less than the one before."""
    return [Member(number) for number in range(count)]


def test_idle_ones_are_ended_one_after_another() -> None:
    """Over the whole time, in equal distances, the longest idle first."""
    members = quiet(9)
    owner = Owner(*reversed(members))
    done = owner.drain(10)
    owner.run(10)
    assert done == [None]
    assert not owner.aborts
    ended = owner.idle_ends
    assert [member for member, _ in ended] == members
    assert [when for _, when in ended] == pytest.approx(
        [10 * (number + 0.5) / 9 for number in range(9)], abs=0.15
    )
    assert not owner.clock.getDelayedCalls()


def test_those_that_may_be_idle_are_ended_in_the_second_half() -> None:
    """One after another as well: at the limit they would be ended all at once."""
    members = [Member(number, unsure=True) for number in range(10)]
    waits = Member(0, waits=True)
    owner = Owner(*members, waits)
    owner.drain(10)
    owner.run(4.9)
    assert not owner.idle_ends
    owner.run(5.2)
    assert [member for member, _ in owner.idle_ends] == members
    assert [when for _, when in owner.idle_ends] == pytest.approx(
        [5 + 5 * (number + 0.5) / 10 for number in range(10)], abs=0.3
    )
    assert [member for member, _ in owner.aborts] == [waits]


def test_thousands_are_ended_in_equal_shares() -> None:
    owner = Owner(*(Member(0) for _ in range(5000)))
    owner.drain(10)
    owner.run(5)
    assert len(owner.idle_ends) == pytest.approx(2500, abs=60)
    at_once = {when: 0 for _, when in owner.idle_ends}
    for _, when in owner.idle_ends:
        at_once[when] += 1
    assert max(at_once.values()) <= 5000 / STEPS + 1
    owner.registry.abort_all()


def test_those_in_use_have_the_whole_time() -> None:
    """What moves, and what is quiet but waits for an answer."""
    idle, moves, waits = Member(0), Member(0), Member(0, waits=True)
    owner = Owner(moves, waits, idle)
    done = owner.drain(10)
    for _ in range(99):
        moves.moved = owner.clock.seconds()
        owner.run(0.1)
    assert [member for member, _ in owner.idle_ends] == [idle]
    assert not done
    owner.run(0.1)
    assert [member for member, _ in owner.aborts] == [moves, waits]
    assert done == [None]
    # Nothing has moved since it was found to wait.
    assert waits.asked == 1


def test_one_that_becomes_idle_is_ended_as_well() -> None:
    """It has waited, it was answered, and then nothing moves for some seconds."""
    waits = Member(-1, waits=True)
    owner = Owner(waits, *quiet(3))
    owner.drain(20)
    owner.run(8)
    assert waits.asked
    waits.waits, waits.moved = False, owner.clock.seconds()
    owner.run(12 - 0.1)
    [when] = [when for member, when in owner.idle_ends if member is waits]
    assert when >= 8 + IDLE_AFTER
    owner.registry.abort_all()


def test_a_step_looks_at_few() -> None:
    """However many there are that wait."""
    members = [Member(0, waits=True) for _ in range(100 * LOOKS)]
    owner = Owner(*members, idle := Member(50))
    owner.drain(10)
    owner.run(10 / STEPS)
    assert sum(each.asked for each in members) <= LOOKS
    owner.run(10 - 10 / STEPS - 0.01)
    assert sum(each.asked for each in members) <= LOOKS * STEPS
    assert not owner.aborts
    owner.run(0.02)
    assert len(owner.aborts) == len(members) + (idle in dict(owner.aborts))


def test_a_short_drain_has_a_short_patience() -> None:
    """Or it would find nobody idle; and one that is over at once has no step."""
    owner = Owner(Member(99.7), Member(99.95))
    owner.drain(1)
    owner.run(0.99)
    assert owner.idle_ends
    owner = Owner(*quiet(3))
    assert owner.drain(0) == [None]
    assert not owner.idle_ends
    owner = Owner(*quiet(3))
    owner.drain(0.01)
    owner.run(0.01)
    assert len(owner.aborts) == 3
    assert not owner.idle_ends


def test_a_late_reactor_ends_no_more_than_is_due() -> None:
    """A step that comes late is one step, and the limit comes when it should."""
    owner = Owner(*quiet(90))
    done = owner.drain(10)
    owner.clock.advance(5)
    assert len(owner.idle_ends) <= 2
    owner.run(4.9)
    assert len(owner.idle_ends) == pytest.approx(90, abs=4)
    owner.clock.advance(30)
    assert done == [None]
    assert not owner.clock.getDelayedCalls()


def test_one_that_can_not_be_ended_keeps_no_other(
    logged_failures: LoggedFailures,
) -> None:
    first, *others = quiet(4)
    owner = Owner(first, *others)
    owner.broken.append(first)
    done = owner.drain(10)
    owner.run(9.9)
    logged_failures.take("an idle member could not be ended")
    assert {member for member, _ in owner.idle_ends} <= set(others)
    assert len(owner.idle_ends) >= 2
    owner.run(0.2)
    assert done == [None]


def test_a_defect_of_the_search_keeps_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = Owner(*quiet(4))

    def search(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(spreading.Spread, "_search", search)
    done = owner.drain(10)
    for _ in range(400):
        try:
            owner.clock.advance(0.05)
        except ZeroDivisionError:
            # A reactor logs it, and goes on.
            continue
    assert done == [None]
    assert [when for _, when in owner.aborts] == pytest.approx([10] * 4, abs=0.06)


def test_to_reopen_ends_the_steps() -> None:
    owner = Owner(*quiet(4))
    owner.drain(10)
    owner.run(5)
    owner.registry.reopen()
    left = len(owner.members)
    assert left
    owner.run(10)
    assert len(owner.members) == left


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["move", "wait", "answer", "leave", "time"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=8),
    st.sampled_from([0.05, 1, 4, 30, 400]),
    _ACTIONS,
)
def test_whatever_happens(
    moved: list[float], limit: float, actions: list[tuple[str, int]]
) -> None:
    """Nobody in use is ended before the limit, nobody at all after it."""
    members = [Member(when) for when in moved]
    owner = Owner(*members)
    done = owner.drain(limit)
    idle_after = min(IDLE_AFTER, limit / 4)
    for what, number in actions:
        member = members[number % len(members)]
        before = len(owner.idle_ends)
        if member not in owner.members and what != "time":
            continue
        if what == "move":
            member.moved = owner.clock.seconds()
        elif what == "wait":
            member.waits = True
        elif what == "answer":
            member.waits, member.moved = False, owner.clock.seconds()
        elif what == "leave":
            owner.gone(member)
        else:
            owner.clock.advance(limit * number / 40)
        for ended, when in owner.idle_ends[before:]:
            assert not ended.waits
            assert when + 100 - ended.moved >= idle_after
        assert len(owner.clock.getDelayedCalls()) == bool(owner.members)
        assert bool(done) == (not owner.members)
        assert owner.now < limit - 1e-9 or done
    owner.clock.advance(limit)
    assert done == [None]
    assert all(when >= limit - 1e-9 for _, when in owner.aborts)
    assert not owner.clock.getDelayedCalls()


@given(st.integers(1, 400), st.sampled_from([1.0, 10.0, 60.0]))
def test_the_ends_are_spread(count: int, limit: float) -> None:
    """At any time as many have ended as the time that has passed, within two steps'."""
    owner = Owner(*(Member(0) for _ in range(count)))
    owner.drain(limit)
    step = max(limit / STEPS, 0.02)
    for passed in range(1, round(limit / step)):
        owner.clock.advance(step)
        due = count * passed * step / limit
        assert abs(len(owner.idle_ends) - due) <= 2 + 2 * count * step / limit
    owner.clock.advance(2 * step)
    assert not owner.members
