"""Log writers: a log's lines on their way to an outlet, which may take none of them.

A line is written at once.  What the outlet does not take (a pipe that nobody reads, a
terminal that stands still, a full disk) waits, up to :data:`LIMIT` bytes; beyond that
whole lines are lost, and counted.  What waits is tried again with each line, and every
:data:`RETRY` seconds.  When all of it is written, the log says how many were lost.

Nothing here waits for a reader, so that neither a session nor the end of the process
does.  A writer may be called from any thread, as Twisted's logger is, and from within
itself, by a destructor that logs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from relayd.net.log_throttle import LogThrottle
from relayd.net.monotonic import monotonic
from relayd.operating.outlets import Outlet

#: Bytes that may wait.
LIMIT = 1 << 20

#: Bytes of what waits that are written in one call, after the first.
CHUNK = 1 << 16

#: Seconds between two tries.
RETRY = 0.1

#: At the end of the process: seconds between two looks at what is left, how many looks
#: without a byte give a reader up, and how many one that takes some gets.
LOOK, GIVE_UP, TIMES = 0.02, 5, 50

_NEWLINE = ord("\n")


class LogWriter:
    """Writes lines to an outlet.

    :param reactor: for the retries.
    :param outlet: takes the lines.
    :param tell: called when lines were lost and all others are written, once a second
        at most: with how many were lost since it was called last, and in all.

    :ivar lost: how many lines were lost.
    """

    def __init__(
        self, reactor: Any, outlet: Outlet, tell: Callable[[int, int], None]
    ) -> None:
        self._reactor = reactor
        self._clock = monotonic(reactor)
        self._throttle = LogThrottle(self._clock)
        self._outlet = outlet
        self._tell = tell
        self._lock = threading.RLock()
        self._writing = False
        self._waiting = bytearray()
        #: What waits begins within a line.
        self._begun = False
        self._retry: IDelayedCall | None = None
        self._asked = self._ended = False
        self.lost = self._told = 0

    def write(self, lines: bytes) -> None:
        """Write a line, or several, each with its newline."""
        with self._lock:
            if self._writing:
                self._keep(lines)
                return
            if self._waiting:
                self._flush()
            if self._waiting:
                self._keep(lines)
                return
            self._writing = True
            try:
                taken = self._outlet.write(lines)
            except OSError:
                taken = 0
            self._writing = False
            if not taken:
                self._keep(lines)
            elif taken < len(lines):
                # In front of what has come from within.
                self._waiting[:0] = lines[taken:]
                self._begun = lines[taken - 1] != _NEWLINE
                self._ask()

    def replace_outlet(self, outlet: Outlet) -> None:
        """Go on with another outlet, and close the one before."""
        with self._lock:
            self._flush()
            if self._begun and not outlet.is_same_file(self._outlet):
                # The rest of a line means nothing in another file.
                del self._waiting[: self._waiting.index(b"\n") + 1]
                self._begun = False
                self.lost += 1
            self.lost += self._outlet.unwritten.count(b"\n")
            self._outlet.close()
            self._outlet = outlet
            self._flush()

    def finish(self) -> tuple[int, int]:
        """The process ends: write what can be written, and count the rest.

        What is written after this is written at once, or lost.

        :return: how many lines were lost, of which nobody was told, and in all.
        """
        with self._lock:
            self._ended = True
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            self._flush()
            pause, idle, left = threading.Event(), 0, self._left
            for _ in range(TIMES):
                if not left or idle == GIVE_UP:
                    break
                pause.wait(LOOK)
                self._flush()
                idle = idle + 1 if self._left == left else 0
                left = self._left
            rest = bytes(self._waiting) + self._outlet.abandon()
            self.lost += rest.count(b"\n")
            self._waiting.clear()
            if self._begun:
                # What is told after this is a line of its own.
                self._waiting += b"\n"
                self._flush()
                self._waiting.clear()
                self._begun = False
            untold, self._told = self.lost - self._told, self.lost
            return untold, self.lost

    @property
    def waiting(self) -> int:
        """How many bytes wait."""
        return len(self._waiting)

    @property
    def _left(self) -> int:
        return len(self._waiting) + len(self._outlet.unwritten)

    def _keep(self, lines: bytes) -> None:
        """Have lines wait, if they may."""
        if self._ended or len(self._waiting) + len(lines) > LIMIT:
            self.lost += lines.count(b"\n")
        else:
            self._waiting += lines
        self._ask()

    def _flush(self) -> None:
        """Write what waits, as far as the outlet takes it."""
        self._writing = True
        waiting, taken, size = self._waiting, 1, self._outlet.first
        while waiting and taken:
            chunk = bytes(waiting[:size])
            try:
                taken = self._outlet.write(chunk)
            except OSError:
                # Whatever it is may pass.
                break
            if taken:
                del waiting[:taken]
                self._begun = chunk[taken - 1] != _NEWLINE
            size = CHUNK
        self._writing = False

    # -- retries

    def _ask(self) -> None:
        """Ask for another try; from any thread."""
        if not self._asked and not self._ended:
            self._asked = True
            self._reactor.callFromThread(self._later)

    def _later(self) -> None:
        if not self._ended:
            self._retry = self._clock.callLater(RETRY, self._again)

    def _again(self) -> None:
        with self._lock:
            self._retry = None
            self._flush()
            if self._waiting or (
                self.lost > self._told and not self._throttle.is_due()
            ):
                self._later()
                return
            self._asked = False
            untold, self._told = self.lost - self._told, self.lost
        if untold:
            self._tell(untold, self._told)
