"""What is bounded in a running relay: each limit, where it stands, how often hit."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates
from relayd.admission.per_client import ConnectRate
from relayd.admission.rates import Rates
from relayd.admission.session_limits import SessionLimits
from relayd.core.errors import Refused
from relayd.net.upstream import Upstream
from relayd.operating import limits_listing
from relayd.operating.limits_listing import Process, limits
from relayd.operating.listing import Shown
from relayd.operating.logs import Logs
from relayd.preludes.client_hello import hello_of
from relayd.preludes.socks4 import Command, write_request
from relayd.tcp import RelayFactory
from relayd.udp_nat import FlowServer
from relayd.udp_nat import Server as Where
from relayd.upstreams.checks import Checker
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.datagrams.support import Bench
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.proxies import Proxy
from tests.support.relays import Witness
from tests.support.routers import FakeRouter
from tests.support.shown import shown, whole

PROCESS = Process(reactor=reactor)

Row = tuple[Any, Any, Any]


def told(*relays: Shown, process: Process = PROCESS) -> dict[Any, Row]:
    """By relay and what: the limit, how many there are, and the hits."""
    rows = whole(limits(relays, process))["limits"]
    assert all(set(each) == {"what", "relay", "limit", "now", "hits"} for each in rows)
    found = {
        (each["relay"], each["what"]): (each["limit"], each["now"], each["hits"])
        for each in rows
    }
    assert len(found) == len(rows)
    return found


def of_relay(own: Shown) -> dict[str, Row]:
    return {what: row for (relay, what), row in told(own).items() if relay == own.name}


def a_relay(pool: Any = None, **options: Any) -> RelayFactory:
    pool = pool or Upstream(FakeEndpoint(), "server:80")
    return RelayFactory(pool, observer=Witness(), name="web", **options)


def clients(factory: Any, count: int, host: str = "192.0.2.1") -> None:
    """They connect; some may be refused."""
    for port in range(1, count + 1):
        transport = FakeTransport(clock=factory.clock)
        transport.peer = IPv4Address("TCP", host, port)
        transport.connect(factory.buildProtocol(transport.peer))


def test_those_of_the_process() -> None:
    found = told()
    assert {what for _, what in found} >= {"max_descriptors", "look_ups"}
    limit, now, hits = found[None, "max_descriptors"]
    assert limit is None or limit > now > 2
    assert hits >= 0


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_listing, "max_descriptors", lambda: math.inf)
    monkeypatch.setattr(limits_listing, "count_descriptors", unknown)
    assert told()[None, "max_descriptors"][:2] == (None, 0)


def unknown() -> Generator[None, None, float]:
    yield
    return math.nan


def test_what_else_a_process_has() -> None:
    checker, logs = Checker(Clock()), Logs(reactor, "relayd")
    checker.running, checker.late = 3, 4
    own = {"what": "mine", "relay": None, "limit": 9, "now": 1, "hits": 0}
    process = Process(reactor=reactor, logs=logs, checker=checker, more=[lambda: [own]])
    found = told(process=process)
    assert found[None, "checks"] == (256, 3, 4)
    assert found[None, "mine"] == (9, 1, 0)
    assert found[None, "log_bytes"] == (1 << 20, 0, 0)


def test_a_relay_without_limits_has_no_rows() -> None:
    assert of_relay(shown(a_relay(clock=Clock()))) == {}


def test_sessions_of_keys() -> None:
    """There is no such row where nobody limits any."""
    factory = a_relay(clock=Clock())
    own: Any = factory.own_limits
    leases = [own.enter(key, 2) for key in "aab"]
    with pytest.raises(Refused):
        own.enter("a", 2)
    what = "sessions of a key, by a route"
    assert of_relay(shown(factory)) == {what: (None, 2, 1)}
    for each in leases:
        each.release()
    assert of_relay(shown(factory)) == {what: (None, 0, 1)}


def test_sessions_and_those_who_queue() -> None:
    clock = Clock()
    gate = SessionLimits(2, 3, queue=2, queue_timeout=5, clock=clock)
    rates = ConnectRates(ConnectRate(4, 10.0), clock)
    factory = a_relay(clock=clock, gate=Gates([rates, gate]))
    # The queue is full with the second of the others, the third has too many.
    clients(factory, 3)
    clients(factory, 2, "192.0.2.2")
    clock.advance(0)
    assert of_relay(shown(factory)) == {
        "max_connects_per_client": (4, 3.0, 0),
        "max_connects_per_client: clients that are remembered": (65536, 2, 0),
        "max_sessions": (2, 2, 0),
        "max_sessions_per_client": (3, 3, 0),
        "queue": (2, 2, 1),
    }
    clients(factory, 2)
    clock.advance(5)
    found = of_relay(shown(factory))
    # Two have waited for too long.
    assert found["queue"] == (2, 0, 3)
    assert found["max_sessions_per_client"] == (3, 2, 2)
    assert found["max_connects_per_client"][1] < 3
    factory.abort_all()


def test_a_gate_that_listeners_share_is_told_once() -> None:
    gate = SessionLimits(2)
    one, two = (a_relay(clock=Clock(), gate=gate) for _ in range(2))
    clients(one, 3)
    clients(two, 1)
    assert of_relay(shown(one, two)) == {"max_sessions": (2, 2, 2)}
    one.abort_all()
    two.abort_all()


def test_bandwidth() -> None:
    clock = Clock()
    bandwidth = Bandwidth(None, Rates(1000, 1000), clock=clock)
    factory = a_relay(clock=clock, bandwidth=bandwidth)
    clients(factory, 1)
    assert of_relay(shown(factory)) == {
        "bandwidth": (None, 1, 0),
        "bandwidth: clients that were here": (65536, 0, 0),
    }
    factory.abort_all()


def test_a_proxys_handshakes_and_binds() -> None:
    proxy = Proxy(
        bind=True,
        max_handshakes=4,
        max_handshakes_per_client=2,
        max_binds=3,
        max_binds_per_client=1,
    )
    for _ in range(3):
        proxy.client()
    for _ in range(2):
        proxy.client().receive(write_request(Command.BIND, "198.51.100.1", 21))
    own = Shown("proxy", "socks4", [proxy.factory, proxy.factory])
    found = of_relay(own)
    assert found["max_handshakes"] == (4, 1, 0)
    assert found["max_handshakes_per_client"][0] == 2
    assert found["max_handshakes_per_client"][2] > 0
    assert found["max_binds"] == (3, 1, 0)
    assert found["max_binds_per_client"] == (1, 1, 1)
    proxy.factory.abort_all()
    proxy.clock.advance(0)


def test_clients_about_which_nothing_is_decided() -> None:
    factory = a_relay(
        clock=Clock(), route=FakeRouter(), max_deciding=8, connect_timeout=0
    )
    clients(factory, 3)
    clients(factory, 1, "192.0.2.2")
    found = of_relay(shown(factory))
    assert found == {
        "max_deciding": (8, 3, 0),
        "max_deciding_per_client": (2, 2, 1),
    }
    [first, *_] = factory.registry.living()
    assert first.session.stage.value == "deciding"
    factory.abort_all()
    assert of_relay(shown(factory))["max_deciding"] == (8, 0, 0)


def test_routes_that_go_on_when_their_clients_have_left() -> None:
    waits: list[Deferred[None]] = []

    async def route(conn: Any) -> Any:
        for _ in range(2):
            waits.append(Deferred())
            with suppress(CancelledError):
                await waits[-1]
        return conn.pool()

    factory = a_relay(clock=Clock(), route=route, connect_timeout=0)
    clients(factory, 1)
    what = "route: goes on though its client has left"
    assert of_relay(shown(factory))[what] == (1024, 0, 0)
    factory.abort_all()
    assert of_relay(shown(factory))[what] == (1024, 1, 0)
    waits[-1].callback(None)
    assert of_relay(shown(factory))[what] == (1024, 0, 0)


def test_clients_that_wait_for_a_server_and_servers_that_are_full() -> None:
    clock = Clock()
    full = Server(FakeEndpoint(), "a/db:80", label="a", max_sessions=2)
    factory = a_relay(Pool([full]), clock=clock, wait_for_server=5.0)
    clients(factory, 3)
    assert of_relay(shown(factory)) == {
        "when_none: clients that wait": (4096, 1, 0),
        "max of a/db:80": (2, 2, 1),
    }
    factory.abort_all()


def test_flows() -> None:
    bench = Bench(max_flows=4, max_flows_per_client=2)
    for port in (1, 2, 3):
        bench.arrive(source=("192.0.2.1", port))
    for host in (2, 3, 4):
        bench.arrive(source=(f"192.0.2.{host}", 1))
    assert of_relay(Shown("dns", "udp", [bench.nat])) == {
        "max_flows": (4, 4, 1),
        "max_flows_per_client": (2, 1, 1),
        "datagrams kept: bytes": (1 << 20, 0, 0),
    }
    bench.close()


def test_clients_of_datagrams_that_wait_for_a_server() -> None:
    pool = Pool([FlowServer.at(Where("198.51.100.1", 53))])
    bench = Bench(pool, wait_for_server=5.0)
    pool.servers[0].checked(False, "refused")
    bench.arrive()
    found = of_relay(Shown("dns", "udp", [bench.nat], pools=[pool]))
    limit, now, hits = found["when_none: bytes that wait"]
    assert limit == 4 << 20
    assert now > 0
    assert hits == 0
    bench.close()


def test_clients_of_which_is_not_decided_and_those_that_wait_in_each_pool() -> None:
    factory = RelayFactory(
        None,
        pools={"a": Pool([]), "b": Pool([])},
        sni={"a.example": "a", "": "b"},
        max_deciding=8,
        wait_for_server=5,
        clock=Clock(),
        observer=Witness(),
        name="web",
    )
    for said in (hello_of("a.example"), hello_of("b.example"), b"\x16", b"\x16"):
        transport = FakeTransport(clock=factory.clock)
        transport.connect(factory.buildProtocol(transport.peer))
        transport.receive(said)
    waits = "when_none: clients that wait"
    assert of_relay(shown(factory)) == {
        "max_deciding": (8, 2, 0),
        "max_deciding_per_client": (2, 2, 0),
        waits: (4096, 0, 0),
        f"{waits} for a": (4096, 1, 0),
        f"{waits} for b": (4096, 1, 0),
    }
    factory.abort_all()
