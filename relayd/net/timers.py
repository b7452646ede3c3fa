"""Timers that wake the reactor at a time of CLOCK_MONOTONIC.

The first of these that is available: a timerfd(2) among the reactor's readers; a thread
that waits on the same clock; the reactor's own timer, which follows the machine's
clock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.net.libc import timerfd_create, timerfd_settime

#: The longest time for which a timer is set, in seconds; it is set again then.
FAR = 1e9

_now = time.monotonic


class Timer(Protocol):
    """Wakes the reactor once, at a given time."""

    def arm(self, due: float) -> None:
        """Set the time at which it wakes the reactor.

        :raises OSError: the kernel refuses.
        """

    def close(self) -> None:
        """Stop, and release what it holds."""


def open_timer(
    reactor: Any, due: float, woken: Callable[[], None], lost: Callable[[], None]
) -> Timer:
    """The best timer available, armed.

    :param woken: called when it is due.
    :param lost: called when the reactor has dropped it.
    """
    if IReactorFDSet.providedBy(reactor):
        try:
            return _TimerFd(reactor, due, woken, lost)
        except OSError:
            # No such call, no descriptor left, or a sandbox.
            pass
    try:
        return _ThreadTimer(reactor, due, woken)
    except RuntimeError:
        # The user's limit of threads is reached.
        return _ReactorTimer(reactor, due, woken)


@implementer(IReadDescriptor)
class _TimerFd:
    """A timerfd(2) among the reactor's readers.

    Its descriptor is not read: setting it again, or closing it, clears the event.
    """

    def __init__(
        self,
        reactor: Any,
        due: float,
        woken: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        """:raises OSError: the kernel has none, or no descriptor is left."""
        self._reactor = reactor
        self._lost = lost
        self.doRead = woken
        self._descriptor = timerfd_create()
        try:
            self.arm(due)
            reactor.addReader(self)
        except BaseException:
            os.close(self._descriptor)
            raise

    def arm(self, due: float) -> None:
        # Rounded up, so as not to wake early; 0 would disarm it.
        timerfd_settime(self._descriptor, max(int(min(due, FAR) * 1e9), 0) + 1)

    def close(self) -> None:
        self._reactor.removeReader(self)
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    # -- IReadDescriptor

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "relayd timer"

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""
        self._close()
        self._lost()


class _ThreadTimer:
    """A thread that waits, and then wakes the reactor."""

    def __init__(self, reactor: Any, due: float, woken: Callable[[], None]) -> None:
        """:raises RuntimeError: no thread can be started."""
        self._reactor = reactor
        self._on_due = woken
        self._due = due
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: the process does not wait for it when it ends.
        threading.Thread(target=self._run, name="relayd timer", daemon=True).start()

    def arm(self, due: float) -> None:
        with self._changed:
            self._due = due
            self._changed.notify()

    def close(self) -> None:
        self._closed = True
        self.arm(0.0)

    def _woken(self) -> None:
        if not self._closed:
            self._on_due()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (left := self._due - _now()) > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                if self._closed:
                    return
                # Again in a second unless it is set again: asyncio's reactor makes this
                # a call of zero delay on its own clock, which may be set back.
                self._due = _now() + 1.0
            self._reactor.callFromThread(self._woken)


class _ReactorTimer:
    """The reactor's own timer, which follows the machine's clock."""

    def __init__(self, reactor: Any, due: float, woken: Callable[[], None]) -> None:
        self._reactor = reactor
        self._on_due = woken
        self._call: Any = None
        self.arm(due)

    def arm(self, due: float) -> None:
        self.close()
        left = min(max(due - _now(), 0.0), FAR)
        self._call = self._reactor.callLater(left, self._woken)

    def _woken(self) -> None:
        self._call = None
        self._on_due()

    def close(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
