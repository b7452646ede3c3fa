"""What a relay does when it is sent a signal.

======= ==============================================================================
SIGTERM The first stops it: sessions may finish within the drain timeout.  The second
SIGINT  ends it at once.
SIGHUP  Nothing, and a line in the log.  But when it comes because the terminal in whose
        foreground the relay runs has closed, it stops; it never counts as the second
        signal, as one closing may send several.  Who has it ignored (nohup) gets it
        ignored.
SIGUSR1 Opens the log file anew, by its name (:mod:`relayd.log_file`).
======= ==============================================================================

Twisted's own handlers make the process die of the signal after a clean shutdown, and
answer a second signal with a traceback.  These let it exit with status 0, which is what
a supervisor expects of a service that did as it was told.

They are there before the first listener is opened.  What comes while the process still
starts is done when the reactor runs, so that no start is left half way.  Earlier than
that the kernel's default holds, which ends the process: there is nothing yet to clean
up.  But a container's first process (number 1) has no default: the kernel drops what
it has no handler for.  :func:`hear_early` is for that one.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.logger import Logger

from relayd.log_file import AnyLogFile
from relayd.monotonic import monotonic

log = Logger(namespace="relayd.signals")

#: Seconds after a SIGHUP in which a terminal that is about to close has closed: some
#: programs, and shells, send it first.
CLOSING = 1.0

#: Signals to stop that came before there was anything to stop.
_early: set[int] = set()


def hear_early() -> None:
    """As process 1, keep a SIGTERM until a service starts.

    No other process, and none that has a handler, sees any of it; and neither does a
    process 1 without a service of ours: the kernel drops the signal there, too.
    """
    if (
        os.getpid() == 1
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, lambda number, frame: _early.add(number))


class Signals(Service):
    """The handlers, from when the service starts.

    :param reactor: is stopped by the first signal to stop.
    :param stop_now: waits no longer; for the second.
    :param log_file: what SIGUSR1 opens anew, if anything.
    """

    def __init__(
        self,
        reactor: Any,
        stop_now: Callable[[], None],
        log_file: AnyLogFile | None = None,
    ) -> None:
        self._reactor = reactor
        self._stop_now = stop_now
        self._log_file = log_file
        self._stopping = False
        self._begun = False
        #: Whether there is a terminal that can close.
        self._terminal = False

    def privilegedStartService(self) -> None:
        super().privilegedStartService()
        self._begin()

    def startService(self) -> None:
        super().startService()
        # `twist` starts services without the privileged step.
        self._begin()
        # The reactor installs its own handlers as it starts to run.
        self._reactor.callWhenRunning(self._install)

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        # A daemon has left its terminal by now.
        self._terminal = _terminal_error() == 0
        self._install()
        if _early:
            self._received(_early.pop(), None)

    def _install(self) -> None:
        signal.signal(signal.SIGTERM, self._received)
        signal.signal(signal.SIGINT, self._received)
        signal.signal(signal.SIGUSR1, self._received)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._received)

    def _received(self, number: int, frame: object) -> None:
        # In a signal handler, between any two lines of the program.
        self._reactor.callFromThread(self._act, signal.Signals(number))

    def _act(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._hang_up()
        elif number == signal.SIGUSR1:
            self._reopen()
        elif self._stopping:
            log.info("{name} again: ending at once", name=number.name)
            self._stop_now()
        else:
            self._stop(number.name)

    def _stop(self, why: str) -> None:
        self._stopping = True
        log.info("{why}: stopping", why=why)
        self._reactor.stop()

    def _hang_up(self) -> None:
        if self._has_closed():
            return
        if self._stopping:
            log.info("SIGHUP: stopping already")
            return
        log.info("SIGHUP: going on, there is nothing to reload")
        if self._terminal:
            clock = monotonic(self._reactor)
            clock.callLater(CLOSING, self._has_closed)

    def _has_closed(self) -> bool:
        """Whether the terminal is gone; the first time that it is, stop."""
        if not self._terminal or _terminal_error() != errno.ENXIO:
            return False
        self._terminal = False
        if not self._stopping:
            self._stop("SIGHUP, the terminal is gone")
        return True

    def _reopen(self) -> None:
        file = self._log_file
        if file is None:
            log.info("SIGUSR1: no log file to reopen")
            return
        try:
            file.reopen()
        except OSError as problem:
            log.warn(
                "SIGUSR1: can't open {path}: {why}; the log stays in the old file",
                path=file.path,
                why=problem.strerror,
            )
        else:
            log.info("SIGUSR1: the log goes on in {path}", path=file.path)


def _terminal_error() -> int:
    """0 if this process has a terminal that controls it; or why it has none (tty(4)).

    ENXIO is what the kernel says of one that is gone.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as problem:
        return problem.errno or errno.EIO
    return 0
