"""The relays of a process: built from its settings, and changed in one step.

:meth:`Relays.change` compares what runs with other settings, relay by relay, by their
names.  Those that are the same are left alone.  The others are built first, which
touches nothing that runs; then listeners are opened and handed over
(:meth:`relayd.operating.running.RelayService.change`), or nothing has changed; and then
those that were built take over what must go on: counts, sessions that count for a
limit, what is known of servers.  No turn of the reactor passes meanwhile, so no client
sees a half of it.

A factory of streams is followed by another one, with which new clients begin; sessions
stay with theirs.  A UDP relay becomes what its settings say, as its flows share its
sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from twisted.logger import Logger

from relayd.configuring.config import AnyRelay, Config, ProcessSettings, UdpRelay
from relayd.configuring.interceptions import listens_for_others
from relayd.core.errors import CannotStart, ConfigError
from relayd.core.process_settings import DRAIN_TIMEOUT, SHUTDOWN_DELAY
from relayd.core.relay_names import relay_names
from relayd.operating.checks import ServerCheckService
from relayd.operating.difference import Difference
from relayd.operating.living_filters import LivingFilters
from relayd.operating.logs import Logs
from relayd.operating.pool_tasks import PoolTasks
from relayd.operating.relays import unit_of
from relayd.operating.route_modules import Routes
from relayd.operating.routing import route_of
from relayd.operating.running import RelayService
from relayd.operating.servers import check_listening, listens_transparently
from relayd.operating.standing import Listening
from relayd.operating.succession import succeed, take_over
from relayd.operating.udp_relays import most_flows
from relayd.operating.units import Part, Unit, Workshop, kind_of
from relayd.upstreams.pool import Pool, Task

log = Logger(namespace="relayd.service")

#: The settings of the process that can change while it runs; others take a restart.
CHANGEABLE = frozenset({DRAIN_TIMEOUT.field, SHUTDOWN_DELAY.field})


@attrs.frozen(eq=False)
class _Plan:
    """What was built, and serves nobody yet.

    :ivar units: all relays, by name.
    :ivar built: those that are new, each with the one that it follows, or None.
    :ivar flows: how many each UDP relay that stays can have, of each listener.
    """

    units: Mapping[str, Unit]
    built: list[tuple[Unit | None, Unit]]
    flows: dict[str, int] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class _Renewed:
    """What was read anew of relays that stay.

    :ivar listeners: what their listeners serve clients with.
    :ivar routes: relays, each with the function that its route is from now on.
    """

    listeners: dict[Listening, Any] = attrs.field(factory=dict)
    routes: list[tuple[Unit, Any]] = attrs.field(factory=list)


class Relays:
    """The relays of a process.

    :param reactor: runs them.
    :param logs: of the command.
    :param command: its name, with which errors begin.
    :param config: its settings, at first.
    :raises ConfigError: a relay can't be made; one line for each, with its name.

    :ivar config: the settings that are in effect.
    :ivar alone: there is one relay, which was given no name.
    :ivar units: the relays, by name.
    :ivar service: runs their listeners.
    :ivar checks: checks their servers.
    :ivar tasks: keeps their pools up to date.
    :ivar filters: changes those of their sessions.
    :ivar routes: the functions of their routes.
    :ivar followers: called after each change, before the next turn of the reactor.
    """

    def __init__(
        self,
        config: Config,
        reactor: Any,
        logs: Logs,
        command: str = "relayd",
        made: Callable[[AnyRelay, Workshop], Unit] | None = None,
    ) -> None:
        self._reactor, self._logs = reactor, logs
        self.checks = ServerCheckService(reactor, config.transport)
        self.filters = LivingFilters(reactor)
        self.routes = Routes()
        self.followers: list[Callable[[], object]] = []
        self.units: Mapping[str, Unit] = {}
        #: Of before, with sessions or flows that go on.
        self._former: list[Part] = []
        self.alone = [each.name for each in config.relays] == [None]
        self.config = _named(config)
        self.units = self._plan(self.config, self.routes, made).units
        self.service = RelayService(
            self._listenings(self.units.values()),
            config.drain_timeout,
            reactor,
            command,
            config.shutdown_delay,
        )
        self.tasks = PoolTasks(_tasks(self.units.values()))

    # -- building

    def _plan(
        self,
        config: Config,
        routes: Routes,
        made: Callable[[AnyRelay, Workshop], Unit] | None = None,
    ) -> _Plan:
        """Build what is not there as these settings say.

        :param routes: of what is built.
        :raises ConfigError: a relay can't be made, and so none is.
        """
        shop = Workshop(config, self._reactor, self._logs.lines, self.checks, routes)
        plan = _Plan({}, [])
        problems = []
        self.checks.added.clear()
        for relay in config.relays:
            name = relay.name or ""
            before = self.units.get(name)
            if before is not None and _same(before.settings, relay):
                plan.units[name] = before  # type: ignore[index]
                try:
                    if isinstance(relay, UdpRelay):
                        # They share what the process can have.
                        plan.flows[name] = most_flows(relay, shop.flows)
                except ConfigError as problem:
                    problems.append(f"{whose(relay, alone=self.alone)}{problem}")
                continue
            if before is not None and not _goes_on(before.settings, relay):
                before = None
            try:
                if before is None or not _listens_so(before.settings, relay):
                    check_listening(relay)
                unit = made(relay, shop) if made else unit_of(relay, shop, before)
            except ConfigError as problem:
                begin = whose(relay, alone=self.alone)
                problems += [f"{begin}{line}" for line in str(problem).splitlines()]
                continue
            except Exception:
                # A defect: what was built is not checked, and hears of no server.
                self._forget(plan)
                raise
            plan.units[name] = unit  # type: ignore[index]
            plan.built.append((before, unit))
        if problems:
            self._forget(plan)
            raise ConfigError("\n".join(problems))
        return plan

    def _forget(self, plan: _Plan) -> None:
        """What was built is not wanted."""
        for _, unit in plan.built:
            for part in unit.parts:
                part.let_go()
        for server in self.checks.added:
            self.checks.checker.remove(server)

    def _listenings(self, units: Iterable[Unit]) -> list[Listening]:
        return [each for unit in units for each in unit.listenings]

    # -- changing

    def alike(self, config: Config) -> Config:
        """The same settings; those of a relay that is as it was are the very same.

        They are compared here, in any thread, and not again in :meth:`change`.
        """
        config = _named(config)
        relays = []
        for relay in config.relays:
            each: AnyRelay = relay
            before = self.units.get(each.name or "")
            if before is not None and before.settings == each:
                each = before.settings
            relays.append(each)
        return attrs.evolve(config, relays=relays)

    def change(
        self, config: Config, *, anew: bool = False, routes: Routes | None = None
    ) -> Difference:
        """Have these settings from now on, in one step.

        :param anew: read again what else was read for them: the certificates of
            listeners that stay, and routes.
        :param routes: of before, which are to be those again.

        :raises ConfigError: they can't be had, in a line for each problem; nothing has
            changed.
        """
        config, needs_restart = self._without_restart(_named(config))
        if routes is None:
            routes = self.routes.anew() if anew else self.routes
        plan = self._plan(config, routes)
        before = self.units
        try:
            renewed = self._read_anew(plan, routes) if anew else _Renewed()
        except ConfigError:
            self._forget(plan)
            raise
        try:
            self.service.change(self._listenings(plan.units.values()))
        except CannotStart as problem:
            self._forget(plan)
            why = str(problem).removeprefix(f"{self.service.command}: ")
            raise ConfigError(why) from problem
        self.service.renew(renewed.listeners)
        read = routes.read if routes is not self.routes else ()
        for unit, function in renewed.routes:
            unit.router.route = function
        self.routes = routes
        routes.commit()
        self.config, self.units = config, plan.units
        self.service.drain_timeout = config.drain_timeout
        self.service.shutdown_delay = config.shutdown_delay
        kept = [unit for name, unit in before.items() if plan.units.get(name) is unit]
        gone = [
            unit for name, unit in before.items() if plan.units.get(name) is not unit
        ]
        new = [unit for _, unit in plan.built]
        old_pools, new_pools = _pools_but(gone, new), _pools_but(new, gone)
        listenings = self.service.listenings
        succeed(listenings, self._listenings(before.values()), self.service.former)
        for follows, unit in plan.built:
            if follows is not None:
                _follow(follows, unit)
                self._filter(follows, unit)
        for name, most in plan.flows.items():
            for part in plan.units[name].parts:
                part.served.table.max_flows = most
        self._former += [part for unit in gone for part in unit.parts]
        self._let_go()
        self._check_no_more(old_pools)
        self.tasks.remove(_tasks_of(gone, old_pools))
        self.tasks.add(_tasks_of(new, new_pools))
        self.checks.added.clear()
        for each in self.followers:
            each()
        changed = [unit.name for _, unit in plan.built if unit.name in before]
        return Difference(
            tuple(name for name in plan.units if name not in before),
            tuple(name for name in before if name not in plan.units),
            tuple(changed),
            len(kept),
            needs_restart,
            read,
        )

    def _filter(self, before: Unit, unit: Unit) -> None:
        """Have the sessions of before the filters that they are to have from now on.

        UDP relays are the same after a change, and see to their flows themselves.
        """
        if unit.kind != "udp":
            older = [each for each in self.service.former if each.name == unit.name]
            self.filters.change(older, before.filters, unit.filters)

    def _read_anew(self, plan: _Plan, routes: Routes) -> _Renewed:
        """What relays that stay serve their clients with, and ask about them.

        :raises ConfigError: a certificate, or a route, can't be read: a line for each.
        """
        found, problems = _Renewed(), []
        for name, unit in plan.units.items():
            if self.units.get(name) is not unit:
                continue
            begin = whose(unit.settings, alone=self.alone)
            for each in unit.listenings:
                if each.text and each.enabled:
                    try:
                        found.listeners[each] = each.port_factory()
                    except ConfigError as problem:
                        problems.append(f"{begin}{problem}")
            if unit.router is not None:
                try:
                    found.routes.append((unit, route_of(unit.settings, routes)))
                except ConfigError as problem:
                    problems.append(f"{begin}{problem}")
        if problems:
            raise ConfigError("\n".join(problems))
        return found

    def _without_restart(self, config: Config) -> tuple[Config, tuple[str, ...]]:
        """The settings that can be had now, and the keys of those that can't."""
        fields = {each.name for each in attrs.fields(ProcessSettings)} - CHANGEABLE
        stays = {name: getattr(self.config, name) for name in fields}
        needs = [
            name for name in sorted(fields) if getattr(config, name) != stays[name]
        ]
        return attrs.evolve(config, **stays), tuple(needs)

    def _let_go(self) -> None:
        """Forget what was before, once it has no sessions."""
        left = []
        serving = {part.served for unit in self.units.values() for part in unit.parts}
        for part in self._former:
            if part.served not in serving and len(part.served.registry):
                left.append(part)
            else:
                part.let_go()
        self._former = left

    def _check_no_more(self, pools: Iterable[Pool]) -> None:
        for pool in pools:
            for server in pool.servers:
                self.checks.checker.remove(server)


def _follow(before: Unit, unit: Unit) -> None:
    """A relay takes over from the one before."""
    for part, old in zip(unit.parts, before.parts, strict=False):
        if part.built is not None:
            made_of, was = part.built.made_of, part.served.made_of
            take_over(made_of.gate, was.gate)
            take_over(made_of.bandwidth, was.bandwidth)
            part.served.become(part.built)
        for name, pool in part.pools.items():
            was_pool = old.pools.get(name)
            if was_pool is not None and was_pool is not pool:
                pool.succeed(was_pool)


def _pools_but(units: Iterable[Unit], others: Iterable[Unit]) -> list[Pool]:
    """The pools of some relays that no others have."""
    theirs = {id(pool) for unit in others for pool in unit.pools}
    return [pool for unit in units for pool in unit.pools if id(pool) not in theirs]


def _tasks(units: Iterable[Unit]) -> list[Task]:
    units = list(units)
    return _tasks_of(units, [pool for unit in units for pool in unit.pools])


def _tasks_of(units: Iterable[Unit], pools: Iterable[Pool]) -> list[Task]:
    """What keeps pools up to date, of relays that are not stopped."""
    running = {
        id(pool) for unit in units if unit.settings.enabled for pool in unit.pools
    }
    return [task for pool in pools if id(pool) in running for task in pool.tasks]


def _named(config: Config) -> Config:
    """The same, in which each relay has a name."""
    names = relay_names([each.name for each in config.relays])
    relays = [
        relay if relay.name == name else attrs.evolve(relay, name=name)
        for relay, name in zip(config.relays, names, strict=True)
    ]
    return attrs.evolve(config, relays=relays)


def _goes_on(one: AnyRelay, other: AnyRelay) -> bool:
    """Whether a relay can go on as another: of the same kind, and by such sockets."""
    if isinstance(other, UdpRelay) and isinstance(one, UdpRelay):
        return listens_for_others(one) == listens_for_others(other)
    return kind_of(one) == kind_of(other)


def _listens_so(one: AnyRelay, other: AnyRelay) -> bool:
    """Whether a relay's listeners can have the sockets of those of another."""
    return (
        one.enabled
        and one.listeners == other.listeners
        and listens_transparently(one) == listens_transparently(other)
    )


def _same(one: AnyRelay, other: AnyRelay) -> bool:
    """Whether they are equal; to compare all that they have takes 20 us."""
    return one is other or one == other


def whose(relay: AnyRelay, *, alone: bool) -> str:
    """What an error of a relay begins with.

    :param alone: it is the only one, and has no name of its own: with nothing.
    """
    return "" if alone else f"relay {relay.name}: "
