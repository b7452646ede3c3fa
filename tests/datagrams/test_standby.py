"""New clients that wait for a server."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.core.errors import Refused
from relayd.datagrams import standby
from relayd.datagrams.sockets import BUFFER_SIZE
from relayd.datagrams.standby import CLIENT_OVERHEAD, MAX_BYTES, PART
from relayd.datagrams.unanswered import KEPT_OVERHEAD, MAX_KEPT
from relayd.udp_nat import FlowServer, Server, UdpNat
from relayd.upstreams.balance import RoundRobin
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.datagrams.support import (
    CLIENT,
    Bench,
    FakeResolver,
    peers,
    problem,
    turns,
)

HOST = "198.51.100.1"


def waiting(**settings: Any) -> tuple[Bench, FlowServer]:
    """A relay whose only server is down."""
    server = FlowServer.at(Server(HOST, 53))
    by = settings.pop("by", None) or RoundRobin()
    bench = Bench(Pool([server], by), wait_for_server=5, **settings)
    server.checked(False, "broken")
    bench.clock.advance(0)
    return bench, server


def back(bench: Bench, server: FlowServer) -> None:
    """It is up again, and the reactor turns once."""
    server.checked(True, "fine")
    bench.clock.advance(0)


def sums(bench: Bench) -> tuple[int, int, int]:
    counters = bench.nat.counters
    return counters.received, counters.sent, counters.dropped.total()


class Gate:
    """Counts its leases."""

    def __init__(self) -> None:
        self.asked = self.held = 0

    def enter(self, session: Any) -> Gate:
        self.asked += 1
        self.held += 1
        return self

    def release(self) -> None:
        self.held -= 1


def test_what_was_sent_meanwhile_comes_first() -> None:
    """In order, and each client's from a port of its own."""
    bench, server = waiting()
    other = ("192.0.2.2", 4000)
    for data in (b"one", b"two"):
        bench.arrive(data)
        bench.arrive(data.upper(), source=other)
    assert (len(bench.sockets), sums(bench)) == (0, (0, 0, 0))
    back(bench, server)
    assert [each.sent for each in bench.sockets] == [[b"one", b"two"], [b"ONE", b"TWO"]]
    assert sums(bench) == (4, 4, 0)
    bench.arrive(b"three")
    bench.answer(b"answer", 0)
    assert bench.listener.sent == [(b"answer", CLIENT)]
    bench.check()
    bench.close()
    assert server.sessions == 0


def test_who_has_waited_too_long() -> None:
    """Is dropped and counted, and told in one line; who came later waits on."""
    bench, server = waiting()
    bench.arrive(b"one")
    bench.arrive(b"two")
    bench.pass_time(4)
    later = ("192.0.2.2", 1)
    bench.arrive(b"later", source=later)
    with capturedLogs() as events:
        bench.pass_time(1)
    assert bench.nat.counters.dropped == {"no_server": 2}
    [line] = [formatEvent(each) for each in events]
    assert line == (
        f"{bench.nat.name}: no server could be chosen in 5 s: what its clients have"
        " sent is dropped (2 datagrams for want of a server so far)"
    )
    back(bench, server)
    assert [each.sent for each in bench.sockets] == [[b"later"]]
    assert sums(bench) == (3, 1, 2)
    bench.pass_time(10)
    assert sums(bench) == (3, 1, 2)
    bench.close()


def test_what_one_client_may_have_waiting() -> None:
    """Its first datagrams, and no more."""
    bench, server = waiting()
    for number in range(MAX_KEPT + 3):
        bench.arrive(b"%d" % number)
    assert bench.nat.counters.dropped == {"waiting_full": 3}
    back(bench, server)
    [sock] = bench.sockets
    assert sock.sent == [b"%d" % number for number in range(MAX_KEPT)]
    bench.close()


def test_a_client_key_has_a_part_and_all_have_a_limit() -> None:
    """However many ports it has."""
    bench, server = waiting(max_flows=10_000)
    each = CLIENT_OVERHEAD + KEPT_OVERHEAD
    most = MAX_BYTES // PART // each
    for port in range(1, most + 10):
        bench.arrive(b"", source=("192.0.2.1", port))
    assert bench.nat.counters.dropped == {"waiting_full": 9}
    for host in range(2, 10):
        for port in range(1, most):
            bench.arrive(b"", source=(f"192.0.2.{host}", port))
    bench.clock.advance(5)
    assert bench.nat.counters.dropped["no_server"] == MAX_BYTES // each
    received, sent, dropped = sums(bench)
    assert (received, sent) == (dropped, 0)
    # And nothing of it is left.
    bench.arrive(b"again")
    back(bench, server)
    assert bench.sockets[-1].sent == [b"again"]
    bench.close()


def test_large_datagrams_count_by_their_bytes() -> None:
    bench, server = waiting()
    size = 60_000
    most = MAX_BYTES // PART // (size + KEPT_OVERHEAD + CLIENT_OVERHEAD)
    for port in range(1, most + 3):
        bench.arrive(bytes(size), source=("192.0.2.1", port))
    assert bench.nat.counters.dropped == {"waiting_full": 2}
    bench.arrive(bytes(BUFFER_SIZE), source=("192.0.2.7", 1))
    assert bench.nat.counters.dropped["truncated"] == 1
    back(bench, server)
    assert len(bench.sockets) == most
    bench.check()
    bench.close()


def test_many_get_their_server_in_several_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standby, "AT_ONCE", 3)
    bench, server = waiting()
    for port in range(1, 8):
        bench.arrive(source=("192.0.2.1", port))
    had = turns(bench, lambda: len(bench.nat.table))
    back(bench, server)
    assert had == [0, 3, 6]
    assert len(bench.nat.table) == 7
    bench.check()
    bench.close()


def test_a_server_with_room_for_one() -> None:
    """The next is served when the first flow has ended."""
    bench, server = waiting(unreplied_timeout=2)
    server.max_sessions = 1
    bench.arrive(b"a", source=("192.0.2.1", 1))
    bench.arrive(b"b", source=("192.0.2.1", 2))
    back(bench, server)
    assert [each.sent for each in bench.sockets] == [[b"a"]]
    bench.pass_time(3)
    assert [each.sent for each in bench.sockets] == [[b"a"], [b"b"]]
    bench.close()


def test_a_name_that_has_no_address_yet() -> None:
    """Of a single server, too, which needs no pool."""
    resolver = FakeResolver()
    bench = Bench([Server("name.example", 53)], resolver=resolver, wait_for_server=5)
    bench.arrive(b"early")
    assert not bench.sockets
    resolver.answer(HOST)
    bench.clock.advance(0)
    assert peers(bench) == [HOST]
    assert bench.sockets[0].sent == [b"early"]
    bench.check()
    bench.close()


def test_what_the_gate_gave_is_kept() -> None:
    """It is asked once, and has all back when the flow has ended, or in vain."""
    gate: Any = Gate()
    bench, server = waiting(gate=gate)
    for _ in range(3):
        bench.arrive()
    bench.arrive(source=("192.0.2.2", 1))
    assert (gate.asked, gate.held) == (2, 2)
    back(bench, server)
    assert (gate.asked, gate.held) == (2, 2)
    for flow in list(bench.nat.table):
        bench.nat.end(flow, "expired")
    assert gate.held == 0
    server.checked(False, "broken")
    bench.arrive()
    assert gate.held == 1
    bench.pass_time(5)
    assert gate.held == 0
    bench.arrive()
    bench.close()
    assert gate.held == 0
    assert bench.nat.counters.dropped == {"no_server": 1, "draining": 1}


def test_who_is_refused_does_not_wait() -> None:
    class Closed:
        def enter(self, session: Any) -> Any:
            raise Refused("no", "client")

    bench, server = waiting(gate=Closed())
    bench.arrive()
    assert bench.nat.counters.dropped == {"client": 1}
    back(bench, server)
    assert not bench.sockets
    bench.close()


def test_no_socket_for_one_that_has_waited() -> None:
    """All that it has sent is counted, and its lease given back."""
    gate: Any = Gate()
    bench, server = waiting(gate=gate)
    for _ in range(3):
        bench.arrive()
    bench.open_error = problem(errno.EMFILE)
    with capturedLogs():
        back(bench, server)
    assert sums(bench) == (3, 0, 3)
    assert bench.nat.counters.dropped == {"no_flow": 3}
    assert gate.held == 0
    bench.close()


def test_a_drain_lets_nobody_wait() -> None:
    bench, _ = waiting()
    bench.arrive()
    done: list[Any] = []
    bench.nat.drain(10).addCallback(done.append)
    assert done == [None]
    assert sums(bench) == (1, 0, 1)
    assert bench.nat.counters.dropped == {"draining": 1}
    assert not bench.clock.getDelayedCalls()


@pytest.mark.parametrize("what", ["choose", "send"])
def test_a_defect_is_one_clients(what: str, logged_failures: LoggedFailures) -> None:
    """It is logged, and the datagrams are counted."""

    class Failing(RoundRobin):
        def choose(self, candidates: Any, session: Any) -> Any:
            if what == "choose" and candidates and session.client.endswith(":1"):
                raise RuntimeError("a defect")
            return super().choose(candidates, session)

    gate: Any = Gate()
    bench, server = waiting(by=Failing(), gate=gate)
    for port in (1, 2):
        bench.arrive(b"data", source=("192.0.2.1", port))
    if what == "send":

        def fail(self: Any, data: bytes) -> None:
            raise RuntimeError("a defect")

        opened: Any = bench.open

        def open_first(family: int) -> Any:
            sock = opened(family)
            if len(bench.sockets) == 1:
                sock.send = fail.__get__(sock)
            return sock

        bench.open = open_first
    back(bench, server)
    logged_failures.take("no server for a flow" if what == "choose" else "has waited")
    assert bench.nat.counters.dropped == {"failed": 1}
    assert bench.sockets[-1].sent == [b"data"]
    assert sums(bench) == (2, 1, 1)
    bench.close()
    assert gate.held == 0


def test_a_time_is_none() -> None:
    with pytest.raises(ValueError, match="wait_for_server"):
        Bench(wait_for_server=-1)


# -- a relay that is paused


def paused(**settings: Any) -> tuple[Bench, FlowServer]:
    """One that is, with a client that waits, and a server that is up."""
    server = FlowServer.at(Server(HOST, 53))
    bench = Bench(Pool([server], RoundRobin()), **settings)
    bench.nat.hold(True)
    bench.arrive(b"one")
    bench.pass_time(100)
    assert sums(bench) == (0, 0, 0)
    return bench, server


def test_who_has_waited_is_served_when_the_pause_is_over() -> None:
    """Even where nobody waits for a server, and many do for the pause's end."""
    bench, _ = paused(max_flows=2000)
    for port in range(1, 600):
        bench.arrive(source=("192.0.2.2", port))
    bench.nat.hold(False)
    bench.clock.pump([0] * 5)
    assert len(bench.nat.table) == 600
    assert sums(bench) == (600, 600, 0)
    bench.check()
    bench.close()


def test_no_server_is_there_when_the_pause_is_over() -> None:
    """Who has waited is dropped at once, and so is who comes."""
    bench, server = paused()
    server.checked(False, "broken")
    with capturedLogs() as events:
        bench.nat.hold(False)
        bench.arrive(b"new", source=("192.0.2.2", 1))
        bench.pass_time(0.25)
    assert bench.nat.counters.dropped == {"no_server": 2}
    assert formatEvent(events[-1]) == (
        f"{bench.nat.name}: no server can be chosen: what its clients have sent is"
        " dropped (2 datagrams for want of a server so far)"
    )
    back(bench, server)
    assert not bench.sockets
    assert not bench.clock.getDelayedCalls()
    bench.close()


def test_who_is_to_wait_for_a_server_does_so_after_a_pause() -> None:
    """As long as others do."""
    bench, server = paused(wait_for_server=5)
    server.checked(False, "broken")
    bench.nat.hold(False)
    bench.pass_time(4)
    bench.arrive(b"later", source=("192.0.2.2", 1))
    assert sums(bench) == (0, 0, 0)
    bench.pass_time(1)
    assert bench.nat.counters.dropped == {"no_server": 1}
    back(bench, server)
    assert [each.sent for each in bench.sockets] == [[b"later"]]
    bench.close()


def test_a_pause_lets_those_wait_who_wait_already() -> None:
    """As long as who comes then: ten minutes."""
    bench, server = waiting()
    bench.arrive(b"one")
    bench.pass_time(4)
    bench.nat.hold(True)
    bench.pass_time(590)
    assert sums(bench) == (0, 0, 0)
    bench.arrive(b"later", source=("192.0.2.2", 1))
    bench.pass_time(10)
    assert bench.nat.counters.dropped == {"no_server": 1}
    server.checked(True, "fine")
    bench.nat.hold(False)
    bench.clock.advance(0)
    assert [each.sent for each in bench.sockets] == [[b"later"]]
    bench.check()
    bench.close()


def test_settings_that_come_as_a_pause_ends() -> None:
    """Nothing is left of what was before."""
    bench, _ = paused()
    bench.nat.hold(False)
    become(bench, wait_for_server=5)
    bench.clock.advance(0)
    assert peers(bench) == ["198.51.100.2"]
    bench.close()


# -- a relay that gets other settings


def become(bench: Bench, **settings: Any) -> FlowServer:
    """It has another server from now on, which is returned."""
    server = FlowServer.at(Server("198.51.100.2", 53))
    other = UdpNat(
        None,
        Pool([server], RoundRobin()),
        watcher=bench.watcher,
        clock=bench.clock,
        open_socket=lambda family: bench.open(family),
        max_flows=100,
        **settings,
    )
    bench.nat.become(other)
    return server


def test_they_go_to_its_new_server() -> None:
    gate: Any = Gate()
    bench, old = waiting(gate=gate)
    bench.arrive(b"one")
    new = become(bench, wait_for_server=5)
    bench.clock.advance(0)
    assert peers(bench) == ["198.51.100.2"]
    assert bench.sockets[0].sent == [b"one"]
    assert sums(bench) == (1, 1, 0)
    back(bench, old)
    assert (old.sessions, new.sessions) == (0, 1)
    bench.check()
    bench.close()
    assert gate.held == 0


def test_they_wait_no_longer_than_is_said_now() -> None:
    bench, _ = waiting()
    bench.arrive(b"one")
    new = become(bench, wait_for_server=1)
    new.checked(False, "broken")
    bench.clock.advance(0)
    bench.arrive(b"two", source=("192.0.2.2", 1))
    bench.pass_time(1)
    assert bench.nat.counters.dropped == {"no_server": 2}
    bench.close()


def test_they_are_refused_if_nobody_waits_any_more() -> None:
    gate: Any = Gate()
    bench, _ = waiting(gate=gate)
    bench.arrive(b"one")
    become(bench)
    assert bench.nat.counters.dropped == {"no_server": 1}
    assert gate.held == 0
    assert not bench.clock.getDelayedCalls()
    bench.close()


def test_a_listener_that_has_retired_gets_nobody() -> None:
    bench, server = waiting()
    bench.arrive(b"one")
    bench.nat.retire(bench.nat.listeners)
    bench.clock.advance(0)
    back(bench, server)
    assert not bench.sockets
    received, sent, dropped = sums(bench)
    assert (received, sent, dropped) == (1, 0, 1)
    bench.nat.close()
