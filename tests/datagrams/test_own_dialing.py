"""How each server of datagrams is sent to, if that is its own."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest
from twisted.logger import capturedLogs

from relayd.net.dial_options import DialOptions
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.balance import First, RoundRobin
from relayd.upstreams.pool import Pool
from tests.datagrams.support import (
    Bench,
    FakeResolver,
    FakeSocket,
    peers,
    problem,
    refuse,
)

HOSTS = ("198.51.100.1", "198.51.100.2", "198.51.100.3")

#: Of the relay, and of one of its servers.
RELAYS, OWN = DialOptions(source4="203.0.113.7"), DialOptions(source4="203.0.113.8")

pytestmark = pytest.mark.usefixtures("_binding_sockets")


class BindingSocket(FakeSocket):
    """Keeps what it was bound to."""

    source = ""

    def bind(self, address: Any) -> None:
        self.source = address[0]


@pytest.fixture
def _binding_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_fake(bench: Bench, family: int) -> FakeSocket:
        bench.sockets.append(BindingSocket())
        return bench.sockets[-1]

    monkeypatch.setattr(Bench, "_open_fake", open_fake)


def sources(bench: Bench) -> list[str]:
    found: list[Any] = bench.sockets
    return [each.source for each in found]


def pool() -> Pool:
    """The second server has its own way."""
    ways = (None, OWN, None)
    return Pool(
        [
            FlowServer.at(Server(host, 53, dialing=way))
            for host, way in zip(HOSTS, ways, strict=True)
        ],
        First(),
    )


def test_a_flow_that_moves_is_sent_as_its_new_server_says() -> None:
    """And again as the relay does, at the next; each time on a socket of its own."""
    bench = Bench(pool(), dialing=RELAYS)
    bench.arrive(b"hello")
    refuse(bench)
    refuse(bench)
    assert peers(bench) == list(HOSTS)
    assert sources(bench) == [RELAYS.source4, OWN.source4, RELAYS.source4]
    assert [each.sent for each in bench.sockets] == [[b"hello"]] * 3
    bench.check()
    bench.close()


def test_a_relay_without_options_has_servers_with_some() -> None:
    bench = Bench([Server(HOSTS[0], 53, dialing=OWN), Server(HOSTS[1], 53)])
    for port in (1, 2, 3):
        bench.arrive(source=("192.0.2.1", port))
    assert sources(bench) == [OWN.source4, "", OWN.source4]
    bench.close()


def test_a_way_that_is_not_there_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address has left this machine: other servers get its flows."""
    gone = problem(errno.EADDRNOTAVAIL)

    def bind(sock: BindingSocket, address: Any) -> None:
        raise gone

    monkeypatch.setattr(BindingSocket, "bind", bind)
    both = pool()
    both.upstreams[0].disabled = True
    both.upstreams[0].changed()
    bench = Bench(both)
    bench.arrive()
    [flow] = bench.nat.table
    assert flow.server.host == HOSTS[2]
    assert [each.closed for each in bench.sockets] == [True, False]
    bench.check()
    bench.close()


def test_no_way_at_all_is_a_line_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(sock: BindingSocket, address: Any) -> None:
        raise problem(errno.EADDRNOTAVAIL)

    monkeypatch.setattr(BindingSocket, "bind", bind)
    bench = Bench([Server(HOSTS[0], 53, dialing=OWN)])
    with capturedLogs() as events:
        bench.arrive()
    assert "203.0.113.8" in str(events[0]["why"])
    assert bench.nat.counters.dropped == {"no_flow": 1}
    bench.close()


def test_datagrams_that_go_round_have_a_socket_for_each_way() -> None:
    both = pool()
    both.selector = RoundRobin()
    bench = Bench(both, dialing=RELAYS, udp_balance="datagram")
    for number in range(6):
        bench.arrive(b"%d" % number)
    assert sources(bench) == [RELAYS.source4, OWN.source4]
    first, second = bench.sockets
    assert {to[0] for _, to in first.sent} == {HOSTS[0], HOSTS[2]}
    assert {to[0] for _, to in second.sent} == {HOSTS[1]}
    assert len(second.sent) == 2
    bench.close()
    assert all(each.closed for each in bench.sockets)


def test_the_other_family_of_a_name_is_passed_over() -> None:
    """Its source is for IPv4, and the name's first address is none."""
    server = Server("name.example", 53, dialing=OWN)
    resolver = FakeResolver()
    bench = Bench([server], resolver=resolver)
    ipv6 = (socket.AF_INET6, ("2001:db8::1", 53))
    resolver.last.callback([ipv6, (socket.AF_INET, (HOSTS[0], 53))])
    with capturedLogs():
        bench.arrive()
    assert bench.sockets[-1].peer == (HOSTS[0], 53)
    assert sources(bench)[-1] == OWN.source4
    assert bench.sockets[0].closed
    bench.nat.close()
