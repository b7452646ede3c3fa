"""Flows whose bandwidth is limited: what is too much is dropped, and counted."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.preludes.proxy_protocol import write_version_2
from tests.datagrams.support import CLIENT, Bench, problem

OTHER = ("192.0.2.2", 4000)


def bench_with(*rates: Rates | None, **options: Any) -> tuple[Bench, Bandwidth]:
    """A relay with limits, on a clock that stands still."""
    made: list[Bandwidth] = []

    class Limits:
        """Made once there is the clock of the bench."""

        def limits_of(self, name: str) -> Any:
            if not made:
                made.append(Bandwidth(*rates, clock=bench.clock))
            return made[0].limits_of(name)

    bench = Bench(bandwidth=Limits(), **options)
    bench.arrive(b"")
    return bench, made[0]


#: A quantum is 1,000 bytes.
SLOW = Rates(4000, 4000)


def test_what_comes_too_fast_is_dropped_and_counted() -> None:
    bench, _ = bench_with(SLOW)
    for _ in range(8):
        bench.arrive(bytes(300))
    [sock] = bench.sockets
    assert [len(each) for each in sock.sent] == [0, 300, 300, 300, 300]
    assert bench.nat.counters.dropped == {"bandwidth": 4}
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.up_bytes) == (5, 1200)
    # Its debt of 200 is paid, and there is something left.
    bench.clock.advance(0.06)
    bench.arrive(bytes(300))
    assert len(sock.sent) == 6
    bench.check()
    bench.close()


def test_answers_have_a_limit_of_their_own() -> None:
    bench, _ = bench_with(Rates(down=4000))
    for _ in range(8):
        bench.arrive(bytes(300))
        bench.answer(bytes(300))
    [sock] = bench.sockets
    assert len(sock.sent) == 9
    assert len(bench.listener.sent) == 4
    assert bench.nat.counters.replies_dropped == {"bandwidth": 4}
    assert not bench.nat.counters.dropped
    bench.check()
    bench.close()


def test_runs() -> None:
    """One that may pass as a whole is sent in one call; or else one by one."""
    bench, _ = bench_with(SLOW)
    [sock] = bench.sockets

    def arrive(count: int) -> int:
        for _ in range(count):
            bench.listener.inbox.append((bytes(100), CLIENT))
        before = len(sock.sent)
        bench.watcher.ready(bench.listener.number)
        return len(sock.sent) - before

    assert arrive(4) == 4
    assert arrive(12) == 6
    assert bench.nat.counters.dropped == {"bandwidth": 6}
    assert arrive(2) == 0
    bench.clock.advance(0.25)
    assert arrive(3) == 3
    for _ in range(26):
        sock.inbox.append(bytes(100))
    bench.watcher.ready(sock.number)
    assert len(bench.listener.sent) == 20
    assert bench.nat.counters.replies_dropped == {"bandwidth": 6}
    bench.check()
    bench.close()


@pytest.mark.parametrize("shared", [True, False])
def test_of_each_client(shared: bool) -> None:
    rates = (SLOW,) if shared else (None, SLOW)
    bench, bandwidth = bench_with(*rates)
    for _ in range(8):
        bench.arrive(bytes(250))
        bench.arrive(bytes(250), OTHER)
    sent = [sum(map(len, sock.sent)) for sock in bench.sockets]
    assert sent == ([500, 500] if shared else [1000, 1000])
    assert bandwidth.clients == (0 if shared else 2)
    bench.check()
    bench.close()
    assert bandwidth.clients == 0


def test_of_each_flow() -> None:
    """A client's flows, which are of two ports of it."""
    bench, _ = bench_with(None, None, SLOW)
    for port in (4000, 4001):
        for _ in range(8):
            bench.arrive(bytes(250), (CLIENT[0], port))
    assert [sum(map(len, sock.sent)) for sock in bench.sockets] == [1000, 1000]
    bench.close()


def test_a_flow_that_can_not_be_opened_counts_for_no_client() -> None:
    bench, bandwidth = bench_with(None, SLOW)
    assert bandwidth.clients == 1
    watch = bench.watcher.watch

    def refuse(*_: Any) -> None:
        raise problem(1)

    bench.watcher.watch = refuse  # type: ignore[method-assign]
    bench.arrive(b"x", OTHER)
    assert bandwidth.clients == 1
    bench.watcher.watch = watch  # type: ignore[method-assign]
    bench.arrive(b"x", OTHER)
    assert bandwidth.clients == 2
    bench.close()
    assert bandwidth.clients == 0


def test_a_preamble_is_not_counted() -> None:
    bench, _ = bench_with(SLOW, send_proxy="v2")
    for _ in range(8):
        bench.arrive(bytes(250))
    [sock] = bench.sockets
    reached = f"203.0.113.1:{bench.listener.getsockname()[1]}"
    told = write_version_2(f"{CLIENT[0]}:{CLIENT[1]}", reached, datagrams=True)
    assert sock.sent == [told, *[told + bytes(250)] * 4]
    assert bench.nat.counters.dropped == {"bandwidth": 4}
    bench.check()
    bench.close()


def test_without_limits_a_flow_has_no_place_for_them() -> None:
    bench = Bench()
    bench.arrive(b"x")
    [flow] = bench.nat.table.flows.values()
    with pytest.raises(AttributeError):
        flow.limits = 1
    bench.close()
