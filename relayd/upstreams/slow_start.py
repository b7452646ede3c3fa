"""Slow start: a server that has come up gets its share of sessions little by little.

Its caches are cold, or its connections are all new: a whole share at once, and with
least-sessions all new sessions until it has as many as the others, would have it down
again.  So its weight grows linearly, in steps.

Servers that are up when their relay starts have their whole weight.  Those that join a
pool later, and those that were withdrawn, begin slowly as well.
"""

from __future__ import annotations

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from relayd.net.monotonic import monotonic
from relayd.upstreams.passive import Servers
from relayd.upstreams.server import Server

#: How many steps there are; the first one is taken at once.
STEPS = 20


#: What rounding may have taken off a whole share.
_ALMOST = 1 - 1e-6


class SlowStart:
    """Sets the `share` of servers that have come up.

    :param pool: whose servers.
    :param seconds: until a server has its whole weight.
    :param clock: monotonic seconds.
    """

    def __init__(self, pool: Servers, seconds: float, clock: IReactorTime) -> None:
        if not seconds > 0:
            raise ValueError(f"a slow start takes more than 0 seconds: {seconds}")
        self.duration = seconds
        self._clock: IReactorTime = monotonic(clock)
        self._timer: IDelayedCall | None = None
        #: Those that are up.
        self._up = {each for each in pool.servers if _is_up(each)}
        #: Those whose weight grows, and since when.
        self._growing: dict[Server, float] = {}
        pool.listeners.append(self._notice)

    def start(self) -> None:
        """The relay starts."""

    def stop(self) -> None:
        """The relay stops."""
        for server in self._growing:
            server.share = 1.0
        self._growing.clear()
        self._cancel()

    def _cancel(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _notice(self, server: Server) -> None:
        """A server of the pool has changed, has joined or leaves."""
        if not _is_up(server):
            self._up.discard(server)
            if self._growing.pop(server, None) is not None:
                server.share = 1.0
                if not self._growing:
                    self._cancel()
        elif server not in self._up:
            self._up.add(server)
            # The pool is told already that it has changed.
            server.share = 1 / STEPS
            self._growing[server] = self._clock.seconds()
            if self._timer is None:
                self._set_timer()

    def _set_timer(self) -> None:
        self._timer = self._clock.callLater(self.duration / STEPS, self._grow)

    def _grow(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        for server, since in list(self._growing.items()):
            if server not in self._growing:
                # What another one changed has brought it down.
                continue
            share = max((now - since) / self.duration, 1 / STEPS)
            if share > _ALMOST:
                share = 1.0
                del self._growing[server]
            server.share = share
            server.changed()
        if self._growing and self._timer is None:
            self._set_timer()


def _is_up(server: Server) -> bool:
    return server.up and not server.withdrawn
