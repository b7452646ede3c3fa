"""How much of the log is written, by the namespaces of its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.application.service import Application
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.python.failure import Failure

from relayd.core.errors import ConfigError
from relayd.operating.log_file import TwistdLog
from relayd.operating.log_levels import LEVELS, MOST, LogLevels
from relayd.operating.logs import Logs


def levels() -> LogLevels:
    made = LogLevels()
    made.in_use = True
    return made


class Written:
    """A log file of a command, and loggers that write to it."""

    def __init__(self, path: Path, access: str | None, log_format: Any) -> None:
        self.path = path
        self.log = TwistdLog(MemoryReactorClock(), str(path))
        self.logs = Logs(
            *(MemoryReactorClock(), "relayd", self.log, access), log_format=log_format
        )
        application: Any = Application("test")
        self.logs.attach(application)
        self.observer = application.getComponent(ILogObserver)

    def logger(self, namespace: str) -> Logger:
        return Logger(namespace=namespace, observer=self.observer)

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_log_file_has(log_format: str, tmp_path: Path) -> None:
    written = Written(tmp_path / "log", None, log_format)
    stream, other = (
        written.logger("relayd.stream.retries"),
        written.logger("relayd.checks"),
    )
    for each in (stream, other):
        each.debug("no {n}", n=1)
        each.info("yes {n}", n=1)
    assert len(written.lines) == 2
    found = written.logs.levels.set("relayd.stream", "debug")
    assert found == {"default": "info", "relayd.stream": "debug"}
    for each in (stream, other):
        each.debug("mark {n}", n=2)
    assert ["mark 2" in line for line in written.lines] == [False, False, True]
    written.logs.levels.set("default", "error")
    other.warn("no {n}", n=3)
    other.failure("yes", Failure(ValueError("no")))
    stream.debug("yes")
    marks = [line for line in written.lines[3:] if "yes" in line]
    assert len(marks) == 2
    assert not any("no 3" in line for line in written.lines)
    written.log.close()


def test_lines_of_sessions_are_no_matter_of_levels(tmp_path: Path) -> None:
    """Of a log file they are events; an access log has no others."""
    written = Written(tmp_path / "log", None, "text")
    written.logs.levels.set("default", "critical")
    written.logs.levels.set("relayd.session", "critical")
    for namespace in ("relayd.session", "relayd.flow"):
        written.logger(namespace).info("{line}", line="x=1")
    assert len(written.lines) == 2
    written.log.close()
    access = Written(tmp_path / "log2", str(tmp_path / "access"), "text")
    access.logs.levels.set("default", "critical")
    assert access.logs.lines.write is not None
    access.logs.lines.write("relayd.session", "session=1")
    assert (tmp_path / "access").read_text().endswith("session=1\n")
    access.log.close()
    access.logs._access.close()  # type: ignore[union-attr]


def test_events_without_a_level_are_written() -> None:
    made = levels()
    made.set("default", "critical")
    assert made.shows({"log_format": "of old"})
    assert made.shows({"log_level": LogLevel.debug})
    assert not made.shows({"log_level": LogLevel.error, "log_namespace": "a"})


NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)


@given(st.lists(st.tuples(NAMES | st.just("default"), st.sampled_from(LEVELS))), NAMES)
def test_the_longest_that_is_meant_has_the_say(
    said: list[tuple[str, str]], asked: str
) -> None:
    made, model = levels(), {"default": "info"}
    for namespace, level in said:
        above = namespace
        inherited = None
        while "." in above and inherited is None:
            above = above.rpartition(".")[0]
            inherited = model.get(above)
        if namespace != "default" and level == (inherited or model["default"]):
            model.pop(namespace, None)
        else:
            model[namespace] = level
        assert made.set(namespace, level) == made.get() == model
    parts = asked.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    expected = next((model[n] for n in names if n in model), model["default"])
    assert made.of(asked) == expected
    for level in LogLevel.iterconstants():
        shown = made.shows({"log_level": level, "log_namespace": asked})
        assert shown == (LEVELS.index(level.name) >= LEVELS.index(expected))


@pytest.mark.parametrize(
    ("namespace", "level", "why"),
    [
        ("relayd", "loud", "bad level 'loud': expected debug, info, warn, error, crit"),
        ("relayd", "DEBUG", "bad level 'DEBUG'"),
        ("", "info", "bad namespace '': expected the name of a logger"),
        ("relayd..x", "info", "bad namespace"),
        ("relayd stream", "info", "bad namespace"),
        ("x\n", "info", "bad namespace"),
        ("x" * 201, "info", "bad namespace"),
    ],
)
def test_what_is_refused(namespace: str, level: str, why: str) -> None:
    made = levels()
    with pytest.raises(ConfigError, match=why):
        made.set(namespace, level)
    assert made.get() == {"default": "info"}


def test_namespaces_are_limited() -> None:
    made = levels()
    for n in range(MOST):
        made.set(f"n{n}", "debug")
    with pytest.raises(ConfigError, match="100 namespaces have levels already"):
        made.set("another", "debug")
    # One that is there may change, and the way out is as the message says.
    made.set("n1", "warn")
    made.set("n2", "info")
    made.set("another", "debug")
    assert len(made.get()) == MOST + 1


def test_a_log_that_others_write() -> None:
    logs = Logs(MemoryReactorClock(), "relayd")
    with pytest.raises(ConfigError, match="the log is not written by relayd"):
        logs.levels.set("relayd", "debug")
    assert logs.levels.get() == {"default": "info"}
