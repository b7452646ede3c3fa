"""The log's lines about clients that were not admitted: a hundred a second at most."""

from __future__ import annotations

from twisted.logger import capturedLogs, formatEvent

from relayd.core.session import Ending, Session
from relayd.observing.line_limit import MAX_LINES
from relayd.observing.session_log import SessionLog


def refused(number: int, at: float) -> Session:
    session = Session(number, "192.0.2.1:5000", "192.0.2.2:80", at)
    session.ending, session.ended_at = Ending.REFUSED, at
    session.reason = "client"
    session.detail = "client: --deny-client 192.0.2.0/24"
    return session


def test_a_flood_of_refused_clients_does_not_fill_the_log() -> None:
    """The rest are counted; those that were admitted always get their line."""
    told = SessionLog()
    with capturedLogs() as events:
        for second in (5.0, 6.5):
            for number in range(MAX_LINES + 7):
                told.refused(refused(number, second), "no")
        done = refused(1, 6.5)
        done.ending, done.detail = Ending.DONE, ""
        done.up.read = 1
        told.closed(done)
    lines = [formatEvent(event) for event in events]
    assert len(lines) == 2 * (MAX_LINES + 1) + 1
    assert told.left_out == 14
    assert lines[0].endswith("detail='client: --deny-client 192.0.2.0/24'")
    warning = (
        "100 clients were not admitted in a second: the rest of them get no line"
        " ({} left out so far)"
    )
    assert lines[MAX_LINES] == warning.format(0)
    assert lines[2 * MAX_LINES + 1] == warning.format(7)
    assert "ending=done" in lines[-1]
