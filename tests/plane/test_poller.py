"""The plane's epoll: where it works, what it holds, and the events of one batch."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from relayd.plane import obstacle
from relayd.plane.poller import Plane
from tests.conftest import descriptors
from tests.support.standing import Still, refuse, still
from tests.support.watched import _EDGE, Watched, pair, plane

__all__ = ["pair", "plane", "still"]

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


@contextmanager
def child() -> Iterator[None]:
    """A child of this process, which holds all descriptors until the block ends."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        theirs.recv(1)
        os._exit(0)
    try:
        yield
    finally:
        ours.close()
        theirs.close()
        os.waitpid(pid, 0)


#: Python 3.12 warns whoever forks, as pytest's workers have threads.
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@may_fork
def test_an_event_of_what_a_child_holds_is_not_for_whoever_got_the_number_since(
    still: Still, plane: Plane, pair: tuple[Watched, Watched]
) -> None:
    """The socket is closed here alone, so the kernel still knows it."""
    one, _ = pair
    number = one.near.fileno()
    with child():
        plane.unwatch_and_close(one.near)
        fresh = Watched(plane)
        assert fresh.near.fileno() == number
        one.far.send(b"x")
        still.turn()
        assert fresh.told == []
        fresh.far.send(b"x")
        still.turn()
        assert fresh.told == ["ready"]
        fresh.close()


@may_fork
def test_what_a_child_has_unregistered_is_closed_all_the_same(plane: Plane) -> None:
    """The epoll is its own as well.  So is what was never watched."""
    before = descriptors()
    with child():
        one = Watched(plane)
        with select.epoll.fromfd(os.dup(plane.fileno())) as same:
            same.unregister(one.near.fileno())
        one.close()
        plane.unwatch_and_close(socket.socket())
        assert plane.fileno() == -1
    assert descriptors() == before


@may_fork
@pytest.mark.cost
def test_a_close_is_one_call_where_nobody_has_forked(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of cost.  The kernel unregisters what is closed."""

    class Counting:
        unregistered = 0

        def __init__(self) -> None:
            self.really = select_epoll()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.really, name)

        def unregister(self, descriptor: int) -> None:
            Counting.unregistered += 1
            self.really.unregister(descriptor)

    select_epoll = select.epoll
    monkeypatch.setattr(select, "epoll", Counting)
    Watched(plane).close()
    assert Counting.unregistered == 0
    with child():
        Watched(plane).close()
    assert Counting.unregistered == 1
