"""What an operator says of servers by their names and labels, and for how long."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.control.steering import Conflict, Invalid, Unknown
from relayd.core.session import Ending
from relayd.operating.listing import Shown
from relayd.operating.listing_servers import server as told_of
from relayd.operating.server_words import NOTHING, Said, ServerWords
from relayd.tcp import RelayFactory
from relayd.udp_nat import FlowServer
from relayd.udp_nat import Server as Where
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.datagrams.support import Bench, peers
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.relays import Relay, Witness
from tests.support.shown import shown


def a_server(name: str, label: str = "") -> Server:
    full = f"{label}/{name}" if label else name
    return Server(FakeEndpoint(), full, label=label)


class Running:
    """A relay `web` of servers a and b, and what was said of them."""

    def __init__(self, *own: Server) -> None:
        self.clock = Clock()
        self.servers = list(own) or [a_server("a:80", "a"), a_server("b:80", "b")]
        for each in self.servers:
            endpoint: Any = each.endpoint
            endpoint.clock = self.clock
        self.pool = Pool(self.servers)
        self.factory = self.made(self.pool)
        self.older: list[Any] = []
        self.there = True
        self.words = ServerWords(self.clock, lambda name: self.shown)

    def made(self, pool: Pool) -> RelayFactory:
        self.witness = Witness()
        return RelayFactory(
            pool, clock=self.clock, observer=self.witness, name="web", retries=0
        )

    @property
    def shown(self) -> Any:
        return shown(self.factory, older=self.older) if self.there else None

    def client(self, factory: RelayFactory | None = None) -> FakeTransport:
        """One that is relayed by the next server."""
        transport = FakeTransport(clock=self.clock)
        protocol = (factory or self.factory).buildProtocol(transport.peer)
        transport.connect(protocol)
        protocol.session.server.endpoint.dials[-1].connect()
        return transport

    @property
    def words_now(self) -> list[Any]:
        return [each.operator for each in self.servers]


def test_a_server_is_meant_by_its_name_or_its_label() -> None:
    now = Running()
    a, b = now.servers
    assert now.words.say(now.shown, "a", "down", None) == [a]
    assert now.words.say(now.shown, "b/b:80", None, 7) == [b]
    assert (now.words_now, b.weight) == (["down", None], 7)
    assert now.words.said("web", "a") == Said("down")
    now.words.say(now.shown, "a", None, None)
    assert (now.words_now, now.words.said("web", "a")) == ([None, None], NOTHING)
    with pytest.raises(Unknown, match="web has no server 'b:80': there are a/a:80, b/"):
        now.words.say(now.shown, "b:80", "down", None)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (("up", 257, None), "^weight is 0 to 256, not 257$"),
        (("up", None, 3.0), "^within is for a drain: give state = drain, too$"),
        ((None, None, 3.0), "^within is for a drain"),
        (("drain", None, -1.0), "^within must not be negative: -1$"),
        (("down", -1, 3.0), "^weight .*\nwithin "),
    ],
)
def test_what_makes_no_sense_changes_nothing(said: Any, problem: str) -> None:
    now = Running()
    with pytest.raises(Invalid, match=problem):
        now.words.say(now.shown, "a", *said)
    assert now.words_now == [None, None]
    assert now.words.said("web", "a") == NOTHING


def test_what_was_said_of_a_label_holds_for_those_that_join() -> None:
    """As do addresses of a name, which have its label."""
    one, two = a_server("192.0.2.1:80", "db"), a_server("192.0.2.2:80", "db")
    now = Running(one, two)
    assert now.words.say(now.shown, "db", "drain", 2) == [one, two]
    three, other = a_server("192.0.2.3:80", "db"), a_server("192.0.2.3:80", "web")
    now.pool.replace([one], [three, other])
    assert (three.operator, three.weight, other.operator) == ("drain", 2, None)
    # What is said of one of them later stands for it alone,
    now.words.say(now.shown, "db/192.0.2.3:80", "up", None)
    assert (two.operator, three.operator, three.weight) == ("drain", "up", 1)
    # and until more is said of all.
    now.words.say(now.shown, "db", "down", None)
    assert (two.operator, three.operator) == ("down", "down")
    now.words.say(now.shown, "db", None, None)
    assert (two.operator, three.operator) == (None, "up")


def test_what_was_said_holds_for_the_pools_that_follow() -> None:
    now = Running()
    before = now.factory
    client = now.client()
    now.words.say(now.shown, "a", "drain", None)
    new = [a_server("a:80", "a"), a_server("b:80", "b")]
    pool = Pool(new)
    now.words.adopt("web", pool)
    now.factory, now.older = now.made(pool), [before]
    assert [each.operator for each in new] == ["drain", None]
    # And of those before, as long as they have sessions.
    now.words.say(now.shown, "b", "down", None)
    assert [each.operator for each in (*now.servers, *new)] == ["drain", "down"] * 2
    joins = a_server("b:80", "b")
    pool.replace([new[1]], [joins])
    assert joins.operator == "down"
    assert now.words.drop(now.shown) == 2
    assert [each.operator for each in (*now.servers, new[0], joins)] == [None] * 4
    now.words.adopt("web", Pool([a_server("a:80", "a")]))
    client.lose()


def test_a_drain_kills_what_is_left_when_its_time_is_over() -> None:
    now = Running()
    clients = [now.client() for _ in range(4)]
    older, now.factory = now.factory, now.made(Pool([a_server("a:80", "a")]))
    now.older = [older]
    now.words.say(now.shown, "a", "drain", None, 10)
    now.clock.advance(9.9)
    assert not any(each.aborted for each in clients)
    now.clock.advance(0.1)
    now.clock.pump([0, 0, 0, 0])
    assert [each.aborted for each in clients] == [True, False, True, False]
    assert older.endings == {"killed": 2}
    for each in clients:
        each.lose()
    older.stopFactory()
    now.words.stop()
    assert not now.clock.getDelayedCalls()


@pytest.mark.parametrize("how", ["up", "no limit", "later", "stop", "name", "gone"])
def test_a_drain_that_is_not_carried_out(how: str) -> None:
    now = Running()
    client = now.client()
    now.words.say(now.shown, "a", "drain", None, 10)
    if how == "up":
        now.words.say(now.shown, "a", "up", None)
    elif how == "no limit":
        now.words.say(now.shown, "a", "drain", None)
    elif how == "later":
        now.clock.advance(5)
        now.words.say(now.shown, "a", "drain", None, 10)
        now.clock.advance(9)
    elif how == "stop":
        now.words.stop()
    elif how == "name":
        now.words.say(now.shown, "a/a:80", "up", None)
    else:
        now.there = False
    now.clock.pump([1.0] * (10 if how != "later" else 0))
    assert not client.aborted
    now.words.stop()
    now.words.forget("web")
    client.lose()
    [session] = now.witness.sessions
    assert session.ending is not Ending.KILLED


# -- a server of which nothing was said before


def test_a_relays_only_server_can_be_taken_out_and_back() -> None:
    relay = Relay(retries=0)
    own = shown(relay.factory)
    words = ServerWords(relay.clock, lambda name: own)
    relayed = relay.client()
    server = relay.server.dials[0].connect()
    dialled = relay.client()
    [one] = words.say(own, "server:80", "drain", None)
    assert one is relay.factory.pool.servers[0]
    assert (one.sessions, told_of(own, "server:80")["sessions"]) == (2, 2)
    refused = relay.client()
    relay.clock.advance(0)
    assert relay.witness.sessions[-1].ending is Ending.NO_UPSTREAM
    words.say(own, "server:80", None, None)
    served = relay.client()
    assert one.sessions == 3
    dialled.lose()
    assert one.sessions == 2
    relayed.lose()
    server.lose()
    relay.clock.advance(0)
    assert one.sessions == 1
    served.lose()
    assert one.sessions == 0
    refused.lose()
    words.stop()
    assert not relay.factory.sessions


def test_its_sessions_from_before_a_change_are_its_own_too() -> None:
    """Of settings that are about other things, so that it has the same pool."""
    relay = Relay(retries=0)
    client = relay.client()
    relay.server.dial.connect()
    now = RelayFactory(
        relay.factory.pool, clock=relay.clock, observer=Witness(), name="web"
    )
    own = shown(now, older=[relay.factory])
    words = ServerWords(relay.clock, lambda name: own)
    assert told_of(own, "server:80")["sessions"] == 1
    [one] = words.say(own, "server:80", "drain", None)
    assert (one.sessions, told_of(own, "server:80")["sessions"]) == (1, 1)
    client.lose()
    relay.clock.advance(0)
    assert one.sessions == 0
    words.stop()


def test_its_sessions_are_cut_if_it_goes_down() -> None:
    relay = Relay(cut=True)
    own = shown(relay.factory)
    words = ServerWords(relay.clock, lambda name: own)
    client = relay.client()
    relay.server.dial.connect()
    words.say(own, "server:80", "down", None)
    relay.clock.advance(0)
    assert client.aborted
    assert relay.session.ending is Ending.UPSTREAM_DOWN


def test_the_only_server_of_datagrams_likewise() -> None:
    bench = Bench(timeout=100, unreplied_timeout=100)
    bench.arrive()
    bench.answer()
    bench.arrive(source=("192.0.2.9", 1))
    own = Shown("dns", "udp", [bench.nat])
    words = ServerWords(bench.clock, lambda name: own)
    [one] = words.say(own, "198.51.100.1:53", "drain", None)
    assert one.sessions == 2
    bench.arrive(source=("192.0.2.10", 1))
    assert bench.nat.counters.dropped == {"no_server": 1}
    # Those that it has go on.
    bench.arrive(b"more")
    assert bench.sockets[0].sent == [b"?", b"more"]
    own = Shown("dns", "udp", [bench.nat], pools=[bench.nat.balance])  # type: ignore[list-item]
    words.say(own, "198.51.100.1:53", None, None)
    bench.arrive(source=("192.0.2.10", 1))
    assert (len(peers(bench)), one.sessions) == (3, 3)
    words.say(own, "198.51.100.1:53", "drain", None, 5)
    bench.clock.pump([1.0] * 6)
    assert bench.observer.endings == ["killed"] * 3
    assert one.sessions == 0
    bench.check()
    words.stop()
    bench.close()


def test_its_flows_are_cut_if_it_goes_down() -> None:
    bench = Bench(cut=True)
    bench.arrive()
    bench.answer()
    own = Shown("dns", "udp", [bench.nat])
    words = ServerWords(bench.clock, lambda name: own)
    words.say(own, "198.51.100.1:53", "down", None)
    bench.clock.advance(0)
    assert bench.observer.endings == ["upstream_down"]
    words.stop()
    bench.close()


def test_what_is_no_relay_of_ours_can_not() -> None:
    class Other:
        servers = (Where("198.51.100.1", 53),)

    own = Shown("dns", "udp", [Other()])
    words = ServerWords(Clock(), lambda name: own)
    with pytest.raises(Conflict, match=r"dns: 198.51.100.1:53 can't be taken out"):
        words.say(own, "198.51.100.1:53", "down", None)


def test_a_server_of_flows_has_words_too() -> None:
    pool = Pool([FlowServer.at(Where(f"198.51.100.{n}", 53)) for n in (1, 2)])
    bench = Bench(pool)
    own = Shown("dns", "udp", [bench.nat], pools=[pool])
    words = ServerWords(bench.clock, lambda name: own)
    words.say(own, "198.51.100.1:53", "down", None)
    for port in range(1, 5):
        bench.arrive(source=("192.0.2.1", port))
    assert set(peers(bench)) == {"198.51.100.2"}
    bench.close()


def test_what_was_said_of_a_server_of_one_pool_is_of_no_other() -> None:
    """Each keeps it when another pool takes its place."""
    own = a_server("a:80")
    now = Running(own)
    pools = [now.pool, Pool([a_server("ssh/a:80")], name="ssh")]
    there = Shown("web", "tcp", [now.factory], pools=pools)
    [ssh] = now.words.say(there, "ssh/a:80", "drain", None)
    assert (own.operator, ssh.operator) == (None, "drain")
    now.words.say(there, "a:80", None, 7)
    assert (own.weight, ssh.weight) == (7, 1)
    new = [Pool([a_server("a:80")]), Pool([a_server("ssh/a:80")], name="ssh")]
    for pool in new:
        now.words.adopt("web", pool)
    said = [(each.operator, each.weight) for pool in new for each in pool.servers]
    assert said == [(None, 7), ("drain", 1)]
