"""The service behind `--metrics`: what is counted, read, and served by HTTP.

It is the first part of a command to start and the last to stop, so that readers can see
how the relays start, and how they drain.  Imported only if it is asked for, as it takes
prometheus_client and twisted.web.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import (
    IDelayedCall,
    IListeningPort,
    IStreamServerEndpoint,
)
from twisted.logger import Logger
from twisted.python.failure import Failure

import relayd
import twisted
from relayd.core.addresses import address_name
from relayd.core.counts import ServerCounts, SessionCounts
from relayd.core.errors import CannotStart
from relayd.net.descriptors import Descriptors
from relayd.net.listener import Listeners
from relayd.net.monotonic import monotonic
from relayd.observing.log_times import LogTimes
from relayd.observing.metrics import RelayCollector, exposition
from relayd.observing.readings import Flows, ProcessReading, RuleCounts, Sessions
from relayd.operating.collecting import keep_for_good
from relayd.operating.health import Health, pools_of
from relayd.operating.logs import Logs
from relayd.operating.metrics_site import MetricsSite
from relayd.operating.process_counts import (
    count_descriptors,
    max_descriptors,
    pipes_in_use,
)
from relayd.operating.running import RelayService
from relayd.operating.standing import has_flows
from relayd.upstreams.pool import Pool

log = Logger(namespace="relayd.metrics")

#: Seconds between two looks at how late the reactor is.
INTERVAL = 1.0


def _pools_of(factories: Iterable[Any]) -> list[Pool]:
    """The pools of one relay; each once."""
    return list(dict.fromkeys(pool for each in factories for pool in pools_of(each)))


class _Following:
    """Hears of the servers of one pool, for the counts of its relay.

    Addresses of a name may be others every day.
    """

    def __init__(self, counts: SessionCounts) -> None:
        self.counts = counts

    def __call__(self, server: Any) -> None:
        """One has changed: count for one that joins, and not for one that leaves."""
        servers = self.counts.servers
        if server.draining:
            servers.pop(server.name, None)
        elif server.name not in servers:
            servers[server.name] = ServerCounts()


class MetricsService(Service):
    """Counts the relays of a command, and serves the totals.

    :param reactor: runs them.
    :param endpoint: where metrics are served.
    :param relays: the relays.  Nothing may have been relayed yet.
    :param logs: the logs of the command.

    :ivar loaded_at: when the settings were last read with success: seconds since the
        epoch.
    :ivar rules: says what has happened to netfilter rules; None: it makes none.
    :ivar port: the listener, while it is open.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: IStreamServerEndpoint,
        relays: RelayService,
        logs: Logs,
    ) -> None:
        self._reactor = reactor
        self._clock = monotonic(reactor)
        self._endpoint = endpoint
        self._relays = relays
        self._logs = logs
        self.loaded_at = LogTimes.since_epoch()
        self.rules: Callable[[], RuleCounts] | None = None
        self.port: IListeningPort | None = None
        #: Of the relays that there are, and of those that have sessions still, by name.
        self._counts: dict[str, SessionCounts] = {}
        #: What hears of the servers of each pool.
        self._following: dict[Pool, _Following] = {}
        self._listening = False
        self._lag = self._due = 0.0
        self._look: IDelayedCall | None = None
        collector = RelayCollector(self._counted, self._process)
        self._site = MetricsSite(
            lambda accept: exposition(collector, accept),
            Health(relays, self._clock.seconds),
            self._clock,
        )
        self.follow()

    # -- what is counted

    def follow(self) -> None:
        """Have the sessions of each relay counted, of all its listeners together.

        To be called after each change of the relays, in the same turn of the reactor: a
        relay that stays goes on counting, and its servers that stay; others begin with
        0.
        """
        factories: dict[str, list[Any]] = {}
        for factory in dict.fromkeys(each.factory for each in self._relays.listenings):
            if not has_flows(factory):
                factories.setdefault(factory.name, []).append(factory)
        there = {*factories, *(each.name for each in self._relays.served)}
        self._counts = {
            name: each for name, each in self._counts.items() if name in there
        }
        following, self._following = self._following, {}
        for name, own in factories.items():
            # A proxy's clients choose the servers: there is no end to their names.
            pools = _pools_of(own)
            servers = [each.name for pool in pools for each in pool.upstreams]
            counts = self._counts.get(name)
            if counts is None:
                counts = self._counts[name] = SessionCounts(servers)
            else:
                counts.servers = {
                    each: counts.servers.get(each) or ServerCounts() for each in servers
                }
            for factory in own:
                factory.counts = counts
            for pool in pools:
                heard = following.pop(pool, None)
                if heard is None:
                    heard = _Following(counts)
                    pool.listeners.append(heard)
                self._following[pool] = heard
        for pool, heard in following.items():
            pool.listeners.remove(heard)

    def _counted(self) -> Iterator[Sessions | Flows]:
        """The relays that there are now, with what they have from before a change."""
        relays: dict[str, dict[Any, None]] = {}
        for each in self._relays.listenings:
            relays.setdefault(each.factory.name, {})[each.factory] = None
        former: dict[str, list[Any]] = {}
        for served in self._relays.former:
            if served.name in relays:
                former.setdefault(served.name, []).append(served)
        for name, factories in relays.items():
            own = list(factories)
            before = [
                each
                for each in former.get(name, ())
                if has_flows(each) == has_flows(own[0])
            ]
            if has_flows(own[0]):
                pools = [each.balance for each in own if each.balance is not None]
                yield Flows(name, [*own, *before], pools)
                continue
            totals = list(dict.fromkeys(each.totals for each in own))
            yield Sessions(
                name,
                own[0].counts,
                living=[each.registry for each in (*own, *before)],
                bandwidth=own[0].bandwidth if totals[0].waited is None else totals[0],
                pools=_pools_of(own),
                retries=[each.retried for each in totals],
                undecided=_undecided((*own, *before)),
            )

    def _process(self) -> Generator[None, None, ProcessReading]:
        open_descriptors = yield from count_descriptors()
        return ProcessReading(
            build={
                "version": relayd.__version__,
                "twisted": twisted.__version__,
                "python": platform.python_version(),
            },
            accept_pauses=Descriptors.of(self._reactor).pauses,
            open_descriptors=open_descriptors,
            max_descriptors=max_descriptors(),
            pipes_in_use=pipes_in_use(self._reactor),
            reactor_lag=self._lag,
            log_lines_dropped=self._logs.lines_lost,
            stopping=self._relays.stopping,
            loaded_at=self.loaded_at,
            rules=None if self.rules is None else self.rules(),
        )

    def loaded(self, at: float) -> None:
        """The settings were read again, with success.

        :param at: seconds since the epoch.
        """
        self.loaded_at = at

    def limits(self) -> list[dict[str, Any]]:
        """Where its own bounds stand."""
        return self._site.limits()

    # -- its life

    def privilegedStartService(self) -> None:
        """Listen, while this process may still open low ports.

        :raises CannotStart: the listener can't be opened.
        """
        super().privilegedStartService()
        self._listen()

    def startService(self) -> None:
        super().startService()
        # `twist` starts services without the privileged step.
        self._listen()
        self._look_later()
        self._reactor.callWhenRunning(keep_for_good)

    def _listen(self) -> None:
        if self._listening:
            return
        self._listening = True
        problems: list[CannotStart] = []
        starting = True

        def not_opened(reason: Failure) -> None:
            why = f"{self._relays.command}: --metrics: {reason.getErrorMessage()}"
            if starting:
                problems.append(CannotStart(why))
            else:
                log.critical("{why}", why=why)

        opening = self._endpoint.listen(self._site)
        opening.addCallbacks(self._opened, not_opened)
        starting = False
        if problems:
            self._listening = False
            raise problems[0]

    def _opened(self, port: IListeningPort) -> None:
        if not self._listening:
            port.stopListening()
            return
        self.port = port
        for one in port.ports if isinstance(port, Listeners) else [port]:
            log.info("metrics on {address}", address=address_name(one.getHost()))

    def stopService(self) -> Deferred[Any]:
        """Close the listener, and its connections."""
        super().stopService()
        if self._look is not None:
            self._look.cancel()
            self._look = None
        return self.close()

    def close(self) -> Deferred[Any]:
        """Close the listener, and its connections."""
        self._listening = False
        port, self.port = self.port, None
        self._site.close()
        return maybeDeferred(port.stopListening if port is not None else bool)

    # -- the reactor

    def _look_later(self) -> None:
        self._due = self._clock.seconds() + INTERVAL
        self._look = self._clock.callLater(INTERVAL, self._look_again)

    def _look_again(self) -> None:
        self._lag = max(0.0, self._clock.seconds() - self._due)
        self._look_later()


def _undecided(factories: Iterable[Any]) -> list[Any]:
    """The tables of clients that a route, or a server name, has not decided about."""
    tables = {
        id(each.handshakes): each.handshakes
        for each in factories
        if each.handshakes is not None
        and (each.router is not None or getattr(each, "chooses", None) is not None)
    }
    return list(tables.values())
