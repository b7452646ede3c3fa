"""What a stranger sends is one word of a line of text, under whatever name it is."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.address import UNIXAddress
from twisted.logger import capturedLogs, formatEvent

from relayd.core.addresses import address_name
from relayd.core.session import Ending, Session
from relayd.observing.line_log import LineLog
from relayd.observing.log_fields import RESERVED
from relayd.observing.session_log import SessionLog
from relayd.preludes.proxy_protocol import ProxyHeader
from relayd.socks.session import Socks4Session

#: The line's own fields, and those of a proxy's and of a header's.
FIELDS = [
    *("session", "relay", "client", "peer", "listener", "upstream", "connect"),
    *("attempts", "duration", "up", "down", "ending", "code"),
]
OF_PROXY = ["command", "user", "requested", "reply"]
OF_HEADER = ["authority", "unique_id", "netns"]

FORGED = "GET up=0 ending=done code=-- client=9.9.9.9:1"

NAMES = st.sampled_from(["tenant", "fact_client", *FIELDS, *sorted(RESERVED), "log_x"])


def a_session(client: str = "192.0.2.1:5000") -> Socks4Session:
    return Socks4Session(
        1,
        client,
        "192.0.2.2:80",
        100.0,
        peer="192.0.2.9:9",
        ended_at=101.0,
        ending=Ending.DENIED,
    )


def lines_of(session: Session) -> list[str]:
    """Its line at its end, and one before: written, and as the text of an event."""
    written: list[str] = []
    log = SessionLog(LineLog(lambda _, line: written.append(line)))
    with capturedLogs() as events:
        for each in (log, SessionLog()):
            each.refused(session, "why")
            each.interim(session, 100.5)
    return [*written, *map(formatEvent, events)]


def fields_of(line: str) -> dict[str, str]:
    """The fields of a line, as a script finds them."""
    words = line.removeprefix("interim ").split(" ")
    fields = dict(word.split("=", 1) for word in words)
    assert len(fields) == len(words)
    return fields


def bare(name: str) -> str:
    """Without what a name that is taken gets, as often as it takes."""
    while name.startswith("fact_"):
        name = name.removeprefix("fact_")
    return name


@pytest.mark.parametrize("taken", ["client", "session", "ending", "system", "level"])
def test_a_fact_whose_name_is_taken_is_one_word_too(taken: str) -> None:
    """And so are those beside it."""
    session = a_session()
    session.note("before", FORGED)
    session.note(taken, FORGED)
    session.note("after", FORGED)
    for line in lines_of(session):
        fields = fields_of(line)
        for name in ("before", f"fact_{taken}", "after"):
            assert ast.literal_eval(fields[name]) == FORGED


@given(
    client=st.binary(max_size=20),
    user=st.binary(max_size=20),
    header=st.lists(st.binary(max_size=20), min_size=3, max_size=3),
    notes=st.dictionaries(NAMES, st.text() | st.just(FORGED), max_size=5),
)
def test_whatever_strangers_send_adds_no_field(
    client: bytes, user: bytes, header: list[bytes], notes: dict[str, Any]
) -> None:
    """The name of a client's socket, a user id, a balancer's header and what routes and
    filters note of the first bytes."""
    session = a_session(address_name(UNIXAddress(client)))
    session.user_id = user
    session.header = ProxyHeader("", "", *header)
    for name, text in notes.items():
        session.note(name, text)
    expected = {*FIELDS, *OF_PROXY}
    expected |= {name for name, text in zip(OF_HEADER, header, strict=True) if text}
    for line in lines_of(session):
        fields = fields_of(line)
        added = expected if "ending" in fields else expected - {"ending", "code"}
        others = fields.keys() - added
        assert len(others) == len(notes)
        assert set(map(bare, others)) <= set(map(bare, notes))
        assert fields["client"] == session.client
