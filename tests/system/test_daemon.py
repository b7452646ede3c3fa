"""A daemon that gives up root's rights: what becomes of its log file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.process import START, TWISTD, eventually
from tests.system.programs import lacking

pytestmark = pytest.mark.system

#: Nobody's.
OTHER = 65534


@contextmanager
def daemon(folder: Path, *options: str) -> Iterator[int]:
    """A relay that is started as root and goes on as somebody else."""
    if os.geteuid() != 0:
        lacking("to become another user takes root")
    subprocess.run(
        [
            *(TWISTD, f"--pidfile={folder}/pid", f"--logfile={folder}/log", *options),
            *("relayd", "-l", "127.0.0.1:0", "-d", "80"),
        ],
        cwd=folder,
        check=True,
        timeout=START,
    )
    pid = int((folder / "pid").read_text())
    try:
        eventually(lambda: said(folder / "log", "listening on"))
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def said(path: Path, pattern: str) -> bool:
    """Whether a log file has a line like that."""
    return path.exists() and bool(re.search(pattern, path.read_text()))


def runs(pid: int) -> bool:
    """Whether it does."""
    return Path(f"/proc/{pid}/status").exists()


def test_a_log_file_that_it_may_not_open_again(tmp_path: Path) -> None:
    """It stays with the old one and says so; once it may, it opens the new one."""
    log, old = tmp_path / "log", tmp_path / "old"
    with daemon(tmp_path, f"--uid={OTHER}", f"--gid={OTHER}") as pid:
        status = Path(f"/proc/{pid}/status")
        eventually(lambda: f"Uid:\t{OTHER}" in status.read_text())
        log.rename(old)
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: said(old, rf"SIGUSR1: can't open {log}: Permission denied"))
        # As logrotate's `create` makes it.
        log.touch()
        os.chown(log, OTHER, OTHER)
        # pytest's own folders, which are root's alone: two, or three of a worker's.
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o011)
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: said(log, f"SIGUSR1: the log goes on in {log}"))
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: said(log, "Server Shut Down"))
        eventually(lambda: not runs(pid))


def test_a_log_file_outside_of_a_jail(tmp_path: Path) -> None:
    """Its name means another file there, whose folder is missing: likewise."""
    if os.geteuid() != 0:
        lacking("a jail takes root")
    log, old, jail = tmp_path / "log", tmp_path / "old", tmp_path / "jail"
    jail.mkdir()
    running = subprocess.Popen(
        [
            *(TWISTD, "-n", "--pidfile=", f"--logfile={log}", f"--chroot={jail}"),
            *("relayd", "-l", "unix:/s", "-d", "unix:/t"),
        ],
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        eventually(lambda: said(log, "listening on unix:/s"))
        log.rename(old)
        running.send_signal(signal.SIGUSR1)
        eventually(lambda: said(old, rf"SIGUSR1: can't open {log}: No such file"))
        running.send_signal(signal.SIGHUP)
        eventually(lambda: said(old, "SIGHUP: going on"))
        running.send_signal(signal.SIGTERM)
        assert running.wait(START) == 0
        assert list(jail.iterdir()) == []
    finally:
        running.kill()
        running.wait()
