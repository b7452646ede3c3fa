"""Lists of flows, and the NAT table of flows and sessions."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.address import IPv4Address

from relayd.control.steering import FlowQuery, Invalid, Unknown
from relayd.operating.listing import Shown
from relayd.operating.listing_flows import flows, nat
from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.pool import Pool
from tests.datagrams.support import Bench
from tests.support.relays import Relay
from tests.support.shown import shown, whole


def a_bench() -> tuple[Bench, Shown]:
    """A relay of two servers, and a flow of 192.0.2.1 at the first that speaks."""
    pool = Pool(
        [FlowServer.at(Server(f"198.51.100.{n}", 53), label=f"s{n}") for n in (1, 2)]
    )
    bench = Bench(pool, timeout=1000, unreplied_timeout=1000)
    bench.converse(("192.0.2.1", 4000))
    bench.clock.advance(5)
    return bench, Shown("dns", "udp", [bench.nat], pools=[pool])


def test_what_is_told_of_a_flow() -> None:
    bench, own = a_bench()
    [flow] = bench.nat.table
    assert whole(flows([own], FlowQuery())) == {
        "flows": [
            {
                "relay": "dns",
                "client": "192.0.2.1:4000",
                "listener": "203.0.113.1:" + str(bench.listener.number % 60000),
                "port": "203.0.113.1:" + str(bench.sockets[0].number % 60000),
                "server": "198.51.100.1:53",
                "age": 7.25,
                "idle": 5.0,
                "datagrams_up": 2,
                "datagrams_down": 1,
                "bytes_up": 2,
                "bytes_down": 1,
                "replied": True,
                "filters": [],
            }
        ],
        "matched": 1,
        "total": 1,
    }
    bench.nat.end(flow, "failed")
    assert whole(flows([own], FlowQuery()))["flows"] == []
    bench.close()


def test_which_flows_are_listed() -> None:
    bench, own = a_bench()
    for port in (1, 2, 3):
        bench.arrive(b"xx" * port, source=("192.0.2.7", port))

    def found(**query: Any) -> list[str]:
        answer: Any = whole(flows([own], FlowQuery(**query)))
        assert answer["total"] == 4
        return [each["client"] for each in answer["flows"]]

    others = [f"192.0.2.7:{port}" for port in (1, 2, 3)]
    assert found() == ["192.0.2.1:4000", *others]
    assert found(client="192.0.2.7") == others
    assert found(client="192.0.2.0/24", limit=2) == ["192.0.2.1:4000", others[0]]
    assert found(server="s2") == [others[0], others[2]]
    assert found(server="198.51.100.1:53") == ["192.0.2.1:4000", others[1]]
    assert found(server="s1/198.51.100.1:53", sort="age") == found(server="s1")
    assert found(sort="bytes")[:2] == [others[2], others[1]]
    assert found(server="198.51.100.1") == []
    bench.close()


def test_flows_that_end_while_they_are_listed() -> None:
    bench, own = a_bench()
    bench.arrive(source=("192.0.2.7", 1))
    work = flows([own], FlowQuery())
    next(work)
    bench.nat.end(next(iter(bench.nat.table)), "failed")
    [left] = whole(work)["flows"]
    assert left["client"] == "192.0.2.7:1"
    bench.close()


def test_the_table_has_sessions_and_flows() -> None:
    bench, own = a_bench()
    relay = Relay()
    client, waiting = relay.client(), relay.client()
    server = relay.server.dials[0].connect()
    server.host = IPv4Address("TCP", "203.0.113.5", 43210)
    client.receive(b"hello")
    server.receive(b"you")
    relay.clock.advance(4)
    answer: Any = whole(nat([own, shown(relay.factory)], FlowQuery(sort="bytes")))
    assert answer == {
        "entries": [
            {
                "protocol": "tcp",
                "relay": "web",
                "client": "192.0.2.1:50000",
                "listener": "192.0.2.2:80",
                "port": "203.0.113.5:43210",
                "server": "192.0.2.1:9000",
                "age": 4.0,
                "idle": answer["entries"][0]["idle"],
                "bytes_up": 5,
                "bytes_down": 3,
                "datagrams_up": None,
                "datagrams_down": None,
            },
            {
                "protocol": "udp",
                "relay": "dns",
                "client": "192.0.2.1:4000",
                "listener": "203.0.113.1:" + str(bench.listener.number % 60000),
                "port": "203.0.113.1:" + str(bench.sockets[0].number % 60000),
                "server": "198.51.100.1:53",
                "age": 7.25,
                "idle": 5.0,
                "datagrams_up": 2,
                "datagrams_down": 1,
                "bytes_up": 2,
                "bytes_down": 1,
            },
        ],
        # One is dialled still: it is no entry.
        "matched": 2,
        "total": 2,
    }
    found: Any = whole(nat([own, shown(relay.factory)], FlowQuery(relay="dns")))
    assert (found["matched"], found["total"]) == (1, 1)
    waiting.lose()
    client.lose()
    server.lose()
    bench.close()


def test_an_own_address_is_told_while_there_is_one() -> None:
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()

    def closed() -> Any:
        raise OSError("closed")

    def port() -> Any:
        [entry] = whole(nat([shown(relay.factory)], FlowQuery()))["entries"]
        return entry["port"]

    assert port() == "192.0.2.2:80"
    server.getHost = closed  # type: ignore[method-assign]
    assert port() is None
    # It is gone; its client has not heard of that yet.
    work = nat([shown(relay.factory)], FlowQuery())
    next(work)
    client.lose()
    server.lose()
    relay.clock.advance(0)
    assert whole(work)["entries"] == []


@pytest.mark.parametrize("of", [flows, nat])
def test_what_is_asked_for_in_vain(of: Any) -> None:
    bench, own = a_bench()
    with pytest.raises(Unknown, match="no relay 'db': there is dns"):
        whole(of([own], FlowQuery(relay="db")))
    with pytest.raises(Invalid, match="^client 'me'"):
        whole(of([own], FlowQuery(client="me")))
    bench.close()
