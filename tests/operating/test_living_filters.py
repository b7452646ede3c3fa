"""Faults follow their relay's settings onto sessions that go on; on fakes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.filtering import FilterFactory
from relayd.core.session import Ending
from relayd.operating.living_filters import AT_ONCE, LivingFilters
from tests.conftest import LoggedFailures
from tests.support.own_filters import Makes, Own
from tests.support.relays import Relay


class Fault(FilterFactory):
    """Equal to others of its name, as those are that were made of the same words."""

    joins = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fault) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


class First(Fault):
    joins = False


A, B, C, FIRST, OTHER = Fault("a"), Fault("b"), Fault("c"), First("1"), First("2")


class Session:
    """One that is relayed.

    :ivar on: the names of its filters.
    """

    def __init__(self, number: int, *filters: Fault) -> None:
        self.session = SimpleNamespace(id=number, ending=None)
        self.bridge: Any = SimpleNamespace(closing=False)
        self.on = [each.name for each in filters]

    def change_filters(self, gone: list[Fault], new: list[Fault]) -> None:
        for each in gone:
            if each.name in self.on:
                self.on.remove(each.name)
        self.on += [each.name for each in new]


class Factory:
    def __init__(self, count: int, *filters: Fault) -> None:
        self.filters = filters
        self.sessions = [Session(number, *filters) for number in range(count)]
        self.registry = SimpleNamespace(living=lambda: list(self.sessions))

    def filter_by(self, filters: tuple[Fault, ...]) -> None:
        self.filters = filters

    @property
    def on(self) -> list[list[str]]:
        return [each.on for each in self.sessions]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def living(clock: Clock) -> LivingFilters:
    return LivingFilters(clock)


@pytest.mark.parametrize(
    ("before", "after", "on"),
    [
        ([], [A], ["a"]),
        ([A], [], []),
        ([A, B], [B, C], ["b", "c"]),
        # Another order is no change; nor is one that is built anew.
        ([A, B], [B, Fault("a")], ["a", "b"]),
        # What does not join stays as it was when the session began.
        ([FIRST, A], [OTHER, B], ["1", "b"]),
        ([], [FIRST], []),
        ([FIRST], [], ["1"]),
        # Two that are equal are two.
        ([A], [A, A], ["a", "a"]),
        ([A, B, A], [A], ["a"]),
        ([A, A], [], []),
    ],
)
def test_what_becomes_of_a_session(
    living: LivingFilters,
    clock: Clock,
    before: list[Fault],
    after: list[Fault],
    on: list[str],
) -> None:
    factory = Factory(2, *before)
    living.change([factory], before, after)
    assert factory.on == [on, on]
    # One that is not relayed yet is to have the same.
    assert [each.name for each in factory.filters] == on
    assert not clock.getDelayedCalls()


def test_a_session_whose_server_is_dialled_meanwhile(living: LivingFilters) -> None:
    """It began when its relay had no filters, or only this one."""
    own = Makes(Own)
    own.joins = True
    relay = Relay()
    for before, after in ([], [own]), ([own], []):
        relay.client()
        [protocol] = relay.factory.sessions.values()
        living.change([relay.factory], before, after)
        relay.server.dials[-1].connect()
        assert list(protocol.filtered) == [each.name for each in after]
        protocol.abort_session(Ending.KILLED)
        relay.clock.pump([0.0] * 4)
    relay.factory.stopFactory()


def test_those_of_earlier_changes_as_well(living: LivingFilters) -> None:
    older, old = Factory(1, FIRST, A), Factory(1, A, OTHER)
    living.change([older, old], [A, OTHER], [B])
    assert (older.on, old.on) == ([["1", "b"]], [["2", "b"]])


def test_many_follow_in_slices(living: LivingFilters, clock: Clock) -> None:
    """One slice in a turn; no timer is left."""
    factory = Factory(3 * AT_ONCE)
    living.change([factory], [], [A])
    for done in (1, 2, 3):
        assert factory.on.count(["a"]) == done * AT_ONCE
        # Another one is for the next turn.
        [call] = clock.getDelayedCalls()
        work = call.func
        call.cancel()
        work()
    assert not clock.getDelayedCalls()


def test_changes_wait_for_each_other(living: LivingFilters, clock: Clock) -> None:
    """Each session sees them in their order, whenever it began."""
    factory = Factory(2 * AT_ONCE)
    living.change([factory], [], [A])
    # It began since, with what its factory lists now.
    factory.sessions.insert(0, Session(99, *factory.filters))
    living.change([factory], [A], [B])
    living.change([factory], [B], [B, C])
    clock.advance(0)
    assert factory.on == [["b", "c"]] * (2 * AT_ONCE + 1)
    assert not clock.getDelayedCalls()


def test_one_that_is_not_relayed_any_more_or_again(
    living: LivingFilters, clock: Clock
) -> None:
    """Those that are joined later have what their factory lists: not twice."""
    factory = Factory(AT_ONCE + 5)
    unjoined, joined_again, ended, closing, goes_on = factory.sessions[:5]
    unjoined.bridge = None
    living.change([factory], [], [A])
    joined_again.bridge = SimpleNamespace(closing=False)
    unjoined.bridge = SimpleNamespace(closing=False)
    ended.session.ending = object()
    closing.bridge.closing = True
    clock.advance(0)
    assert [each.on for each in factory.sessions[:5]] == [[], [], [], [], ["a"]]
    assert goes_on.on == ["a"]


def test_a_session_that_fails_keeps_none_from_it(
    living: LivingFilters,
    logged_failures: LoggedFailures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factory = Factory(3)

    def fails(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(factory.sessions[1], "change_filters", fails)
    living.change([factory], [], [A])
    assert factory.on == [["a"], [], ["a"]]
    logged_failures.take("the filters of session 1 could not be changed")


def test_it_stops_with_the_process(living: LivingFilters, clock: Clock) -> None:
    factory = Factory(2 * AT_ONCE)
    living.change([factory], [], [A])
    living.stop()
    assert not clock.getDelayedCalls()
    living.stop()
