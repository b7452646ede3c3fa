"""Detects that file descriptors run out, and logs it.

A listener stops accepting a little before the table is full, since a client that is
accepted needs a second descriptor for its server.
"""

from __future__ import annotations

import resource
import weakref
from typing import Any

from twisted.logger import Logger

from relayd.net.log_throttle import LogThrottle
from relayd.net.monotonic import monotonic

log = Logger(namespace="relayd.descriptors")

#: Seconds for which a listener stops accepting when no descriptor is left.
PAUSE = 0.1

#: Descriptors kept free for dials, logs and name look-ups.
RESERVE = 16


class Descriptors:
    """The descriptors of this process, as the listeners of a reactor share them.

    :ivar pauses: how often a listener has paused because they ran out.
    """

    _all: weakref.WeakKeyDictionary[Any, Descriptors] = weakref.WeakKeyDictionary()

    def __init__(self, clock: Any) -> None:
        # A weak reference: `_all` is keyed by the reactor, which must not be kept.
        weakly: Any = weakref.proxy(monotonic(clock))
        self._throttle = LogThrottle(weakly)
        self._low = 0
        self.pauses = 0

    @classmethod
    def of(cls, reactor: Any) -> Descriptors:
        """The instance that this reactor's listeners share."""
        if reactor not in cls._all:
            cls._all[reactor] = cls(reactor)
        return cls._all[reactor]

    def is_low(self, descriptor: int) -> bool:
        """Whether a newly opened `descriptor` leaves less than the reserve.

        The kernel assigns the lowest free number, so the number shows how many are in
        use.
        """
        if descriptor < self._low:
            return False
        # The limit may have been raised since.  A lowered one shows when accept fails.
        try:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        except OSError:
            # Refused by a sandbox.  accept will fail when the table is full.
            return False
        self._low = limit - min(RESERVE, limit // 4)
        return descriptor >= self._low

    def log_pause(self, where: str, why: str, *, short: bool = True) -> None:
        """Count a pause, and log it, once a second at most.

        :param short: descriptors, or memory, have run out.
        """
        self.pauses += 1
        if not self._throttle.is_due():
            return
        until, hint = (
            (" until a session ends", "raise the limit with ulimit -n")
            if short
            else ("", f"tried again after {PAUSE:g} s")
        )
        log.warn(
            "{where}: {why}; clients wait{until}"
            " (paused {pauses} times so far; {hint})",
            where=where,
            why=why,
            until=until,
            pauses=self.pauses,
            hint=hint,
        )
