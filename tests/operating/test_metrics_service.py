"""The service behind --metrics: how it starts and stops, and what it reads."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred

import relayd
from relayd.configuring.address_grammar import parse_destination, parse_listener
from relayd.configuring.config import Config, Relay, Socks4Relay, UdpRelay
from relayd.configuring.route_settings import parse_sni
from relayd.configuring.server_grammar import parse_server
from relayd.core.errors import CannotStart, ConfigError
from relayd.core.session import Direction
from relayd.net.descriptors import Descriptors
from relayd.observing.line_log import EVENTS
from relayd.observing.readings import Sessions, read_sessions
from relayd.operating.changing import Relays
from relayd.operating.log_file import WrittenLog
from relayd.operating.metrics_service import (
    INTERVAL,
    MetricsService,
)
from relayd.operating.relays import unit_of
from relayd.operating.running import RelayService
from relayd.operating.service import make_service
from relayd.operating.signals import Signals
from relayd.operating.succession import succeed
from relayd.operating.units import Workshop
from relayd.plane.poller import Plane
from tests.support.contracts import until


def relay(name: str, listen: str = "127.0.0.1:0", *servers: str) -> Relay:
    to = tuple(map(parse_destination, servers or ("127.0.0.1:9",)))
    return Relay((parse_listener(listen),), to, name)


def service_of(*relays: Any, metrics: str = "127.0.0.1:0") -> Any:
    where: Any = parse_listener(metrics)
    return make_service(Config(relays, metrics=where), reactor)


def listens(port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) != errno.ECONNREFUSED


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The handlers of the tests' process stay, and what it collects."""
    told: list[str] = []
    monkeypatch.setattr(Signals, "_install", lambda self: None)
    monkeypatch.setattr("gc.freeze", lambda: told.append("frozen"))
    return told


def test_it_starts_first_and_stops_last() -> None:
    """And is there only if it is asked for."""
    kinds = [type(each) for each in service_of(relay("web"))]
    assert kinds[:2] == [Signals, MetricsService]
    assert kinds[-1] is RelayService
    without = make_service(Config((relay("web"),)), reactor)
    [*_, relays] = without
    assert not any(isinstance(each, MetricsService) for each in without)
    assert [each.factory.counts for each in relays.listenings] == [None]


def test_what_is_counted() -> None:
    """Each relay's sessions together, however many listeners and factories it has."""
    two = (parse_listener("127.0.0.1:0"), parse_listener("127.0.0.1:0"))
    web = Relay(two, (parse_destination("db:1"), parse_destination("db:2")), "web")
    proxy = Socks4Relay(listeners=two, name="office")
    dns = UdpRelay(
        (parse_listener("udp:127.0.0.1:0"),),
        (parse_destination("udp:127.0.0.1:9"),),
        "dns",
    )
    services = list(service_of(web, proxy, dns))
    [metrics] = [each for each in services if isinstance(each, MetricsService)]
    [relays] = [each for each in services if isinstance(each, RelayService)]
    counted = {each.relay: each for each in metrics._counted()}
    assert list(counted) == ["web", "office", "dns"]
    assert list(counted["web"].counts.servers) == ["db:1", "db:2"]
    assert len(counted["web"].living) == 1
    assert not counted["office"].counts.servers
    assert len(counted["office"].living) == 2
    factories = {each.factory for each in relays.listenings if not each.flows}
    assert len({each.counts for each in factories}) == 2
    assert len(counted["dns"].sources) == 1


class Service(RelayService):
    """One whose relays change, though nothing listens."""

    def __init__(self, *relays: Relay) -> None:
        super().__init__([], 1, reactor)
        self.of_before: list[Any] = []
        self.change_to(*relays)

    def change_to(self, *relays: Relay) -> None:
        """Have the relays of these settings; those of before have sessions still."""
        before = self.listenings
        shop = Workshop(Config(()), reactor, EVENTS)
        self.listenings = [
            listening for each in relays for listening in unit_of(each, shop).listenings
        ]
        succeed(self.listenings, before, self.of_before)
        self.of_before += [each.factory for each in before]

    @property
    def former(self) -> list[Any]:
        return self.of_before


class Client:
    """One whose session lives."""

    wheel_bucket: Any = None

    def __init__(self) -> None:
        directions = {"up": Direction(), "down": Direction()}
        self.session: Any = SimpleNamespace(ordinal=3, server=None, **directions)
        self.session.up.read = 100


def metrics_of(relays: RelayService) -> MetricsService:
    logs: Any = SimpleNamespace(lines_lost=0)
    where: Any = None
    return MetricsService(reactor, where, relays, logs)


def readings(metrics: MetricsService) -> dict[str, Any]:
    """What is read of each relay now."""
    found = {}
    for each in metrics._counted():
        assert isinstance(each, Sessions)
        reading = read_sessions(each)
        while True:
            try:
                next(reading)
            except StopIteration as done:
                found[each.relay] = done.value
                break
    return found


def test_totals_of_a_relay_that_changes() -> None:
    """They go on, those of servers that stay as well; its old sessions are active."""
    service = Service(relay("web", "127.0.0.1:0", "10.0.0.1:1", "10.0.0.2:1"))
    metrics = metrics_of(service)
    old: Any = service.listenings[0].factory
    old.counts.closed["done"] += 3
    old.counts.servers["10.0.0.1:1"].results["connected"] += 5
    old.totals.retried.count = 2
    heard = len(old.pool.listeners)
    client = Client()
    old.wheel.add(client)
    service.change_to(relay("web", "127.0.0.1:0", "10.0.0.1:1", "10.0.0.3:1"))
    metrics.follow()
    new: Any = service.listenings[0].factory
    assert new is not old
    old.counts.closed["done"] += 1
    new.counts.closed["done"] += 1
    reading = readings(metrics)["web"]
    assert reading.closed["done"] == 5
    assert (reading.active, reading.opened, reading.up) == (1, 6, 100)
    assert reading.retried == 2
    assert {name: each.results for name, each in reading.servers.items()} == {
        "10.0.0.1:1": {"connected": 5},
        "10.0.0.3:1": {},
    }
    # Nothing hears of the servers of before any more, and once of those of now.
    assert len(old.pool.listeners) == heard - 1
    metrics.follow()
    assert len(new.pool.listeners) == heard
    old.wheel.discard(client)
    old.wheel.settle()


def test_relays_that_come_and_go() -> None:
    """One that is new begins with 0, and so does one that is back, once it was gone."""
    service = Service(relay("web"), relay("db"))
    metrics = metrics_of(service)
    counts = {each.factory.name: each.factory for each in service.listenings}
    web: Any = counts["web"]
    web.counts.closed["done"] += 3
    service.change_to(relay("db"), relay("new"))
    metrics.follow()
    assert list(readings(metrics)) == ["db", "new"]
    # While it has sessions, it is the one that it was.
    service.change_to(relay("web"), relay("db"))
    metrics.follow()
    assert readings(metrics)["web"].closed["done"] == 3
    service.change_to(relay("db"))
    service.of_before.clear()
    metrics.follow()
    service.change_to(relay("web"), relay("db"))
    service.of_before.clear()
    metrics.follow()
    assert readings(metrics)["web"].closed["done"] == 0


@pytest_twisted.inlineCallbacks
def test_it_follows_a_change(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As a command is put together: totals, and a session that goes on."""
    made: list[Relays] = []
    build = Relays.__init__

    def noted(relays: Relays, *args: Any) -> None:
        made.append(relays)
        build(relays, *args)

    monkeypatch.setattr(Relays, "__init__", noted)
    before = relay("web", "127.0.0.1:0", "10.0.0.1:1", "10.0.0.2:1")
    command = service_of(before, relay("db"))
    [relays] = made
    [metrics] = [each for each in command if isinstance(each, MetricsService)]
    relays.service.startService()
    client = Client()
    [old, _] = (each.factory for each in relays.service.listenings)
    factory: Any = old
    factory.wheel.add(client)
    factory.counts.closed["done"] += 3
    factory.totals.retried.count = 2
    after = relay("web", "127.0.0.1:0", "10.0.0.1:1", "10.0.0.3:1")
    relays.change(attrs.evolve(relays.config, relays=[after, relay("new")]))
    assert relays.service.listenings[0].factory is not old
    reading = readings(metrics)
    assert list(reading) == ["web", "new"]
    web = reading["web"]
    assert (web.active, web.opened, web.up, web.retried) == (1, 4, 100, 2)
    assert list(web.servers) == ["10.0.0.1:1", "10.0.0.3:1"]
    factory.wheel.discard(client)
    yield relays.service.stopService()


@pytest_twisted.inlineCallbacks
def test_its_listener_and_its_timer_are_gone_when_it_has_stopped(
    own_process: list[str],
) -> Any:
    service = service_of(relay("web"))
    service.privilegedStartService()
    assert own_process == []
    service.startService()
    # The relays are there for good, and need not be looked at during a scrape.
    assert own_process == ["frozen"]
    [_, metrics, *_] = service
    port = metrics.port.getHost().port
    with closing(socket.create_connection(("127.0.0.1", port))):
        yield until(lambda: metrics._site.channels)
        yield maybeDeferred(service.stopService)
        yield until(lambda: not metrics._site.channels)
    assert metrics.port is None
    assert not listens(port)


def test_a_relay_that_can_not_listen_closes_it_again() -> None:
    """In a program that goes on, too."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        service = service_of(relay("web", taken))
        [_, metrics, *_] = service
        with pytest.raises(CannotStart, match=f"^relayd: can't listen on {taken}: "):
            service.privilegedStartService()
        assert metrics.port is None
        service = service_of(relay("web"), metrics=taken)
        [*_, relays] = service
        said = f"^relayd: --metrics: can't listen on {taken}: Address already in use$"
        with pytest.raises(CannotStart, match=said):
            service.startService()
        assert not relays.ports


def test_an_endpoint_that_opens_later(logged_failures: Any) -> None:
    """Not one of ours: its port is closed if the service has stopped meanwhile."""
    service = service_of(relay("web"))
    [_, metrics, *_] = service
    closed = []

    class Port:
        def stopListening(self) -> None:
            closed.append(self)

    opening: Deferred[Any] = Deferred()
    metrics._endpoint.listen = lambda factory: opening
    metrics._listen()
    metrics.close()
    opening.callback(Port())
    assert len(closed) == 1
    opening = Deferred()
    metrics._listen()
    opening.errback(OSError("too late"))
    logged_failures.take("relayd: --metrics: too late")


def test_it_takes_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not installed with relayd itself."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "prometheus_client" or "metrics" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'relayd\[metrics\]'$"):
        service_of(relay("web"))


def test_without_metrics_their_packages_are_not_imported() -> None:
    """They would take as long as all of Twisted."""
    code = (
        "import sys, relayd.tap.relayd, relayd.operating.service;"
        "print([m for m in ('prometheus_client', 'twisted.web') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"[]\n"


# -- what it reads


def whole(work: Any) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def test_what_is_read_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number from whoever counts it."""
    [_, metrics, *_, relays] = service_of(relay("web"))
    monkeypatch.setattr(Descriptors.of(reactor), "pauses", 4)
    monkeypatch.setattr(Plane.of(reactor).pipes, "in_use", 5)
    metrics._logs._access = log = WrittenLog(reactor, "never.log", "the access log")
    log.writer = SimpleNamespace(lost=6)  # type: ignore[assignment]
    metrics._lag, metrics.loaded_at, relays.stopping = 0.5, 7.0, True
    reading = whole(metrics._process())
    assert (reading.accept_pauses, reading.pipes_in_use) == (4, 5)
    assert (reading.log_lines_dropped, reading.reactor_lag) == (6, 0.5)
    assert (reading.loaded_at, reading.stopping) == (7.0, True)
    assert reading.build["version"] == relayd.__version__
    log.writer = None
    assert whole(metrics._process()).log_lines_dropped == 0


def test_how_late_the_reactor_is() -> None:
    """By a timer of the last second."""
    from twisted.internet.testing import MemoryReactorClock

    clock: Any = MemoryReactorClock()
    [_, made, *_] = service_of(relay("web"))
    late = MetricsService(clock, made._endpoint, made._relays, made._logs)
    late._look_later()
    clock.advance(INTERVAL)
    assert late._lag == 0.0
    clock.advance(INTERVAL + 0.25)
    assert late._lag == 0.25
    late.stopService()
    assert not clock.getDelayedCalls()


# -- several pools


def pooled(*servers: str) -> Relay:
    """A relay with the servers db:1 and db:2 in a pool b, and others."""
    dest = map(parse_server, (*servers, "db:1,pool=b", "db:2,pool=b"))
    listen, sni = parse_listener("127.0.0.1:0"), map(parse_sni, ("=default", "b=b"))
    made: Any = Relay
    return made([listen], dest, "web", sni=sni)  # type: ignore[no-any-return]


def test_servers_of_all_pools_are_counted_each_by_itself() -> None:
    """One of the same address in another pool is another one."""
    service = Service(pooled("db:1"))
    metrics = metrics_of(service)
    old: Any = service.listenings[0].factory
    assert list(old.counts.servers) == ["db:1", "b/db:1", "b/db:2"]
    for name, count in (("db:1", 5), ("b/db:1", 7)):
        old.counts.servers[name].results["connected"] += count
    heard = [len(each.listeners) for each in old.all_pools]
    client = Client()
    client.session.server = old.all_pools[1].upstreams[0]
    old.wheel.add(client)
    service.change_to(pooled("db:3", "db:4,pool=b"))
    metrics.follow()
    new: Any = service.listenings[0].factory
    reading = readings(metrics)["web"]
    found = {name: (x.results, x.active) for name, x in reading.servers.items()}
    assert found == {
        "db:3": ({}, 0),
        "b/db:4": ({}, 0),
        "b/db:1": ({"connected": 7}, 1),
        "b/db:2": ({}, 0),
    }
    # Each pool tells of those that come and go, once.
    assert [len(each.listeners) for each in old.all_pools] == [n - 1 for n in heard]
    metrics.follow()
    assert [len(each.listeners) for each in new.all_pools] == heard
    pool = new.all_pools[1]
    pool.replace([pool.servers[1]], [])
    assert list(new.counts.servers) == ["db:3", "b/db:4", "b/db:2"]
    old.wheel.discard(client)
    old.wheel.settle()
