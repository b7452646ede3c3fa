"""The service of one twistd command: listeners, signals, log file.

The listeners are built from the settings (:mod:`relayd.operating.relays`) and opened as
the service starts (:mod:`relayd.operating.running`).  The signals
(:mod:`relayd.operating.signals`) are handled before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from twisted.application.service import IServiceCollection, MultiService, Service
from twisted.internet.defer import inlineCallbacks, maybeDeferred
from twisted.logger import Logger

from relayd.configuring.address_grammar import StreamAddress
from relayd.configuring.config import AnyRelay, Config, Relay, Socks4Relay, UdpRelay
from relayd.configuring.server_grammar import options_of
from relayd.core.errors import CannotStart, ConfigError
from relayd.core.relay_names import relay_names
from relayd.net.dial_options import DialOptions
from relayd.operating.checks import ServerCheckService
from relayd.operating.dial_rights import DialRights
from relayd.operating.endpoints import listening_endpoint, on_plane
from relayd.operating.interim_lines import InterimLines
from relayd.operating.logs import Logs
from relayd.operating.notify import Notifier
from relayd.operating.open_files import raise_open_files
from relayd.operating.pool_tasks import PoolTasks
from relayd.operating.relays import (
    FlowLimit,
    relay_listenings,
    socks4_listenings,
    udp_listenings,
)
from relayd.operating.running import RelayService
from relayd.operating.signals import Signals
from relayd.operating.standing import Listening
from relayd.tcp import RelayFactory
from relayd.udp_nat import UdpNat
from relayd.upstreams.pool import Pool

log = Logger(namespace="relayd.service")


class CommandService(MultiService):
    """The service of one command, made of several.

    :param parts: in the order in which they start.
    :param logs: opened for the application.
    :param clean_up: called when a part can't start: it closes what others have opened.
    """

    def __init__(
        self,
        parts: Sequence[Service],
        logs: Logs,
        clean_up: Callable[[], object] = bool,
    ) -> None:
        super().__init__()
        for part in parts:
            part.setServiceParent(self)
        self._logs = logs
        self._clean_up = clean_up

    def privilegedStartService(self) -> None:
        """Start what needs privileges, such as a low port.

        :raises CannotStart: a part can't start.
        """
        try:
            super().privilegedStartService()
        except CannotStart:
            self._clean_up()
            raise

    def startService(self) -> None:
        """Start the rest.

        :raises CannotStart: a part can't start.
        """
        try:
            super().startService()
        except CannotStart:
            self._clean_up()
            raise

    def setServiceParent(self, parent: IServiceCollection) -> None:
        """Attach to an application, and open its logs.

        :raises CannotStart: a log can't be opened.
        """
        super().setServiceParent(parent)
        self._logs.attach(parent)

    @inlineCallbacks
    def stopService(self) -> Any:
        """Stop the parts, the last first, each when those after it have stopped.

        What the relays need, or what tells of them, is there until they have drained.
        """
        Service.stopService(self)
        for part in reversed(list(self)):
            try:
                yield maybeDeferred(part.stopService)
            except Exception:
                log.failure("a part of the service could not be stopped")


def _command(
    config: Config,
    parts: Sequence[Service],
    relays: RelayService,
    reactor: Any,
    logs: Logs,
) -> CommandService:
    """A command of these parts, with its signals, and what tells its manager of it."""
    signals = Signals(reactor, relays.stop_now, logs.files)
    notifier = Notifier.of(reactor, relays)
    last = [] if notifier is None else [notifier]
    if config.metrics is None:
        return CommandService([signals, *parts, *last], logs)
    metrics = _metrics(config.metrics, relays, reactor, logs)
    return CommandService([signals, metrics, *parts, *last], logs, metrics.close)


def _metrics(
    where: StreamAddress, relays: RelayService, reactor: Any, logs: Logs
) -> Any:
    """What serves the metrics.

    :raises ConfigError: prometheus_client is not installed, or Twisted can't use the
        endpoint string.
    """
    try:
        from relayd.operating.metrics_service import MetricsService
    except ModuleNotFoundError as problem:
        if not (problem.name or "").startswith("prometheus_client"):
            raise
        raise ConfigError(
            "--metrics needs a package that is not installed: pip install"
            " 'relayd[metrics]'"
        ) from problem
    # Readers are few, and are served by Twisted's transports.
    endpoint = listening_endpoint(where, reactor, backlog=64, transport="twisted")
    return MetricsService(reactor, endpoint, relays, logs)


def make_service(
    config: Config, reactor: Any, logs: Logs | None = None, command: str = "relayd"
) -> MultiService:
    """The service of one command.

    :param logs: of the command; None: of a program that logs by itself.
    :param command: its name, with which errors begin.
    :raises ConfigError: Twisted can't use an endpoint string, or this machine can't
        give what is asked for; one line for each relay that can't be made, with its
        name.
    """
    raise_open_files(config.max_descriptors, reactor)
    # Once, and not by each relay.
    on_plane(config.transport, reactor)
    problems: list[str] = []
    logs = logs or Logs(
        reactor, command, access_log=config.access_log, log_format=config.log_format
    )
    names = relay_names([each.name for each in config.relays])
    parts: list[Service] = []
    listenings: list[Listening] = []
    flows = FlowLimit.of(config)
    checks = ServerCheckService(reactor, config.transport)
    # Those of relays that are stopped can be made, too; they are not started.
    unused = ServerCheckService(reactor, config.transport)
    for relay in map(_named, config.relays, names):
        checked = checks if relay.enabled else unused
        try:
            if isinstance(relay, UdpRelay):
                listenings += udp_listenings(
                    relay, config, reactor, logs.lines, flows, checked
                )
            elif isinstance(relay, Socks4Relay):
                listenings += socks4_listenings(relay, config, reactor, logs.lines)
            elif config.demo:
                # Imports twisted.web, which only the demo needs.
                from relayd.operating.demo import demo_relay

                site, listening = demo_relay(relay, config, reactor, logs.lines)
                parts.append(site)
                listenings += listening
            else:
                listenings += relay_listenings(
                    relay, config, reactor, logs.lines, checked
                )
        except ConfigError as problem:
            problems.append(f"{_whose(relay, config)}{problem}")
    if problems:
        raise ConfigError("\n".join(problems))
    service = RelayService(
        listenings, config.drain_timeout, reactor, command, config.shutdown_delay
    )
    if config.log_interval:
        parts.append(
            InterimLines(
                reactor, config.log_interval, lambda: service.served, logs.lines
            )
        )
    if any(map(_checks, config.relays)):
        parts.append(checks)
    tasks = [
        task
        for served in dict.fromkeys(each.factory for each in listenings if each.enabled)
        if (pool := _pool_of(served)) is not None
        for task in pool.tasks
    ]
    if tasks:
        parts.append(PoolTasks(tasks))
    if dialing := _dialing(config, names):
        parts.append(DialRights(dialing, command))
    parts.append(service)
    if config.demo:
        from relayd.operating.demo import DemoInvitation

        parts.append(DemoInvitation())
    return _command(config, parts, service, reactor, logs)


def _pool_of(served: Any) -> Pool | None:
    """The pool of a relay, if its servers have state, or may."""
    if isinstance(served, RelayFactory):
        return served.pool
    return served.balance if isinstance(served, UdpNat) else None


def _checks(relay: AnyRelay) -> bool:
    """Whether servers of a relay are checked."""
    if isinstance(relay, Socks4Relay):
        return False
    own = [options_of(each).check for each in relay.destinations]
    return any(each is not None for each in (relay.pool.check, *own))


def _dialing(config: Config, names: Sequence[str]) -> list[tuple[str, DialOptions]]:
    """How relays and servers are dialled in a way of their own, and whose it is."""
    found: dict[tuple[str, DialOptions], None] = {}
    for relay, name in zip(config.relays, names, strict=True):
        whose, options = _whose(_named(relay, name), config), relay.dialing.options
        found[whose, options] = None
        if isinstance(relay, Relay | UdpRelay):
            for each in relay.destinations:
                found[whose, options_of(each).dialing(options) or options] = None
    return [(whose, options) for whose, options in found if options != DialOptions()]


def _whose(relay: AnyRelay, config: Config) -> str:
    """What an error of a relay begins with: nothing, if it is the only one."""
    alone = len(config.relays) == 1 and config.relays[0].name is None
    return "" if alone else f"relay {relay.name}: "


def _named(relay: AnyRelay, name: str) -> AnyRelay:
    return attrs.evolve(relay, name=name)
