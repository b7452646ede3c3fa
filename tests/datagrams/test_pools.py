"""Flows of a pool: which server they get, and where they go when it fails them."""

from __future__ import annotations

import errno
from collections import Counter
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.interfaces import ISelector
from relayd.datagrams.moving import ANEW_AFTER, MAX_REFUSALS, MAX_SERVERS
from relayd.datagrams.servers import LOOK_UP_INTERVAL
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.balance import First, LeastSessions, RandomOfTwo, RoundRobin
from relayd.upstreams.client_hash import ClientHash
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from tests.datagrams.support import (
    CLIENT,
    Bench,
    FakeResolver,
    peers,
    problem,
    refuse,
)

HOSTS = ("198.51.100.1", "198.51.100.2", "198.51.100.3")


def server(host: str, **settings: Any) -> FlowServer:
    return FlowServer.at(Server(host, 53), **settings)


def pool_of(
    *servers: FlowServer, by: ISelector | None = None, count: int = 2
) -> tuple[Pool, list[FlowServer]]:
    own = list(servers) or [server(host) for host in HOSTS[:count]]
    return Pool(own, by or RoundRobin()), own


def ask(bench: Bench, count: int, first: int = 1) -> list[str]:
    """So many new clients; the last number of the server that each gets."""
    before = len(bench.sockets)
    for port in range(first, first + count):
        bench.arrive(source=(f"192.0.2.{port % 250}", port))
    return [each[-1] for each in peers(bench)[before:]]


# -- which one


def test_weights_backups_and_the_disabled() -> None:
    pool, (a, b, c) = pool_of(
        server(HOSTS[0], weight=3),
        server(HOSTS[1]),
        server(HOSTS[2], tier=1),
    )
    bench = Bench(pool)
    assert Counter(ask(bench, 40)) == {"1": 30, "2": 10}
    assert [each.sessions for each in (a, b, c)] == [30, 10, 0]
    a.disabled = True
    a.changed()
    assert set(ask(bench, 5, 100)) == {"2"}
    b.disabled = True
    b.changed()
    assert set(ask(bench, 5, 200)) == {"3"}
    bench.check()
    bench.close()
    assert [each.sessions for each in (a, b, c)] == [0, 0, 0]


def test_a_server_has_so_many_flows_at_most() -> None:
    """When all are full, a new client's datagrams are dropped and counted."""
    pool, (a, b) = pool_of(
        server(HOSTS[0], max_sessions=2), server(HOSTS[1], max_sessions=1), by=First()
    )
    bench = Bench(pool, unreplied_timeout=4)
    assert ask(bench, 4) == ["1", "1", "2"]
    assert bench.nat.counters.dropped == {"no_server": 1}
    bench.pass_time(5)
    assert (a.sessions, b.sessions) == (0, 0)
    assert ask(bench, 1, 9) == ["1"]
    bench.close()


def test_the_fewest_flows() -> None:
    pool, _ = pool_of(by=LeastSessions())
    bench = Bench(pool, timeout=4, unreplied_timeout=4)
    first = ask(bench, 2)
    assert sorted(first) == ["1", "2"]
    # One of them lives on.
    bench.pass_time(3)
    bench.arrive(source=("192.0.2.1", 1))
    bench.pass_time(3)
    assert len(bench.nat.table) == 1
    assert ask(bench, 1, 9) == [first[1]]
    bench.close()


def test_the_same_server_for_the_same_client() -> None:
    """Whatever port it sends from; the others' clients stay when one leaves."""
    pool, own = pool_of(count=3, by=ClientHash())
    bench = Bench(pool, max_flows=1000, max_flows_per_client=1000)
    first = ask(bench, 200)
    found = {}
    for port, there in enumerate(first, 1):
        assert found.setdefault(port % 250, there) == there
    own[0].disabled = True
    own[0].changed()
    for port, there in enumerate(first, 1):
        bench.arrive(source=(f"192.0.2.{port % 250}", 5000 + port))
        if there != "1":
            assert peers(bench)[-1][-1] == there
    bench.close()


def test_two_at_random() -> None:
    """All of them get some."""
    pool, own = pool_of(count=3, by=RandomOfTwo())
    bench = Bench(pool)
    assert Counter(ask(bench, 90)).keys() == {"1", "2", "3"}
    assert max(each.sessions for each in own) - min(each.sessions for each in own) < 20
    bench.close()


def test_servers_that_join_and_leave() -> None:
    """Loops are looked for among those that are there."""
    pool, (a, _) = pool_of()
    bench = Bench(pool)
    assert set(ask(bench, 4)) == {"1", "2"}
    c = server(HOSTS[2])
    pool.replace([a], [c])
    assert [each.host for each in bench.nat.servers] == [HOSTS[2], HOSTS[1]]
    assert set(ask(bench, 4, 10)) == {"2", "3"}
    bench.listener.inbox.append((b"?", (HOSTS[2], 53)))
    bench.watcher.ready(bench.listener.number)
    assert bench.nat.counters.dropped == {"source_loops": 1}
    with pytest.raises(ValueError, match="its pool has the servers"):
        bench.nat.servers = [Server(HOSTS[0], 53)]
    bench.close()


def test_a_name_without_an_address_is_not_chosen() -> None:
    resolver = FakeResolver()
    pool, _ = pool_of(
        FlowServer.at(Server("name.example", 53), label="db"), server(HOSTS[1])
    )
    bench = Bench(pool, resolver=resolver)
    assert pool.names == "db/name.example:53, 198.51.100.2:53"
    assert ask(bench, 2) == ["2", "2"]
    resolver.answer(HOSTS[0])
    assert set(ask(bench, 2, 10)) == {"1", "2"}
    bench.clock.advance(LOOK_UP_INTERVAL)
    resolver.answer("0.0.0.0")
    assert ask(bench, 2, 20) == ["2", "2"]
    bench.close()


def test_a_server_without_a_route() -> None:
    """The next one takes the flow."""
    pool, own = pool_of()
    bench = Bench(pool)
    real = bench.open

    def open_socket(family: int) -> Any:
        sock = real(family)

        def connect(address: Any) -> None:
            if address[0] == HOSTS[0]:
                raise problem(errno.ENETUNREACH)
            sock.peer = address

        sock.connect = connect
        return sock

    bench.open = open_socket
    for port in range(1, 5):
        bench.arrive(source=("192.0.2.1", port))
    assert [each.peer[0] for each in bench.live] == [HOSTS[1]] * 4
    assert [each.sessions for each in own] == [0, 4]
    bench.check()
    bench.close()


# -- where they go


def test_a_refusal_leads_to_another_server() -> None:
    """What the client has sent is sent again; its port is the same."""
    pool, (a, b) = pool_of()
    bench = Bench(pool)
    bench.arrive(b"one")
    bench.arrive(b"two")
    assert (a.sessions, b.sessions) == (1, 0)
    refuse(bench)
    assert peers(bench) == list(HOSTS[:2])
    assert bench.sockets[0].closed
    assert bench.sockets[1].sent == [b"one", b"two"]
    assert (a.sessions, b.sessions) == (0, 1)
    bench.answer(b"here")
    assert bench.listener.sent == [(b"here", CLIENT)]
    assert bench.nat.counters.resent == 2
    bench.check()
    bench.close()
    assert (a.sessions, b.sessions) == (0, 0)
    assert bench.observer.facts[0].server == "198.51.100.2:53"


def test_all_refuse() -> None:
    """The flow has tried each once, and stays; later it tries them again."""
    pool, own = pool_of(count=3)
    bench = Bench(pool)
    bench.arrive()
    for _ in range(6):
        refuse(bench)
    assert sorted(peers(bench)) == sorted(HOSTS)
    bench.check()
    assert sum(each.sessions for each in own) == 1
    bench.clock.advance(ANEW_AFTER)
    refuse(bench)
    assert len(peers(bench)) == 4
    bench.close()
    assert [each.sessions for each in own] == [0, 0, 0]


def test_a_flow_tries_a_few_servers_only() -> None:
    pool, _ = pool_of(*(server(f"198.51.100.{n}") for n in range(1, 20)))
    bench = Bench(pool)
    bench.arrive()
    for _ in range(20):
        refuse(bench)
    assert len(peers(bench)) == 1 + MAX_SERVERS
    bench.close()


def test_a_flow_that_was_answered_goes_when_it_is_refused_again_and_again() -> None:
    """Its server may be back in a moment; an answer begins the count anew."""
    pool, _ = pool_of()
    bench = Bench(pool)
    bench.arrive()
    bench.answer()
    for _ in range(MAX_REFUSALS - 1):
        refuse(bench)
    bench.answer()
    for _ in range(MAX_REFUSALS - 1):
        refuse(bench)
    assert peers(bench) == [HOSTS[0]]
    refuse(bench)
    assert peers(bench) == list(HOSTS[:2])
    bench.arrive(b"more")
    bench.answer(b"from b")
    assert bench.listener.sent[-1] == (b"from b", CLIENT)
    bench.check()
    bench.close()


def test_a_flow_in_use_goes_as_well() -> None:
    """It stays in use, and is read as one that has just begun."""
    pool, _ = pool_of()
    bench = Bench(pool)
    bench.converse(CLIENT)
    [flow] = bench.nat.table
    assert flow.in_use
    for _ in range(MAX_REFUSALS):
        refuse(bench, 0)
    assert peers(bench) == list(HOSTS[:2])
    bench.arrive()
    for _ in range(50):
        bench.answer()
    assert flow.in_use
    assert flow.down_datagrams == 51
    bench.check()
    bench.close()


def test_first_the_next_address_of_a_name() -> None:
    resolver = FakeResolver()
    pool, _ = pool_of(FlowServer.at(Server("name.example", 53)), server(HOSTS[2]))
    bench = Bench(pool, resolver=resolver)
    resolver.answer(*HOSTS[:2])
    while not bench.sockets or peers(bench)[-1] != HOSTS[0]:
        bench.arrive(source=("192.0.2.1", 1 + len(bench.sockets)))
    begun = len(peers(bench)) - 1
    refuse(bench)
    refuse(bench)
    assert peers(bench)[begun:] == list(HOSTS)
    assert bench.nat.counters.resent == 2
    bench.check()
    bench.close()


def test_a_name_that_has_moved_takes_flows_that_are_refused() -> None:
    """Even one that was answered, at once: nobody comes back to the old address."""
    resolver = FakeResolver()
    bench = Bench([Server("name.example", 53)], resolver=resolver, timeout=1000)
    resolver.answer(HOSTS[0])
    bench.converse(CLIENT)
    bench.clock.advance(LOOK_UP_INTERVAL)
    resolver.answer(HOSTS[1])
    bench.arrive()
    assert peers(bench) == [HOSTS[0]]
    refuse(bench)
    assert peers(bench) == list(HOSTS[:2])
    bench.arrive(b"new")
    assert bench.sockets[1].sent == [b"new"]
    bench.check()
    bench.close()


# -- servers that are silent


def test_flows_leave_a_server_that_its_operator_takes_down_and_that_is_silent() -> None:
    """Those of one that it drains stay."""
    pool, (a, b) = pool_of()
    bench = Bench(pool, timeout=100, unreplied_timeout=100)
    b.disabled = True
    b.changed()
    bench.converse(CLIENT)
    b.disabled = False
    b.changed()
    for word, there in (("drain", HOSTS[:1]), ("down", HOSTS[:2])):
        a.operate(word)  # type: ignore[arg-type]
        for _ in range(4):
            bench.pass_time(1)
            bench.arrive(b"vain")
        assert peers(bench) == list(there)
    assert (a.sessions, b.sessions) == (0, 1)
    bench.close()


def test_flows_leave_a_server_that_is_down_and_silent() -> None:
    """One whose client does not send stays, and one that is answered."""
    pool, (a, b) = pool_of()
    bench = Bench(pool, timeout=100, unreplied_timeout=100)
    clients = [("192.0.2.1", port) for port in (1, 2, 3)]
    b.disabled = True
    b.changed()
    bench.converse(*clients)
    b.disabled = False
    b.changed()
    a.checked(False, "broken")
    for _ in range(8):
        bench.pass_time(1)
        bench.arrive(b"vain", source=clients[0])
        bench.arrive(b"fine", source=clients[1])
        bench.answer(number=1)
    assert peers(bench) == [HOSTS[0]] * 3 + [HOSTS[1]]
    [moved] = [each for each in bench.nat.table if each.server.host == HOSTS[1]]
    assert moved.source == clients[0]
    assert b"vain" in bench.sockets[3].sent
    assert (a.sessions, b.sessions) == (2, 1)
    bench.check()
    bench.close()


def test_flows_leave_a_server_that_has_left() -> None:
    """The address of a name is another now; its port at the client stays."""
    pool, (a, b) = pool_of()
    bench = Bench(pool, timeout=100)
    bench.converse(CLIENT)
    c = server(HOSTS[2])
    pool.replace([a, b], [c])
    for _ in range(4):
        bench.arrive(b"more")
        bench.pass_time(1)
    assert peers(bench) == [HOSTS[0], HOSTS[2]]
    assert (a.sessions, c.sessions) == (0, 1)
    bench.close()


def test_nobody_else_is_there() -> None:
    """Flows stay where they are."""
    pool, (a,) = pool_of(server(HOSTS[0]))
    bench = Bench(pool, timeout=100)
    bench.converse(CLIENT)
    a.checked(False, "broken")
    for _ in range(8):
        bench.arrive()
        bench.pass_time(1)
    refuse(bench)
    assert peers(bench) == [HOSTS[0]]
    assert a.sessions == 1
    bench.check()
    bench.close()


# -- passive health


def ejecting(
    bench_clock: Clock, pool: Pool, max_fails: int = 3, fail_time: float = 10
) -> Ejector:
    limits = FailLimits(max_fails=max_fails, fail_time=fail_time)
    return Ejector(pool, bench_clock, limits)


def test_refusals_take_a_server_out_and_an_answer_brings_it_back() -> None:
    pool, (a, _) = pool_of()
    bench = Bench(pool)
    ejector = ejecting(bench.clock, pool)
    for _turn in range(3):
        while not bench.sockets or peers(bench)[-1] != HOSTS[0]:
            bench.arrive(source=("192.0.2.9", 1000 + len(bench.sockets)))
        refuse(bench)
    assert a.ejected
    assert "Connection refused" in a.why
    assert set(ask(bench, 5, 50)) == {"2"}
    bench.clock.advance(10)
    there = ask(bench, 6, 100)
    assert Counter(there)["1"] == 1, "one tries it"
    assert a.ejected
    bench.answer(number=peers(bench).index(HOSTS[0], -6))
    assert not a.ejected
    assert set(ask(bench, 4, 150)) == {"1", "2"}
    ejector.stop()
    bench.close()


@pytest.mark.parametrize("chatty", [False, True])
def test_flows_without_an_answer_take_a_server_out(chatty: bool) -> None:
    """Whether their clients go on sending, and so go to another one, or give up."""
    pool, (a, b) = pool_of()
    bench = Bench(pool, unreplied_timeout=4)
    ejector = ejecting(bench.clock, pool, 2, 100)
    # B has answered: this is no protocol without answers.
    bench.arrive(source=("192.0.2.9", 1))
    bench.arrive(source=("192.0.2.9", 2))
    bench.answer(number=peers(bench).index(HOSTS[1]))
    sources = [("192.0.2.8", port) for port in (1, 2, 3, 4)]
    for source in sources:
        bench.arrive(source=source)
    for _ in range(8):
        bench.pass_time(1)
        for number, peer in enumerate(peers(bench)):
            sock = bench.sockets[number]
            if peer == HOSTS[1] and not sock.closed:
                bench.answer(number=number)
        if chatty:
            for source in sources:
                bench.arrive(source=source)
    assert a.ejected
    assert "no answer" in a.why
    assert not b.ejected
    if chatty:
        assert {each.server.host for each in bench.nat.table} == {HOSTS[1]}
    ejector.stop()
    bench.close()


def test_silence_moves_no_flow_where_servers_are_not_judged() -> None:
    """What its client has sent would be sent to another server, again."""
    pool, _ = pool_of()
    bench = Bench(pool, unreplied_timeout=4)
    ask(bench, 2)
    bench.answer(number=peers(bench).index(HOSTS[1]))
    ask(bench, 4, 50)
    for _ in range(8):
        bench.pass_time(1)
        ask(bench, 4, 50)
        for number, peer in enumerate(peers(bench)):
            if peer == HOSTS[1] and not bench.sockets[number].closed:
                bench.answer(number=number)
    assert {each.server.host for each in bench.nat.table} == set(HOSTS[:2])
    bench.close()


def test_a_protocol_without_answers_proves_nothing() -> None:
    pool, (a, b) = pool_of()
    bench = Bench(pool, unreplied_timeout=4)
    ejector = ejecting(bench.clock, pool, 1, 100)
    for _ in range(12):
        ask(bench, 4)
        bench.pass_time(1)
    bench.pass_time(6)
    assert not a.ejected
    assert not b.ejected
    assert len(bench.sockets) == 4, "nor does a flow go elsewhere"
    ejector.stop()
    bench.close()


def test_a_server_that_answers_others_has_not_failed() -> None:
    """Whoever sends nonsense does not take servers from others."""
    pool, (a, b) = pool_of()
    bench = Bench(pool, unreplied_timeout=4)
    ejector = ejecting(bench.clock, pool, 1, 100)
    ask(bench, 4)
    bench.pass_time(2)
    before = len(bench.sockets)
    ask(bench, 2, 50)
    for number in range(before, before + 2):
        bench.answer(number=number)
    bench.pass_time(4)
    assert bench.observer.endings.count("unreplied") == 4
    assert not a.ejected
    assert not b.ejected
    ejector.stop()
    bench.close()
