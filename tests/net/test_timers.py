"""What wakes a reactor: a timerfd, a thread, or its own timer."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import deferLater
from zope.interface.verify import verifyObject

from relayd.net.monotonic import (
    MonotonicClock,
)
from tests.conftest import descriptors

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="timerfd(2) is Linux's")

live: Any = reactor


# -- on a real reactor


def waiting(seconds: float) -> Deferred[None]:
    return deferLater(MonotonicClock.of(reactor), seconds)


async def rests() -> None:
    """Wait until the reactor holds nothing of the clock's."""
    for _ in range(200):
        await deferLater(reactor, 0.005)
        if MonotonicClock.of(reactor)._timer is None:
            return
    raise AssertionError("it holds its timer")


@LINUX
@pytest_twisted.ensureDeferred
async def test_a_timerfd_is_watched_while_a_call_is_pending() -> None:
    clock = MonotonicClock.of(reactor)
    before = descriptors()
    pause = waiting(0.02)
    [added] = [what for n, what in descriptors().items() if n not in before]
    assert added == "anon_inode:[timerfd]"
    [reader] = [each for each in live.getReaders() if each is clock._timer]
    assert verifyObject(IReadDescriptor, reader)
    assert reader.logPrefix() == "relayd timer"
    flags = Path(f"/proc/self/fdinfo/{reader.fileno()}").read_text()
    assert int(flags.split("flags:")[1].split()[0], 8) & os.O_NONBLOCK
    assert not os.get_inheritable(reader.fileno())
    await pause
    await rests()
    assert reader not in live.getReaders()
    assert descriptors() == before


@LINUX
@pytest_twisted.ensureDeferred
async def test_a_due_timerfd_causes_no_busy_loop() -> None:
    """The event of a timer that is set again is gone."""
    clock = MonotonicClock.of(reactor)
    woken: list[float] = []
    timer: Any = None
    long = clock.callLater(60, woken.append, 0)
    timer = clock._timer
    told = timer.doRead
    timer.doRead = lambda: (woken.append(time.monotonic()), told())
    for _ in range(3):
        await waiting(0.01)
    await deferLater(reactor, 0.05)
    assert len(woken) <= 6
    long.cancel()
    await rests()


def _refuse(number: int) -> Callable[..., int]:
    def call(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("timerfd_create", errno.ENOSYS),
        ("timerfd_create", errno.EPERM),
        ("timerfd_create", errno.EMFILE),
        ("timerfd_settime", errno.EPERM),
        ("timerfd_settime", errno.EOPNOTSUPP),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_thread_waits_where_there_is_no_timerfd(
    what: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"relayd.net.timers.{what}", _refuse(number))
    await _by_thread()


@pytest_twisted.ensureDeferred
async def test_a_thread_waits_where_the_reactor_watches_no_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interface = SimpleNamespace(providedBy=lambda _: False)
    monkeypatch.setattr("relayd.net.timers.IReactorFDSet", interface)
    await _by_thread()


def timer_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "relayd timer"]


async def _by_thread() -> None:
    # One that was closed may not have noticed yet.
    before, others = descriptors(), timer_threads()
    clock = MonotonicClock.of(reactor)
    made: list[int] = []
    begin = time.monotonic()
    long = clock.callLater(60, made.append, 60)
    clock.callLater(0.01, made.append, 1)
    clock.callLater(0.03, made.append, 3)
    [thread] = [each for each in timer_threads() if each not in others]
    assert thread.daemon
    assert descriptors() == before
    await waiting(0.04)
    assert made == [1, 3]
    assert time.monotonic() - begin >= 0.04
    long.cancel()
    await rests()
    thread.join(5)
    assert not thread.is_alive()
    # And again.
    await waiting(0.001)
    await rests()


@LINUX
@pytest_twisted.ensureDeferred
async def test_a_timerfd_that_can_not_be_set_any_more_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sandbox that was shut meanwhile."""
    before, others = descriptors(), timer_threads()
    pause = waiting(0.3)
    monkeypatch.setattr("relayd.net.timers.timerfd_settime", _refuse(errno.EPERM))
    await waiting(0.01)
    assert descriptors() == before
    assert [each for each in timer_threads() if each not in others]
    await pause
    await rests()


@LINUX
@pytest_twisted.ensureDeferred
async def test_no_descriptor_is_left_if_it_can_not_be_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(live, "addReader", _refuse(errno.ENOSPC))
        pause = waiting(0.01)
    assert descriptors() == before
    await pause
    await rests()


@pytest_twisted.ensureDeferred
async def test_the_reactors_own_timer_is_the_last_resort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No descriptor and no thread is left: nothing is raised."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("relayd.net.timers.timerfd_create", _refuse(errno.EMFILE))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    clock = MonotonicClock.of(reactor)
    made: list[int] = []
    clock.callLater(0.2, made.append, 2)
    clock.callLater(0.01, made.append, 1)
    await waiting(0.2)
    assert made == [1, 2]
    clock.callLater(60, made.append, 60).cancel()
    await rests()


@LINUX
@pytest_twisted.ensureDeferred
async def test_the_reactor_that_stops_takes_the_timer_with_it() -> None:
    clock = MonotonicClock.of(reactor)
    before = descriptors()
    call = clock.callLater(60, list)
    timer: Any = clock._timer
    live.removeReader(timer)
    timer.connectionLost(None)
    timer.connectionLost(None)
    assert descriptors() == before
    call.cancel()
    await waiting(0.001)
    await rests()
