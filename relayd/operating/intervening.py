"""What an operator does to clients, servers and sessions while relays run.

None of it is a change of settings: clients are held for a while, a server is taken out,
sessions are ended, or looked into.  See :class:`relayd.control.steering.Steering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from relayd.configuring.given import Layers
from relayd.control.steering import (
    Asker,
    Conflict,
    Invalid,
    Json,
    ServerState,
    Stream,
    Work,
)
from relayd.net.monotonic import monotonic
from relayd.operating.capturing import CaptureStream, find_session
from relayd.operating.changing import Relays
from relayd.operating.killing import kill
from relayd.operating.listing import Shown
from relayd.operating.logs import Logs
from relayd.operating.seeing import Seeing
from relayd.operating.server_words import Said, ServerWords
from relayd.operating.working import Works

log = Logger(namespace="relayd.control")

#: The longest time that may be given, in seconds: a year.
LONGEST = 366 * 86400.0


class Intervening(Seeing):
    """See :class:`relayd.operating.steering.Steered`, which is one."""

    def __init__(
        self, reactor: Any, relays: Relays, layers: Layers, logs: Logs, path: str | None
    ) -> None:
        super().__init__(reactor, relays, layers, logs, path)
        self._clock = monotonic(reactor)
        #: Held by the change of settings that is under way.
        self._lock = DeferredLock()
        #: What was said of servers.
        self._works = Works(self._clock)
        self.words = ServerWords(self._clock, self._shown_or_none)
        #: When clients that are held are served, by relay.
        self._resumes: dict[str, IDelayedCall] = {}

    def close(self) -> None:
        """The process stops: no timer is left."""
        self._stop_explaining()
        self.words.stop()
        self._works.stop()
        self._all.filters.stop()
        for each in self._resumes.values():
            each.cancel()
        self._resumes.clear()

    def _shown_or_none(self, relay: str) -> Shown | None:
        return self._shown_of(relay) if relay in self._all.units else None

    def _check_running(self) -> None:
        if self._all.service.stopping:
            raise Conflict("relayd stops: nothing can be changed any more")

    def _revise(self, relay: str) -> None:
        self._revisions[relay] = self._revisions.get(relay, 0) + 1

    def pause(self, relay: str, seconds: float | None, by: Asker) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        unit = self._unit(relay)
        self._check_running()
        if not unit.settings.enabled:
            raise Conflict(f"{relay} is stopped: it has no clients to hold")
        later = None if seconds is None else seconds_of(seconds)
        self._forget_resume(relay)
        self._all.service.hold(relay)
        if later is not None:
            self._resumes[relay] = self._clock.callLater(later, self._resume, relay)
        self._revise(relay)
        return self.relay(relay)

    def resume(self, relay: str, by: Asker) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        self._unit(relay)
        self._resume(relay)
        return self.relay(relay)

    def _resume(self, relay: str) -> None:
        self._forget_resume(relay)
        if relay in self._all.service.held:
            self._all.service.release(relay)
            self._revise(relay)
            log.info("{relay}: clients are served again", relay=relay)

    def _forget_resume(self, relay: str) -> None:
        timer = self._resumes.pop(relay, None)
        if timer is not None and timer.active():
            timer.cancel()

    def _forget_resumes(self) -> None:
        """Of relays that were stopped, or are no more."""
        for relay in self._resumes.keys() - self._all.service.held:
            self._forget_resume(relay)

    # -- servers and sessions

    def set_server(
        self,
        relay: str,
        server: str,
        state: ServerState | None,
        weight: int | None,
        within: float | None,
        by: Asker,
    ) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        self._check_running()
        if self._lock.locked:
            raise Conflict("another change is under way: try again")
        shown = self._shown_of(relay)
        limit = None if within is None else seconds_of(within)
        said = self._said(relay, server, state, weight)
        self.words.say(shown, server, said.word, said.weight, limit)
        self.overlay = self.overlay.with_word(relay, server, said)
        self._revise(relay)
        return self.server(relay, server)

    def kill(
        self,
        sessions: Sequence[int] | None,
        client: str | None,
        server: str | None,
        relay: str | None,
        by: Asker,
    ) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        return kill(
            self._shown(),
            sessions=sessions,
            client=client,
            server=server,
            relay=relay,
            why=f"by {by}",
        )

    def capture(self, session: int, most_bytes: int | None, by: Asker) -> Stream:
        """See :class:`relayd.control.steering.Steering`."""
        # Imports what is used now and then.
        from relayd.filters.live_capture import LiveCapture

        protocol = find_session(self._shown(), session)
        return CaptureStream(protocol, most_bytes, LiveCapture)

    def _said(
        self, relay: str, server: str, state: ServerState | None, weight: int | None
    ) -> Said:
        """What is said of a server from now on; what is not given stays."""
        before = self.overlay.servers.get(relay, {}).get(server, Said())
        if state == "auto":
            return Said(None, weight)
        return Said(
            before.word if state is None else state,
            before.weight if weight is None else weight,
        )


def seconds_of(given: float) -> float:
    """:raises Invalid: it is no time."""
    if not 0 <= given <= LONGEST:
        raise Invalid(f"{given:g} seconds: expected 0 to a year")
    return given
