"""What is told of servers: how each is, why, and what it has to do."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from twisted.internet.defer import succeed
from twisted.internet.task import Clock

from relayd.configuring.address_grammar import HostPort
from relayd.configuring.config import Relay as RelaySettings
from relayd.configuring.route_settings import parse_sni
from relayd.configuring.server_grammar import parse_server
from relayd.configuring.server_options import ServerOptions
from relayd.control.steering import Unknown
from relayd.core.session import Ending
from relayd.net.upstream import Upstream
from relayd.observing import log_times
from relayd.operating.explaining_pools import pool_of
from relayd.operating.listing import Shown, is_called
from relayd.operating.listing_servers import server, servers
from relayd.operating.servers import BACKUPS, Maker
from relayd.tcp import RelayFactory
from relayd.udp_nat import FlowServer
from relayd.udp_nat import Server as Where
from relayd.upstreams.checks import Checker
from relayd.upstreams.judging import Schedule, Verdict
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.datagrams.support import Bench, FakeResolver
from tests.support.fakes import FakeEndpoint
from tests.support.relays import Relay, Witness
from tests.support.shown import shown, whole


def a_relay(*own: Upstream, clock: Clock | None = None) -> Shown:
    clock = clock or Clock()
    factory = RelayFactory(Pool(own), clock=clock, observer=Witness(), name="web")
    return shown(factory)


def a_server(name: str = "db:80", **settings: Any) -> Server:
    label = settings.get("label")
    return Server(FakeEndpoint(), f"{label}/{name}" if label else name, **settings)


def test_what_is_told_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_times.LogTimes, "since_epoch", lambda _: 1798000000.0)
    clock = Clock()
    one = a_server(label="a", weight=3, max_sessions=9, tier=BACKUPS)
    own = a_relay(one, clock=clock)
    checker = Checker(clock, chance=lambda: 0.5)
    checker.add(one, lambda: succeed(Verdict(False, "refused")), Schedule(every=60))
    before = server(own, "a")
    assert (before["checked"], before["last_check"]) == (True, None)
    checker.start()
    clock.advance(0.5)
    clock.advance(20)
    one.began()
    assert server(own, "a") == {
        "relay": "web",
        "pool": "default",
        "name": "a/db:80",
        "label": "a",
        "address": "db:80",
        "state": "down",
        "why": "refused",
        "weight": 3,
        "max_sessions": 9,
        "sessions": 1,
        "fails": 0,
        "checked": True,
        "last_check": {
            "at": "2026-12-23T04:26:20.000000Z",
            "ok": False,
            "why": "refused",
        },
        "backup": True,
        "operator": None,
    }
    assert whole(servers([own])) == {"servers": [server(own, "a/db:80")]}
    checker.remove(one)
    assert not server(own, "a")["checked"]
    one.closed()
    checker.stop()


def test_how_a_server_may_be() -> None:
    clock = Clock()
    names = ("up", "down", "out", "off", "word", "drain", "none")
    own = {name: a_server(f"{name}:80", label=name) for name in names}
    relay = a_relay(*own.values(), clock=clock)
    ejector = Ejector(relay.pools[0], clock, FailLimits(max_fails=1, eject_most=100))
    own["down"].checked(False, "no answer")
    own["out"].began()
    own["out"].failed(Ending.CONNECT_REFUSED, "no")
    own["off"].disabled = True
    own["word"].operate("down")
    own["drain"].operate("drain")
    own["none"].operate_weight(0)
    told = whole(servers([relay]))["servers"]
    assert [(each["label"], each["state"], each["why"]) for each in told] == [
        ("up", "up", ""),
        ("down", "down", "no answer"),
        ("out", "ejected", "a dial has failed, the last one: no; out for 10 s"),
        ("off", "disabled", "disabled"),
        ("word", "down", "its operator has taken it down"),
        ("drain", "drain", "its operator drains it"),
        ("none", "up", "its weight is 0"),
    ]
    assert [each["operator"] for each in told if each["operator"]] == ["down", "drain"]
    assert [each["fails"] for each in told] == [0, 0, 1, 0, 0, 0, 0]
    ejector.stop()


def test_those_of_one_name_are_told_as_one() -> None:
    """A relay of a range of ports has a pool for each."""
    pools = [Pool([a_server(), a_server("b:80")]) for _ in range(2)]
    for pool, count in zip(pools, (2, 3), strict=True):
        for _ in range(count):
            pool.servers[0].began()
    pools[1].servers[1].checked(False, "broken")
    factories = [RelayFactory(each, clock=Clock(), name="web") for each in pools]
    told = whole(servers([shown(*factories)]))["servers"]
    assert [(each["name"], each["sessions"], each["state"]) for each in told] == [
        *(("db:80", 5, "up"), ("b:80", 0, "down"))
    ]


def test_a_server_of_which_nothing_is_said() -> None:
    relay = Relay()
    client = relay.client()
    own = shown(relay.factory)
    [told] = whole(servers([own]))["servers"]
    assert told == server(own, "server:80")
    assert (told["state"], told["sessions"], told["fails"]) == ("up", 1, None)
    assert (told["label"], told["address"], told["checked"]) == (
        *(None, "server:80"),
        False,
    )
    client.lose()


def test_a_server_of_datagrams() -> None:
    where = Where("198.51.100.1", 53)
    pool = Pool([FlowServer.at(where, label="ns"), FlowServer.at(Where("a.test", 53))])
    bench = Bench(pool, resolver=FakeResolver())
    bench.close()
    own = Shown("dns", "udp", [bench.nat], pools=[pool])
    told = whole(servers([own]))["servers"]
    assert [(each["name"], each["address"]) for each in told] == [
        ("ns/198.51.100.1:53", "198.51.100.1:53"),
        ("a.test:53", "a.test:53"),
    ]
    plain = Bench()
    plain.arrive()
    own = Shown("dns", "udp", [plain.nat])
    [one] = whole(servers([own]))["servers"]
    assert (one["name"], one["sessions"]) == ("198.51.100.1:53", 1)
    assert one == server(own, "198.51.100.1:53")
    plain.close()


def test_relays_and_servers_that_are_not_there() -> None:
    own = a_relay(a_server(label="a"), a_server("b:80"))
    with pytest.raises(Unknown, match="web has no server 'x': there are a/db:80, b:80"):
        server(own, "x")
    with pytest.raises(Unknown, match="web has no server ''"):
        server(own, "")
    with pytest.raises(Unknown, match="there is no relay 'db': there is web"):
        whole(servers([own], "db"))
    assert len(whole(servers([own], "web"))["servers"]) == 2


def test_a_proxy_has_none() -> None:
    assert whole(servers([Shown("socks", "socks4", [])])) == {"servers": []}


# -- several pools


def pools_of_a_relay() -> Shown:
    """A relay with the same address in two of its pools."""
    one, labelled = a_server(), a_server("db:81", label="blue")
    there = Server(FakeEndpoint(), "ssh/db:80")
    blue = Server(FakeEndpoint(), "ssh/blue/db:81", label="blue")
    only = Upstream(FakeEndpoint(), "*.example.com/db:443")
    pools = [
        Pool([one, labelled]),
        Pool([there, blue], name="ssh"),
        Pool([only], name="*.example.com"),
    ]
    factory = RelayFactory(pools[0], clock=Clock(), observer=Witness(), name="web")
    return Shown("web", "tcp", [factory], pools=pools)


def test_an_address_in_two_pools_is_two_servers() -> None:
    own = pools_of_a_relay()
    rows = whole(servers([own]))["servers"]
    told = [[each[key] for key in ("pool", "name", "address")] for each in rows]
    assert told == [
        ["default", "db:80", "db:80"],
        ["default", "blue/db:81", "db:81"],
        ["ssh", "ssh/db:80", "db:80"],
        ["ssh", "ssh/blue/db:81", "db:81"],
        ["*.example.com", "*.example.com/db:443", "db:443"],
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("db:80", ["db:80"]),
        ("ssh/db:80", ["ssh/db:80"]),
        ("blue", ["blue/db:81"]),
        ("blue/db:81", ["blue/db:81"]),
        ("ssh/blue", ["ssh/blue/db:81"]),
        ("ssh/blue/db:81", ["ssh/blue/db:81"]),
        ("*.example.com/db:443", ["*.example.com/db:443"]),
        ("db:443", []),
        ("ssh", []),
        ("", []),
        ("default/db:80", []),
    ],
)
def test_a_name_means_the_servers_of_one_pool(name: str, meant: list[str]) -> None:
    """As they are listed: those of the default pool, unless it begins with another."""
    own = pools_of_a_relay()
    there = [each for pool in own.pools for each in pool.upstreams]
    assert [each.name for each in there if is_called(each, name)] == meant
    if meant:
        assert server(own, name)["name"] == meant[0]
    else:
        with pytest.raises(Unknown):
            server(own, name)


def test_a_server_that_joins_a_pool_belongs_to_it() -> None:
    pool = Pool([Upstream(FakeEndpoint(), "a/x:1")], name="a")
    new = Server(FakeEndpoint(), "a/x:2")
    pool.replace([], [new])
    assert [each.pool for each in pool.upstreams] == ["a", "a"]
    # As does one that takes the place of one without a state.
    pool.exchange(pool.upstreams[0], Server(FakeEndpoint(), "a/x:1"))
    assert [each.pool for each in pool.servers] == ["a", "a"]
    alone = Pool([Upstream(FakeEndpoint(), "x:1")])
    assert alone.upstreams[0].pool == ""


def test_names_of_servers_are_made_with_their_pools() -> None:
    """Those that a name brings, too, whose addresses other pools may have."""
    address = parse_server("db.example:80,name=blue")
    assert isinstance(address, HostPort)
    made = Maker(Clock(), "twisted", pool="b")
    assert made.server(address).name == "b/blue/db.example:80"
    plain = attrs.evolve(address, options=ServerOptions())
    assert made.upstream(plain).name == "b/db.example:80"
    found = made.named(address, ServerOptions(), "srv.example/192.0.2.1:80")
    assert found.name == "b/srv.example/192.0.2.1:80"
    assert Maker(Clock(), "twisted").server(address).name == "blue/db.example:80"


def test_the_pools_of_settings_have_the_same_names() -> None:
    """As they are explained, when nothing runs."""
    dest = map(parse_server, ("a:1", "a:1,pool=b", "a:2,pool=b,name=x"))
    sni = map(parse_sni, ("c.example=a:3", "=b", "d=default"))
    made: Any = RelaySettings
    relay = made([parse_server("1")], dest, sni=sni)
    pools = [pool_of(relay, name) for name in ("default", "b", "c.example", "none")]
    assert [[each.name for each in pool.upstreams] for pool in pools] == [
        *(["a:1"], ["b/a:1", "b/x/a:2"], ["c.example/a:3"], [])
    ]
    assert [pool.name for pool in pools[:3]] == ["default", "b", "c.example"]
