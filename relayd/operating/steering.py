"""Steers a running relayd: reload, settings, start and stop, servers, sessions.

What runs is always what the file says and what was said since (the overlay), together.
A change makes both anew, has them checked as a whole, as at the start, and then the
relays follow in one step (:mod:`relayd.operating.changing`), or nothing has changed and
its reasons are told.  Changes wait for each other.

A file is read, and many relays are checked, in a thread: the reactor goes on.

`reload --confirm` takes back what a reload has changed, unless it is confirmed in time:
who has shut himself out need not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
from twisted.application.service import Service
from twisted.internet.defer import (
    Deferred,
    inlineCallbacks,
    maybeDeferred,
    succeed,
)
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.configuring.config import Config
from relayd.configuring.configure import configure
from relayd.configuring.given import Layers
from relayd.configuring.source import Source, with_names
from relayd.control.steering import (
    Asker,
    Conflict,
    Invalid,
    Json,
    Refusal,
    Unfinished,
)
from relayd.core.errors import ConfigError
from relayd.observing.log_times import LogTimes
from relayd.operating.aside import aside
from relayd.operating.changing import Relays
from relayd.operating.difference import Difference
from relayd.operating.intervening import Intervening, seconds_of
from relayd.operating.killing import kill
from relayd.operating.logs import Logs
from relayd.operating.overlay import Overlay, section_of
from relayd.operating.route_modules import Routes
from relayd.operating.server_words import NOTHING

log = Logger(namespace="relayd.control")

#: From so many relays on, they are checked in a thread: it takes some 0.3 ms for one.
MANY = 20

_ENABLED = "enabled"


class Steered(Intervening):
    """A running relayd, for those who steer it.

    It is a :class:`relayd.control.steering.Steering`.

    :param reactor: runs it; has a pool of threads.
    :param relays: of the process.
    :param source: where their settings came from.
    :param logs: of the command.

    :ivar reloading: called as a reload begins.
    :ivar reloaded: called when one is over: with a line, if it was refused.
    :ivar loaded: called when one has succeeded, with the time, in seconds since the
        epoch.
    :ivar afterwards: has what is outside of this process follow a change; the next one
        waits for it.  Called with whether all was read again; fires with what has
        failed: a line for each.
    """

    def __init__(
        self, reactor: Any, relays: Relays, source: Source, logs: Logs
    ) -> None:
        layers = source.first
        names = [each.name or "" for each in relays.config.relays]
        named = attrs.evolve(layers, relays=with_names(layers.relays, names))
        super().__init__(reactor, relays, named, logs, source.path)
        # Relays of the command line come last.
        own = source.own
        numbered = named.relays[len(named.relays) - len(own.relays) :]
        self._source = attrs.evolve(source, own=attrs.evolve(own, relays=numbered))
        self._reactor = reactor
        self.reloading: Callable[[], object] = lambda: None
        self.reloaded: Callable[[str], object] = lambda problem: None
        self.loaded: list[Callable[[float], object]] = []
        self.afterwards: Callable[[bool], Deferred[Sequence[str]]]
        self.afterwards = lambda anew: succeed(())
        #: What a reload that waits to be confirmed goes back to, and when.
        self._back: tuple[Layers, Overlay, Routes, float] | None = None
        self._back_at: IDelayedCall | None = None

    def close(self) -> None:
        """The process stops: no timer is left."""
        super().close()
        if self._back_at is not None:
            self._back_at.cancel()
        self._back = self._back_at = None

    # -- one change at a time

    def _change(
        self,
        overlay: Callable[[Layers], Overlay],
        layers: Callable[[], Layers] | None = None,
        then: Callable[[], object] = bool,
        routes: Routes | None = None,
    ) -> Deferred[Difference]:
        """Have other settings: all of them, or none.

        :param overlay: makes it, for what is below, once no other change is under way;
            may refuse.
        :param layers: reads what is below; unless given, it is as it was.
        :param then: called once they are there, before the next change.
        :param routes: of before, which are to be those again.
        """
        return self._lock.run(self._change_now, overlay, layers, then, routes)

    @inlineCallbacks
    def _change_now(
        self,
        make: Callable[[Layers], Overlay],
        read: Callable[[], Layers] | None,
        then: Callable[[], object],
        routes: Routes | None,
    ) -> Any:
        self._check_running()
        layers = self._layers
        if read is not None:
            layers = yield aside(self._reactor, read)
        said = make(layers)
        wanted = said.over(layers)
        config: Config
        try:
            if len(layers.relays) >= MANY:
                config = yield aside(self._reactor, partial(self._configure, wanted))
            else:
                config = self._configure(wanted)
            self._check_running()
            difference = self._all.change(config, anew=read is not None, routes=routes)
        except ConfigError as problem:
            raise Invalid(*str(problem).splitlines()) from problem
        self._layers, was, self.overlay = layers, self.overlay, said
        changed = {*difference.added, *difference.removed, *difference.changed}
        for name in changed | said.others(was):
            self._revise(name)
        self._needs_restart = difference.needs_restart
        self._say_of_servers(was, difference.changed)
        self._forget_resumes()
        then()
        unfinished = yield self.afterwards(read is not None)
        return attrs.evolve(difference, unfinished=tuple(unfinished))

    def _configure(self, wanted: Layers) -> Config:
        """:raises ConfigError: these settings can't be had."""
        return self._all.alike(configure(wanted))

    def _say_of_servers(self, before: Overlay, changed: Sequence[str]) -> None:
        """Tell the servers what the operator says of them.

        :param changed: relays that have other servers now, perhaps.
        """
        for relay in {*before.servers, *self.overlay.servers}:
            if relay not in self._all.units:
                self.words.forget(relay)
                continue
            shown = self._shown_of(relay)
            was, now = (each.servers.get(relay, {}) for each in (before, self.overlay))
            for server in {**was, **now}:
                said = now.get(server, NOTHING)
                if was.get(server) != said or (relay in changed and not shown.pools):
                    self.words.note(shown, server, said)
            for pool in shown.pools:
                self.words.adopt(relay, pool)

    # -- settings

    @inlineCallbacks
    def set(self, relay: str, settings: Mapping[str, Any], by: Asker) -> Any:
        """See :class:`relayd.control.steering.Steering`."""
        if not settings:
            raise Invalid("nothing to set: give key=value")

        self._unit(relay)
        difference = yield self._change(lambda _: self._with(relay, settings))
        return self._changed(relay, difference)

    def _changed(self, relay: str, difference: Difference) -> Json:
        """The answer to a change of a relay.

        :raises Unfinished: not all has followed it.
        """
        if difference.unfinished:
            made = f"{relay} is changed, and stays so, but:"
            raise Unfinished(made, *difference.unfinished)
        return self.relay(relay)

    def _with(self, relay: str, settings: Mapping[str, Any]) -> Overlay:
        """The overlay, with other settings of a relay.

        :raises Refusal: it can't be.
        """
        kind = self._unit(relay).kind
        made, problems = self.overlay.with_settings(relay, kind, settings)
        if problems:
            raise Invalid(*problems)
        return made

    @inlineCallbacks
    def start(self, relay: str, by: Asker) -> Any:
        """See :class:`relayd.control.steering.Steering`."""
        difference = yield self._enable(relay, True)
        return self._changed(relay, difference)

    @inlineCallbacks
    def stop(self, relay: str, cut: bool, by: Asker) -> Any:
        """See :class:`relayd.control.steering.Steering`."""
        killing: list[Deferred[Any]] = []

        def begin() -> None:
            if cut:
                work = kill(self._shown(), relay=relay, why=f"stopped by {by}")
                killing.append(self._works.begin(work))

        # Before a change that waits for this one, which may start the relay again.
        difference = yield self._enable(relay, False, begin)
        if killing:
            yield killing[0]
        return self._changed(relay, difference)

    @inlineCallbacks
    def drain(self, relay: str, within: float | None, by: Asker) -> Any:
        """See :class:`relayd.control.steering.Steering`."""
        timeout = self._config.drain_timeout if within is None else seconds_of(within)

        def begin() -> None:
            for factory, _ in self._shown_of(relay).generations:
                factory.drain(timeout)

        # As above.
        difference = yield self._enable(relay, False, begin)
        return self._changed(relay, difference)

    def _enable(
        self, relay: str, enabled: bool, then: Callable[[], object] = bool
    ) -> Deferred[Difference]:
        def overlay(layers: Layers) -> Overlay:
            self._unit(relay)
            in_file = section_of(layers, relay).enabled
            return self._with(
                relay, {_ENABLED: None if enabled == in_file else enabled}
            )

        self._unit(relay)
        return self._change(overlay, then=then)

    # -- the file

    @inlineCallbacks
    def reload(self, discard: bool, confirm: float | None, by: Asker | None) -> Any:
        """See :class:`relayd.control.steering.Steering`.

        :param by: None: by a signal.
        """
        self._check_confirmed()
        if why := self._source.why_not:
            raise Conflict(why)
        seconds = None if confirm is None else seconds_of(confirm)
        before = self._layers, self.overlay, self._all.routes, self._loaded

        def overlay(layers: Layers) -> Overlay:
            nonlocal before
            # Another one may have come before.
            self._check_confirmed()
            before = self._layers, self.overlay, self._all.routes, self._loaded
            there, were = (
                {each.name or "": each.kind for each in of.relays}
                for of in (layers, self._layers)
            )
            return Overlay() if discard else self.overlay.only(there, were)

        def then() -> None:
            if seconds is not None:
                self._back = before
                self._back_at = self._clock.callLater(seconds, self._go_back)

        self.reloading()
        try:
            difference = yield self._change(overlay, self._source.read, then)
        except Exception as problem:
            lines = getattr(problem, "problems", [str(problem)])
            self._note_reload(*lines)
            self.reloaded(f"the last reload was refused: {lines[0]}")
            raise
        self._note_loaded(LogTimes.since_epoch())
        self._note_reload()
        self.reloaded(next(iter(difference.unfinished), ""))
        counted = len(self.overlay), len(before[1]) - len(self.overlay)
        words = difference.in_words(*counted)
        log.info("reloaded: {what}", what=words)
        if difference.unfinished:
            raise Unfinished(f"reloaded: {words}; but:", *difference.unfinished)
        return {**difference.as_json(*counted), "confirm_within": seconds}

    def _check_confirmed(self) -> None:
        """:raises Conflict: a reload waits to be confirmed."""
        if self._back is not None:
            raise Conflict(
                "a reload waits to be confirmed: confirm it first, or wait until it has"
                " gone back"
            )

    @inlineCallbacks
    def reload_by_signal(self) -> Any:
        """Read the settings again (SIGHUP); the log has what is wrong."""
        if self._source.path is None:
            log.info("there is no file to read")
            # Who manages the service waits for it.
            self.reloading()
            self.reloaded("")
            return
        try:
            yield self.reload(False, None, None)
        except Unfinished:
            # The log has it: what should have followed has told of it.
            pass
        except Refusal as refusal:
            for line in refusal.problems:
                log.error("{line}", line=line)
            log.error("nothing has changed")

    def _note_reload(self, *problems: str, ok: bool = False) -> None:
        """Have it shown; `ok`: it is in effect, in spite of the problems."""
        at, ok = LogTimes().now(), ok or not problems
        self._last_reload = {"at": at, "ok": ok, "problems": list(problems)}

    def _note_loaded(self, at: float) -> None:
        """The settings in effect were read then."""
        self._loaded = at
        for each in self.loaded:
            each(at)

    def _go_back(self) -> None:
        """Nobody has confirmed the reload."""
        back, self._back, self._back_at = self._back, None, None
        if back is None or self._all.service.stopping:
            return
        log.warn("the reload was not confirmed in time: going back")
        layers, overlay, routes, loaded = back
        going = maybeDeferred(
            self._change, lambda _: overlay, lambda: layers, routes=routes
        )
        gone = "it was not confirmed in time: all is as it was before"

        def failed(reason: Failure) -> None:
            why = reason.getErrorMessage()
            log.error("the reload could not be taken back: {why}", why=why)
            # It is in effect, and nothing takes it back any more.
            stays = f"it was not confirmed in time, and could not be taken back: {why}"
            self._note_reload(stays, ok=True)

        def went(difference: Difference) -> None:
            # What is in effect is older than the file, as after a refusal.
            self._note_loaded(loaded)
            self._note_reload(gone)

        going.addCallbacks(went, failed)

    def confirm(self, by: Asker) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        if self._back is None or self._back_at is None:
            raise Conflict("no reload waits to be confirmed")
        self._back_at.cancel()
        self._back = self._back_at = None
        return {"confirmed": True}

    def _waits(self) -> Json | None:
        if self._back_at is None:
            return None
        left = self._back_at.getTime() - self._clock.seconds()
        return {"seconds_left": max(left, 0.0)}

    # -- the log

    def set_log_level(self, namespace: str, level: str, by: Asker) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        try:
            return {"levels": self._logs.levels.set(namespace, level)}
        except ConfigError as problem:
            raise Invalid(str(problem)) from problem


class SteeringTimers(Service):
    """Ends the timers of a steered relayd when it stops.

    :param steered: its timers.
    """

    def __init__(self, steered: Steered) -> None:
        self._steered = steered

    def stopService(self) -> None:
        super().stopService()
        self.close()

    def close(self) -> None:
        """The same; also of one that has not started."""
        self._steered.close()
