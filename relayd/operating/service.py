"""The service of one twistd command: listeners, signals, log file.

The listeners are built from the settings (:mod:`relayd.operating.relays`) and opened as
the service starts (:mod:`relayd.operating.running`).  The signals
(:mod:`relayd.operating.signals`) are handled before that.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import attrs
from twisted.application.service import IServiceCollection, MultiService, Service
from twisted.internet.defer import inlineCallbacks, maybeDeferred
from twisted.logger import Logger

from relayd.configuring.config import (
    DEMO_LISTENER,
    Config,
    Relay,
    Socks4Config,
    UdpRelay,
)
from relayd.configuring.cycles import refuse_cycles
from relayd.core.errors import ConfigError
from relayd.core.relay_names import relay_name, relay_names
from relayd.net.upstream import Upstream
from relayd.operating.logs import Logs
from relayd.operating.notify import Notifier
from relayd.operating.open_files import raise_open_files
from relayd.operating.relays import (
    pool_listening,
    relay_listening,
    socks4_listenings,
    udp_listening,
)
from relayd.operating.running import RelayService
from relayd.operating.signals import Signals
from relayd.upstreams.pool import Pool

log = Logger(namespace="relayd.service")


class CommandService(MultiService):
    """The service of one command, made of several.

    :param parts: in the order in which they start.
    :param logs: opened for the application.
    """

    def __init__(self, parts: Sequence[Service], logs: Logs) -> None:
        super().__init__()
        for part in parts:
            part.setServiceParent(self)
        self._logs = logs

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
    parts: Sequence[Service], relays: RelayService, reactor: Any, logs: Logs
) -> CommandService:
    """A command of these parts, with its signals, and what tells its manager of it."""
    signals = Signals(reactor, relays.stop_now, logs.files)
    notifier = Notifier.of(reactor, relays)
    last = [] if notifier is None else [notifier]
    return CommandService([signals, *parts, *last], logs)


def can_listen_on(address: str) -> bool:
    """Whether a listener can be opened on an IPv4 address, now."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _named(relay: Relay | UdpRelay, name: str) -> Relay | UdpRelay:
    return attrs.evolve(relay, name=name)


def make_service(
    config: Config, reactor: Any, logs: Logs | None = None
) -> MultiService:
    """The service of one `twistd relayd`.

    :param logs: of the command; None: of a program that logs by itself.
    :raises ConfigError: a relay leads back to itself, or Twisted can't use one of the
        endpoint strings.
    """
    refuse_cycles(config.relays)
    raise_open_files(config.max_descriptors, reactor)
    logs = logs or Logs(reactor, "relayd", access_log=config.access_log)
    lines = logs.lines
    parts: list[Service] = []
    if config.demo:
        # Imports twisted.web, which only the demo needs.
        from relayd.operating.demo import DemoInvitation, DemoSite

        site = DemoSite(reactor)
        parts.append(site)
        pool = Pool([Upstream(site, "the demo's file server")])
        listenings = [pool_listening(DEMO_LISTENER, pool, config, reactor, lines)]
    else:
        names = relay_names([each.name for each in config.relays])
        relays = map(_named, config.relays, names)
        listenings = [
            udp_listening(each, config, reactor, lines)
            if isinstance(each, UdpRelay)
            else relay_listening(each, config, reactor, lines)
            for each in relays
        ]
    service = RelayService(
        listenings,
        config.drain_timeout,
        reactor,
        shutdown_delay=config.shutdown_delay,
    )
    parts.append(service)
    if config.demo:
        parts.append(DemoInvitation())
    return _command(parts, service, reactor, logs)


def make_socks4_service(
    config: Socks4Config, reactor: Any, logs: Logs | None = None
) -> MultiService:
    """The service of one `twistd socks4`.

    :param logs: of the command; None: of a program that logs by itself.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    raise_open_files(config.max_descriptors, reactor)
    address = config.socks4.bind_address
    if address and not can_listen_on(address):
        raise ConfigError(
            f"bad --bind-address {address!r}: it is no address of this machine"
        )
    # One proxy, however many listeners it has.
    config = attrs.evolve(config, name=relay_name(config.name))
    logs = logs or Logs(reactor, "socks4", access_log=config.access_log)
    listenings = socks4_listenings(config, reactor, logs.lines)
    proxies = RelayService(
        listenings, config.drain_timeout, reactor, "socks4", config.shutdown_delay
    )
    return _command([proxies], proxies, reactor, logs)
