"""The servers of UDP relays, as settings say, and names that stand for several."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.task import Clock, deferLater
from twisted.logger import capturedLogs, formatEvent

from relayd.configuring.config import FlowPoolSettings
from relayd.configuring.server_grammar import parse_server
from relayd.core.errors import ConfigError
from relayd.core.pool_settings import parse_when_none
from relayd.net.dns import Answer, Found
from relayd.operating.flow_pools import FlowMaker, flow_servers
from relayd.operating.running import RelayService
from relayd.operating.service import make_service
from relayd.udp_nat import Server
from relayd.upstreams.balance import LeastSessions
from relayd.upstreams.names import Follower
from relayd.upstreams.passive import Ejector
from relayd.upstreams.pool import Pool
from relayd.upstreams.slow_start import SlowStart
from tests.support.files import config_of

live: Any = reactor


def made(*texts: str, **settings: Any) -> Any:
    destinations: Any = [parse_server(each) for each in texts]
    return flow_servers(
        destinations, FlowPoolSettings(**settings), Clock(), FlowMaker()
    )


def test_one_plain_server_has_no_state() -> None:
    for text in ("udp:10.0.0.5:53", "udp:10.0.0.5:53,send-proxy=v2"):
        [server] = made(text)
        assert isinstance(server, Server)
        assert server.state is None
    assert isinstance(made("udp:10.0.0.5:53,max=3"), Pool)
    assert isinstance(made("udp:10.0.0.5:53,name=a"), Pool)


def test_what_is_said_of_servers() -> None:
    pool = made(
        "udp:10.0.0.5:53,weight=3,max=7,name=a",
        "udp:10.0.0.6:53,backup,disabled",
        balance="least-sessions",
        slow_start=30.0,
    )
    first, second = pool.servers
    assert pool.names == "a/10.0.0.5:53, 10.0.0.6:53"
    assert (first.weight, first.max_sessions, first.tier) == (3, 7, 0)
    assert second.disabled
    assert second.tier > 0
    assert isinstance(pool.selector, LeastSessions)
    assert [type(each) for each in pool.tasks] == [Ejector, SlowStart]
    assert made("udp:1", "udp:2", max_fails=0).tasks == []
    assert made("udp:1,weight=2").tasks == []
    for what in ("fail", "try-all", "wait=5"):
        pool = made("udp:1", "udp:2", when_none=parse_when_none(what))
        assert pool.try_all == (what == "try-all")


def test_client_hash_makes_its_table_as_the_relay_starts() -> None:
    """No client waits for it."""
    ports = [f"udp:{port}" for port in range(1, 61)]
    pool = made(*ports, balance="client-hash", max_fails=0)
    [task] = pool.tasks
    selector: Any = pool.selector
    assert selector._near is None
    task.start()
    assert len(selector._near.numbers) == 60
    assert not selector._lacking
    task.stop()


def test_a_server_that_can_not_be_sent_to() -> None:
    for extra in ("", ",weight=2"):
        with pytest.raises(ConfigError, match="can't use udp"):
            made(f"udp:[fe80::1%nosuch]:53{extra}")


class Zone:
    """What the name servers say."""

    def __init__(self, _: Any = None) -> None:
        self.found: tuple[Found, ...] = ()

    def __call__(self, _: Any) -> Zone:
        return self

    def host(self, name: str, port: int) -> Deferred[Answer]:
        assert (name, port) == ("ns.example", 53)
        return succeed(Answer(self.found, 30.0, ""))

    def service(self, name: str) -> Deferred[Answer]:
        assert name == "_dns._udp.example"
        return succeed(Answer(self.found, 30.0, ""))


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Zone:
    zone = Zone()
    monkeypatch.setattr("relayd.operating.named_servers.NameServers", zone)
    return zone


def test_a_service_has_tiers_and_weights(zone: Zone) -> None:
    zone.found = (
        Found("10.0.0.5", 53, 0, 30),
        Found("10.0.0.6", 54, 1, 10),
        Found("2001:db8::1", 53, 0, 0),
    )
    pool = made("udp:srv:_dns._udp.example,max=5")
    for each in pool.tasks:
        each.start()
    assert [(each.name, each.weight, each.tier) for each in pool.servers] == [
        ("_dns._udp.example/10.0.0.5:53", 30, 0),
        ("_dns._udp.example/10.0.0.6:54", 10, 1),
        ("_dns._udp.example/[2001:db8::1]:53", 0, 0),
    ]
    assert {each.max_sessions for each in pool.servers} == {5}
    assert pool.servers[2].endpoint.address[0] == socket.AF_INET6
    for each in pool.tasks:
        each.stop()


@pytest.mark.parametrize(
    "bad",
    [
        *("255.255.255.255", "0.0.0.0", "224.0.0.1", "ff02::1"),
        *("::ffff:255.255.255.255", "::ffff:0.0.0.0", "::ffff:224.0.0.1"),
    ],
)
def test_what_a_name_says_that_is_no_host(zone: Zone, bad: str) -> None:
    """It is left out; the others serve.  Of this alone, nothing is sent."""
    zone.found = (Found(bad, 53), Found("10.0.0.5", 53))
    pool = made("udp:dns:ns.example:53")
    [follower] = [each for each in pool.tasks if isinstance(each, Follower)]
    follower.start()
    assert [each.name for each in pool.servers] == ["ns.example/10.0.0.5:53"]
    follower.stop()
    zone.found = (Found(bad, 53),)
    with capturedLogs() as events:
        pool = made("udp:dns:ns.example:53")
        pool.tasks[-1].start()
    assert pool.servers == []
    [line] = [formatEvent(each) for each in events]
    assert line.endswith(": none of its addresses is a host's; nothing is sent")
    pool.tasks[-1].stop()


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Two servers and a client."""
    with ExitStack() as held:
        made = []
        for _ in range(3):
            made.append(
                held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            )
            made[-1].bind(("127.0.0.1", 0))
            made[-1].setblocking(False)
        yield made


async def came(sock: socket.socket) -> tuple[bytes, Any]:
    """The next datagram."""
    for _ in range(500):
        try:
            return sock.recvfrom(100)
        except BlockingIOError:
            await deferLater(live, 0.01, lambda: None)
    raise AssertionError("nothing came")


@pytest_twisted.ensureDeferred
async def test_a_name_that_moves_takes_its_conversations_along(
    tmp_path: Path, zone: Zone, sockets: list[socket.socket]
) -> None:
    """To the new address, when the old one refuses; the port of the client stays."""
    old, new, client = sockets
    ports = [each.getsockname()[1] for each in (old, new)]
    zone.found = (Found("127.0.0.1", ports[0]),)
    text = 'quiet = true\ndrain_timeout = 0\n[udp.dns]\nlisten = "127.0.0.1:0"\n'
    text += 'dest = "srv:_dns._udp.example"\nresolve_every = 0.05\n'
    service: Any = make_service(config_of(tmp_path / "relayd.toml", text), reactor)
    service.privilegedStartService()
    service.startService()
    try:
        [relays] = [each for each in service if isinstance(each, RelayService)]
        where = ("127.0.0.1", relays.ports[0].getHost().port)
        nat = relays.listenings[0].factory
        client.sendto(b"one", where)
        data, peer = await came(old)
        assert data == b"one"
        old.sendto(b"from the old", peer)
        assert await came(client) == (b"from the old", where)
        zone.found = (Found("127.0.0.1", ports[1]),)
        while nat.balance.upstreams[0].endpoint.port != ports[1]:
            await deferLater(live, 0.01, lambda: None)
        old.close()
        for number in range(20):
            client.sendto(b"more %d" % number, where)
            await deferLater(live, 0.01, lambda: None)
        data, peer = await came(new)
        assert data.startswith(b"more")
        new.sendto(b"from the new", peer)
        assert await came(client) == (b"from the new", where)
        assert len(nat.table) == 1
    finally:
        await maybeDeferred(service.stopService)
