"""What leads back to a relay is dropped."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.udp_nat import Server
from tests.datagrams.support import (
    SERVER,
    Bench,
    FakeResolver,
)


def test_a_source_that_would_loop_is_dropped() -> None:
    """A source that is the listener's, a server's, or nobody's, in every spelling.

    Each would have had a flow whose answers are the next requests, for ever.
    """
    servers = [Server(*SERVER), Server("2001:db8::1", 53), Server("fe80::1%lo", 53)]
    for host in ("203.0.113.1", "0.0.0.0"):
        bench = Bench(servers, host=host, own=lambda ip: str(ip) == "203.0.113.1")
        port = bench.listener.number % 60000
        forged: list[Any] = [
            ("203.0.113.1", port),
            SERVER,
            ("2001:db8::1", 53, 0, 0),
            ("fe80::1", 53, 0, 1),
            ("0.0.0.0", 7),
            ("::", 7, 0, 0),
            ("::ffff:0.0.0.0", 7, 0, 0),
            ("::ffff:203.0.113.1", port, 0, 0),
            (f"::ffff:{SERVER[0]}", SERVER[1], 0, 0),
        ]
        for source in forged:
            bench.arrive(source=source)
        assert bench.nat.counters.dropped == {"source_loops": len(forged)}
        assert not bench.sockets
        # Each is a client like another with another port, or another interface.
        for number, source in enumerate(forged[:4], 1):
            other = (*source[:1], source[1] + 1, *source[2:])
            bench.arrive(source=other)
            assert len(bench.sockets) == number
        bench.arrive(source=("fe80::1", 53, 0, 2))
        assert len(bench.sockets) == 5
        bench.check()
        bench.close()


def test_a_wildcard_listener_has_every_address_of_this_machine() -> None:
    """It is asked only of those who speak from the listener's own port number."""
    asked: list[str] = []

    def own(address: Any) -> bool:
        asked.append(str(address))
        return "own" in names[str(address)]

    names = {"198.51.100.77": "own", "fe80::5%lo": "own", "192.0.2.1": "another's"}
    bench = Bench(host="0.0.0.0", own=own)
    port = bench.listener.number % 60000
    bench.arrive(source=("198.51.100.77", port))
    bench.arrive(source=("fe80::5", port, 0, 1))
    assert bench.nat.counters.dropped == {"source_loops": 2}
    bench.arrive(source=("198.51.100.77", port + 1))
    bench.arrive(source=("192.0.2.1", port))
    assert len(bench.sockets) == 2
    assert asked == ["198.51.100.77", "fe80::5%lo", "192.0.2.1"]
    # Not for each datagram, only when a flow is admitted.
    bench.arrive(source=("192.0.2.1", port))
    assert len(asked) == 3
    bench.close()


def test_the_loop_guard_follows_listeners_and_servers() -> None:
    """As they come and go, and as a name's addresses do."""
    resolver = FakeResolver()
    name = Server("name.example", 53)
    bench = Bench([name, Server(*SERVER)], resolver=resolver)
    nat, port = bench.nat, bench.listener.number % 60000
    assert not nat.loops.leads_back(("198.51.100.5", 53))
    resolver.answer("198.51.100.4", "198.51.100.5")
    assert nat.loops.leads_back(("198.51.100.4", 53))
    assert nat.loops.leads_back(("198.51.100.5", 53))
    nat.servers = [Server("198.51.100.9", 9)]
    assert nat.loops.leads_back(("198.51.100.9", 9))
    assert not nat.loops.leads_back(SERVER)
    assert nat.loops.leads_back(("203.0.113.1", port))
    bench.close()
    assert not nat.loops.leads_back(("203.0.113.1", port))


def test_a_local_server_may_have_every_address_of_this_machine() -> None:
    """It may listen on all of them; it is asked only who speaks from its port."""
    asked: list[str] = []

    def own(address: Any) -> bool:
        asked.append(str(address))
        return str(address) in ("::1", "fd77::1", "127.0.0.1", "203.0.113.1")

    bench = Bench([Server("::1", 53), Server(*SERVER)], own=own)
    bench.arrive(source=("192.0.2.1", 4000))
    assert not asked
    for host in ("fd77::1", "127.0.0.1", "::ffff:203.0.113.1"):
        source = (host, 53, 0, 0) if ":" in host else (host, 53)
        bench.arrive(source=source)
    assert bench.nat.counters.dropped == {"source_loops": 3}
    bench.arrive(source=("192.0.2.1", 53))
    assert len(bench.sockets) == 2
    # A server elsewhere says nothing of this machine's addresses.
    bench.nat.servers = [Server(*SERVER)]
    bench.arrive(source=("127.0.0.1", 53))
    assert len(bench.sockets) == 3
    bench.close()


@pytest.mark.parametrize("here", [True, False])
def test_a_source_that_is_another_relays_server(here: bool) -> None:
    """On this machine it may echo; on another, two peers are relayed to each other."""

    def own(address: Any) -> bool:
        return here

    one, two = Bench(own=own), Bench([Server("198.51.100.2", 54)], own=own)
    one.arrive(source=("198.51.100.2", 54))
    two.arrive(source=SERVER)
    for bench in (one, two):
        assert bench.nat.counters.dropped["source_loops"] == here
        assert len(bench.sockets) == (not here)
    two.close()
    one.arrive(source=("198.51.100.2", 54))
    assert len(one.sockets) == 1
    one.close()
