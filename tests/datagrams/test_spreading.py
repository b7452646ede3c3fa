"""Each datagram to the next server."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from typing import Any

import pytest

from relayd.datagrams.mmsg import BATCH
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.balance import RandomOfTwo, RoundRobin
from relayd.upstreams.pool import Pool
from tests.datagrams.support import CLIENT, Bench, Observer, become, problem

HOSTS = ("198.51.100.1", "198.51.100.2", "2001:db8::3")


def spread(*servers: FlowServer, by: Any = None, **settings: Any) -> Bench:
    pool = Pool(servers, by or RoundRobin())
    return Bench(pool, udp_balance="datagram", **settings)


def servers(**settings: Any) -> list[FlowServer]:
    return [FlowServer.at(Server(host, 53), **settings) for host in HOSTS]


def got(bench: Bench) -> Counter[str]:
    """How many datagrams each server has had."""
    return Counter(to[0] for sock in bench.sockets for _, to in sock.sent)


def test_in_turn_whoever_sends() -> None:
    """By the weights; a flow has a socket for each family, and no more."""
    own = servers()
    own[0].weight = 2
    bench = spread(*own)
    for number in range(40):
        bench.arrive(b"%d" % number, source=("192.0.2.1", 1 + number // 20))
    assert got(bench) == {HOSTS[0]: 20, HOSTS[1]: 10, HOSTS[2]: 10}
    assert len(bench.sockets) == 4
    assert len(bench.nat.table) == 2
    counters = bench.nat.counters
    assert (counters.received, counters.sent) == (40, 40)
    bench.close()
    assert bench.observer.facts[0].server == "each-in-turn"
    assert [each.sessions for each in own] == [0, 0, 0]


@pytest.mark.parametrize("weight", [1, 3])
@pytest.mark.parametrize("pooled", [True, False])
def test_clients_of_one_datagram_have_turns_as_well(weight: int, pooled: bool) -> None:
    own = servers()[:2]
    own[0].weight = weight if pooled else 1
    plain = [Server(host, 53) for host in HOSTS[:2]]
    bench = spread(*own) if pooled else Bench(plain, udp_balance="datagram")
    for port in range(1, 25):
        bench.arrive(source=("192.0.2.1", port))
    share = own[0].weight
    assert got(bench)[HOSTS[0]] == 24 * share // (share + 1)
    bench.close()


def test_runs_are_divided() -> None:
    bench = spread(*servers()[:2])
    bench.arrive()
    bench.listener.inbox.extend((b"%d" % number, CLIENT) for number in range(9))
    bench.watcher.ready(bench.listener.number)
    assert got(bench) == {HOSTS[0]: 5, HOSTS[1]: 5}
    bench.close()


def test_who_is_down_gets_none_at_once() -> None:
    """If all are, the datagrams are dropped and counted; the flow lives on."""
    own = servers()[:2]
    bench = spread(*own)
    bench.arrive()
    own[0].checked(False, "broken")
    for _ in range(4):
        bench.arrive()
    assert got(bench)[HOSTS[1]] >= 4
    own[1].checked(False, "broken")
    bench.arrive()
    assert bench.nat.counters.dropped == {"send_EADDRNOTAVAIL": 1}
    own[0].checked(True, "fine")
    bench.arrive()
    assert sum(got(bench).values()) == 6
    bench.close()


def test_one_that_can_not_be_sent_to_is_passed_over() -> None:
    bench = spread(*servers()[:2])
    bench.arrive()
    [sock] = bench.sockets
    sock.errors.append(problem(errno.ENETUNREACH))
    bench.arrive()
    assert bench.nat.counters.sent == 2
    assert not bench.nat.counters.dropped
    bench.close()


def test_what_comes_back_is_dropped() -> None:
    """From whomever: the socket is connected to nobody."""
    bench = spread(*servers()[:2])
    bench.arrive()
    [sock] = bench.sockets
    sock.inbox.extend([b"answer"] * (BATCH + 3))
    for _ in range(3):
        bench.watcher.ready(sock.number)
    counters = bench.nat.counters
    assert counters.replies_received == BATCH + 3
    assert counters.replies_dropped == {"one_way": BATCH + 3}
    assert not bench.listener.sent
    [flow] = bench.nat.table
    assert not flow.replied
    bench.close()


def test_a_flow_of_before_uses_the_servers_of_now() -> None:
    """After several changes of settings, whatever the balance of new flows is."""
    bench = spread(*servers())

    def more(own: list[FlowServer], balance: str = "datagram") -> Counter[str]:
        """Who gets how many of some more datagrams, as it has these servers."""
        become(bench, Pool(own), udp_balance=balance)
        before = got(bench)
        for _ in range(8):
            bench.arrive()
        return got(bench) - before

    bench.arrive()
    assert more(servers()[:2]) == {HOSTS[0]: 4, HOSTS[1]: 4}
    assert more(servers()[1:]) == {HOSTS[1]: 4, HOSTS[2]: 4}
    a, b, _ = servers()
    b.operate("down")
    assert more([a, b]) == {HOSTS[0]: 8}
    assert more(servers()[1:2], "flow") == {HOSTS[1]: 8}
    assert more(servers()[:2]) == {HOSTS[0]: 4, HOSTS[1]: 4}
    assert len(bench.nat.table) == 1
    bench.answer(number=0)
    assert bench.nat.counters.replies_dropped == {"one_way": 1}
    bench.close()


def test_at_random() -> None:
    bench = spread(*servers()[:2], by=RandomOfTwo())
    for _ in range(100):
        bench.arrive()
    assert min(got(bench).values()) > 20
    bench.close()


def test_plain_servers_have_turns_too() -> None:
    """And each datagram says whose it is, if it is to."""
    plain = [Server(host, 53) for host in HOSTS[:2]]
    bench = Bench(plain, udp_balance="datagram", send_proxy="v2")
    for _ in range(4):
        bench.arrive(b"text")
    assert got(bench) == {HOSTS[0]: 2, HOSTS[1]: 2}
    [sock] = bench.sockets
    assert all(
        data.startswith(b"\r\n\r\n\0\r\nQUIT\n") and data.endswith(b"text")
        for data, _ in sock.sent
    )
    bench.close()


def test_a_real_socket_has_a_port_from_the_beginning() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))
        port = there.getsockname()[1]
        bench = Bench([Server("127.0.0.1", port)], udp_balance="datagram")
        bench.open = lambda family: socket.socket(family, socket.SOCK_DGRAM)
        bench.arrive(b"here")
        data, peer = there.recvfrom(10)
        [flow] = bench.nat.table
        assert data == b"here"
        assert flow.ours == ("0.0.0.0", peer[1])
        bench.nat.close()


# -- for want of descriptors


class Told(RoundRobin):
    """Chooses the server of this number."""

    number = 0

    def choose(self, candidates: Any, session: Any) -> Any:
        return candidates[self.number]


def crowded(flows: int, **settings: Any) -> Bench:
    """There is a socket of IPv4 for each of so many flows, and no descriptor more.

    What is sent from now on is for a server with an IPv6 address.
    """
    told = Told()
    bench = spread(*servers()[1:], by=told, **settings)

    def open_few(family: int) -> Any:
        if len(bench.live) == flows:
            raise problem(errno.EMFILE)
        return bench._open_fake(family)

    bench.open = open_few
    for port in range(1, flows + 1):
        bench.arrive(source=("192.0.2.1", port))
        bench.clock.advance(0.25)
    assert len(bench.nat.table) == flows
    told.number = 1
    return bench


def test_another_flow_ends_for_want_of_a_descriptor() -> None:
    """That which was idle longest, and not the one that sends."""
    bench = crowded(3)
    bench.arrive(b"more", source=("192.0.2.1", 1))
    [facts] = bench.observer.facts
    assert (facts.client, facts.ending) == ("192.0.2.1:2", "evicted")
    assert facts.by == "192.0.2.1:1"
    assert [(data, to[0]) for data, to in bench.sockets[-1].sent] == [
        (b"more", HOSTS[2])
    ]
    assert not bench.nat.counters.dropped
    bench.close()


def test_a_flow_that_is_alone_stays() -> None:
    """What it can't send is dropped and counted."""
    bench = crowded(1)
    bench.arrive(source=("192.0.2.1", 1))
    assert bench.nat.counters.dropped == {"send_EMFILE": 1}
    assert len(bench.nat.table) == len(bench.live) == 1
    bench.close()


def test_an_observer_ends_the_flow_for_which_another_ended() -> None:
    """Nothing is opened for it."""

    class Ends(Observer):
        def ended(self, flow: Any, facts: Any) -> None:
            super().ended(flow, facts)
            bench.nat.abort_all()

    bench = crowded(3, observer=Ends())
    bench.arrive(source=("192.0.2.1", 1))
    assert bench.nat.counters.dropped == {"send_EBADF": 1}
    assert not bench.live
    assert len(bench.observer.facts) == 3
    bench.close()


def test_a_flow_of_the_same_batch_ends() -> None:
    """Its datagram is dropped and counted, and opens no socket; the next is served."""
    bench = crowded(2)
    for data, port in ((b"1", 1), (b"2", 2)):
        bench.listener.inbox.append((data, ("192.0.2.1", port)))
    bench.watcher.ready(bench.listener.number)
    assert bench.nat.counters.dropped == {"send_EBADF": 1}
    assert len(bench.live) == 2
    bench.arrive(b"3", source=("192.0.2.1", 2))
    assert [data for data, _ in bench.sockets[-1].sent] == [b"3"]
    assert got(bench).total() == bench.nat.counters.sent == 4
    bench.close()


def test_there_is_no_other_way() -> None:
    with pytest.raises(ValueError, match="udp_balance is flow or datagram"):
        Bench(udp_balance="packet")
