"""The service behind `--metrics`: what is counted, read, and served by HTTP.

It is the first part of a command to start and the last to stop, so that readers can see
how the relays start, and how they drain.  Imported only if it is asked for, as it takes
prometheus_client and twisted.web.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Generator, Iterable, Iterator
from functools import partial
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
from relayd.observing.readings import Flows, ProcessReading, Sessions
from relayd.operating.health import Health
from relayd.operating.logs import Logs
from relayd.operating.metrics_site import MetricsSite
from relayd.operating.process_counts import (
    count_descriptors,
    max_descriptors,
    pipes_in_use,
)
from relayd.operating.running import RelayService

log = Logger(namespace="relayd.metrics")

#: Seconds between two looks at how late the reactor is.
INTERVAL = 1.0


def _follow(counts: SessionCounts, server: Any) -> None:
    """A server has changed: count for one that joins, and no more for one that leaves.

    Addresses of a name may be others every day.
    """
    if server.draining:
        counts.servers.pop(server.name, None)
    elif server.name not in counts.servers:
        counts.servers[server.name] = ServerCounts()


class MetricsService(Service):
    """Counts the relays of a command, and serves the totals.

    :param reactor: runs them.
    :param endpoint: where metrics are served.
    :param relays: the relays.  Nothing may have been relayed yet.
    :param logs: the logs of the command.

    :ivar loaded_at: when the settings were last read with success: seconds since the
        epoch.
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
        self.port: IListeningPort | None = None
        self._listening = False
        self._lag = self._due = 0.0
        self._look: IDelayedCall | None = None
        collector = RelayCollector(self._counted, self._process)
        self._site = MetricsSite(
            lambda accept: exposition(collector, accept),
            Health(relays, self._clock.seconds),
            self._clock,
        )
        self._count()

    # -- what is counted

    def _count(self) -> None:
        """Have the sessions of each relay counted, of all its listeners together."""
        names: dict[str, list[str]] = {}
        for factory in self._streams():
            # A proxy's clients choose the servers: there is no end to their names.
            pool = getattr(factory, "pool", None)
            own = names.setdefault(factory.name, [])
            own += [] if pool is None else [each.name for each in pool.upstreams]
        counts = {relay: SessionCounts(own) for relay, own in names.items()}
        for factory in self._streams():
            factory.counts = counts[factory.name]
            if pool := getattr(factory, "pool", None):
                pool.listeners.append(partial(_follow, factory.counts))

    def _streams(self) -> list[Any]:
        """The factories of stream relays, each of which may have several listeners."""
        listenings = self._relays.listenings
        found: Iterable[Any] = (each.factory for each in listenings if not each.flows)
        return list(dict.fromkeys(found))

    def _counted(self) -> Iterator[Sessions | Flows]:
        """The relays that there are now."""
        relays: dict[str, dict[Any, bool]] = {}
        for each in self._relays.listenings:
            relays.setdefault(each.factory.name, {})[each.factory] = each.flows
        for name, factories in relays.items():
            own = list(factories)
            if factories[own[0]]:
                pools = [each.balance for each in own if each.balance is not None]
                yield Flows(name, own, pools)
            else:
                yield Sessions(
                    name,
                    own[0].counts,
                    living=[each.registry for each in own],
                    bandwidth=own[0].bandwidth,
                    pools=[each.pool for each in own if hasattr(each, "pool")],
                    retries=[each.retries for each in own if each.retries],
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
        )

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


def keep_for_good() -> None:
    """Have Python's collector look no more at what there is now: the relays.

    A scrape makes enough objects for it to look at all there are, now and then.  With
    1,000 relays that took 90 ms, in which nobody is served.
    """
    gc.collect()
    gc.freeze()
