"""Totals that are read while the relays go on."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayd.core.counts import FlowCounts, SessionCounts
from relayd.core.flows import Counters, Flow
from relayd.core.session import Ending, Session
from relayd.net.upstream import Upstream
from relayd.observing.readings import PART, Flows, Sessions, read_flows, read_sessions
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server

Result = TypeVar("Result")


def result(work: Generator[None, None, Result]) -> Result:
    """All of the work, at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Result = end.value
            return found


class Relay:
    """A stream relay, as readings see it."""

    def __init__(self, *servers: str) -> None:
        self.counts = SessionCounts(servers)
        self.living: list[Any] = []
        self.source = Sessions("web", self.counts, [self.living])

    def opens(self, server: str = "") -> Any:
        session = Session(1, "client", "listener", 0.0, ordinal=1)
        session.server = Upstream(object(), server) if server else None
        protocol = SimpleNamespace(session=session)
        self.living.append(protocol)
        return protocol

    def moves(self, protocol: Any, count: int) -> None:
        session = protocol.session
        session.up.read += count
        session.down.read += 2 * count
        session.down.spliced += count

    def ends(self, protocol: Any, ending: Ending = Ending.DONE) -> None:
        protocol.session.ending, protocol.session.ended_at = ending, 1.0
        self.living.remove(protocol)
        self.counts.close(protocol.session)


def test_clients_that_are_not_admitted_yet_are_not_counted() -> None:
    """Or the total would go down when one of them is refused."""
    relay = Relay()
    relay.opens().session.ordinal = -1
    relay.opens()
    reading = result(read_sessions(relay.source))
    assert (reading.opened, reading.active) == (1, 1)


def test_sessions_that_live_and_those_that_are_over() -> None:
    relay = Relay("db:1", "db:2")
    for number, server in enumerate(("db:1", "db:1", "db:2", "elsewhere", "")):
        relay.moves(relay.opens(server), number)
    relay.ends(relay.living[1], Ending.IDLE)
    relay.ends(relay.living[-1], Ending.DENIED)
    relay.counts.refuse(Ending.REFUSED.word)
    relay.counts.fail("db:2", Ending.CONNECT_TIMEOUT, 0.0)
    reading = result(read_sessions(relay.source))
    assert (reading.opened, reading.active) == (5, 3)
    assert reading.closed == {"done": 0, "idle": 1, "denied": 1}
    assert reading.refused == {"refused": 1, "denied": 1}
    assert (reading.up, reading.down, reading.spliced) == (10, 20, 10)
    assert sum(reading.durations.counts) == 2
    servers = {name: (s.active, s.up) for name, s in reading.servers.items()}
    assert servers == {"db:1": (1, True), "db:2": (1, False)}


def test_the_listeners_of_a_relay_are_read_together() -> None:
    relay, other = Relay(), Relay()
    relay.opens()
    other.opens()
    both = Sessions("web", relay.counts, [relay.living, other.living])
    assert result(read_sessions(both)).active == 2


def test_it_takes_turns() -> None:
    """Each part of the work is a limited number of records."""
    relay = Relay()
    for _ in range(3 * PART + 1):
        relay.opens()
    assert len(list(read_sessions(relay.source))) == 4


@settings(max_examples=30)
@given(st.data())
def test_no_total_goes_down_while_sessions_move_and_end(data: st.DataObject) -> None:
    """Whatever happens between two parts of the work; and none is counted twice."""
    relay = Relay("db:1")
    relay.source = Sessions("web", relay.counts, [relay.living])
    before = [0] * 5
    opened = moved = 0
    living: list[Any] = []
    for _ in range(data.draw(st.integers(1, 4))):
        reading = read_sessions(relay.source)
        while True:
            acts = st.lists(st.sampled_from(["open", "move", "end"]), max_size=6)
            for act in data.draw(acts):
                if act == "open":
                    # Many, of which the reading has parts.
                    living += [relay.opens("db:1") for _ in range(PART // 2)]
                    opened += PART // 2
                elif living:
                    one = data.draw(st.sampled_from(living))
                    if act == "move":
                        relay.moves(one, 7)
                        moved += 7
                    else:
                        living.remove(one)
                        relay.ends(one)
            try:
                next(reading)
            except StopIteration as end:
                found = end.value
                break
        closed = sum(found.closed.values())
        now = [found.opened, closed, found.up, found.down, found.spliced]
        assert all(new >= old for new, old in zip(now, before, strict=True))
        assert (found.opened, closed + found.active) <= (opened, opened)
        assert found.up <= moved
        before = now
    last = result(read_sessions(relay.source))
    assert (last.opened, last.active) == (opened, len(living))
    assert (last.up, last.down, last.spliced) == (moved, 2 * moved, moved)


def test_flows_that_live_and_those_that_are_over() -> None:
    """Of all listeners of the relay; the kernel's drops are somebody's."""

    def source(scale: int) -> Any:
        flow, over = Flow("key", "host", 0.0), Flow("other", "host", 0.0)
        flow.up_bytes, flow.down_bytes = 5 * scale, 6 * scale
        over.up_bytes, over.down_bytes = 50 * scale, 60 * scale
        counters = Counters(received=9, sent=3 * scale, replies_sent=4 * scale)
        counters.dropped.update(truncated=scale)
        counters.replies_dropped.update(reply_cap=2 * scale)
        counters.kernel_dropped = 10 * scale
        counts = FlowCounts()
        counts.close(over)
        counts.kernel_replies_dropped = 4 * scale
        return SimpleNamespace(counters=counters, counts=counts, registry=[flow])

    reading = result(read_flows(Flows("dns", [source(1), source(100)])))
    assert (reading.active, reading.up, reading.down) == (2, 303, 404)
    assert (reading.up_bytes, reading.down_bytes) == (55 * 101, 66 * 101)
    assert reading.dropped == {
        ("up", "truncated"): 101,
        ("down", "reply_cap"): 202,
        ("up", "kernel"): 606,
        ("down", "kernel"): 404,
    }


@pytest.mark.parametrize("datagrams", [False, True])
def test_what_an_operator_says_of_servers_is_read(datagrams: bool) -> None:
    """A server that it has taken out has no weight; one that drains is up."""
    servers: list[Any] = [
        Server(object(), name, weight=3)  # type: ignore[arg-type]
        for name in "abcd"
    ]
    servers[0].operate("down")
    servers[1].operate("drain")
    servers[2].checked(False, "refused")
    servers[2].operate("up")
    servers[3].operate_weight(7)
    pools = [Pool(servers)]
    reading: Any
    if datagrams:
        reading = result(read_flows(Flows("dns", [], pools)))
    else:
        counts = SessionCounts("abcd")
        reading = result(read_sessions(Sessions("web", counts, [], pools=pools)))
    told = {name: (each.up, each.weight) for name, each in reading.servers.items()}
    assert told == {"a": (False, 0), "b": (True, 0), "c": (True, 3), "d": (True, 7)}
