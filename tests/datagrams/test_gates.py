"""The gate of a UDP relay: asked for each new flow, and what it gives is given back."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from relayd.admission.client_rules import parse_client_rule
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates, RulesGate
from relayd.admission.per_client import ConnectRate
from relayd.admission.session_limits import SessionLimits
from relayd.core.errors import Refused
from relayd.udp_nat import Server
from tests.conftest import LoggedFailures
from tests.datagrams.support import CLIENT, Bench, FakeResolver, problem

OTHER = ("192.0.2.2", 4000)


class Door:
    """A gate that the test opens and closes, and that counts."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.asked: list[Any] = []
        self.inside = 0

    def enter(self, asked: Any) -> Any:
        self.asked.append(asked)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer
        self.inside += 1
        return self

    def release(self) -> None:
        self.inside -= 1


def test_a_gate_is_asked_for_each_new_flow() -> None:
    door = Door()
    bench = Bench(gate=door, name="dns")
    for _ in range(3):
        bench.arrive()
    [asked] = door.asked
    assert asked.client == asked.peer == "192.0.2.1:4000"
    assert asked.listener.startswith("203.0.113.1:")
    assert asked.relay == "dns"
    assert door.inside == 1
    bench.check()
    bench.nat.abort_all()
    assert door.inside == 0


def test_datagrams_of_those_refused_are_dropped_and_counted() -> None:
    """By the gate's word, for each of them; the log says so once a second."""
    rules = RulesGate([parse_client_rule("192.0.2.1", allow=False)])
    bench = Bench(gate=rules, name="dns")
    with capturedLogs() as events:
        for _ in range(5):
            bench.arrive()
    bench.arrive(source=OTHER)
    assert bench.nat.counters.dropped == {"client": 5}
    assert len(bench.sockets) == 1
    [line] = map(formatEvent, events)
    assert line == (
        "dns: no flow for 192.0.2.1:4000: client: --deny-client 192.0.2.1 (1 datagrams"
        " dropped for that reason so far)"
    )
    bench.check()
    bench.nat.abort_all()


def test_each_reason_has_a_line_of_its_own() -> None:
    """One client that sends on though it is refused does not hide another's reason."""
    door = Door()
    bench = Bench(gate=door, name="dns")
    with capturedLogs() as events:
        for reason in ("client", "client", "hours", "gate", "hours"):
            door.answer = Refused("no", reason)
            bench.arrive()
    assert [formatEvent(event).split(": ")[2] for event in events] == [
        *("client", "hours", "gate")
    ]
    bench.check()
    bench.nat.abort_all()


def test_new_flows_have_a_rate() -> None:
    bench = Bench()
    bench = Bench(gate=ConnectRates(ConnectRate(2, 10.0), bench.clock))
    for port in (1, 2, 3, 1, 2):
        bench.arrive(source=("192.0.2.1", port))
    assert len(bench.sockets) == 2
    assert bench.nat.counters.dropped == {"max_connects_per_client": 1}
    bench.check()
    bench.nat.abort_all()


def test_datagrams_do_not_wait() -> None:
    """An answer that takes time is a refusal; its lease is given back."""
    door = Door()
    bench = Bench(gate=door)
    cancelled: list[Any] = []
    for later in (Deferred[Any](), Deferred[Any](cancelled.append)):
        door.answer = later
        bench.arrive()
        if not later.called:
            door.inside += 1
            later.callback(door)
    assert len(cancelled) == 1
    assert door.inside == 0
    # One that is there already comes too late as well.
    door.answer = Deferred()
    door.inside += 1
    door.answer.callback(door)
    bench.arrive()
    assert door.inside == 0

    async def slow() -> Any:
        return door

    door.answer = slow()
    door.inside += 1
    bench.arrive()
    assert door.inside == 0
    assert bench.nat.counters.dropped == {"gate": 4}
    assert not bench.sockets
    bench.check()
    bench.nat.abort_all()


def test_a_gate_that_forgets_to_answer_refuses(logged_failures: LoggedFailures) -> None:
    class Forgetful:
        def enter(self, asked: Any) -> None:
            return None

    bench = Bench(gate=Forgetful())
    bench.arrive()
    logged_failures.take("a gate answered None, which is no lease")
    assert bench.nat.counters.dropped == {"gate": 1}
    assert not bench.sockets
    bench.check()
    bench.nat.abort_all()


def test_a_gate_that_fails_refuses(logged_failures: LoggedFailures) -> None:
    door = Door()
    door.answer = ZeroDivisionError("in the gate")
    bench = Bench(gate=door)
    bench.arrive()
    logged_failures.take("in the gate")
    assert bench.nat.counters.dropped == {"gate": 1}
    bench.check()
    bench.nat.abort_all()


@pytest.mark.parametrize("why", ["no socket", "no server", "table"])
def test_a_flow_that_is_not_opened_after_all(why: str) -> None:
    door = Door()
    if why == "no server":
        bench = Bench([Server("server", 53)], resolver=FakeResolver(), gate=door)
    else:
        bench = Bench(gate=door, max_flows=1)
    if why == "no socket":
        bench.open_error = problem(errno.EACCES)
    if why == "table":
        bench.converse(CLIENT)
    bench.arrive(source=OTHER)
    assert len(door.asked) == 1 + (why == "table")
    assert door.inside == (why == "table")
    bench.check()
    bench.nat.close()
    assert door.inside == 0


def test_flows_end_when_the_hours_are_over() -> None:
    over: list[bool] = [False]
    bench = Bench(closes=lambda: over[0])
    bench.arrive()
    bench.arrive(source=OTHER)
    bench.clock.pump([0.5] * 4)
    assert len(bench.live) == 2
    over[0] = True
    bench.clock.pump([0.5] * 4)
    assert not bench.live
    assert bench.observer.endings == ["hours", "hours"]
    bench.check()
    bench.nat.abort_all()


STEPS = ["arrive", "arrive", "arrive", "answer", "advance", "break", "abort", "drain"]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), max_size=40))
@settings(max_examples=200)
def test_leases_are_given_back_once_whatever_happens(
    steps: list[tuple[str, int]],
) -> None:
    limits, door = SessionLimits(3, 2), Door()
    gate = Gates([limits, ConnectRates(ConnectRate(4, 1.0), Clock()), door])
    bench = Bench(gate=gate, max_flows=3, timeout=3, unreplied_timeout=2)
    for step, number in steps:
        door.answer = Refused("no") if number == 5 else None
        if step == "arrive" and not bench.listener.closed:
            bench.arrive(source=(f"192.0.2.{number // 2}", 4000 + number))
        elif step == "answer" and bench.live:
            bench.answer(number=bench.sockets.index(bench.live[-1]))
        elif step == "advance":
            bench.clock.pump([0.5] * number)
        elif step == "break":
            bench.open_error = problem(errno.EMFILE) if number % 2 else None
        elif step == "abort":
            bench.nat.abort_all()
        elif step == "drain" and number > 3:
            bench.nat.drain(1)
        assert limits.sessions == door.inside == len(bench.nat.table)
        bench.check()
    bench.nat.drain(0)
    assert (limits.sessions, limits.clients, door.inside) == (0, 0, 0)
