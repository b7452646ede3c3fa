"""How violations are counted and told."""

from __future__ import annotations

from soak.scripts import draw_session
from soak.violations import Violations
from tests.tools.sessions import session_of


def test_violations_are_counted_once_a_session_and_a_few_listed() -> None:
    violations = Violations(lambda _: None)
    for number in range(1, 400):
        session = draw_session(1, number)
        violations.add(session, "client", "wrong bytes")
        violations.add(session, "server", "so what")
    assert violations.count == 399
    assert len(violations.lines()) == violations.FIRST


def test_violations_are_printed_until_there_are_too_many() -> None:
    told: list[str] = []
    violations = Violations(told.append)
    violations.add(None, "server", "a header\nof no session")
    assert told == ["no session, server: a header of no session"]
    for number in range(1, 10 * violations.PRINTED):
        violations.add(draw_session(1, number), "client", "wrong bytes")
    assert violations.count == 10 * violations.PRINTED
    assert len(told) == violations.PRINTED + 1
    assert all("wrong bytes" in text for text in told[1:-1])
    assert told[-1].endswith("only counted")


def test_a_violation_has_the_ending_from_the_log() -> None:
    violations = Violations(lambda _: None)
    session = session_of("idle for ever")
    violations.add(session, "client", "hung")
    session.ending = "done"
    assert violations.lines() == [
        f"idle for ever, connection {session.number}, client: hung; ending=done"
    ]
