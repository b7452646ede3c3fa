"""Lines about what goes on: when, how many at once, and none of those who ended."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.session import Session
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import SessionLog
from relayd.operating import interim_lines
from relayd.operating.interim_lines import InterimLines
from tests.conftest import LoggedFailures
from tests.datagrams.support import Bench
from tests.support.fakes import FakeTransport
from tests.support.relays import Relay


class Interim:
    """The lines of some relays of one clock."""

    def __init__(self, clock: Clock, interval: float, *relays: Any) -> None:
        self.lines: list[str] = []
        self.relays = list(relays)
        self.service = InterimLines(
            clock,
            interval,
            lambda: self.relays,
            LineLog(lambda _, line: self.lines.append(line)),
        )
        self.clock = clock
        self.service.startService()

    def pass_time(self, seconds: float) -> list[str]:
        """The lines of this time."""
        self.lines.clear()
        for _ in range(int(seconds * 8)):
            self.clock.advance(0.125)
        return list(self.lines)

    def stop(self) -> None:
        self.service.stopService()


def durations(lines: list[str]) -> list[float]:
    return [float(re.findall(r" (?:duration|age)=(\S+)", line)[0]) for line in lines]


def test_a_session_has_a_line_whenever_it_has_lasted_an_interval_more() -> None:
    """At a time of its own; the first when it is as old as that, none when it ends."""
    relay = Relay()
    interim = Interim(relay.clock, 8.0, relay.factory)
    assert interim.pass_time(3) == []
    client = relay.client()
    server = relay.server.dial.connect()
    client.receive(b"hello")
    server.take()
    assert interim.pass_time(7.75) == []
    [line] = interim.pass_time(2)
    assert line.startswith("interim session=")
    assert " up=5 down=0" in line
    assert "ending" not in line
    assert interim.pass_time(5) == []
    lines = interim.pass_time(16.5)
    for number, lasted in enumerate(durations([line, *lines]), 1):
        assert 8 * number <= lasted <= 8 * number + 1
    assert len(lines) == 2
    client.lose()
    server.lose()
    assert interim.pass_time(30) == []
    interim.stop()
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()


def test_sessions_before_they_are_relayed_have_lines_too() -> None:
    relay = Relay(connect_timeout=0)
    interim = Interim(relay.clock, 2.0, relay.factory)
    client = relay.client()
    [line] = interim.pass_time(3)
    assert " connect=- attempts=1 " in line
    client.lose()
    interim.stop()


def test_a_flow_has_lines() -> None:
    """One that is in use: of the others there are MAX_LINES a second, as ever."""
    bench = Bench()
    interim = Interim(bench.clock, 2.0, bench.nat)
    bench.arrive()
    bench.answer()
    [line] = interim.pass_time(3)
    assert re.match(r"interim flow relay=\S+ client=192\.0\.2\.1:", line)
    assert "ending" not in line
    assert " up=1/" in line
    interim.stop()
    bench.close()


def test_relays_that_come_and_go() -> None:
    """They are asked for at each sweep; one that is there twice is seen once."""
    relay = Relay(connect_timeout=0)
    interim = Interim(relay.clock, 2.0)
    client = relay.client()
    assert interim.pass_time(3) == []
    interim.relays = [relay.factory, relay.factory]
    assert len(interim.pass_time(2)) == 1
    interim.relays = []
    assert interim.pass_time(3) == []
    client.lose()
    interim.stop()


def watch_turns(
    monkeypatch: pytest.MonkeyPatch, after: Callable[[], None] = lambda: None
) -> list[int]:
    """How many lines each turn writes; a test's clock has several in one advance.

    :param after: called after each line.
    """
    turns: list[int] = []
    turn = InterimLines._turn
    write = SessionLog.interim

    def counted(service: InterimLines) -> None:
        turns.append(0)
        turn(service)

    def told(log: SessionLog, session: Session, now: float) -> None:
        turns[-1] += 1
        write(log, session, now)
        after()

    monkeypatch.setattr(InterimLines, "_turn", counted)
    monkeypatch.setattr(SessionLog, "interim", told)
    return turns


@pytest.mark.parametrize("interval", [0.125, 2.0])
def test_many_are_spread_over_turns(
    interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of lines, and of those that are looked at; each is told once all the same."""
    monkeypatch.setattr(interim_lines, "LINES", 3)
    monkeypatch.setattr(interim_lines, "LOOKS", 5)
    turns = watch_turns(monkeypatch)
    relay = Relay()
    interim = Interim(relay.clock, interval, relay.factory)
    clients = [relay.client() for _ in range(20)]
    lines = interim.pass_time(max(interval, 0.25))
    assert len(set(lines)) == len(lines) == sum(turns) == 20
    assert max(turns) == 3
    # Those that had no line were looked at, five in a turn.
    assert len(turns) >= 7 + 7 * 4 * (interval > 1)
    for client in clients:
        client.lose()
    interim.stop()


def test_one_that_ends_during_a_sweep_has_no_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interim_lines, "LINES", 1)

    def leave() -> None:
        while interim.lines and clients:
            clients.pop().lose()

    watch_turns(monkeypatch, leave)
    relay = Relay()
    interim = Interim(relay.clock, 1.0, relay.factory)
    clients: list[FakeTransport] = [relay.client() for _ in range(3)]
    assert len(interim.pass_time(3)) == 1
    interim.stop()


def test_one_that_can_not_be_told_costs_itself(
    logged_failures: LoggedFailures,
) -> None:
    bench = Bench()
    interim = Interim(bench.clock, 1.0, bench.nat)
    bench.arrive()
    bench.arrive(source=("192.0.2.2", 7))
    bad, _ = bench.nat.table
    server, bad.server = bad.server, None
    assert len(interim.pass_time(1.5)) == 1
    logged_failures.take("could not be logged")
    bad.server = server
    interim.stop()
    bench.close()
