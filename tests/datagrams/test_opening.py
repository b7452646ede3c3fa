"""Who gets a flow, and which flow is evicted for it."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any
from unittest.mock import Mock

import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.core.flows import FlowFacts
from relayd.core.hops import datagrams
from relayd.datagrams.loops import hop_name
from relayd.datagrams.opening import MAX_READ
from relayd.udp_nat import Server
from tests.datagrams.support import (
    CLIENT,
    SERVER,
    Bench,
    FakeResolver,
    FakeSocket,
    Observer,
    problem,
)


def test_datagrams_without_a_flow_are_counted_by_reason() -> None:
    """Nobody at port 0 can be answered; a server without an address is none."""
    bench = Bench()
    bench.arrive(source=("192.0.2.1", 0))
    assert bench.nat.counters.dropped == {"source_port_0": 1}
    bench.close()
    bench = Bench([Server("name.example", 53)], resolver=FakeResolver())
    bench.arrive()
    assert bench.nat.counters.dropped == {"no_server": 1}
    assert not bench.sockets
    bench.close()


def test_refused_flows_are_logged_once_a_second() -> None:
    """With what is in the way, and how many it cost so far."""
    bench = Bench(max_flows=1)
    bench.converse(CLIENT)
    with capturedLogs() as events:
        for _ in range(5):
            bench.arrive(source=("192.0.2.9", 1))
        bench.clock.advance(1)
        bench.arrive(source=("192.0.2.9", 1))
    so_far = "datagrams dropped without a flow so far"
    assert [formatEvent(each) for each in events] == [
        f"the flow table is full: no flow for 192.0.2.9 (1 {so_far})",
        f"the flow table is full: no flow for 192.0.2.9 (6 {so_far})",
    ]
    assert bench.nat.table.refused == 6
    bench.close()


def test_a_loop_and_a_full_table_are_throttled_apart() -> None:
    """In one second: neither hides the other one."""
    bench = Bench(max_flows=1)
    bench.converse(CLIENT)
    port = bench.listener.number % 60000
    name = hop_name(("192.0.2.8", 8), port)
    datagrams.add(name, bench.nat.loops, "")
    with capturedLogs() as events:
        bench.arrive(source=("192.0.2.8", 8))
        bench.arrive(source=("192.0.2.9", 9))
    datagrams.remove(name)
    lines = [formatEvent(each) for each in events]
    assert len(lines) == 2
    assert "lead back to their own relay" in lines[0]
    assert "the flow table is full: no flow for 192.0.2.9" in lines[1]
    bench.close()


def test_a_flow_without_a_socket_is_refused() -> None:
    """The datagram is dropped, the relay goes on, and no socket is left open."""
    bench = Bench()
    bench.open_error = problem(errno.EMFILE)
    with capturedLogs() as events:
        bench.arrive()
    assert "no socket for a flow of 192.0.2.1: " in formatEvent(events[0])
    bench.open_error, bench.connect_error = None, problem(errno.ENETUNREACH)
    bench.arrive()
    bench.connect_error, bench.watcher.full = None, True
    bench.arrive()
    assert [each.closed for each in bench.sockets] == [True, True]
    assert bench.nat.counters.dropped == {"no_flow": 3}
    bench.watcher.full = False
    bench.arrive()
    assert bench.sockets[-1].sent == [b"?"]
    bench.close()


def test_the_longest_idle_flow_is_evicted() -> None:
    """One that is in use does not, however many come."""
    bench = Bench(max_flows=3, max_flows_per_client=3)
    bench.converse(CLIENT)
    for port in range(1, 50):
        bench.arrive(source=("192.0.2.2", port))
        bench.check()
    assert bench.observer.endings == ["evicted"] * 47
    assert not bench.sockets[0].closed
    facts = bench.observer.facts[0]
    assert (facts.client, facts.by) == ("192.0.2.2:1", "192.0.2.2:3")
    assert bench.nat.table.evicted == 47
    bench.arrive(b"still here")
    assert bench.sockets[0].sent[-1] == b"still here"
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_one_answer_does_not_protect_a_flow(together: bool) -> None:
    """A flood from two hosts, each datagram answered, ends no conversation.

    Nor does it keep a newcomer out.
    """
    bench = Bench(together=together, max_flows=100)
    talkers = [("198.51.100.7", port) for port in range(1, 11)]
    streamed = ("198.51.100.8", 1)
    bench.converse(*talkers)
    # One that spoke once, and is sent a stream.
    bench.arrive(b"subscribe", streamed)
    stream = len(bench.sockets) - 1
    bench.answer()
    bench.clock.advance(2.25)
    bench.answer()
    for number in range(400):
        bench.arrive(source=(f"192.0.2.{number % 2 + 1}", 1 + number))
        bench.answer()
    assert len(bench.nat.table) == 100
    for number in range(20):
        # Each newcomer is let in and answered, as the flood goes on.
        newcomer = ("203.0.113.77", 1 + number)
        bench.arrive(b"hello", newcomer)
        bench.answer(b"welcome")
        assert bench.listener.sent[-1] == (b"welcome", newcomer)
        bench.arrive(source=(f"192.0.2.{number % 2 + 1}", 1000 + number))
        bench.answer()
    bench.answer(b"stream", stream)
    assert bench.listener.sent[-1] == (b"stream", streamed)
    assert not any(each.closed for each in bench.sockets[: stream + 1])
    assert set(bench.observer.endings) == {"evicted"}
    assert not bench.nat.counters.dropped
    # Half of a minute later the flood is forgotten, and they are not.
    bench.pass_time(31)
    assert len(bench.nat.table) == len(talkers) + 1
    assert {each.ending for each in bench.observer.facts} == {"evicted", "expired"}
    bench.check()
    bench.close()


def test_one_answer_does_not_protect_a_flow_within_a_clients_limit() -> None:
    """What a client host has that is not in use makes room for more of it."""
    bench = Bench(max_flows=100, max_flows_per_client=3)
    bench.converse(CLIENT)
    for port in range(1, 20):
        bench.arrive(source=(CLIENT[0], port))
        bench.answer()
    assert bench.observer.endings == ["evicted"] * 17
    assert not bench.sockets[0].closed
    assert not bench.nat.counters.dropped
    bench.close()


def test_a_pending_answer_is_passed_on_before_an_eviction() -> None:
    """Then another one makes room, if there is one that was quiet longer by now."""
    bench = Bench(max_flows=2, max_flows_per_client=2)
    bench.arrive()
    bench.arrive(source=("192.0.2.6", 6))
    bench.sockets[0].inbox.append(b"answer")
    bench.arrive(b"new", ("192.0.2.7", 7))
    assert bench.listener.sent == [(b"answer", CLIENT)]
    assert [each.client for each in bench.observer.facts] == ["192.0.2.6:6"]
    # Of a single one, the answer was passed on: that is all it wanted.
    bench.sockets[2].inbox.append(b"another")
    bench.nat.table.max_flows = 1
    bench.nat.end(bench.nat.table.idlest(), "drained")  # type: ignore[arg-type]
    bench.arrive(b"newer", ("192.0.2.8", 8))
    assert bench.listener.sent[-1] == (b"another", ("192.0.2.7", 7))
    assert bench.observer.endings == ["evicted", "drained", "evicted"]
    assert not bench.nat.counters.dropped
    bench.close()


def test_a_pending_answer_may_put_a_flow_in_use() -> None:
    """It is kept, and who came is refused."""
    bench = Bench(max_flows=1)
    bench.arrive()
    bench.clock.advance(2.25)
    bench.sockets[0].inbox.append(b"answer")
    bench.arrive(b"new", ("192.0.2.7", 7))
    assert bench.listener.sent == [(b"answer", CLIENT)]
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert bench.nat.table.refused == 1
    assert not bench.observer.endings
    bench.close()


@pytest.mark.parametrize("late", [False, True])
def test_the_flows_read_before_an_eviction_are_limited(late: bool) -> None:
    """A new client is worth no more of the others' time, and is let in all the same."""
    most = MAX_READ + 2
    bench = Bench(max_flows=most, max_flows_per_client=most)
    for port in range(1, MAX_READ + 3):
        bench.arrive(source=("192.0.2.1", port))
    if late:
        bench.clock.advance(2.25)
    for sock in bench.sockets:
        sock.inbox.append(b"answer")
    bench.arrive(source=("192.0.2.7", 7))
    assert len(bench.listener.sent) == MAX_READ
    # Late, all that were asked turned out to be in use.
    assert bench.nat.counters.dropped == ({"no_flow": 1} if late else {})
    assert bench.nat.table.refused == late
    assert bench.observer.endings == ([] if late else ["evicted"])
    bench.close()


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.ENETUNREACH])
def test_a_server_without_a_route_evicts_no_flow(number: int) -> None:
    """Where IPv6 is switched off, for one; other servers have the turn."""
    bench = Bench([Server("2001:db8::1", 53), Server(*SERVER)])
    real = bench.open

    def open_socket(family: int) -> Any:
        sock = real(family)
        if family == socket.AF_INET6:
            sock.connect = Mock(side_effect=problem(number))
        return sock

    bench.open = open_socket
    for port in range(1, 6):
        bench.arrive(source=("192.0.2.2", port))
    assert [each.peer for each in bench.live] == [SERVER] * 5
    [flow, *_] = bench.nat.table.flows.values()
    assert flow.server.name == "198.51.100.1:53"
    assert not bench.nat.counters.dropped
    # Where there is no other, who comes is refused.
    bench.nat.servers = [Server("2001:db8::1", 53)]
    with capturedLogs() as events:
        bench.arrive(source=("192.0.2.2", 6))
    assert os.strerror(number) in formatEvent(events[0])
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert len(bench.live) == 5
    assert not bench.observer.endings
    bench.check()
    bench.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOSPC])
def test_a_flow_is_evicted_when_the_machine_has_no_more_sockets(number: int) -> None:
    """Ports and descriptors may be fewer than the table has room for."""
    bench = Bench()
    bench.converse(("192.0.2.2", 1))
    bench.arrive(source=("192.0.2.2", 2))
    bench.answer()
    real = bench.open

    def open_if_one_was_closed(family: int) -> Any:
        if len(bench.live) >= 2:
            raise problem(number)
        return real(family)

    bench.open = open_if_one_was_closed
    bench.arrive(source=("192.0.2.3", 3))
    assert [each.client for each in bench.observer.facts] == ["192.0.2.2:2"]
    assert bench.observer.endings == ["evicted"]
    assert not bench.nat.counters.dropped
    assert bench.observer.facts[0].by == "192.0.2.3:3"
    # One in use is not ended for another's sake, here either.
    bench.clock.advance(2.25)
    bench.answer(number=2)
    bench.arrive(source=("192.0.2.4", 4))
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert len(bench.live) == 2
    # Nor is any where that would not help.
    bench.open = real
    bench.arrive(source=("192.0.2.5", 5))
    bench.connect_error = problem(errno.ENETUNREACH)
    bench.arrive(source=("192.0.2.6", 6))
    assert len(bench.live) == 3
    bench.close()


def test_an_observer_may_close_the_relay() -> None:
    """Even as a flow makes room for another, which is then not opened."""

    class Closing(Observer):
        def ended(self, flow: Any, facts: FlowFacts) -> None:
            bench.nat.close()

    bench = Bench(observer=Closing(), max_flows=1)
    bench.arrive()
    bench.arrive(source=("192.0.2.2", 1))
    assert bench.nat.counters.dropped == {"draining": 1}
    bench.close()


@pytest.mark.parametrize("full", ["table", "machine"])
def test_an_observer_may_open_the_relay_again(full: str) -> None:
    """Those who had sent to the closed listener are not admitted to the new one."""

    class Restarting(Observer):
        def ended(self, flow: Any, facts: FlowFacts) -> None:
            if not bench.listener.closed:
                bench.nat.close()
                bench.nat.listen([again])

    again = FakeSocket()
    bench = Bench(observer=Restarting(), max_flows=1 if full == "table" else 9)
    bench.arrive()
    if full == "machine":
        real = bench.open
        refusals = iter([problem(errno.EMFILE)])

        def open_socket(family: int) -> Any:
            for refusal in refusals:
                raise refusal
            return real(family)

        bench.open = open_socket
    bench.listener.inbox.extend((b"?", ("192.0.2.2", port)) for port in (1, 2, 3))
    bench.watcher.ready(bench.listener.number)
    assert bench.nat.counters.dropped == {"draining": 3}
    assert not bench.live
    bench.listener = again
    bench.arrive()
    assert len(bench.live) == 1
    bench.close()
