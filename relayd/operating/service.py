"""The service of one twistd command: listeners, signals, log file.

The listeners are built from the settings (:mod:`relayd.operating.relays`) and opened as
the service starts (:mod:`relayd.operating.running`).  The signals
(:mod:`relayd.operating.signals`) are handled before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.application.service import IServiceCollection, MultiService, Service
from twisted.internet.defer import inlineCallbacks, maybeDeferred
from twisted.logger import Logger

from relayd.configuring.address_grammar import StreamAddress
from relayd.configuring.config import Config, Relay, UdpRelay
from relayd.configuring.pools_of_relay import servers_of
from relayd.configuring.server_grammar import options_of
from relayd.configuring.source import Source
from relayd.core.errors import CannotStart, ConfigError
from relayd.net.dial_options import DialOptions
from relayd.operating.changing import Relays, whose
from relayd.operating.dial_rights import DialRights
from relayd.operating.endpoints import listening_endpoint, on_plane
from relayd.operating.huge_pages import HugePages
from relayd.operating.interim_lines import InterimLines
from relayd.operating.logs import Logs
from relayd.operating.notify import Notifier
from relayd.operating.open_files import raise_open_files
from relayd.operating.running import RelayService
from relayd.operating.servers import LISTENING, listens_transparently
from relayd.operating.signals import Signals
from relayd.operating.steering import Steered, SteeringTimers
from relayd.operating.units import Unit, Workshop

if TYPE_CHECKING:
    from relayd.operating.managed_rules import ManagedRules

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
    relays: Relays,
    reactor: Any,
    logs: Logs,
    source: Source | None,
    rules: ManagedRules | None,
    pages: HugePages | None,
) -> CommandService:
    """A command of these parts, with its signals, and what tells its manager of it.

    :param rules: one of the parts, if it manages those of its relays.
    """
    signals = Signals(reactor, relays.service.stop_now, logs.files)
    notifier = Notifier.of(reactor, relays.service)
    last = [] if notifier is None else [notifier]
    first: list[Any] = [] if pages is None else [pages]
    if source is not None and not config.demo:
        steered = Steered(reactor, relays, source, logs)
        if notifier is not None:
            steered.reloading, steered.reloaded = notifier.reloading, notifier.reloaded
        if notifier is not None or not source.why_not:
            signals.reload = steered.reload_by_signal
        if rules is not None:
            steered.afterwards, steered.rules = rules.follow, rules.shown
        if config.control is not None:
            first.append(_control(config, steered, relays.service.command, reactor))
        first.append(SteeringTimers(steered))
    else:
        steered = None
    if config.metrics is not None:
        metrics = _metrics(config.metrics, relays.service, reactor, logs)
        relays.followers.append(metrics.follow)
        if rules is not None:
            metrics.rules = rules.counts
        first.append(metrics)
        if steered is not None:
            steered.process.more.append(metrics.limits)
            steered.loaded.append(metrics.loaded)

    def clean_up() -> None:
        for each in first if rules is None else (*first, rules):
            each.close()
        relays.service.close_now()

    return CommandService([signals, *first, *parts, *last], logs, clean_up)


def _control(config: Config, steered: Steered, command: str, reactor: Any) -> Any:
    """What serves the control socket."""
    # Imports twisted.web, which few relays need.
    from relayd.operating.control_service import ControlService

    where: Any = config.control
    uids = config.control_uids, config.control_read_uids
    return ControlService(reactor, where.path, steered, *uids, command)


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
    config: Config,
    reactor: Any,
    logs: Logs | None = None,
    command: str = "relayd",
    source: Source | None = None,
) -> MultiService:
    """The service of one command.

    :param logs: of the command; None: of a program that logs by itself.
    :param command: its name, with which errors begin.
    :param source: where the settings came from: they can be read again, and changed by
        the control socket; unless given, they can't.
    :raises ConfigError: Twisted can't use an endpoint string, or this machine can't
        give what is asked for; one line for each relay that can't be made, with its
        name.
    """
    raise_open_files(config.max_descriptors, reactor)
    # Once, and not by each relay.
    on_plane(config.transport, reactor)
    # What a program has beside its relays is not ours to move.
    pages = None if logs is None else HugePages(reactor)
    logs = logs or Logs(
        reactor, command, access_log=config.access_log, log_format=config.log_format
    )
    parts: list[Service] = []
    demo = partial(_demo, parts) if config.demo else None
    relays = Relays(config, reactor, logs, command, demo)
    if config.log_interval:
        living = InterimLines(
            reactor, config.log_interval, lambda: relays.service.served, logs.lines
        )
        parts.append(living)
    parts += [relays.checks, relays.tasks]
    if dialing := _dialing(relays.config, alone=relays.alone):
        parts.append(DialRights(dialing, command))
    # It stops when the relays have.
    if rules := _rules(config, relays, reactor, command):
        parts.append(rules)
    parts.append(relays.service)
    if config.demo:
        from relayd.operating.demo import DemoInvitation

        parts.append(DemoInvitation())
    return _command(config, parts, relays, reactor, logs, source, rules, pages)


def _rules(
    config: Config, relays: Relays, reactor: Any, command: str
) -> ManagedRules | None:
    """What manages the netfilter rules of the relays, if this process is to."""
    if not config.manage_netfilter:
        return None
    # Imports what few relays need.
    from relayd.operating.managed_rules import ManagedRules

    return ManagedRules(relays, reactor, command)


def _demo(parts: list[Service], relay: Relay, shop: Workshop) -> Unit:
    """The demo's relay; its file server is one of the parts."""
    # Imports twisted.web, which only the demo needs.
    from relayd.operating.demo import demo_unit

    site, unit = demo_unit(relay, shop)
    parts.append(site)
    return unit


def _dialing(config: Config, *, alone: bool) -> list[tuple[str, DialOptions]]:
    """How relays and servers are dialled in a way of their own, and whose it is."""
    found: dict[tuple[str, DialOptions], None] = {}
    for relay in config.relays:
        whom, options = whose(relay, alone=alone), relay.dialing.options
        found[whom, options] = None
        if isinstance(relay, UdpRelay) and (what := listens_transparently(relay)):
            # Its replies leave by sockets that are made as it runs.
            found[whom + what, LISTENING] = None
        if isinstance(relay, Relay | UdpRelay):
            for each in servers_of(relay):
                found[whom, options_of(each).dialing(options) or options] = None
    return [(whom, options) for whom, options in found if options != DialOptions()]
