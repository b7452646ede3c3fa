"""Whether relays are ready, by their listeners and their servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from relayd.core.counts import SessionCounts
from relayd.core.session import Ending
from relayd.net.upstream import Upstream
from relayd.operating.health import DOWN, Health
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


def listening(name: str, factory: Any, *, flows: bool) -> Any:
    return SimpleNamespace(name=name, factory=factory, flows=flows, enabled=True)


class Bench:
    """A service of three relays, one of datagrams, all of which stand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.counts = SessionCounts(["db:1", "db:2"])
        web = SimpleNamespace(name="web", counts=SessionCounts(["web:80"]))
        database = SimpleNamespace(name="db", counts=self.counts)
        dns = SimpleNamespace(name="dns")
        self.listenings = [
            listening(":80", web, flows=False),
            listening(":1", database, flows=False),
            listening(":2", database, flows=False),
            listening(":53", dns, flows=True),
        ]
        self.stopping = False
        self.open = list(self.listenings)
        service: Any = self
        self.health = Health(service, lambda: self.now)

    @property
    def standing(self) -> Any:
        return self.open

    @property
    def all_listening(self) -> bool:
        return len(self.open) == len(self.listenings)

    def fails(self, server: str) -> None:
        self.counts.fail(server, Ending.CONNECT_REFUSED, self.now)

    @property
    def each(self) -> dict[str, str]:
        return self.health.why_not_each()


def test_all_is_well() -> None:
    bench = Bench()
    assert bench.health.why_not() == ""
    assert bench.each == {"web": "", "db": "", "dns": ""}


def test_one_that_stops_is_not_ready_for_any_relay() -> None:
    bench = Bench()
    bench.stopping = True
    assert bench.health.why_not() == "stopping"
    assert set(bench.each.values()) == {"stopping"}


def test_a_listener_that_is_not_open() -> None:
    """The command is not ready, and the relay whose it is; the others are."""
    bench = Bench()
    bench.open.remove(bench.listenings[2])
    assert bench.health.why_not() == "not all listeners are open"
    assert bench.each == {
        "web": "",
        "db": "not all of its listeners are open",
        "dns": "",
    }


def test_a_relay_that_is_stopped() -> None:
    """It is not ready, which is no reason to send nobody to the others."""
    bench = Bench()
    for each in bench.listenings[1:3]:
        each.enabled = False
        bench.open.remove(each)
    assert bench.each == {"web": "", "db": "stopped", "dns": ""}


def test_servers_that_do_not_answer() -> None:
    """All of them; and that is no reason to send nobody to the other relays."""
    bench = Bench()
    bench.fails("db:1")
    assert bench.each["db"] == ""
    bench.fails("db:2")
    assert bench.each["db"] == "dials to all of its servers have failed"
    assert bench.each["web"] == ""
    assert bench.health.why_not() == ""


def a_server(name: str) -> Server:
    return Server(SimpleNamespace(), name)  # type: ignore[arg-type]


def test_servers_that_checks_find_down() -> None:
    """However long that is ago; nobody dials them."""
    bench = Bench()
    servers = [a_server("db:1"), a_server("db:2")]
    pool = bench.listenings[1].factory.pool = Pool(servers)
    assert bench.each["db"] == ""
    servers[0].checked(False, "no answer")
    assert bench.each["db"] == ""
    servers[1].checked(False, "no answer")
    bench.now += 10 * DOWN
    assert bench.each["db"] == "none of its servers can have a client"
    assert bench.each["web"] == bench.health.why_not() == ""
    pool.try_all = True
    assert bench.each["db"] == ""
    pool.try_all = False
    servers[0].checked(True, "connected")
    assert bench.each["db"] == ""


@pytest.mark.parametrize(
    ("what", "is_ready"),
    [
        ({"ejected": True}, False),
        ({"disabled": True}, False),
        ({"weight": 0}, False),
        ({"max_sessions": 1, "sessions": 1}, True),
    ],
)
def test_servers_that_are_out_and_servers_that_are_full(
    what: Any, is_ready: bool
) -> None:
    bench = Bench()
    server = a_server("db:1")
    bench.listenings[1].factory.pool = Pool([server])
    for name, value in what.items():
        setattr(server, name, value)
    assert (bench.each["db"] == "") is is_ready


def test_a_name_without_servers() -> None:
    bench = Bench()
    # Of flows as well.
    bench.listenings[3].factory.balance = Pool([])
    assert bench.each["dns"] == "none of its servers can have a client"


@pytest.mark.parametrize("router", [None, object()])
def test_one_pool_of_several_is_enough(router: Any) -> None:
    """Nobody knows which of them the next client is for."""
    bench = Bench()
    servers = [a_server("db:1"), a_server("b/db:1")]
    factory = bench.listenings[1].factory
    factory.router = router
    factory.all_pools = [Pool([]), *(Pool([each]) for each in servers)]
    servers[0].checked(False, "no answer")
    assert bench.each["db"] == ""
    servers[1].checked(False, "no answer")
    assert bench.each["db"] == "none of its servers can have a client"


def test_a_route_that_names_servers_itself() -> None:
    """Its relay has none: they are in no pool."""
    bench = Bench()
    factory = bench.listenings[1].factory
    factory.all_pools = [Pool([])]
    assert bench.each["db"] == "none of its servers can have a client"
    factory.router = object()
    assert bench.each["db"] == ""


def test_servers_without_a_state() -> None:
    bench = Bench()
    plain = Upstream(SimpleNamespace(), "db:1")  # type: ignore[arg-type]
    bench.listenings[1].factory.pool = Pool([plain, plain])
    assert bench.each["db"] == ""


def test_that_is_forgotten() -> None:
    """A relay that gets no clients would never find out that a server is back."""
    bench = Bench()
    bench.fails("db:1")
    bench.now += 1
    bench.fails("db:2")
    bench.now += DOWN - 1.5
    assert bench.each["db"]
    bench.now += 0.5
    assert bench.each["db"] == ""
