"""Signal handling.

======= ==============================================================================
SIGTERM The first stops it: clients are accepted for the shutdown delay, and sessions
SIGINT  may finish within the drain timeout.  The second ends it at once, in either.
SIGHUP  Reads the settings again, if they are from a file; those that come while one
        does so have it done once more, after it.  But if it is sent because the
        terminal in whose foreground the relay runs has closed, the relay stops.  It
        never counts as the second signal, since a closing terminal may send several.
        If it was ignored when the relay started (nohup), it stays ignored.
SIGUSR1 Reopens the log files by name (:mod:`relayd.operating.log_file`).
======= ==============================================================================

Twisted's own handlers make the process die of the signal after a clean shutdown, and
answer a second signal with a traceback.  With these it exits with status 0, as a
supervisor expects of a service that it has stopped.

They are installed before the first listener opens.  A signal during the start is
handled when the reactor runs, so that no start is interrupted halfway; none is
delivered while the reactor has its own handlers in their place.  Before the start the
kernel's default applies, which ends the process: there is nothing to clean up yet.  But
for process 1, as in a container, the kernel drops signals that have no handler.
:func:`catch_early_sigterm` is for that process.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.net.monotonic import monotonic
from relayd.operating.log_file import AnyLogFile

log = Logger(namespace="relayd.signals")

#: Seconds after a SIGHUP at which the terminal is checked again: some programs and
#: shells send the signal before they close it.
CLOSING = 1.0

#: Those that are handled.
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

#: Signals to stop that arrived before the service started.
_early: set[int] = set()


def catch_early_sigterm() -> None:
    """As process 1, keep a SIGTERM until the service starts.

    Nothing is done in other processes, nor if there is a handler.  A process 1 that
    starts no service of ours ignores the signal, as it did before.
    """
    if (
        os.getpid() == 1
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, lambda number, frame: _early.add(number))


class Signals(Service):
    """Installs the handlers when the service starts.

    :param reactor: stopped by the first signal to stop.
    :param stop_now: called by the second; ends the relay at once.
    :param log_files: reopened on SIGUSR1.

    :ivar reload: called on SIGHUP, to read the settings again; it may return a Deferred
        that fires when that is done, and logs what came of it.  None: there is nothing
        to read.
    """

    def __init__(
        self,
        reactor: Any,
        stop_now: Callable[[], None],
        log_files: Sequence[AnyLogFile] = (),
        reload: Callable[[], object] | None = None,
    ) -> None:
        self._reactor = reactor
        self._stop_now = stop_now
        self._log_files = log_files
        self.reload = reload
        self._reloading = self._again = False
        self._stopping = False
        self._begun = False
        #: Whether there is a controlling terminal, which can close.
        self._terminal = False

    def privilegedStartService(self) -> None:
        super().privilegedStartService()
        self._begin()

    def startService(self) -> None:
        super().startService()
        # `twist` starts services without the privileged step.
        self._begin()
        # The reactor installs its own handlers as it starts to run.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        self._reactor.callWhenRunning(self._take_over)

    def stopService(self) -> None:
        super().stopService()
        # The reactor may never have run.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def _take_over(self) -> None:
        """The reactor runs: those that have come meanwhile are delivered."""
        self._install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        # Only now: a daemon has left its terminal before.
        self._terminal = _terminal_error() == 0
        self._install()
        if _early:
            self._received(_early.pop(), None)

    def _install(self) -> None:
        for number in _HANDLED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        # This is a signal handler, which runs between any two lines: only schedule.
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
        if self.reload is None:
            log.info("SIGHUP: going on, there is nothing to reload")
        else:
            log.info("SIGHUP: reading the settings again")
            self._reload()
        if self._terminal:
            clock = monotonic(self._reactor)
            clock.callLater(CLOSING, self._has_closed)

    def _reload(self) -> None:
        if self.reload is None or self._stopping:
            return
        # What has changed since the first began to read must not be missed.
        self._again = self._reloading
        if not self._reloading:
            self._reloading = True
            done = maybeDeferred(self.reload)
            done.addErrback(self._failed).addCallback(self._reloaded)

    def _failed(self, reason: Failure) -> None:
        log.failure("SIGHUP: the settings could not be read again", reason)

    def _reloaded(self, _: object) -> None:
        again, self._reloading, self._again = self._again, False, False
        if again:
            self._reload()

    def _has_closed(self) -> bool:
        """Whether the terminal is gone; if so, stop, the first time."""
        if not self._terminal or _terminal_error() != errno.ENXIO:
            return False
        self._terminal = False
        if not self._stopping:
            self._stop("SIGHUP, the terminal is gone")
        return True

    def _reopen(self) -> None:
        if not self._log_files:
            log.info("SIGUSR1: no log file to reopen")
        for file in self._log_files:
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
    """0 if this process has a controlling terminal, else the errno (tty(4)).

    ENXIO means that the terminal is gone.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as problem:
        return problem.errno or errno.EIO
    return 0
