"""Tells the service manager how the relay is: sd_notify(3), `Type=notify-reload`.

A manager that wants to hear names a socket in NOTIFY_SOCKET; without it nothing is
sent.  What is sent:

========================= ============================================================
READY=1                   all listeners stand, and the reactor runs
STATUS=                   how many sessions and flows there are, when that changes; and
                          what came of the last reload, if it was refused
RELOADING=1               it reads its settings again; with MONOTONIC_USEC=, the time on
                          CLOCK_MONOTONIC, by which systemd knows that this is the
                          reload that it has asked for, and no earlier one
READY=1                   that is over, also if the new settings were refused: it goes
                          on with those that it had
WATCHDOG=1                at half of WATCHDOG_USEC, by the reactor: if it hangs, no more
STOPPING=1                the first signal to stop has come
EXTEND_TIMEOUT_USEC=      while it stops, and not beyond the time that a stop may take
========================= ============================================================

systemd before 253 has `Type=notify`, and no use for the time.

The protocol is a datagram of lines to a UNIX socket, so no library is needed.  A
datagram that can't be sent is dropped: the manager must not be able to stop the relay.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from relayd.net.monotonic import monotonic
from relayd.operating.running import LAST, RelayService

log = Logger(namespace="relayd.notify")

#: Seconds between two looks at what there is to tell.
INTERVAL = 5.0

#: Seconds between two looks while some listeners do not stand yet; and at least.
SOON = 0.05

#: Seconds that an extension is for: several intervals, so that one may be late.
EXTENSION = 20.0

#: Characters of what is said of a reload: some managers show a line.
LONGEST = 200


class Notifier(Service):
    """Sends what there is to tell.

    :param reactor: runs what is told.
    :param address: of the manager's socket: a path, or `@` and an abstract name.
    :param relays: whose state is told.
    :param watchdog: seconds within which the manager must hear of it; 0: it need not.
    """

    def __init__(
        self, reactor: Any, address: str, relays: RelayService, watchdog: float = 0.0
    ) -> None:
        self._reactor = reactor
        self._clock = monotonic(reactor)
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._relays = relays
        self._interval = INTERVAL
        if watchdog:
            self._interval = max(SOON, min(INTERVAL, watchdog / 2))
        self._watched = watchdog > 0
        self._status = self._reload_status = ""
        self._stopping_until: float | None = None
        self._next: IDelayedCall | None = None
        self._failed = False
        self._ready = False

    @classmethod
    def of(
        cls, reactor: Any, relays: RelayService, environ: Mapping[str, str] = os.environ
    ) -> Notifier | None:
        """The notifier for the manager that started this process; None without one."""
        address = environ.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            # None, or one that is reached by vsock, which is for virtual machines.
            return None
        # Those that are for another process are inherited as well.
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = environ.get("WATCHDOG_USEC", "") if ours else ""
        watchdog = int(period) / 1e6 if period.isascii() and period.isdigit() else 0.0
        return cls(reactor, address, relays, watchdog)

    def startService(self) -> None:
        super().startService()
        self._reactor.callWhenRunning(self._tell)
        self._reactor.addSystemEventTrigger("after", "shutdown", self._end)

    def stopService(self) -> None:
        super().stopService()
        relays = self._relays
        longest = relays.shutdown_delay + relays.drain_timeout + LAST
        self._stopping_until = self._clock.seconds() + longest
        self._send("STOPPING=1", *self._news())

    def reloading(self) -> None:
        """The settings are about to be read again."""
        if self._tells_reloads:
            now = int(self._clock.seconds() * 1e6)
            self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def reloaded(self, status: str = "") -> None:
        """That is over, whatever came of it.

        :param status: what the status is to say of it, until the next one; nothing, if
            all went well.
        """
        self._reload_status = " ".join(status.split())[:LONGEST]
        if self._tells_reloads:
            self._send("READY=1", *self._news())

    @property
    def _tells_reloads(self) -> bool:
        """Not while it starts: to be ready means more then; nor as it stops."""
        return self._ready and self._stopping_until is None

    def _tell(self) -> None:
        self._next = None
        news = self._news()
        if not self._ready and self._relays.all_listening:
            self._ready = True
            news.insert(0, "READY=1")
        if news:
            self._send(*news)
        wait = self._interval if self._ready else SOON
        self._next = self._clock.callLater(wait, self._tell)

    def _end(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _news(self) -> list[str]:
        """What is due besides a change of state."""
        news = []
        sessions, flows = self._relays.counts
        status = f"STATUS={sessions} sessions, {flows} flows"
        if self._watched:
            news.append("WATCHDOG=1")
        if self._stopping_until is not None:
            status += ", draining" if self._relays.draining else ", stopping"
            if self._clock.seconds() <= self._stopping_until:
                news.append(f"EXTEND_TIMEOUT_USEC={int(EXTENSION * 1e6)}")
        elif self._reload_status:
            status += f"; {self._reload_status}"
        if status != self._status:
            self._status = status
            news.append(status)
        return news

    def _send(self, *lines: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as problem:
            if not self._failed:
                self._failed = True
                log.warn(
                    "the service manager can't be told that {what}: {why}",
                    what=lines[0],
                    why=problem.strerror,
                )
