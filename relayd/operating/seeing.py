"""What a running relayd tells of itself: the half of its steering that changes nothing.

See :class:`relayd.control.steering.Steering`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks

import relayd
from relayd.configuring.address_settings import DEST
from relayd.configuring.config import Config
from relayd.configuring.effective import effective_of
from relayd.configuring.given import Layers
from relayd.configuring.route_settings import SNI
from relayd.configuring.server_grammar import ServersOf, options_of
from relayd.configuring.written import in_clear
from relayd.control.steering import (
    Conflict,
    FlowQuery,
    Invalid,
    Json,
    SessionQuery,
    Unknown,
    Work,
)
from relayd.core.errors import ConfigError
from relayd.core.route_spec import DEFAULT
from relayd.core.setting_types import Kind
from relayd.observing.log_times import LogTimes
from relayd.operating import (
    health,
    limits_listing,
    listing,
    listing_flows,
    listing_servers,
)
from relayd.operating.changing import Relays
from relayd.operating.explaining import State, explained
from relayd.operating.explaining_routes import Said, not_run, on_reactor
from relayd.operating.health import pool_of
from relayd.operating.logs import Logs
from relayd.operating.overlay import Entry, Overlay, section_of, shown
from relayd.operating.standing import Served, has_flows
from relayd.operating.units import Unit
from relayd.upstreams.pool import Pool

#: How many explanations may wait for routes at once.
EXPLAINED_AT_ONCE = 32


class Seeing:
    """What there is.

    :param relays: of the process.
    :param layers: what their settings were made of.
    :param logs: of the command.

    :ivar path: of the file that was read; None: there is none.
    :ivar overlay: what was said since.
    :ivar process: the bounds of the process.
    :ivar rules: says how the rules stand that it manages
        (:meth:`relayd.operating.managed_rules.ManagedRules.shown`).
    """

    def __init__(
        self, reactor: Any, relays: Relays, layers: Layers, logs: Logs, path: str | None
    ) -> None:
        self.path = path
        self.overlay = Overlay()
        self.process = limits_listing.Process(
            reactor=reactor, logs=logs, checker=relays.checks.checker
        )
        self._all = relays
        self._layers = layers
        self._logs = logs
        self._started = LogTimes.since_epoch()
        #: When the settings in effect were read.
        self._loaded = self._started
        self._last_reload: Json | None = None
        self._needs_restart: Sequence[str] = ()
        #: Explanations that wait for a route.
        self._explaining: dict[Deferred[Any], None] = {}
        #: How often there were too many of them.
        self._not_explained = 0
        self.process.more.append(self._limits)
        self.rules: Callable[[], Json] = _no_rules
        #: How often each relay has changed.
        self._revisions: dict[str, int] = {}

    @property
    def _config(self) -> Config:
        return self._all.config

    def _unit(self, name: str) -> Unit:
        """:raises Unknown: there is no such relay."""
        unit = self._all.units.get(name)
        if unit is None:
            there = listing.listing_of(self._all.units)
            raise Unknown(f"there is no relay {name!r}: there {there}")
        return unit

    # -- relays

    def status(self) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        service = self._all.service
        streams, flows = service.counts
        state = "running"
        if service.stopping:
            state = "draining" if service.draining else "stopping"
        times = LogTimes()
        return {
            "version": relayd.__version__,
            "pid": os.getpid(),
            "started_at": times(self._started),
            "uptime": max(LogTimes.since_epoch() - self._started, 0.0),
            "config": self.path,
            "loaded_at": times(self._loaded),
            "state": state,
            "relays": len(self._all.units),
            "sessions": streams,
            "flows": flows,
            "changes": len(self.overlay),
            "needs_restart": list(self._needs_restart),
            "confirm": self._waits(),
            "last_reload": self._last_reload,
            "netfilter": {
                "managed": self._config.manage_netfilter,
                "mark": self._config.netfilter_mark,
                **self.rules(),
            },
        }

    def _waits(self) -> Json | None:
        """What waits to be confirmed."""
        return None

    def relays(self) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        rows = []
        for name in list(self._all.units):
            if name in self._all.units:
                rows.append(self._row(self._all.units[name]))
            yield
        return {"relays": rows}

    def relay(self, name: str) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        unit = self._unit(name)
        section = section_of(self.overlay.over(self._layers), name)
        settings = {
            each.key: {"value": shown(each.rows[0], each.value), "source": each.source}
            for each in effective_of(section)
        }
        return {**self._row(unit), "settings": settings}

    def _row(self, unit: Unit) -> Json:
        service = self._all.service
        factories = [each.served for each in unit.parts]
        older = self._older(unit.name)
        sessions = sum(len(each.registry) for each in factories)
        before = sum(len(each.registry) for each in older)
        admission = unit.settings.admission
        named = getattr(unit.settings, "destinations", ())
        route = getattr(unit.settings, "route", None)
        return {
            "name": unit.name,
            "kind": unit.kind,
            "state": self._state(unit),
            "listen": service.addresses(unit.name),
            "dest": list(map(_place_of, named)),
            "sni": list(map(str, getattr(unit.settings, "sni", ()))),
            "route": None if route is None else str(route),
            "sessions": sessions + before,
            "older_sessions": before,
            "max_sessions": getattr(admission, "max_sessions", None),
            **(
                _of_flows(factories)
                if unit.kind == "udp"
                else _of_streams([*factories, *older])
            ),
        }

    def _state(self, unit: Unit) -> str:
        service = self._all.service
        if service.draining:
            return "draining"
        if not unit.settings.enabled:
            served = [each.served for each in unit.parts]
            served += self._older(unit.name)
            draining = any(
                each.registry.draining and len(each.registry) for each in served
            )
            return "draining" if draining else "stopped"
        return "paused" if unit.name in service.held else "running"

    def revision(self, relay: str, server: str = "") -> str:
        """See :class:`relayd.control.steering.Steering`."""
        self._unit(relay)
        return f"{self._revisions.get(relay, 0)}-{self._started:.0f}"

    # -- what lives

    def _shown(self) -> list[listing.Shown]:
        """All relays, and those that are no more and have sessions."""
        shown = [self._shown_of(name) for name in self._all.units]
        former = self._all.service.former
        names = {each.name for each in former} - self._all.units.keys()
        for name in sorted(names):
            gone = self._older(name)
            kind: Kind = "udp" if has_flows(gone[0]) else "tcp"
            shown.append(listing.Shown(name, kind, (), gone))
        return shown

    def _shown_of(self, relay: str) -> listing.Shown:
        """:raises Unknown: there is no such relay."""
        unit = self._unit(relay)
        factories = list(dict.fromkeys(each.served for each in unit.parts))
        older = self._older(relay)
        return listing.Shown(relay, unit.kind, factories, older, pools_of(unit))

    def _older(self, relay: str) -> list[Served]:
        """What has sessions of a relay from before a change."""
        return [each for each in self._all.service.former if each.name == relay]

    def sessions(self, query: SessionQuery) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        return listing.sessions(self._shown(), query)

    def flows(self, query: FlowQuery) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        return listing_flows.flows(self._shown(), query)

    def nat(self, query: FlowQuery) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        return listing_flows.nat(self._shown(), query)

    def servers(self, relay: str | None) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        return listing_servers.servers(self._shown(), relay)

    def server(self, relay: str, server: str) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        return listing_servers.server(self._shown_of(relay), server)

    def _limits(self) -> list[Json]:
        """Its own bounds."""
        row = {"what": "explanations", "relay": None, "limit": EXPLAINED_AT_ONCE}
        return [{**row, "now": len(self._explaining), "hits": self._not_explained}]

    def limits(self) -> Work:
        """See :class:`relayd.control.steering.Steering`."""
        return limits_listing.limits(self._shown(), self.process)

    # -- settings

    def _called(self) -> dict[str, dict[str, list[Entry]]]:
        """Where the settings name each server, where something was said of servers."""
        return {
            name: _entries(unit)
            for name, unit in self._all.units.items()
            if name in self.overlay.servers
        }

    def diff(self) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        found = self.overlay.differences(self._layers, self._called())
        return {"changes": list(found)}

    def merged(self) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        try:
            toml = self.overlay.as_toml(self._layers, self._called())
        except ConfigError as problem:
            raise Invalid(str(problem)) from problem
        return {"toml": toml, "in_clear": in_clear(self.overlay.over(self._layers))}

    @inlineCallbacks
    def explain(
        self,
        relay: str,
        client: str,
        at: str | None,
        dest: str | None,
        first: str | None,
        sni: str | None,
        runs: bool = True,
    ) -> Any:
        """See :class:`relayd.control.steering.Steering`."""
        unit = self._unit(relay)
        if len(self._explaining) >= EXPLAINED_AT_ONCE:
            self._not_explained += 1
            many = EXPLAINED_AT_ONCE
            raise Conflict(f"{many} explanations wait for a route: try again later")
        served = unit.parts[0].served
        pool = pool_of(served)
        stopped = "" if unit.settings.enabled else "it is stopped"
        if self._all.service.draining:
            # Until then clients are accepted, for `shutdown_delay`.
            stopped = "relayd stops"
        if has_flows(served):
            state = State(gate=served.made_of.gate, pool=pool, stopped=stopped)
        else:
            state = State.of(served, stopped)
        state = attrs.evolve(
            state,
            held=unit.name in self._all.service.held,
            router=unit.router,
            listener=next(iter(self._all.service.addresses(unit.name)), ""),
        )
        try:
            decide = on_reactor(self.process.reactor) if runs else not_run
            explaining = explained(
                *(unit.settings, client, decide),
                at=at,
                dest=dest,
                said=Said.of(first, sni),
                state=state,
            )
            made = Deferred.fromCoroutine(explaining)
            self._explaining[made] = None
            try:
                found = yield made
            finally:
                del self._explaining[made]
        except ConfigError as problem:
            raise Invalid(*str(problem).splitlines()) from problem
        except CancelledError:
            raise Conflict("relayd stops: it waits for no route any more") from None
        return found.as_json

    def _stop_explaining(self) -> None:
        """The process stops: nothing is waited for."""
        for each in list(self._explaining):
            each.cancel()

    def log_levels(self) -> Json:
        """See :class:`relayd.control.steering.Steering`."""
        return {"levels": self._logs.levels.get()}


def _no_rules() -> Json:
    """What is said of netfilter rules by a process that leaves them to others."""
    return {"relays": [], "failures": 0, "lost": 0, "problems": []}


def _place_of(destination: Any) -> str:
    """A destination without its options, but with its pool."""
    pool = options_of(destination).pool
    return f"{destination},pool={pool}" if pool else str(destination)


def _of_streams(factories: Iterable[Any]) -> Json:
    """What was counted of a relay of streams.

    :param factories: all that have sessions; those of before a change come last.
    """
    first, *_ = factories
    totals, counts = first.totals, first.counts
    up = down = None
    if counts is not None:
        living = [p.session for each in factories for p in each.registry.living()]
        up = counts.up + sum(each.up.read for each in living)
        down = counts.down + sum(each.down.read for each in living)
    return {
        "refused": sum(totals.refusals.values()),
        "retries": totals.retried.count,
        "bytes_up": up,
        "bytes_down": down,
    }


def _of_flows(factories: Iterable[Any]) -> Json:
    """What was counted of a UDP relay; what it refuses are datagrams."""
    up = down = refused = 0
    for each in factories:
        up += each.counts.up + sum(flow.up_bytes for flow in each.table)
        down += each.counts.down + sum(flow.down_bytes for flow in each.table)
        refused += sum(each.counters.dropped.values())
    return {"refused": refused, "retries": None, "bytes_up": up, "bytes_down": down}


def pools_of(unit: Unit) -> list[Pool]:
    """The pools that its parts have now: a server may have been given a state."""
    return [pool for each in unit.parts for pool in health.pools_of(each.served)]


def _entries(unit: Unit) -> dict[str, list[Entry]]:
    """By what a server is called: where the settings of its relay name it."""
    settings: Any = unit.settings
    named: dict[str, list[tuple[Entry, Any]]] = {}
    for number, each in enumerate(settings.destinations):
        pool = options_of(each).pool or DEFAULT
        named.setdefault(pool, []).append((Entry(DEST.key, number), each))
    for number, entry in enumerate(getattr(settings, "sni", ())):
        if not isinstance(entry.target, str):
            where = Entry(SNI.key, number), entry.target
            named.setdefault(entry.pool, []).append(where)
    found: dict[str, dict[Entry, None]] = {}
    for own in pools_of(unit):
        # Those that a name has brought come behind, or in another's place.
        fixed = [
            place
            for place, destination in named.get(own.name, ())
            if not isinstance(destination, ServersOf)
        ]
        for place, server in zip(fixed, own.upstreams, strict=False):
            for name in listing.names_of(server):
                found.setdefault(name, {})[place] = None
    return {name: list(places) for name, places in found.items()}
