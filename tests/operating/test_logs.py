"""Where the lines of sessions go, and what is refused before anything listens."""

from __future__ import annotations

import atexit
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from twisted.application.service import Application, MultiService
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import ILogObserver, LogLevel, capturedLogs

from relayd.core.errors import CannotStart
from relayd.observing.log_times import LogTimes
from relayd.operating import log_file
from relayd.operating.log_file import TwistdLog, TwistLog
from relayd.operating.logs import Logs
from relayd.operating.outlets import Outlet, ThreadOutlet, open_to_append
from tests.support.process import eventually


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of standard output, and of error."""
    path = tmp_path / "output"
    monkeypatch.setattr(
        log_file, "_output", lambda stream: Outlet(open_to_append(str(path)))
    )
    monkeypatch.setattr(atexit, "register", lambda call: None)
    return path


def words(path: Path) -> list[str]:
    """The lines of a log without their times."""
    return [line.split(" ", 1)[1] for line in path.read_text().splitlines()]


def end(reactor: Any) -> None:
    """The process ends."""
    for call, args, keywords in reactor.triggers["after"]["shutdown"]:
        call(*args, **keywords)


def test_lines_go_to_standard_output_with_the_log(output: Path) -> None:
    """They look as events do, and are in their order."""
    reactor = MemoryReactorClock()
    log = TwistdLog(reactor, None)
    logs = Logs(reactor, "relayd", log)
    application: Any = Application("test")
    logs.attach(application)
    observer = application.getComponent(ILogObserver)
    event = {
        "log_format": "{line}",
        "log_namespace": "relayd.session",
        "log_level": LogLevel.info,
        "line": "session=1",
        "log_time": 1e9,
    }
    observer(event)
    assert logs.lines.write is not None
    logs.lines.write("relayd.session", "session=1")
    one, other = words(output)
    assert one == other == "[relayd.session#info] session=1"
    assert output.read_text().startswith("2001-09-09T01:46:40.000000Z [")
    assert logs.files == []
    log.close()
    # Nothing is opened any more, and nothing is lost by that.
    logs.lines.write("relayd.session", "session=2")
    log.finish()
    log.reopen()


@pytest.mark.parametrize("access", [None, "file"])
def test_lines_of_a_log_file_are_events(access: str | None, tmp_path: Path) -> None:
    """Unless an access log is asked for."""
    reactor = MemoryReactorClock()
    log = TwistdLog(reactor, str(tmp_path / "log"))
    name = access and str(tmp_path / access)
    logs = Logs(reactor, "relayd", log, name)
    logs.attach(Application("test"))
    files = [each.path for each in logs.files]
    if name is None:
        assert logs.lines.write is None
        assert files == [log.path]
    else:
        assert logs.lines.write is not None
        logs.lines.write("relayd.flow", "flow")
        assert words(Path(name)) == ["[relayd.flow#info] flow"]
        assert files == [log.path, name]
        os.rename(name, tmp_path / "old")
        logs.files[1].reopen()
        logs.lines.write("relayd.flow", "another")
        assert words(Path(name)) == ["[relayd.flow#info] another"]
        end(reactor)
    log.close()


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_an_access_log_on_standard_output(
    name: str, output: Path, tmp_path: Path
) -> None:
    """Alone there, if the log is a file; by the log's writer, if that is there, too."""
    reactor = MemoryReactorClock()
    for log in (TwistdLog(reactor, None), TwistdLog(reactor, str(tmp_path / "log"))):
        logs = Logs(reactor, "relayd", log, name)
        logs.attach(Application("test"))
        assert logs.lines.write is not None
        assert (logs.lines.write == log.write_line) is (log.path is None)
        logs.lines.write("relayd.session", "session=1")
        log.close()
    end(reactor)
    assert words(output) == ["[relayd.session#info] session=1"] * 2


def test_an_embedders_observer_goes_on_getting_events(tmp_path: Path) -> None:
    """A service collection of its own, and an application with an observer."""
    reactor = MemoryReactorClock()
    application: Any = Application("test")
    application.setComponent(ILogObserver, print)
    for parent in (application, MultiService()):
        logs = Logs(reactor, "relayd", TwistdLog(reactor, None))
        logs.attach(parent)
        assert logs.lines.write is None
    Logs(reactor, "relayd").attach(application)


@pytest.mark.parametrize(
    ("name", "daemon", "says"),
    [
        (
            "{}/none/log",
            False,
            "can't open the access log '{}/none/log': No such file or directory: give",
        ),
        ("{}", False, "can't open the access log '{}': Is a directory: give another"),
        ("-", True, "bad --access-log '-': a daemon has no standard output: give a"),
        ("{}/log", False, "bad --access-log '{}/log': it is the log file, where these"),
    ],
)
def test_an_access_log_that_can_not_be_had_is_one_line(
    name: str, daemon: bool, says: str, tmp_path: Path
) -> None:
    reactor = MemoryReactorClock()
    log = TwistdLog(reactor, str(tmp_path / "log"))
    logs = Logs(reactor, "relayd", log, name.format(tmp_path), daemon=daemon)
    with pytest.raises(CannotStart) as caught:
        logs.attach(Application("test"))
    message = str(caught.value.code)
    assert message.startswith("relayd: " + says.format(tmp_path))
    assert message.isprintable()
    log.close()


def test_the_log_of_twist_is_its_own(tmp_path: Path) -> None:
    """Only an access log is written here."""
    reactor = MemoryReactorClock()
    with (tmp_path / "log").open("a") as file:
        logs = Logs(reactor, "relayd", TwistLog(file), str(tmp_path / "access"))
        logs.attach(Application("test"))
        assert [each.path for each in logs.files] == [
            str(tmp_path / "log"),
            str(tmp_path / "access"),
        ]
    end(reactor)


def test_what_is_lost_is_told_in_the_log(tmp_path: Path) -> None:
    """Of the access log when it flows again, or at the end."""
    reactor = MemoryReactorClock()
    reactor.callFromThread = lambda call: call()
    logs = Logs(reactor, "relayd", None, "/dev/full")
    logs.attach(MultiService())
    assert logs.lines.write is not None
    for _ in range(3):
        logs.lines.write("relayd.session", "a line")
    with capturedLogs() as events:
        end(reactor)
    [event] = events
    told = (
        "3 lines of the access log were lost, 3 in all: what reads it did not keep up"
    )
    assert event["line"] == f"{told}, or it can't be written"


@pytest.mark.parametrize("full", [True, False])
def test_what_the_log_lost_itself_is_told_in_it_or_on_standard_error(
    full: bool, output: Path, tmp_path: Path
) -> None:
    reactor = MemoryReactorClock()
    reactor.callFromThread = lambda call: call()
    log = TwistdLog(reactor, "/dev/full")
    log.attach(Application("test"))
    log.write("one\n")
    log.write("two\n")
    if not full:
        log.path = str(tmp_path / "log")
        assert log.writer is not None
        log.writer.lost = 2
        log.writer._waiting.clear()
        log.reopen()
    log.finish()
    told = "2 lines of the log were lost, 2 in all: what reads it did not keep up, or"
    if full:
        assert output.read_text().startswith(f"relayd: {told}")
    else:
        assert words(tmp_path / "log")[-1].startswith(f"[relayd.log#warn] {told}")
        assert not output.exists()
    log.close()


def test_what_is_told_on_standard_error_may_need_a_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is given the moment to write it, before the process ends."""

    def output(stream: object) -> ThreadOutlet:
        # A thread of a busy machine may get its turn later than it would be given up.
        for name in ("GIVE_UP", "TIMES"):
            monkeypatch.setattr(f"relayd.operating.log_writer.{name}", 500)
        return ThreadOutlet(os.dup(ends[1]))

    monkeypatch.setattr(log_file, "_output", output)
    ends = os.pipe()
    reactor = MemoryReactorClock()
    reactor.callFromThread = lambda call: call()
    log = TwistdLog(reactor, "/dev/full")
    log.attach(Application("test"))
    log.write("one\n")
    log.finish()
    os.set_blocking(ends[0], False)
    assert b"1 lines of the log were lost, 1 in all" in os.read(ends[0], 1000)
    log.close()
    for each in ends:
        os.close(each)
    eventually(
        lambda: "relayd log" not in [each.name for each in threading.enumerate()],
        "its thread ends",
    )


def test_several_threads_write_times() -> None:
    """One that comes in between finds a second and its text that belong together."""
    between: list[str] = []

    class Interrupted(LogTimes):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if armed and not between:
                between.append("")
                between[0] = self(3.75)

    armed = False
    times = Interrupted()
    armed = True
    assert times(3.5) == "1970-01-01T00:00:03.500000Z"
    assert between == ["1970-01-01T00:00:03.750000Z"]


def test_times() -> None:
    """In UTC, with microseconds; what has no time has none."""
    times = LogTimes()
    assert times(0.0) == "1970-01-01T00:00:00.000000Z"
    assert times(1.5) == "1970-01-01T00:00:01.500000Z"
    assert times(1.75) == "1970-01-01T00:00:01.750000Z"
    assert times(0.999999) == "1970-01-01T00:00:00.999999Z"
    assert times(None) == "-"
