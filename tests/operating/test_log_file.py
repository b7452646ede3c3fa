"""The logs of a command: which they are, who writes them, and that none is lost."""

from __future__ import annotations

import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.application.service import Application, MultiService
from twisted.internet import reactor
from twisted.logger import ILogObserver, LogLevel

from relayd.configuring.config import Config
from relayd.core.errors import CannotStart
from relayd.operating.log_file import TwistdLog, TwistLog, log_of
from relayd.operating.logs import Logs
from relayd.operating.service import make_service

TWISTD: dict[str, Any] = {
    "logfile": None,
    "logger": None,
    "syslog": False,
    "nodaemon": True,
    "debug": False,
}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "-"),
        ({"logfile": "-"}, "-"),
        ({"logfile": "-", "nodaemon": False}, None),
        ({"logfile": "a/b"}, "a/b"),
        ({"logfile": "a/b", "syslog": True}, None),
        ({"logfile": "a/b", "logger": print}, None),
        ({"nodaemon": False}, "twistd.log"),
        ({"nodaemon": False, "debug": True}, "-"),
        ({"nodaemon": False, "logfile": "c"}, "c"),
    ],
    ids=str,
)
def test_what_twistd_logs_to(given: dict[str, Any], name: str | None) -> None:
    """As its own options say; nothing is opened yet."""
    found = log_of({**TWISTD, **given}, reactor)
    if name is None:
        assert found is None
    else:
        assert isinstance(found, TwistdLog)
        assert found.path == (None if name == "-" else os.path.abspath(name))
        assert not Path(name).exists()


def test_what_twist_logs_to(tmp_path: Path) -> None:
    """Its own file, or its output; a program that is neither has none to reopen."""
    with (tmp_path / "log").open("a") as file:
        found = log_of({"logFile": file}, reactor)
        assert isinstance(found, TwistLog)
        assert found.path == str(tmp_path / "log")
    for output in (sys.__stdout__, sys.__stderr__):
        assert log_of({"logFile": output}, reactor) is None
    assert log_of(None, reactor) is None
    # What `twist` has where standard output is closed, and a stream of no descriptor.
    assert log_of({"logFile": None}, reactor) is None
    assert log_of({"logFile": StringIO()}, reactor) is None


def say(application: Any, text: str) -> None:
    """Let the observer that an application has brought along write a line."""
    observer = application.getComponent(ILogObserver)
    observer({"log_format": text, "log_level": LogLevel.info})


def test_an_application_logs_to_the_file(tmp_path: Path) -> None:
    """It is opened then, and goes on in the file that has the name."""
    path, old = tmp_path / "log", tmp_path / "old"
    log_file = TwistdLog(reactor, str(path))
    application: Any = Application("test")
    logs = Logs(reactor, "relayd", log_file)
    make_service(Config(()), reactor, logs).setServiceParent(application)
    path.chmod(0o640)
    say(application, "one")
    path.rename(old)
    say(application, "two")
    log_file.reopen()
    say(application, "three")
    assert [line.split()[-1] for line in old.read_text().splitlines()] == ["one", "two"]
    assert path.read_text().endswith(" three\n")
    # logrotate may have made it, with a mode of its own choice.
    path.rename(old)
    path.touch(0o600)
    log_file.reopen()
    assert path.stat().st_mode & 0o777 == 0o600
    log_file.close()


def test_a_new_file_has_the_mode_of_the_old_one(tmp_path: Path) -> None:
    """Whatever the umask has become: a daemon's is 077."""
    path = tmp_path / "log"
    log_file = TwistdLog(reactor, str(path))
    log_file.open()
    path.chmod(0o644)
    log_file.reopen()
    path.unlink()
    before = os.umask(0o077)
    try:
        log_file.reopen()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    log_file.close()


def test_a_file_that_can_not_be_opened_keeps_the_old_one(tmp_path: Path) -> None:
    """For both runners."""
    path, old = tmp_path / "log", tmp_path / "old"
    log_file = TwistdLog(reactor, str(path))
    application: Any = Application("test")
    log_file.attach(application)
    path.rename(old)
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        log_file.reopen()
    say(application, "still")
    assert old.read_text().endswith(" still\n")
    log_file.close()
    path.rmdir()
    with path.open("a") as file:
        other = TwistLog(file)
        old.unlink()
        path.rename(old)
        path.mkdir()
        with pytest.raises(IsADirectoryError):
            other.reopen()
        file.write("still")
        file.flush()
        assert old.read_text() == "still"
        path.rmdir()
        # Nobody reads it: an open that waits for that would hold up SIGTERM.
        os.mkfifo(path)
        with pytest.raises(OSError, match="No such device or address"):
            other.reopen()
        path.unlink()
        other.reopen()
        assert os.get_blocking(file.fileno())
        file.write("new")
        file.flush()
        assert (old.read_text(), path.read_text()) == ("still", "new")


def test_any_text_can_be_logged(tmp_path: Path) -> None:
    """Escaped, where the file's encoding has no such character."""
    log_file = TwistdLog(reactor, str(tmp_path / "one"))
    log_file.open()
    log_file.write("\xf6 \udcff\n")
    log_file.close()
    assert (tmp_path / "one").read_bytes() == b"\xc3\xb6 \\udcff\n"
    with (tmp_path / "two").open("a", encoding="ascii") as file:
        log_of({"logFile": file}, reactor)
        file.write("\xf6 \udcff\n")
    assert (tmp_path / "two").read_bytes() == b"\\xf6 \\udcff\n"


def test_logs_to_other_places_are_left_alone(tmp_path: Path) -> None:
    """A program's own services, and an application with an observer."""
    log_file = TwistdLog(reactor, str(tmp_path / "log"))
    logs = Logs(reactor, "relayd", log_file)
    make_service(Config(()), reactor, logs).setServiceParent(MultiService())
    application: Any = Application("test")
    application.setComponent(ILogObserver, print)
    log_file.attach(application)
    assert application.getComponent(ILogObserver) is print
    assert not (tmp_path / "log").exists()
    # Nothing was opened, and nothing is lost by that.
    log_file.write("to nobody")
    log_file.flush()


def test_a_device_is_not_rotated(tmp_path: Path) -> None:
    """As root, Twisted's own file would rename /dev/null when it is 1 MB long."""
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    log_file = TwistdLog(reactor, str(device))
    log_file.open()
    for _ in range(30):
        log_file.write("x" * 50_000)
    assert [each.name for each in tmp_path.iterdir()] == ["null"]
    log_file.close()
    plain = TwistdLog(reactor, str(tmp_path / "log"))
    plain.open()
    for _ in range(30):
        plain.write("x" * 50_000)
    plain.close()
    assert (tmp_path / "log.1").stat().st_size == 1_000_000


def test_a_file_that_can_not_be_rotated_goes_on(tmp_path: Path) -> None:
    """As under --chroot, or where --uid gave up the permission."""
    folder = tmp_path / "folder"
    folder.mkdir()
    log_file = TwistdLog(reactor, str(folder / "log"))
    log_file.open()
    folder.rename(tmp_path / "other")
    for _ in range(30):
        log_file.write("x" * 50_000)
    log_file.close()
    assert [each.name for each in tmp_path.iterdir()] == ["other"]
    assert (tmp_path / "other" / "log").stat().st_size == 30 * 50_000


def test_a_log_file_that_can_not_be_opened_is_one_line(tmp_path: Path) -> None:
    """Before anything listens."""
    missing = TwistdLog(reactor, str(tmp_path / "missing" / "log"))
    service = make_service(Config(()), reactor, Logs(reactor, "relayd", missing))
    with pytest.raises(CannotStart) as caught:
        service.setServiceParent(cast(Any, Application("test")))
    assert caught.value.code == (
        f"relayd: can't open the log file '{tmp_path}/missing/log': No such file or"
        " directory: give another with --logfile, or run it with -n"
    )
