"""A log whose every line is a JSON object: of sessions, and of whatever else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.application.service import Application
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import ILogObserver, Logger, LogLevel, capturedLogs
from twisted.python.failure import Failure

from relayd.core.flows import Counters
from relayd.core.session import Ending, Session
from relayd.observing.flow_lines import FlowLog
from relayd.observing.json_lines import JsonLines
from relayd.observing.log_times import LogTimes
from relayd.observing.session_log import SessionLog
from relayd.operating.log_events import event_line
from relayd.operating.log_file import TwistdLog
from relayd.operating.logs import Logs
from tests.conftest import LoggedFailures

log = Logger(namespace="a.logger")


def a_session() -> Session:
    return Session(1, "192.0.2.1:5", "192.0.2.2:80", 0.0, ending=Ending.IDLE)


def made(event: Any) -> dict[str, Any]:
    """The object of an event."""
    times = LogTimes()
    line = event_line(event, JsonLines(times), times)
    assert line is not None
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    found: dict[str, Any] = json.loads(line)
    return found


def test_an_event_of_any_kind() -> None:
    with capturedLogs() as events:
        log.warn("{what}\nand more", what="something", log_time=1.5)
    [event] = events
    event["log_time"] = 1.5
    assert made(event) == {
        "@timestamp": "1970-01-01T00:00:01.500000Z",
        "event.name": "relayd.log",
        "log.level": "warn",
        "log.logger": "a.logger",
        "message": "something\nand more",
    }


def test_a_failure_has_its_traceback(logged_failures: LoggedFailures) -> None:
    with capturedLogs() as events:
        try:
            raise ZeroDivisionError("by nought")
        except ZeroDivisionError:
            log.failure("it failed")
    logged_failures.take("by nought")
    found = made(events[0])
    assert (found["message"], found["log.level"]) == ("it failed", "critical")
    assert found["error.type"] == "builtins.ZeroDivisionError"
    assert found["error.message"] == "by nought"
    assert "Traceback (most recent call last)" in found["error.stack_trace"]
    assert "builtins.ZeroDivisionError: by nought" in found["error.stack_trace"]


def test_a_failure_that_can_not_be_told_costs_itself() -> None:
    class Untold(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError("of its text")

    found = made({"log_format": "it failed", "log_failure": Failure(Untold())})
    assert found["error.type"].endswith("Untold")
    assert found["error.message"] == "(it can't be told)"


def test_events_that_lack_everything() -> None:
    """Older code, and events that say nothing."""
    times = LogTimes()
    assert event_line({}, JsonLines(times), times) is None
    found = made({"log_format": "x", "log_system": "-", "log_level": None})
    assert (found["log.logger"], found["log.level"]) == ("-", "info")
    assert found["@timestamp"].startswith("20")
    assert made({"log_format": "{gone}"})["message"].startswith("Unable to format")


@given(st.text(min_size=1), st.text(), st.sampled_from(list(LogLevel.iterconstants())))
def test_no_text_breaks_a_line(text: str, name: str, level: Any) -> None:
    event = {"log_format": "{text}", "text": text, "log_namespace": name}
    found = made({**event, "log_level": level})
    assert found["message"] == text
    assert found["log.level"] == level.name
    assert found["log.logger"] == (name or "-")


@pytest.mark.parametrize("where", ["output", "log file", "access log"])
def test_every_line_that_is_written_is_an_object(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sessions, of flows, of the process, and of what was lost."""
    monkeypatch.setattr("atexit.register", lambda call: None)
    reactor = MemoryReactorClock()
    log_path, access = tmp_path / "log", tmp_path / "access"
    twistds = TwistdLog(reactor, str(log_path))
    if where == "output":
        # Written as standard output is.
        twistds.path = None
        monkeypatch.setattr(twistds, "_outlet", lambda: _outlet(str(log_path)))
    given = str(access) if where == "access log" else None
    logs = Logs(reactor, "relayd", twistds, given, log_format="json")
    application: Any = Application("test")
    logs.attach(application)
    observer = application.getComponent(ILogObserver)
    with capturedLogs() as events:
        SessionLog(logs.lines).closed(a_session())
        FlowLog(logs.lines).closed("dns", "a:1", Counters())
        log.info("listening")
    assert len(events) == (3 if where == "log file" else 1)
    for event in events:
        observer(event)
    twistds.write_line("relayd.log", "3 lines were lost", "warn")
    lines = log_path.read_text().splitlines()
    if where == "access log":
        lines += access.read_text().splitlines()
        for call, args, keywords in reactor.triggers["after"]["shutdown"]:
            call(*args, **keywords)
    said = sorted(
        (one["event.name"], one.get("message", "")) for one in map(json.loads, lines)
    )
    assert said == [
        ("relayd.datagrams", ""),
        ("relayd.log", "3 lines were lost"),
        ("relayd.log", "listening"),
        ("relayd.session.closed", ""),
    ]
    assert all("@timestamp" in json.loads(line) for line in lines)
    twistds.close()


def _outlet(path: str) -> Any:
    from relayd.operating.outlets import Outlet, open_to_append

    return Outlet(open_to_append(path))
