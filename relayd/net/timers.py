"""What wakes the reactor at a time of CLOCK_MONOTONIC.

The best that there is: a timerfd(2) among the reactor's readers; where it can't be had,
a thread that waits on the same clock; where there is not even that, the reactor's own
timer, which goes by the machine's clock.
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

#: As far ahead as a timer is set, in seconds; it is set again then.
FAR = 1e9

_now = time.monotonic


class Timer(Protocol):
    """Wakes the reactor once, at a time."""

    def arm(self, due: float) -> None:
        """Wake it at `due` instead.

        :raises OSError: the kernel refuses.
        """

    def close(self) -> None:
        """Wake it no more, and hold nothing."""


def open_timer(
    reactor: Any, due: float, woken: Callable[[], None], lost: Callable[[], None]
) -> Timer:
    """The best that there is, armed."""
    if IReactorFDSet.providedBy(reactor):
        try:
            return _Descriptor(reactor, due, woken, lost)
        except OSError:
            # No such call, no descriptor left, or a sandbox.
            pass
    try:
        return _Thread(reactor, due, woken)
    except RuntimeError:
        # The user has as many as it may.
        return _Own(reactor, due, woken)


@implementer(IReadDescriptor)
class _Descriptor:
    """A timerfd(2) that the reactor reads.

    It is not read: setting it again, or closing it, takes the event away.
    """

    def __init__(
        self,
        reactor: Any,
        due: float,
        woken: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        """:raises OSError: it can't be had."""
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
        # Not before it is due, and 0 would be never.
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


class _Thread:
    """A thread that waits, and calls from there."""

    def __init__(self, reactor: Any, due: float, woken: Callable[[], None]) -> None:
        """:raises RuntimeError: no thread can be started."""
        self._reactor = reactor
        self._told = woken
        self._due = due
        self._closed = False
        self._news = threading.Condition()
        # Nobody waits for it when the process ends.
        threading.Thread(target=self._run, name="relayd timer", daemon=True).start()

    def arm(self, due: float) -> None:
        with self._news:
            self._due = due
            self._news.notify()

    def close(self) -> None:
        self._closed = True
        self.arm(0.0)

    def _woken(self) -> None:
        if not self._closed:
            self._told()

    def _run(self) -> None:
        while True:
            with self._news:
                while (left := self._due - _now()) > 0:
                    self._news.wait(min(left, threading.TIMEOUT_MAX))
                if self._closed:
                    return
                # Once more in a while unless it is set again: asyncio's reactor makes
                # it a call of zero delay, on its own clock.
                self._due = _now() + 1.0
            self._reactor.callFromThread(self._woken)


class _Own:
    """The reactor's own timer, which goes by the machine's clock."""

    def __init__(self, reactor: Any, due: float, woken: Callable[[], None]) -> None:
        self._reactor = reactor
        self._told = woken
        self._call: Any = None
        self.arm(due)

    def arm(self, due: float) -> None:
        self.close()
        left = min(max(due - _now(), 0.0), FAR)
        self._call = self._reactor.callLater(left, self._woken)

    def _woken(self) -> None:
        self._call = None
        self._told()

    def close(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
