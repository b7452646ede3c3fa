"""What every test is held to, and what most of them use.

pytest-twisted runs each test in the reactor's thread and looks no further.  The
`nothing_left_behind` fixture does: a test that leaves a timer, a reader or
writer, an open file descriptor, a logged failure or an unhandled Deferred error
behind has failed, whatever it asserted.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from hypothesis import settings
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.logger import LogLevel, eventAsText, globalLogPublisher

from relayd.core.hops import datagrams, streams
from relayd.datagrams import loops
from relayd.net.descriptors import Descriptors
from relayd.net.monotonic import MonotonicClock
from relayd.net.resolving import Resolver
from relayd.plane.poller import Plane
from tests.support import process

#: How a process closes that has not forked.
_CLOSE_UNFORKED = Plane.unwatch_and_close

# pytest asks before each test which Twisted there is, and reads that from a file.
importlib.metadata.version = functools.cache(importlib.metadata.version)

# Its asserts say what they have found.
pytest.register_assert_rewrite("relayd.testing")

#: How long a test's last connections get to close, in seconds.
SETTLE = 2.0

# Deadlines on single examples are wall time, which a busy machine stretches.
settings.register_profile("relayd", deadline=None, max_examples=50)
settings.load_profile("relayd")

# A shell has what it starts in the background ignore them (and so has nohup), and the
# relays that tests start would do the same.
_HEARD: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}
for _signal, _handler in _HEARD.items():
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)


def pause(seconds: float) -> Deferred[None]:
    """Let the reactor run for a while."""
    return deferLater(reactor, seconds)


def descriptors() -> dict[int, str]:
    """The open file descriptors of this process, and what each is."""
    found = {}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the listing's own
            found[int(name)] = os.readlink(f"/dev/fd/{name}")
    return found


def _opened() -> dict[int, Any]:
    """The same, and each told from others: cheaper, as every test asks for it twice."""
    found: dict[int, Any] = {}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the listing's own
            status = os.fstat(int(name))
            found[int(name)] = (status.st_dev, status.st_ino)
            if not stat.S_IFMT(status.st_mode):
                # An epoll, an eventfd, a timer: one inode is all of them.
                found[int(name)] = os.readlink(f"/dev/fd/{name}")
    return found


def _left(before: dict[int, Any], readers: set[Any]) -> list[str]:
    live: Any = reactor
    watched = {*live.getReaders(), *live.getWriters()} - readers
    now = _opened()
    calls = [*live.getDelayedCalls(), *MonotonicClock.of(live).getDelayedCalls()]
    new = {
        number
        for number, what in now.items()
        if before.get(number) != what and number not in process.kept
    }
    names = descriptors() if new else {}
    return [
        *(f"timer {call}" for call in calls if call.active()),
        *(f"watched {each!r}" for each in watched),
        *(f"descriptor {number} {names[number]}" for number in new & names.keys()),
    ]


#: Signals whose handlers are as before, after each test.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class LoggedFailures(list[str]):
    """The failures that a test has logged.  One that it expects, it takes out."""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["log_level"] >= LogLevel.error:
            self.append(eventAsText(event))

    def take(self, text: str) -> str:
        """Remove and return the one failure that says `text`."""
        gc.collect()
        [found] = [each for each in self if text in each]
        self.remove(found)
        return found


@pytest.fixture(autouse=True)
def logged_failures() -> Iterator[LoggedFailures]:
    """What the test logs as a failure; whatever is left at the end fails it."""
    failures = LoggedFailures()
    globalLogPublisher.addObserver(failures)
    yield failures
    # Deferreds log their unhandled errors as they are collected.
    gc.collect()
    # What is left now is the modules'; the next collection need not look at it.
    gc.freeze()
    globalLogPublisher.removeObserver(failures)
    assert not failures, "logged failures:\n" + "\n".join(failures)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes share the tests with `-n auto`.

    Thrice as many as processors, since a live test waits for most of its time; but
    each first collects all of the tests.
    """
    return min(8, 3 * (os.cpu_count() or 1))


def pytest_collection_finish() -> None:
    """Let the collections after each test look only at what tests make."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def warm_reactor() -> None:
    """Let the reactor make what it keeps: wakers, and a reserved descriptor."""
    live: Any = reactor
    factory = Factory()
    factory.noisy = False
    port = live.listenTCP(0, factory, interface="127.0.0.1")
    pytest_twisted.blockon(port.stopListening())


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Let a test begin with nothing that relayd keeps for the reactor, but its own.

    What was logged within the last second is not logged again, and pipes that could
    not be had are not asked for: a test would see what the one before it had done.
    Nor has this process forked, as it does for a `preexec_fn` of any test.
    """
    Plane.unwatch_and_close = _CLOSE_UNFORKED  # type: ignore[method-assign]
    for kind in (Descriptors, Plane, Resolver):
        kind._all.pop(reactor, None)
    loops.open_guards.clear()
    for hops in (streams, datagrams):
        hops.ports.clear()
        hops.hops.clear()
        hops.past.clear()
        hops.files.clear()


@pytest.fixture(autouse=True)
def nothing_left_behind(logged_failures: LoggedFailures) -> Iterator[None]:
    """Fail a test that leaves timers, readers, writers or descriptors behind.

    The handlers of signals are as before.
    """
    live: Any = reactor
    readers = {*live.getReaders(), *live.getWriters()}
    before = _opened()
    handlers = {each: signal.getsignal(each) for each in HANDLED}
    yield
    # A service keeps its handlers, as a process has one.
    for each, handler in handlers.items():
        signal.signal(each, handler)
    waited = 0.0
    while (left := _left(before, readers)) and waited < SETTLE:
        pytest_twisted.blockon(pause(0.02))
        waited += 0.02
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture
def tmp_socket(tmp_path: Path) -> Path:
    """A path for a UNIX socket, short enough for one."""
    path = tmp_path / "s"
    assert len(str(path)) < 100
    return path


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on loopback are dialled as if they were on another machine."""
    monkeypatch.setattr("relayd.net.dialing.is_loopback", lambda host: False)


@pytest.fixture
def server() -> Iterator[process.Server]:
    """A TCP server of the test's own, for a relay in another process."""
    with process.Server() as listening:
        yield listening


@pytest.fixture(params=process.TRANSPORTS)
def connections_of(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whose connections the relays use that a test starts: it runs on each kind."""
    with process.transport(request.param):
        yield
