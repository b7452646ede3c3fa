"""What the log says of flows and of their relay."""

from __future__ import annotations

from twisted.logger import capturedLogs, formatEvent

from relayd.core.flows import Flow, FlowFacts
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
)
from relayd.observing.flow_lines import MAX_LINES, FlowLog, QuietFlowLog
from tests.datagrams.support import (
    Bench,
)


def test_lines_of_ended_flows_are_limited() -> None:
    """A hundred of those that were never in use in a second, and that there are more.

    Whether they were answered or not: answers are to be had by a flood as well.
    """
    told = FlowLog()
    facts = FlowFacts("relay1", "c", "l", "p", "s", 1.0, "evicted")
    with capturedLogs() as events:
        for began in [5.0] * (MAX_LINES + 7) + [6.0] * (MAX_LINES + 1):
            flow = Flow("key", "192.0.2.1", began)
            flow.replied = began > 5
            told.ended(flow, facts)
    lines = [formatEvent(event) for event in events]
    assert len(lines) == 2 * (MAX_LINES + 1)
    warning = (
        f"{MAX_LINES} flows that were never in use ended in a second: the rest of them"
        " get no line ({} left out so far)"
    )
    assert lines[MAX_LINES] == warning.format(0)
    assert lines[-1] == warning.format(7)
    assert told.left_out == 8


def test_each_flow_in_use_has_its_line() -> None:
    """However many of them end in a second: that is what the relay is for."""
    told = FlowLog()
    flow = Flow("key", "192.0.2.1", 5.0)
    flow.replied = flow.in_use = True
    with capturedLogs() as events:
        for _ in range(3 * MAX_LINES):
            told.ended(flow, FlowFacts("relay1", "c", "l", "p", "s", 1.0, "expired"))
    assert {event["ending"] for event in events} == {"expired"}
    assert len(events) == 3 * MAX_LINES
    assert told.left_out == 0


def test_the_line_of_a_flow() -> None:
    """Who, from where to where, how long, how much, and why it ended."""
    bench = Bench(observer=FlowLog(), unreplied_timeout=3)
    with capturedLogs() as events:
        bench.arrive(bytes(10))
        bench.arrive(bytes(5))
        bench.answer(bytes(7))
        bench.clock.advance(1.5)
        port = bench.sockets[0].number % 60000
        listener = bench.listener.number % 60000
        bench.nat.close()
    line, _ = [formatEvent(each) for each in events]
    assert line == (
        f"flow relay={bench.nat.name} client=192.0.2.1:4000"
        f" listener=203.0.113.1:{listener}"
        f" port=203.0.113.1:{port} server=198.51.100.1:53 age=1.500"
        " up=2/15 down=1/7 ending=drained"
    )
    assert events[0]["client"] == "192.0.2.1:4000"
    assert [each["relay"] for each in events] == [bench.nat.name] * 2


def test_the_line_of_an_evicted_flow() -> None:
    """Ends with for whom; with its interface, if it has one."""
    bench = Bench(observer=FlowLog(), max_flows=1)
    bench.arrive()
    with capturedLogs() as events:
        bench.arrive(source=("192.0.2.7", 5353))
        bench.arrive(source=("fe80::1", 5353, 0, 1))
        bench.close()
    assert formatEvent(events[0]).endswith(" ending=evicted by=192.0.2.7:5353")
    assert formatEvent(events[1]).endswith(" ending=evicted by=[fe80::1%lo]:5353")
    assert " client=[fe80::1%lo]:5353 " in formatEvent(events[2])
    assert formatEvent(events[2]).endswith(" ending=drained")


def test_the_quiet_log_leaves_out_flows_that_ended_well() -> None:
    """An answered flow that expired is no news."""
    bench = Bench(observer=QuietFlowLog(), unreplied_timeout=2, timeout=2)
    with capturedLogs() as events:
        bench.arrive()
        bench.answer()
        bench.arrive(source=("192.0.2.2", 1))
        bench.pass_time(4)
        bench.close()
    assert [each["ending"] for each in events] == ["unreplied"]


def test_the_line_of_a_relay() -> None:
    """What became of all datagrams; quietly only if some were dropped."""
    for kind in (FlowLog, QuietFlowLog):
        for kernel in (0, 2):
            bench = Bench(observer=kind())
            bench.listener.dropped = kernel
            with capturedLogs() as events:
                bench.nat.close()
            assert len(events) == (kind is FlowLog or kernel > 0)
        bench = Bench(observer=kind())
        bench.arrive(source=("192.0.2.1", 0))
        bench.arrive(source=("192.0.2.1", 0))
        bench.arrive(bytes(BUFFER_SIZE))
        bench.arrive()
        bench.answer()
        with capturedLogs() as events:
            bench.close()
        assert formatEvent(events[-1]) == (
            f"datagrams relay={bench.nat.name}"
            f" listener=203.0.113.1:{bench.listener.number % 60000}"
            " received=4 sent=1 replies_received=1 replies_sent=1"
            " dropped=source_port_0:2,truncated:1 replies_dropped=-"
            " icmp_errors=0 kernel_dropped=0 resent=0"
            " not_resent=0"
        )
        assert events[-1]["received"] == 4
