"""Passive health: a server whose dials fail is taken out, and tried again later.

**Out.**  So many failed dials within some seconds eject a server: it gets no new
session for as many seconds.  Sessions that it has go on.

**Reset at once.**  A session whose server has reset it, and has said nothing, counts as
a failed dial.  What the server was sent may have been the reason, so that a client
could take servers out at will: where the client has sent something, such sessions count
in a row only, and one that ends in any other way wipes them out.

**Back.**  Then one session may try it.  If that is connected the server is back; if it
fails the server is out for twice the time, up to a limit; if its client leaves before,
the next session tries.  The time is the first one again once the server has been back
for as long as it was out.  A server that checks have found down as well is back as soon
as they find it up: with both, a restart costs it no more than `rise` checks.  That they
succeed all the time ends no ejection: what they ask may work while sessions fail.

**Never all.**  At most a share of a pool is out (but one may always be), and never the
last server that could take a session: if the others go, for whatever reason, those
that are out are back at once.  That a few dials have failed does not prove much, and a
client that is refused is no better off than one whose dial fails.

**The operator's word.**  A server that its operator says is up is back at once, and is
not ejected as long as that stands.  One that the operator has taken out, as in a
server's settings, is none of the others that are left.

A server that is back and resets at once is out again by the first such session, if none
has ended in another way before, for the fail time after its return.

A dial that began before its server was ejected does not end the ejection, nor make it
longer, unless it fails during the trial, from which it can't be told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.core import pool_settings
from relayd.net.monotonic import monotonic
from relayd.upstreams.server import Server

log = Logger(namespace="relayd.upstreams")


class Servers(Protocol):
    """A pool (:class:`relayd.upstreams.pool.Pool`)."""

    listeners: list[Callable[[Server], object]]

    @property
    def servers(self) -> Sequence[Server]:
        """Its servers, at present."""


@attrs.frozen(kw_only=True)
class FailLimits:
    """When a server is ejected, and for how long.

    :ivar max_fails: after so many failed dials,
    :ivar fail_time: within so many seconds, for so many seconds at first.
    :ivar fail_max: the most of them.
    :ivar eject_most: the share of a pool that is out at once, in percent.
    """

    max_fails: int = attrs.field(default=pool_settings.MAX_FAILS.default)
    fail_time: float = attrs.field(default=pool_settings.FAIL_TIME.default)
    fail_max: float = attrs.field(default=pool_settings.FAIL_MAX.default)
    eject_most: int = attrs.field(default=pool_settings.EJECT_MOST.default)

    def __attrs_post_init__(self) -> None:
        if self.max_fails < 1 or not self.fail_time > 0 or not self.fail_max > 0:
            raise ValueError(f"limits of failed dials are more than 0: {self}")
        if not 0 <= self.eject_most <= 100:
            raise ValueError(f"eject_most is 0 to 100 percent, not {self.eject_most}")


class _Record:
    """What is known of one server.

    :ivar fails: when its last dials failed, as many as count; and whether they may have
        been provoked.
    :ivar lasts: seconds for which it is out, or was last.
    :ivar returned_at: since when it is back; None: it is out, or never was.
    :ivar timer: until its trial, while it is out; None: it is in, or on trial.
    """

    __slots__ = ("fails", "lasts", "returned_at", "timer")

    def __init__(self, max_fails: int) -> None:
        self.fails: deque[tuple[float, bool]] = deque(maxlen=max_fails)
        self.lasts = 0.0
        self.returned_at: float | None = None
        self.timer: IDelayedCall | None = None


def _serves(server: Server) -> bool:
    """Whether it could take sessions, if not at the moment as it is full."""
    return server.up and server.weight > 0 and not server.withdrawn


class Ejector:
    """Ejects servers of a pool, and lets them return.

    It is what judges them (:class:`relayd.upstreams.server.Passive`), those included
    that join later.

    :param pool: whose servers.
    :param limits: see there.
    :param clock: monotonic seconds.

    :ivar ejections: how many there were.
    """

    def __init__(
        self, pool: Servers, clock: IReactorTime, limits: FailLimits | None = None
    ) -> None:
        self.limits = limits or FailLimits()
        self.ejections = 0
        self._pool = pool
        self._clock: IReactorTime = monotonic(clock)
        #: Of the servers that have failed; no others.
        self._records: dict[Server, _Record] = {}
        for server in pool.servers:
            server.passive = self
        pool.listeners.append(self._notice)

    @property
    def out(self) -> list[Server]:
        """Those that are ejected, those on trial included."""
        return [each for each in self._records if each.ejected]

    # -- Task

    def start(self) -> None:
        """The relay starts: all servers are in."""

    def stop(self) -> None:
        """The relay stops.  What is known of its servers is forgotten."""
        for server in self.out:
            self._return(server, "its relay has stopped")
        self._records.clear()

    # -- Passive

    def connected(self, server: Server) -> None:
        """A dial has succeeded."""
        if not server.ejected:
            return
        record = self._records[server]
        if record.timer is None:
            self._return(server, "it is connected again")
            server.doubted = True

    def failed(self, server: Server, why: str) -> None:
        """A dial has failed.

        :param why: in words.
        """
        if server.draining or server.operator == "up":
            return
        record = self._record(server)
        if server.ejected:
            if record.timer is None and not server.on_trial:
                self._eject(server, record, f"its trial has failed: {why}")
            return
        self._add(server, record, why, provoked=False)

    def reset(self, server: Server, why: str, provoked: bool) -> None:
        """It has reset a session, and has said nothing.

        :param why: in words.
        :param provoked: it was sent something.
        """
        if server.draining or server.ejected or server.operator == "up":
            # If it is ejected, the session is older than that.
            return
        record, was_doubted = self._record(server), server.doubted
        server.doubted = True
        now, since = self._clock.seconds(), record.returned_at
        if (
            was_doubted
            and since is not None
            and now - since <= self.limits.fail_time
            and self._may_go(server)
        ):
            self._eject(server, record, f"its trial has failed: {why}")
            return
        self._add(server, record, why, provoked)

    def served(self, server: Server) -> None:
        """A session has ended in another way: what may have been provoked is void."""
        record = self._records.get(server)
        if record is not None:
            kept = [each for each in record.fails if not each[1]]
            record.fails.clear()
            record.fails.extend(kept)

    def _record(self, server: Server) -> _Record:
        record = self._records.get(server)
        if record is None:
            record = self._records[server] = _Record(self.limits.max_fails)
        return record

    def _add(self, server: Server, record: _Record, why: str, provoked: bool) -> None:
        """A failure of one that is in."""
        fails, limits = record.fails, self.limits
        now = self._clock.seconds()
        fails.append((now, provoked))
        if len(fails) < limits.max_fails or now - fails[0][0] > limits.fail_time:
            return
        if not self._may_go(server):
            return
        if record.returned_at is None or now - record.returned_at >= record.lasts:
            record.lasts = 0.0
        what = "a dial has" if len(fails) == 1 else f"{len(fails)} dials have"
        self._eject(server, record, f"{what} failed, the last one: {why}")

    def came_up(self, server: Server) -> None:
        """Checks have found it down, and up again: what its dials have said is old."""
        if server.ejected:
            self._return(server, "its checks have found it up again")

    def cancelled(self, server: Server) -> None:
        """A dial was given up, which says nothing."""
        if server.ejected and self._records[server].timer is None:
            self._open_trial(server)

    # -- out and back

    def _may_go(self, server: Server) -> bool:
        """Whether the others are enough."""
        takes_part = [each for each in self._pool.servers if not each.withdrawn]
        most = max(len(takes_part) * self.limits.eject_most // 100, 1)
        # Those that are disabled as well: they may be enabled while they are out.
        return len(self.out) < most and any(
            _serves(each) for each in takes_part if each is not server
        )

    def _eject(self, server: Server, record: _Record, why: str) -> None:
        limits = self.limits
        lasts = min(record.lasts * 2 or limits.fail_time, limits.fail_max)
        record.lasts, record.returned_at = lasts, None
        record.fails.clear()
        record.timer = self._clock.callLater(lasts, self._trial_is_due, server)
        self.ejections += 1
        server.ejected, server.on_trial = True, False
        server.why = f"{why}; out for {lasts:g} s"
        log.warn(
            "{relay}: {server} is out: {why}",
            relay=server.relay,
            server=server.name,
            why=server.why,
        )
        server.changed()

    def _trial_is_due(self, server: Server) -> None:
        self._records[server].timer = None
        self._open_trial(server)

    def _open_trial(self, server: Server) -> None:
        server.on_trial, server.why = True, "one session may try it"
        server.changed()

    def _return(self, server: Server, why: str) -> None:
        record = self._records[server]
        self._cancel(record)
        record.returned_at = self._clock.seconds()
        server.ejected = server.on_trial = False
        # A server says an operator's word itself, as long as that stands.
        server.why = "" if server.operator == "up" else why
        log.info(
            "{relay}: {server} is back: {why}",
            relay=server.relay,
            server=server.name,
            why=why,
        )
        server.changed()

    def _cancel(self, record: _Record) -> None:
        timer, record.timer = record.timer, None
        if timer is not None:
            timer.cancel()

    # -- other changes

    def _notice(self, server: Server) -> None:
        """A server of the pool has changed, has joined or leaves."""
        if server.draining:
            record = self._records.pop(server, None)
            if record is not None:
                self._cancel(record)
                server.ejected = server.on_trial = False
        elif server.passive is None:
            server.passive = self
        if server.ejected and server.operator == "up":
            self._return(server, "its operator says that it is up")
        if not self._records or _serves(server):
            return
        out = [each for each in self.out if not each.withdrawn]
        if out and not any(_serves(each) for each in self._pool.servers):
            for each in out:
                # The first may have set others free.
                if each.ejected:
                    self._return(each, "no other server is left")
