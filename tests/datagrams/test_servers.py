"""Servers in turn, and the look-ups of their names."""

from __future__ import annotations

import pytest
from twisted.internet.error import DNSLookupError
from twisted.logger import capturedLogs, formatEvent

from relayd.datagrams.servers import LOOK_UP_INTERVAL
from relayd.udp_nat import Server
from tests.datagrams.support import (
    NAMED,
    SERVER,
    Bench,
    FakeResolver,
    FakeSocket,
    named,
    peers,
)


def test_a_pool_is_round_robin_by_flow() -> None:
    """One flow speaks to one server."""
    bench = Bench([Server("198.51.100.1", 1), Server("2001:db8::1", 2)])
    for port in (1, 2, 3, 1, 2):
        bench.arrive(source=("192.0.2.1", port))
    assert [each.peer[:2] for each in bench.sockets] == [
        ("198.51.100.1", 1),
        ("2001:db8::1", 2),
        ("198.51.100.1", 1),
    ]
    bench.close()


def test_names_are_looked_up_again() -> None:
    """Flows keep their address; a look-up that fails changes nothing."""
    resolver = FakeResolver()
    bench = Bench([Server("name.example", 53)], resolver=resolver, timeout=1000)
    resolver.answer("198.51.100.1", "198.51.100.2")
    bench.converse(("192.0.2.1", 1))
    bench.clock.advance(LOOK_UP_INTERVAL - 2.25)
    assert resolver.asked == [("name.example", 53)] * 2
    resolver.answer("198.51.100.2", "198.51.100.1")
    bench.arrive(source=("192.0.2.1", 2))
    bench.clock.advance(LOOK_UP_INTERVAL)
    resolver.answer("198.51.100.3")
    bench.arrive(source=("192.0.2.1", 1))
    bench.arrive(source=("192.0.2.1", 3))
    bench.clock.advance(LOOK_UP_INTERVAL)
    with capturedLogs() as events:
        resolver.fail(DNSLookupError("name.example: gone"))
    assert "its last address is kept" in formatEvent(events[0])
    bench.arrive(source=("192.0.2.1", 4))
    peers = [each.peer[0][-1] for each in bench.sockets]
    assert peers == ["1", "1", "3", "3"]
    assert len(bench.sockets[0].sent) == 3
    bench.close()


def test_a_name_added_at_run_time_is_looked_up_like_one_at_start() -> None:
    """At once, and again and again; what was there before is not looked up twice."""
    resolver = FakeResolver()
    bench = Bench(resolver=resolver)
    bench.nat.servers = [Server(*SERVER)]
    assert not resolver.asked
    bench.nat.servers = [Server("name.example", 53)]
    bench.arrive(source=("192.0.2.1", 1))
    assert bench.nat.counters.dropped == {"no_server": 1}
    resolver.answer("198.51.100.7")
    bench.arrive(source=("192.0.2.1", 1))
    assert bench.sockets[0].peer == ("198.51.100.7", 53)
    for number in (2, 3):
        bench.clock.advance(LOOK_UP_INTERVAL)
        assert resolver.asked == [("name.example", 53)] * number
    # None is left to look up.
    bench.nat.servers = [Server(*SERVER)]
    bench.clock.advance(2 * LOOK_UP_INTERVAL)
    bench.nat.servers = [Server("other.example", 53)]
    assert resolver.asked[3:] == [("other.example", 53)]
    with pytest.raises(ValueError, match="needs a server"):
        bench.nat.servers = []
    bench.close()


def test_a_name_set_before_it_listens_is_looked_up_when_it_does() -> None:
    """A relay that does not serve asks nobody."""
    resolver = FakeResolver()
    bench = Bench(resolver=resolver)
    bench.nat.close()
    bench.nat.servers = [Server("name.example", 53)]
    assert not resolver.asked
    bench.listener = FakeSocket()
    bench.nat.listen([bench.listener])
    assert resolver.asked == [("name.example", 53)]
    bench.close()


def test_a_server_that_was_never_found() -> None:
    """The others have its turns."""
    resolver = FakeResolver()
    servers = [Server("name.example", 53), Server(*SERVER)]
    with capturedLogs() as events:
        bench = Bench(servers, resolver=resolver)
        resolver.fail(DNSLookupError("no such name"))
    assert "nothing is sent" in formatEvent(events[0])
    for port in (1, 2, 3):
        bench.arrive(source=("192.0.2.1", port))
    assert [each.peer for each in bench.sockets] == [SERVER] * 3
    bench.close()


def test_a_name_without_a_usable_address() -> None:
    """Groups and wildcards, such as those of block lists, are left out."""
    with capturedLogs() as events:
        bench = named("0.0.0.0", "224.0.0.1", "255.255.255.255")
        bench.arrive()
    assert bench.nat.counters.dropped == {"no_server": 1}
    first, second = [formatEvent(each) for each in events]
    assert first == (
        "name.example:53: none of its addresses is a host's (0.0.0.0:53,"
        " 224.0.0.1:53, 255.255.255.255:53); nothing is sent"
    )
    assert second == (
        f"{bench.nat.name}: no flow for 192.0.2.1:4000: no server can be chosen"
        " (1 datagrams dropped for that reason so far)"
    )
    bench.close()
    bench = named("0.0.0.0", NAMED[1])
    bench.arrive()
    assert peers(bench) == [NAMED[1]]
    bench.close()


def test_where_a_server_is_checked() -> None:
    assert Server("198.51.100.1", 53).end == ("198.51.100.1", 53)
    assert Server("fe80::1%lo", 53).end == ("fe80::1%1", 53)
    assert Server("name.example", 53).end is None
