"""What the soak reads in the relay's log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import attrs
import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.observing.flow_lines import FlowLog
from soak.log import (
    DatagramsLine,
    RelayLog,
    SessionLine,
    parse_datagrams_line,
    parse_flow_line,
    parse_session_line,
)
from tests.tools.sessions import SAID

LINE = (
    "2026-11-21T01:05:51+0000 [relayd.session#info] session=17 relay=relay1"
    " client=127.0.0.1:5151 listener=127.0.0.3:8080 upstream=127.0.0.2:80"
    " connect=0.002 attempts=1 duration=0.123 up=78 down=1048 ending=done code=--"
)


def test_a_session_line() -> None:
    assert parse_session_line(LINE) == SessionLine(
        client="127.0.0.1:5151",
        listener="127.0.0.3:8080",
        duration=0.123,
        up=78,
        down=1048,
        ending="done",
    )


def test_a_session_line_with_a_detail_and_without_a_server() -> None:
    line = LINE.replace("=127.0.0.2:80 ", "=- ").replace(
        "ending=done code=--", "ending=idle code=cD detail='nothing moved for 20 s'"
    )
    found = parse_session_line(line)
    assert found is not None
    assert found.ending == "idle"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "2026-11-21T01:05:51+0000 [relayd.service#info] SIGTERM: stopping",
        LINE.replace("relayd.session#info", "relayd.stream#critical"),
        LINE.replace(" ending=done code=--", ""),
    ],
)
def test_other_lines_are_not_of_a_session(line: str) -> None:
    assert parse_session_line(line) is None


def test_the_relays_log_is_counted() -> None:
    log = RelayLog()
    session = log.add(LINE)
    assert session is not None
    for line in (
        "… [relayd.service#info] listening on 127.0.0.1:4000, relay=a, relaying to x",
        "… [relayd.service#info] listening on 127.0.0.2:4001, relay=b, relaying to x",
        "… [relayd.listening#warn] 127.0.0.1:4000: hardly any descriptor is left",
        "… [relayd.stream#critical] session 3 failed",
        "\tTraceback (most recent call last):",
        "\tbuiltins.ValueError: x",
        "… [relayd.wheel#error] x",
    ):
        assert log.add(line) is None
    assert log.listeners == ["127.0.0.1:4000", "127.0.0.2:4001"]
    assert log.troubles == 3
    assert len(log.remarks) == 5


def test_a_clock_that_is_set_shows_in_the_log() -> None:
    log = RelayLog()
    for line, steps in (
        ("2026-11-21T01:05:51+0000 [x#info] a", 0),
        ("2026-11-21T01:06:13+0000 [x#info] b", 0),
        ("2026-11-21T03:06:13+0000 [x#info] c", 1),
        ("\tbuiltins.ValueError: x", 1),
        ("2026-11-21T03:06:14+0000 [x#info] d", 1),
        ("2026-11-21T01:06:15+0000 [x#info] e", 2),
    ):
        log.add(line)
        assert log.steps == steps


def test_the_relays_remarks_are_bounded() -> None:
    log = RelayLog()
    for _ in range(10 * log.REMARKS):
        log.add("[x#error] again")
    assert log.troubles == 10 * log.REMARKS
    assert len(log.remarks) == log.REMARKS


def written(observe: Callable[[FlowLog], None]) -> str:
    """The line that relayd itself writes, as `twistd` puts it into its log."""
    with capturedLogs() as events:
        observe(FlowLog())
    [event] = events
    return (
        f"2026-11-21T01:05:51+0000 [{event['log_namespace']}#info] {formatEvent(event)}"
    )


def flow_line(ending: str, by: str = "") -> str:
    """The line of the flow that `SAID` is."""
    flow = Flow("key", "127.2.0.1", 5.0)
    flow.up_datagrams = flow.down_datagrams = 4
    flow.up_bytes = flow.down_bytes = 400
    ends = ("127.2.0.1:5151", "127.0.0.1:53", "127.0.0.1:4000", "127.0.0.1:9")
    facts = FlowFacts("relay1", *ends, 13.01, ending, by)
    return written(lambda log: log.ended(flow, facts))


def datagrams_line() -> str:
    """The line of a listener's counters."""
    counters = Counters(12, 9, 8, 8, Counter(no_flow=2, send_X=1), kernel_dropped=5)
    return written(lambda log: log.closed("relay1", "127.0.0.1:53", counters))


def test_a_flow_line() -> None:
    assert parse_flow_line(flow_line("expired")) == SAID
    evicted = flow_line("evicted", by="127.2.0.9:1")
    assert parse_flow_line(evicted) == attrs.evolve(SAID, ending="evicted")
    assert parse_flow_line(datagrams_line()) is None


def test_a_datagrams_line() -> None:
    assert parse_datagrams_line(flow_line("expired")) is None
    assert parse_datagrams_line(datagrams_line()) == DatagramsLine(
        *("127.0.0.1:53", 12, 9, 8, 8),
        *(Counter(no_flow=2, send_X=1), Counter(), 5),
    )
