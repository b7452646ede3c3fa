"""The plane's epoll: who is told of what and when, and what is held meanwhile."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

import relayd.plane.poller
from relayd.net.monotonic import LATE, MonotonicClock
from relayd.plane import obstacle
from relayd.plane.poller import BATCHES_PER_TURN, Plane
from tests.conftest import LoggedFailures, descriptors
from tests.support.standing import Still, refuse, still

__all__ = ["still"]

_LOST = Failure(CONNECTION_LOST)

_EDGE = select.EPOLLIN | select.EPOLLET


class Watched:
    """One end of a pair of sockets, on the plane; keeps what it is told.

    :ivar on: what to do when it is told that it is ready, or to proceed.
    :ivar far: the other end.
    """

    def __init__(self, plane: Plane, mask: int = _EDGE) -> None:
        self.plane = plane
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.told: list[str] = []
        self.masks: list[int] = []
        self.on: Callable[[], object] = lambda: None
        try:
            plane.watch(self.near.fileno(), self, mask)
        except OSError:
            self.near.close()
            self.far.close()
            raise

    def ready(self, mask: int) -> None:
        self.told.append("ready")
        self.masks.append(mask)
        self.on()

    def proceed(self) -> None:
        self.told.append("proceed")
        self.on()

    def connectionLost(self, reason: Failure) -> None:
        self.told.append("lost")
        self.close()

    def close(self) -> None:
        self.plane.unwatch_and_close(self.near)
        self.far.close()


@pytest.fixture
def plane(still: Still) -> Plane:
    """The plane of a reactor that stands still."""
    return Plane.of(still)


@pytest.fixture
def pair(plane: Plane) -> Iterator[tuple[Watched, Watched]]:
    """Two that are watched."""
    two = Watched(plane), Watched(plane)
    yield two
    for each in two:
        each.close()


# -- where it works


def test_it_needs_linux_and_a_reactor_that_watches_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anywhere else a relay has Twisted's transports."""
    assert bool(obstacle(reactor)) is (sys.platform != "linux")
    assert obstacle(Clock()) == "Clock watches no descriptors"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "darwin")
        assert obstacle(reactor) == "this is darwin"
    with monkeypatch.context() as patched:
        # An interpreter that was built without it.
        patched.delattr(select, "epoll")
        assert obstacle(reactor)


class Deaf(nullcontext[Any]):
    """An epoll that a sandbox lets nobody use."""

    def __init__(self) -> None:
        super().__init__(self)
        self.register = refuse(errno.EACCES)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: refuse(errno.EPERM)(), "epoll is refused (Operation not permitted)"),
        (lambda: refuse(errno.ENOSYS)(), "epoll is refused (Function not implemented)"),
        (Deaf, "epoll is refused (Permission denied)"),
        (lambda: refuse(errno.EMFILE)(), ""),
    ],
)
def test_an_epoll_that_is_refused_is_found_out(
    made: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not one for which there is no descriptor at the moment."""
    before = descriptors()
    monkeypatch.setattr(select, "epoll", made)
    assert obstacle(reactor) == why
    assert descriptors() == before


def test_a_reactor_has_one_plane_and_takes_it_along() -> None:
    """A program that makes a reactor after another does not pile them up."""
    first, second = Still(), Still()
    assert Plane.of(first) is Plane.of(first)
    assert Plane.of(first) is not Plane.of(second)
    forgotten = weakref.ref(Plane.of(first)), weakref.ref(first)
    del first
    gc.collect()
    assert [each() for each in forgotten] == [None, None]
    assert Plane.of(second).reactor.seconds() == 0


def test_it_is_what_twisted_calls_a_reader(plane: Plane) -> None:
    assert verifyObject(IReadDescriptor, plane)
    assert plane.logPrefix() == "relayd plane"


# -- what is held


def test_nothing_is_held_while_nothing_is_watched(still: Still, plane: Plane) -> None:
    """No descriptor, no reader; as often as it comes to that."""
    before = descriptors()
    for _ in range(3):
        assert (plane.fileno(), still.readers) == (-1, set())
        one, two = Watched(plane), Watched(plane)
        assert still.readers == {plane}
        assert plane.fileno() in descriptors()
        one.close()
        assert still.readers == {plane}
        plane.unwatch(two.near.fileno())
        assert (plane.fileno(), still.readers) == (-1, set())
        two.close()
        assert descriptors() == before


def test_what_ends_within_a_turn_is_let_go_behind_it(
    still: Still, plane: Plane
) -> None:
    """The rest of the turn still needs the epoll."""
    one = Watched(plane)
    one.on = one.close
    one.far.send(b"x")
    still.turn()
    assert one.told == ["ready"]
    assert (plane.fileno(), still.readers) == (-1, set())
    # The reactor may have had the event of the next turn already.
    plane.doRead()


def test_a_descriptor_that_the_kernel_does_not_watch_is_refused(
    still: Still, plane: Plane
) -> None:
    """A file, or one more than it has memory for; nothing is left of the attempt."""
    with open(__file__) as file:
        for first in (True, False):
            others = [] if first else [Watched(plane)]
            with pytest.raises(PermissionError):
                plane.watch(file.fileno(), None, _EDGE)  # type: ignore[arg-type]
            assert bool(still.readers) is not first
            for other in others:
                other.far.send(b"x")
                still.turn()
                assert other.told == ["ready"]
                other.close()


def test_a_reactor_that_refuses_the_epoll_is_asked_again(
    still: Still, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be short of memory for a moment; the plane must not stay deaf."""
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(still, "addReader", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            Watched(plane)
    assert plane.fileno() == -1
    assert descriptors() == before
    one = Watched(plane)
    one.far.send(b"x")
    still.turn()
    assert one.told == ["ready"]
    one.close()


def test_no_descriptor_for_the_epoll_is_an_error_of_whoever_asked(
    still: Still, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(select, "epoll", refuse(errno.EMFILE))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            Watched(plane)
    assert not still.readers
    Watched(plane).close()


# -- events


def test_an_event_is_handed_to_its_handler(
    still: Still, pair: tuple[Watched, Watched]
) -> None:
    one, two = pair
    two.far.send(b"x")
    still.turn()
    assert (one.told, two.told) == ([], ["ready"])
    assert two.masks == [select.EPOLLIN]
    # An edge is told once.
    still.turn()
    assert two.told == ["ready"]


def test_what_is_not_watched_any_more_is_not_reported(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """It stays open, and can be watched again."""
    one, _ = pair
    number = one.near.fileno()
    plane.unwatch(number)
    one.far.send(b"x")
    still.turn()
    assert one.told == []
    assert one.near.recv(1) == b"x"
    plane.unwatch(number)
    one.far.send(b"y")
    plane.watch(number, one, _EDGE)
    still.turn()
    assert one.told == ["ready"]


def test_what_never_was_watched_can_be_unwatched(still: Still, plane: Plane) -> None:
    """A listener that pauses is stopped all the same."""
    plane.unwatch(0)
    with socket.socket() as sock:
        one = Watched(plane)
        plane.unwatch(sock.fileno())
        plane.unwatch(5000)
        assert still.readers == {plane}
        one.close()
        plane.unwatch_and_close(sock)
    plane.change_mask(0, _EDGE)


def test_more_can_be_asked_for_and_is_told_at_once(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """Room to write has no edge if it was there before anyone asked."""
    one, _ = pair
    still.turn()
    assert one.told == []
    plane.change_mask(one.near.fileno(), _EDGE | select.EPOLLOUT)
    still.turn()
    assert one.masks == [select.EPOLLOUT]


def test_a_descriptor_can_change_hands(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """A dial's becomes its connection's."""
    one, two = pair
    plane.hand_over(one.near.fileno(), two)
    one.far.send(b"x")
    still.turn()
    assert (one.told, two.told) == ([], ["ready"])
    plane.hand_over(one.near.fileno(), one)


# -- one batch


def closing_each_other(pair: tuple[Watched, Watched]) -> None:
    """Whichever is told first closes the other."""
    one, two = pair
    one.on, two.on = two.close, one.close
    for each in pair:
        each.far.send(b"x")


def test_an_event_of_what_was_closed_before_it_is_dropped(
    still: Still, pair: tuple[Watched, Watched]
) -> None:
    """Both are in the same batch."""
    closing_each_other(pair)
    still.turn()
    assert sorted(each.told for each in pair) == [[], ["ready"]]


def test_an_event_is_not_for_whoever_got_the_number_since(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """A socket that was opened within a batch has no event in it; later it has."""
    fresh: list[Watched] = []

    def replace(other: Watched) -> None:
        number = other.near.fileno()
        # Only the one that is watched; the plain end keeps its number.
        plane.unwatch_and_close(other.near)
        fresh.append(Watched(plane))
        assert fresh[0].near.fileno() == number
        fresh[0].far.send(b"for the new one")

    one, two = pair
    one.on, two.on = lambda: replace(two), lambda: replace(one)
    for each in pair:
        each.far.send(b"x")
    seen: list[list[str]] = []
    # A third has an event behind theirs, and sees how far it was then.
    third = Watched(plane)
    third.on = lambda: seen.append(list(fresh[0].told))
    third.far.send(b"x")
    still.turn()
    assert sorted(each.told for each in pair) == [[], ["ready"]]
    assert seen == [[]]
    # In the next batch, which is the same turn's.
    assert fresh[0].told == ["ready"]
    fresh[0].close()
    third.close()


def test_an_event_of_what_was_unwatched_before_it_is_dropped(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """A listener may be stopped by a connection that ends."""
    one, two = pair
    one.on = lambda: plane.unwatch(two.near.fileno())
    two.on = lambda: plane.unwatch(one.near.fileno())
    for each in pair:
        each.far.send(b"x")
    still.turn()
    assert sorted(each.told for each in pair) == [[], ["ready"]]


def test_an_event_that_is_nobodys_is_dropped(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """A child process that is being forked holds the socket for a moment more."""
    one, two = pair
    child = os.dup(one.near.fileno())
    try:
        plane.unwatch_and_close(one.near)
        one.far.send(b"x")
        two.far.send(b"x")
        still.turn()
    finally:
        os.close(child)
    assert (one.told, two.told) == ([], ["ready"])


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
