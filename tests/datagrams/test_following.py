"""Flows of a relay that gets other settings go with the servers that it has then."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from relayd.datagrams.moving import MAX_REFUSALS
from relayd.net.dial_options import DialOptions
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.balance import First, LeastSessions
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from tests.datagrams.support import (
    CLIENT,
    SERVER,
    Bench,
    FakeResolver,
    become,
    named,
    peers,
    refuse,
)

HOSTS = ("198.51.100.1", "198.51.100.2", "198.51.100.3")

CLIENTS = [("192.0.2.1", port) for port in (1, 2, 3, 4)]


def server(host: str = HOSTS[0], **settings: Any) -> FlowServer:
    return FlowServer.at(Server(host, 53), **settings)


def servers(*hosts: str, **settings: Any) -> list[FlowServer]:
    return [server(host, **settings) for host in hosts or HOSTS[:2]]


def change(
    bench: Bench,
    before: Pool,
    own: Sequence[FlowServer],
    *,
    order: str = "flows first",
    by: Any = None,
    **settings: Any,
) -> Pool:
    """A change of settings, in either order; no counts are lost by it."""
    pool = Pool(own, by or First())
    if order != "flows first":
        pool.succeed(before)
    become(bench, pool, **settings)
    if order == "flows first":
        pool.succeed(before)
    return pool


def bench_of(own: Sequence[FlowServer], **settings: Any) -> tuple[Bench, Pool]:
    pool = Pool(own, First())
    return Bench(pool, timeout=1000, **settings), pool


ORDERS = pytest.mark.parametrize("order", ["flows first", "counts first"])


# -- checks, and counts


@ORDERS
@pytest.mark.parametrize("changes", [1, 3])
def test_they_leave_a_server_that_goes_down_later(order: str, changes: int) -> None:
    """At once, as they are cut; their sockets have stayed until then."""
    bench, pool = bench_of(servers(), cut=True)
    bench.converse(*CLIENTS[:2])
    bench.arrive(b"new", source=CLIENTS[2])
    for _ in range(changes):
        a, b, c = servers(*HOSTS, max_sessions=7)
        pool = change(bench, pool, [a, b, c], order=order, cut=True)
        assert [each.sessions for each in (a, b, c)] == [3, 0, 0]
        assert not a.inherited
    assert peers(bench) == [HOSTS[0]] * 3
    a.checked(False, "broken")
    assert [each.sessions for each in (a, b, c)] == [0, 3, 0]
    assert peers(bench)[3:] == [HOSTS[1]] * 3
    assert bench.sockets[5].sent == [b"new"], "nobody has answered it"
    bench.check()
    bench.close()
    assert [each.sessions for each in (a, b, c)] == [0, 0, 0]


@ORDERS
def test_one_that_is_down_is_left_as_flows_are_to_go_at_once(order: str) -> None:
    """From this change on."""
    a, b = servers()
    bench, pool = bench_of([a, b])
    bench.converse(CLIENT)
    a.operate("down")
    c, d = servers()
    change(bench, pool, [c, d], order=order, cut=True)
    assert [each.sessions for each in (a, b, c, d)] == [0, 0, 0, 1]
    bench.check()
    bench.close()
    assert (c.sessions, d.sessions) == (0, 0)


@ORDERS
def test_all_that_is_counted_is_counted_once(order: str) -> None:
    """Flows of before, of now, and those that move in between."""
    own = servers(*HOSTS)
    bench, pool = bench_of(own)
    for number in range(5):
        for client in CLIENTS:
            bench.arrive(source=(client[0], client[1] + 10 * number))
        own[number % 3].checked(False, "so it is")
        refuse(bench, len(bench.sockets) - 1)
        own = servers(*HOSTS, max_sessions=50)
        by = LeastSessions()
        pool = change(bench, pool, own, order=order, by=by, timeout=1000)
        flows = list(bench.nat.table)
        assert len(flows) == 4 * (number + 1)
        for each in own:
            there = [flow for flow in flows if flow.server is each.endpoint]
            assert each.sessions == len(there)
    bench.check()
    bench.close()
    assert not any(each.sessions for each in own)


def test_a_limit_of_flows_counts_those_of_before() -> None:
    bench, _ = bench_of(servers())
    for client in CLIENTS[:2]:
        bench.arrive(source=client)
    become(bench, Pool(servers(max_sessions=2), First()))
    bench.arrive(source=CLIENTS[2])
    assert peers(bench) == [*HOSTS[:1] * 2, HOSTS[1]]
    bench.close()


def test_they_go_when_it_refuses_and_is_out() -> None:
    """An answered one, at once; and if it is silent."""
    bench, _ = bench_of(servers())
    bench.converse(*CLIENTS[:2])
    a, b = servers()
    become(bench, Pool([a, b], First()))
    a.checked(False, "broken")
    refuse(bench, 0)
    assert (a.sessions, b.sessions) == (1, 1)
    for _ in range(3):
        bench.arrive(source=CLIENTS[1])
        bench.pass_time(1)
    assert (a.sessions, b.sessions) == (0, 2)
    bench.check()
    bench.close()


def test_silence_says_nothing_of_one_that_answers_others() -> None:
    bench, _ = bench_of(servers())
    bench.arrive(source=CLIENTS[0])
    bench.clock.advance(1)
    bench.arrive(source=CLIENTS[1])
    bench.answer()
    pool = Pool(servers(), First())
    ejector = Ejector(pool, bench.clock, FailLimits(max_fails=1))
    become(bench, pool)
    for _ in range(40):
        bench.arrive(source=CLIENTS[0])
        bench.pass_time(1)
    assert peers(bench) == [HOSTS[0]] * 2
    assert not ejector.ejections
    ejector.stop()
    bench.close()


def test_what_they_have_tried_is_not_tried_again() -> None:
    bench, _ = bench_of(servers(*HOSTS))
    bench.arrive()
    refuse(bench)
    become(bench, Pool(servers(*HOSTS), First()))
    refuse(bench)
    assert peers(bench) == list(HOSTS)
    bench.close()


# -- which one is the same


@pytest.mark.parametrize(
    "settings", [{"weight": 7}, {"tier": 1}, {"label": "blue"}, {"disabled": True}]
)
def test_it_is_the_same_whatever_else_is_said_of_it(settings: dict[str, Any]) -> None:
    bench, pool = bench_of(servers(label="green"))
    bench.converse(CLIENT)
    a, b = servers(**settings)
    change(bench, pool, [b, a], cut=True)
    assert (a.sessions, b.sessions) == (1, 0)
    a.checked(False, "broken")
    assert peers(bench)[1:] == ([] if a.disabled and b.disabled else [HOSTS[1]])
    bench.close()


def test_two_at_one_place_are_told_apart_by_their_names() -> None:
    bench, pool = bench_of([server(label="blue"), server(label="green")])
    bench.arrive()
    green, blue = server(label="green"), server(label="blue")
    change(bench, pool, [green, blue])
    assert (blue.sessions, green.sessions) == (1, 0)
    bench.close()


def test_servers_without_state_and_with_it() -> None:
    """One has none if nothing is said of it; those with state count all of theirs."""
    bench = Bench([Server(HOSTS[0], 53)])
    bench.arrive(b"one")
    a, b = servers()
    become(bench, Pool([a, b], First()))
    assert (a.sessions, b.sessions) == (1, 0)
    bench.arrive(b"two")
    assert len(bench.nat.ledger.unanswered) == 1
    only = Server(HOSTS[0], 53)
    become(bench, [only])
    assert (a.sessions, b.sessions) == (0, 0)
    # There is nowhere else to send it.
    assert len(bench.nat.ledger.unanswered) == 0
    [flow] = bench.nat.table
    assert flow.server is only
    c, d = servers()
    become(bench, Pool([c, d], First()))
    refuse(bench)
    assert (c.sessions, d.sessions) == (0, 1)
    bench.check()
    bench.close()
    assert (c.sessions, d.sessions) == (0, 0)


@pytest.mark.parametrize("own", [False, True])
def test_one_that_is_dialled_in_another_way_is_another(own: bool) -> None:
    """A flow keeps its socket while it is answered, and then has a new one."""
    marked = DialOptions(mark=7)
    said = {} if own else {"dialing": marked}
    bench = Bench([Server(*SERVER)])
    bench.converse(CLIENT)
    here = [Server(*SERVER, dialing=marked if own else None)]
    become(bench, here, **said)
    [flow] = bench.nat.table
    assert flow.server is not here[0]
    # And back again: it is what its socket is for.
    back = [Server(*SERVER)]
    become(bench, back)
    assert flow.server is back[0]
    assert not flow.stranded
    become(bench, here, **said)
    refuse(bench)
    assert flow.server is here[0]
    assert len(bench.sockets) == 2
    bench.check()
    bench.close()


# -- one that is no more


@pytest.mark.parametrize("stateful", [False, True])
def test_one_that_is_removed_keeps_those_that_it_answers(stateful: bool) -> None:
    """The others go, when it refuses or is silent."""
    own: Any = Pool(servers(), First()) if stateful else [Server(*SERVER)]
    bench = Bench(own)
    bench.converse(*CLIENTS[:3])
    bench.arrive(b"new", source=CLIENTS[3])
    a, b = servers(*HOSTS[1:])
    become(bench, Pool([a, b], First()) if stateful else [Server(HOSTS[1], 53)])
    for _ in range(3):
        for number, client in enumerate(CLIENTS[:2]):
            bench.arrive(source=client)
            bench.answer(number=number)
        bench.arrive(b"new", source=CLIENTS[3])
        bench.pass_time(1)
    assert peers(bench)[4:] == [HOSTS[1]], "only one was never answered"
    assert bench.sockets[4].sent[0] == b"new"
    bench.answer(number=4)
    refuse(bench, 0)
    assert peers(bench)[5:] == [HOSTS[1]], "at the first refusal"
    for _ in range(3):
        bench.arrive(source=CLIENTS[1])
        bench.pass_time(1)
    assert peers(bench)[6:] == [HOSTS[1]], "it is silent"
    # The third has not asked since.
    assert Counter(each.peer[0] for each in bench.live) == {HOSTS[0]: 1, HOSTS[1]: 3}
    assert a.sessions == (3 if stateful else 0)
    bench.check()
    bench.close()
    assert a.sessions == 0


def test_one_that_is_removed_is_not_judged() -> None:
    own = servers()
    bench, pool = bench_of(own)
    ejector = Ejector(pool, bench.clock, FailLimits(max_fails=1))
    bench.converse(CLIENT)
    become(bench, Pool([server(HOSTS[1])], First()))
    refuse(bench)
    assert peers(bench) == [HOSTS[0], HOSTS[1]]
    assert not ejector.ejections
    assert (own[0].sessions, own[0].fails) == (0, 0)
    bench.check()
    bench.close()


def test_one_that_is_back_has_its_flows_again() -> None:
    """By a change of settings, or as its name has the address again."""
    bench, pool = bench_of(servers())
    bench.converse(CLIENT)
    pool = change(bench, pool, servers(HOSTS[1]))
    a, b = servers()
    pool = change(bench, pool, [a, b])
    assert (a.sessions, b.sessions) == (1, 0)
    pool.replace([a], [])
    [flow] = bench.nat.table
    assert flow.stranded
    again = server()
    pool.replace([], [again])
    assert (a.sessions, again.sessions) == (0, 1)
    assert not flow.stranded
    bench.close()
    assert again.sessions == 0


@ORDERS
def test_servers_that_a_name_brings_join_after_the_change(order: str) -> None:
    bench, before = bench_of(servers())
    bench.converse(*CLIENTS[:2])
    bench.arrive(b"new", source=CLIENTS[2])
    pool = Pool([server(HOSTS[2])], First())
    if order == "flows first":
        become(bench, pool, cut=True)
        pool.succeed(before)
    else:
        pool.succeed(before)
        become(bench, pool, cut=True)
    a, b = servers()
    pool.replace([], [a, b])
    assert (a.sessions, b.sessions) == (3, 0)
    assert not a.inherited
    a.checked(False, "broken")
    assert len(bench.sockets) == 6
    bench.check()
    bench.close()
    assert not any(each.sessions for each in (a, b, pool.servers[0]))


# -- names


def test_they_follow_their_name() -> None:
    """That has another address later: they go at the first refusal."""
    bench = named(HOSTS[0])
    bench.converse(CLIENT)
    for _ in range(2):
        resolver = FakeResolver()
        become(bench, [Server("name.example", 53)], resolver=resolver)
    resolver.answer(HOSTS[1])
    refuse(bench)
    assert peers(bench) == [HOSTS[0], HOSTS[1]]
    bench.check()
    bench.close()


def test_one_at_the_second_address_of_its_name_stays_there() -> None:
    """It was refused at the first, and does not try that again before a look-up."""
    bench = named(*HOSTS[:2])
    bench.arrive()
    refuse(bench)
    bench.answer()
    resolver = FakeResolver()
    become(bench, [Server("name.example", 53)], resolver=resolver)
    [flow] = bench.nat.table
    assert [address[1][0] for address in flow.tried] == list(HOSTS[:2])
    for _ in range(MAX_REFUSALS):
        refuse(bench, why=errno.EHOSTUNREACH)
    assert peers(bench) == list(HOSTS[:2])
    resolver.answer(*HOSTS[:2])
    refuse(bench)
    assert peers(bench) == [*HOSTS[:2], HOSTS[0]]
    bench.check()
    bench.close()
