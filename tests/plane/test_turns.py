"""The turns of the plane: what goes on behind a batch, fails, or stops."""

from __future__ import annotations

import time

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

import relayd.plane.poller
from relayd.net.monotonic import LATE, MonotonicClock
from relayd.plane.poller import BATCHES_PER_TURN, Plane
from tests.conftest import LoggedFailures
from tests.support.standing import Still, still
from tests.support.watched import Watched, pair, plane

__all__ = ["pair", "plane", "still"]

_LOST = Failure(CONNECTION_LOST)


# -- turns


def test_what_asks_to_go_on_does_so_behind_the_batch(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """In the same turn, but not within the call that asked."""
    one, two = pair

    def go_on() -> None:
        if one.told == ["ready"]:
            plane.schedule(one)
            assert one.told == ["ready"]

    one.on = go_on
    for each in pair:
        each.far.send(b"x")
    still.turn()
    assert one.told == ["ready", "proceed"]
    assert two.told == ["ready"]
    assert not still.getDelayedCalls()


@pytest.mark.parametrize("watched", [True, False])
def test_outside_of_a_turn_the_reactor_is_asked_for_one(
    watched: bool, still: Still, plane: Plane
) -> None:
    """Once for all that go on, and even if the last descriptor was closed since."""
    one, two = Watched(plane), Watched(plane)
    if not watched:
        one.close()
        two.close()
    plane.schedule(one)
    plane.schedule(two)
    assert one.told == two.told == []
    assert len(still.getDelayedCalls()) == 1
    still.call_due()
    assert one.told == two.told == ["proceed"]
    one.close()
    two.close()


def test_one_that_always_goes_on_leaves_the_reactor_its_turn(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """Once a turn, then timers and other people's connections."""
    one, two = pair
    one.on = lambda: plane.schedule(one)
    one.far.send(b"x")
    plane.doRead()
    assert one.told == ["ready", "proceed"]
    # Others get theirs in each turn.
    two.far.send(b"x")
    plane.doRead()
    assert two.told == ["ready"]
    assert len(one.told) == 1 + 2
    # The reactor is asked once, and the next turn is timed, not waited for.
    assert len(still.getDelayedCalls()) == 1
    still.call_due()
    assert len(one.told) == 1 + 3
    one.on = lambda: None
    still.call_due()
    assert not still.getDelayedCalls()


def test_a_turn_takes_so_many_events(
    still: Still, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it leaves are in the next."""
    monkeypatch.setattr(relayd.plane.poller, "BATCH", 3)
    many = [Watched(plane) for _ in range(3 * BATCHES_PER_TURN + 2)]
    for each in many:
        each.far.send(b"x")
    plane.doRead()
    assert sum(map(len, (each.told for each in many))) == 3 * BATCHES_PER_TURN
    # Who judges by what has arrived waits for the rest.
    assert plane.has_more_events
    plane.doRead()
    assert not plane.has_more_events
    assert all(each.told == ["ready"] for each in many)
    for each in many:
        each.close()


def test_a_turn_that_takes_all_there_is_has_no_more_events(
    still: Still, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one that is closed before it could take the rest."""
    monkeypatch.setattr(relayd.plane.poller, "BATCH", 3)
    assert not plane.has_more_events
    many = [Watched(plane) for _ in range(3 * BATCHES_PER_TURN)]
    for each in many[1:]:
        each.far.send(b"x")
    plane.doRead()
    assert not plane.has_more_events
    for each in many:
        each.far.send(b"x")
    plane.doRead()
    assert plane.has_more_events
    for each in many:
        each.close()
    assert not plane.has_more_events


@pytest_twisted.ensureDeferred
async def test_a_late_clock_waits_until_all_that_has_arrived_was_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a real reactor that was busy meanwhile, for many more turns than it waits."""
    monkeypatch.setattr(relayd.plane.poller, "BATCH", 1)
    plane, clock = Plane.of(reactor), MonotonicClock.of(reactor)
    many = [Watched(plane) for _ in range(10 * BATCHES_PER_TURN)]
    judged: Deferred[list[list[str]]] = Deferred()
    clock.callLater(0.01, lambda: judged.callback([each.told[:] for each in many]))
    for each in many:
        each.far.send(b"x")
    time.sleep(0.02 + LATE)
    assert await judged == [["ready"]] * len(many)
    for each in many:
        each.close()


# -- defects of others


@pytest.mark.parametrize("within", ["ready", "proceed"])
def test_one_that_fails_does_not_cost_others_their_events(
    within: str,
    still: Still,
    plane: Plane,
    pair: tuple[Watched, Watched],
    logged_failures: LoggedFailures,
) -> None:
    """It is ended; the rest of the batch, whose edges are told once, is handed out."""

    def fail() -> None:
        raise ZeroDivisionError

    one, two = pair
    one.on = fail
    if within == "ready":
        one.far.send(b"x")
        two.far.send(b"x")
    else:
        plane.schedule(one)
        plane.schedule(two)
    still.turn()
    assert one.told == [within, "lost"]
    assert two.told == [within]
    assert "is ended" in logged_failures.take("ZeroDivisionError")


@pytest.mark.parametrize("problem", [ZeroDivisionError, SystemExit])
def test_a_call_behind_the_batch_that_fails_costs_nobody_else_anything(
    problem: type[BaseException],
    still: Still,
    plane: Plane,
    pair: tuple[Watched, Watched],
    logged_failures: LoggedFailures,
) -> None:
    """It is logged; the others are made, those watched are told, in this turn too."""
    one, two = pair
    made: list[str] = []

    def fail() -> None:
        made.append("fails")
        raise problem

    def ask() -> None:
        plane.after_batch(lambda: made.append("before"))
        plane.after_batch(fail)
        plane.after_batch(lambda: made.append("behind"))
        plane.schedule(two)

    one.on = ask
    one.far.send(b"x")
    still.turn()
    assert made == ["before", "fails", "behind"]
    logged_failures.take(problem.__name__)
    assert (one.told, two.told) == (["ready"], ["proceed"])
    # Nothing is called twice, and all goes on.
    one.on = lambda: None
    one.far.send(b"x")
    two.far.send(b"x")
    still.turn()
    assert made == ["before", "fails", "behind"]
    assert (one.told, two.told) == (["ready"] * 2, ["proceed", "ready"])


def test_a_call_behind_what_was_scheduled_waits_for_no_event(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """Nor does one that is asked for while no batch is handled."""
    one, two = pair
    made: list[list[str]] = []

    def ask() -> None:
        plane.behind_batch(lambda: made.append([*two.told]))
        if not two.told:
            assert not made
            plane.schedule(two)

    one.on = two.on = ask
    one.far.send(b"x")
    still.turn()
    # Asked for by an event, and by what that scheduled.
    assert made == [[], ["proceed"]]
    plane.behind_batch(lambda: made.append(["at once"]))
    assert made[2:] == [["at once"]]


@pytest.mark.parametrize("watched", [True, False])
def test_one_that_fails_is_not_told_to_go_on_for_ever(
    watched: bool, still: Still, plane: Plane, logged_failures: LoggedFailures
) -> None:
    """Those behind it go on, whether or not anything is watched."""

    def fail() -> None:
        raise ZeroDivisionError

    one, two = Watched(plane), Watched(plane)
    one.on = fail
    plane.schedule(one)
    plane.schedule(two)
    if not watched:
        one.close()
        two.close()
    still.turn()
    still.turn()
    assert one.told[0] == "proceed"
    assert one.told.count("proceed") == 1
    assert two.told == ["proceed"]
    logged_failures.take("ZeroDivisionError")
    one.close()
    two.close()


def test_one_that_can_not_even_be_ended_is_logged(
    still: Still,
    pair: tuple[Watched, Watched],
    logged_failures: LoggedFailures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    one, two = pair
    one.on = fail
    monkeypatch.setattr(one, "connectionLost", fail)
    one.far.send(b"x")
    two.far.send(b"x")
    still.turn()
    assert two.told == ["ready"]
    logged_failures.take("is ended")
    logged_failures.take("could not be ended")


# -- the reactor stops


def test_the_reactor_stops_and_so_does_all_that_is_watched(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    plane.connectionLost(_LOST)
    assert [each.told for each in pair] == [["lost"], ["lost"]]
    assert (plane.fileno(), still.readers) == (-1, set())


def test_what_was_closed_as_the_reactor_stops_is_not_told(
    plane: Plane, pair: tuple[Watched, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is lost gives up its dial, which is watched as well."""
    for each, other in (pair, pair[::-1]):

        def lost(_: Failure, me: Watched = each, other: Watched = other) -> None:
            me.told.append("lost")
            me.close()
            other.close()

        monkeypatch.setattr(each, "connectionLost", lost)
    plane.connectionLost(_LOST)
    assert sorted(each.told for each in pair) == [[], ["lost"]]


def test_all_are_told_that_the_reactor_stops(
    still: Still, plane: Plane, logged_failures: LoggedFailures
) -> None:
    """One that fails then does not keep it from the others, before or behind it."""

    def fail(_: Failure) -> None:
        raise ZeroDivisionError

    many = [Watched(plane) for _ in range(3)]
    many[1].connectionLost = fail  # type: ignore[method-assign, assignment]
    plane.connectionLost(_LOST)
    assert many[0].told == many[2].told == ["lost"]
    logged_failures.take("ZeroDivisionError")
    many[1].close()


def test_one_that_closes_its_own_socket_as_the_reactor_stops_is_forgotten(
    still: Still, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener does: nothing is watched after that, whoever closed it."""
    one = Watched(plane)
    monkeypatch.setattr(one, "connectionLost", lambda _: one.near.close())
    plane.connectionLost(_LOST)
    one.far.close()
    assert (plane.fileno(), still.readers) == (-1, set())


@pytest.mark.parametrize("waiting", [1, 3])
def test_the_reactor_may_be_stopped_by_an_event(
    still: Still, plane: Plane, waiting: int
) -> None:
    """The end of the last session is one; nobody hears of the rest of the batch."""
    many = [Watched(plane) for _ in range(waiting)]
    for each in many:
        each.on = lambda: plane.connectionLost(_LOST)
        each.far.send(b"x")
    still.turn()
    assert sorted(each.told for each in many) == [
        *[["lost"]] * (waiting - 1),
        ["ready", "lost"],
    ]
    assert (plane.fileno(), still.readers) == (-1, set())


def test_what_is_opened_by_an_event_that_stopped_the_reactor_is_watched(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """It has the number of one that had an event in the batch, but none itself yet."""
    late: list[Watched] = []

    def stop() -> None:
        plane.connectionLost(_LOST)
        late.append(Watched(plane))
        late[0].far.send(b"x")

    for each in pair:
        each.on = stop
        each.far.send(b"x")
    still.turn()
    assert [each.told for each in late] == [[]]
    still.turn()
    assert late[0].told == ["ready"]
    late[0].close()
