"""What becomes of a server's flows when checks find that it is down."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.datagrams import cutting
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.balance import First, RoundRobin
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.datagrams.support import CLIENT, Bench, become, peers, turns

HOSTS = ("198.51.100.1", "198.51.100.2", "198.51.100.3")

CLIENTS = [("192.0.2.1", port) for port in (1, 2, 3, 4)]


def servers(count: int = 2) -> list[FlowServer]:
    return [FlowServer.at(Server(host, 53)) for host in HOSTS[:count]]


def bench_of(*own: FlowServer, by: Any = None, **settings: Any) -> Bench:
    settings.setdefault("cut", True)
    settings.setdefault("timeout", 1000)
    return Bench(Pool(own, by or First()), **settings)


def turn(bench: Bench) -> None:
    """One turn of the reactor."""
    bench.clock.advance(0)


def test_they_go_to_another_one_at_once() -> None:
    """In use or not, whether their clients send or not; the client's port stays."""
    a, b = servers()
    bench = bench_of(a, b)
    bench.converse(*CLIENTS[:2])
    bench.arrive(b"new", source=CLIENTS[2])
    a.checked(False, "broken")
    assert (a.sessions, b.sessions) == (0, 3)
    assert peers(bench)[3:] == [HOSTS[1]] * 3
    assert bench.sockets[5].sent == [b"new"], "nobody has answered it"
    assert bench.nat.counters.resent == 1
    bench.arrive(b"more", source=CLIENTS[0])
    bench.answer(b"from b", number=3)
    assert bench.listener.sent[-1] == (b"from b", CLIENTS[0])
    assert {each.source for each in bench.nat.table} == set(CLIENTS[:3])
    assert not bench.observer.facts
    bench.check()
    bench.close()
    assert (a.sessions, b.sessions) == (0, 0)


def test_they_stay_unless_they_are_to_go() -> None:
    a, b = servers()
    bench = bench_of(a, b, cut=False)
    bench.converse(CLIENT)
    a.checked(False, "broken")
    assert peers(bench) == [HOSTS[0]]
    assert (a.sessions, b.sessions) == (1, 0)
    bench.close()


def test_they_end_where_there_is_no_other() -> None:
    [a] = servers(1)
    bench = bench_of(a)
    bench.converse(CLIENT)
    a.checked(False, "broken")
    assert bench.observer.endings == ["upstream_down"]
    assert a.sessions == 0
    bench.arrive()
    assert bench.nat.counters.dropped == {"no_server": 1}
    a.checked(True, "fine")
    bench.arrive()
    assert len(bench.nat.table) == 1
    bench.check()
    bench.close()


def test_back_and_forth() -> None:
    """Each time that one goes down; what it was before does not matter."""
    a, b = servers()
    bench = bench_of(a, b)
    bench.converse(CLIENT)
    for down, other in ((a, b), (b, a)) * 4:
        down.checked(False, "broken")
        down.checked(False, "still broken")
        assert (down.sessions, other.sessions) == (0, 1)
        down.checked(True, "fine")
    assert peers(bench) == [HOSTS[0], *[HOSTS[1], HOSTS[0]] * 4]
    bench.check()
    bench.close()


def test_one_that_is_up_again_keeps_those_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cutting, "AT_ONCE", 1)
    a, b = servers()
    bench = bench_of(a, b)
    for client in CLIENTS:
        bench.arrive(source=client)
    a.checked(False, "broken")
    a.checked(True, "fine")
    turn(bench)
    assert (a.sessions, b.sessions) == (3, 1)
    bench.close()


def test_one_that_leaves_drains() -> None:
    """What its checks say then is nothing to anybody."""
    a, b = servers()
    bench = bench_of(a, b)
    bench.converse(CLIENT)
    pool: Any = bench.nat.balance
    pool.replace([a], [])
    a.checked(False, "broken")
    assert peers(bench) == [HOSTS[0]]
    bench.close()


def test_dials_that_fail_are_no_checks() -> None:
    """As of connections: a server that is out for its dials keeps its flows."""
    a, b = servers()
    bench = bench_of(a, b)
    bench.converse(CLIENT)
    a.ejected = True
    a.changed()
    turn(bench)
    assert peers(bench) == [HOSTS[0]]
    bench.close()


def test_many_are_moved_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "AT_ONCE", 3)
    a, b = servers()
    bench = bench_of(a, b)
    for port in range(1, 9):
        bench.arrive(source=("192.0.2.1", port))
    had = turns(bench, lambda: b.sessions)
    a.checked(False, "broken")
    turn(bench)
    assert had == [3, 6]
    assert b.sessions == 8
    bench.check()
    a.checked(True, "fine")
    b.checked(False, "broken")
    # The timer goes with the relay.
    bench.close()
    assert (a.sessions, b.sessions) == (0, 0)


def test_a_flow_that_was_not_answered_is_no_failure_of_its_server() -> None:
    """Its checks have said so already."""

    class Judge:
        said: list[str]

        def __init__(self) -> None:
            self.said = []

        def __getattr__(self, name: str) -> Any:
            return lambda *_: self.said.append(name)

    a, b = servers()
    judge: Any = Judge()
    bench = bench_of(a, b)
    a.passive = judge
    bench.converse(CLIENTS[0])
    bench.arrive(source=CLIENTS[1])
    judge.said.clear()
    a.checked(False, "broken")
    assert judge.said == ["cancelled"]
    bench.close()


def test_a_selector_that_fails_ends_its_flow_and_no_other(
    logged_failures: LoggedFailures,
) -> None:
    class Failing(RoundRobin):
        fails = False

        def choose(self, candidates: Any, session: Any) -> Any:
            if self.fails and session.client == "192.0.2.1:1":
                raise RuntimeError("a defect")
            return candidates[0]

    a, b = servers()
    selector = Failing()
    bench = bench_of(a, b, by=selector)
    for client in CLIENTS:
        bench.arrive(source=client)
    selector.fails = True
    a.checked(False, "broken")
    logged_failures.take("192.0.2.1:1 failed")
    assert bench.observer.endings == ["failed"]
    assert b.sessions == 3
    bench.close()


def test_of_a_relay_that_has_other_servers_now() -> None:
    """What the old ones do is nothing to its flows; what the new ones do is."""
    a, b = servers()
    bench = bench_of(a, b)
    bench.arrive(source=CLIENTS[0])
    c, d = servers()
    become(bench, Pool([c, d], First()), cut=True)
    bench.arrive(source=CLIENTS[1])
    a.checked(False, "broken")
    assert (a.sessions, b.sessions, c.sessions, d.sessions) == (0, 0, 2, 0)
    c.checked(False, "broken")
    assert (c.sessions, d.sessions) == (0, 2)
    bench.check()
    bench.close()
    assert (a.sessions, d.sessions) == (0, 0)


def test_a_change_of_settings_does_not_keep_those_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it leaves the servers as they are."""
    monkeypatch.setattr(cutting, "AT_ONCE", 1)
    a, b = servers()
    bench = bench_of(a, b)
    for client in CLIENTS:
        bench.arrive(source=client)
    a.checked(False, "broken")
    assert (a.sessions, b.sessions) == (3, 1)
    become(bench, bench.nat.balance, cut=True)
    for _ in range(3):
        turn(bench)
    assert (a.sessions, b.sessions) == (0, 4)
    bench.check()
    bench.close()


def test_an_operators_word_does_as_well() -> None:
    a, b = servers()
    bench = bench_of(a, b)
    bench.converse(CLIENT)
    a.operate("down")
    assert (a.sessions, b.sessions) == (0, 1)
    bench.close()
