"""Lines that are no events look as the events do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import capturedLogs, formatEventAsClassicLogText

from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.core.session import Direction, Ending, Session
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import (
    QuietSessionLog,
    SessionLog,
    VerboseSessionLog,
)

TEXT = st.text(max_size=20)
COUNT = st.integers(0, 1 << 50)
TIME = st.floats(0, 1e6)


def direction(count: int) -> Direction:
    made = Direction()
    made.read = count
    return made


SESSIONS = st.builds(
    Session,
    id=COUNT,
    client=TEXT,
    listener=TEXT,
    opened_at=TIME,
    relay=TEXT,
    peer=TEXT,
    upstream=TEXT,
    ended_at=st.none() | TIME,
    up=COUNT.map(direction),
    down=COUNT.map(direction),
    ending=st.none() | st.sampled_from(Ending),
)


def both(kind: type[Any], tell: Any) -> tuple[list[str], list[str]]:
    """What an observer of this kind writes as lines, and as events."""
    lines: list[str] = []
    tell(kind(LineLog(lambda *line: lines.append("- [{}#info] {}\n".format(*line)))))
    with capturedLogs() as events:
        tell(kind())
    texts = [
        str(formatEventAsClassicLogText(event, lambda when: "-")) for event in events
    ]
    return lines, texts


@given(
    kind=st.sampled_from([SessionLog, QuietSessionLog, VerboseSessionLog]),
    session=SESSIONS,
    detail=TEXT,
    facts=st.dictionaries(st.text(min_size=1), st.integers() | TEXT),
)
def test_the_lines_of_a_session(
    kind: type[SessionLog], session: Session, detail: str, facts: dict[str, Any]
) -> None:
    """Of each hook, with facts of all kinds."""

    class WithFacts(Session):
        @property
        def facts(self) -> dict[str, Any]:
            return facts

    told = WithFacts(**attrs.asdict(session, recurse=False))
    told.detail = detail

    def tell(log: Any) -> None:
        for name in ("opened", "dialing", "connected", "closed"):
            getattr(log, name)(told)
        log.refused(told, "why")

    lines, texts = both(kind, tell)
    assert lines == texts
    assert all(line.count("\n") == 1 for line in lines)
    assert lines or kind is QuietSessionLog or told.is_silent


FACTS = st.builds(
    FlowFacts,
    relay=TEXT,
    client=TEXT,
    listener=TEXT,
    port=TEXT,
    server=TEXT,
    age=TIME,
    ending=st.just("evicted"),
    by=TEXT,
)


@given(kind=st.sampled_from([FlowLog, QuietFlowLog]), facts=FACTS, name=TEXT)
def test_the_lines_of_a_flow(kind: type[FlowLog], facts: FlowFacts, name: str) -> None:
    """And the one at the end of a relay."""

    def tell(log: Any) -> None:
        flow = Flow(1, "192.0.2.1:53", 0.0)
        flow.up_datagrams, flow.down_bytes = 3, 4
        log.ended(flow, facts)
        log.closed(name, name, attrs.evolve(Counters(), dropped=Counter(full=3)))

    lines, texts = both(kind, tell)
    assert lines == texts
    assert all(line.count("\n") == 1 for line in lines)
    assert lines
