"""The relay under test: its process, its log, and its figures from /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import attrs

#: The folder of `soak`, and of the relay under test.
ROOT = Path(__file__).parent.parent

MIB = 1024 * 1024

#: Seconds in which a relay without sessions must stop.
STOPPING = 5.0


class RelayFailed(Exception):
    """The relay did not start, or ended by itself."""


@attrs.frozen
class Reading:
    """The resources of a process at one moment.

    :ivar sockets: descriptors.
    :ivar pipes: descriptors; a pipe has two.
    :ivar other: descriptors of anything else.
    :ivar rss: bytes.
    :ivar cpu: seconds of CPU since it began.
    """

    sockets: int
    pipes: int
    other: int
    rss: int
    threads: int
    cpu: float

    def __str__(self) -> str:
        return (
            f"sockets {self.sockets}, pipes {self.pipes}, other {self.other},"
            f" rss {self.rss / MIB:.1f} MiB, threads {self.threads}"
        )


def count_kinds(targets: Sequence[str]) -> Counter[str]:
    """How many descriptors are a "socket", a "pipe", or "other".

    :param targets: what the links in /proc/PID/fd point to.
    """
    kinds = (target.partition(":[")[0] for target in targets)
    return Counter(kind if kind in ("socket", "pipe") else "other" for kind in kinds)


def read_process(pid: int) -> Reading:
    """Read a process's figures.

    :raises OSError: it is gone.
    """
    folder = Path(f"/proc/{pid}")
    targets = []
    for name in os.listdir(folder / "fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            targets.append(os.readlink(folder / "fd" / name))
    kinds = count_kinds(targets)
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines()
    )
    # proc(5): the fields behind the command, which is in brackets; 14 and 15 of all.
    times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
    return Reading(
        kinds["socket"],
        kinds["pipe"],
        kinds["other"],
        # A zombie has no memory.
        int(status.get("VmRSS", "0").split()[0]) * 1024,
        int(status["Threads"]),
        sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
    )


class Relay:
    """A `twistd relayd` in a process of its own, with a wall clock of its own.

    :param clock: the arguments of :mod:`soak.clock`.
    :param options: of `relayd`.
    :ivar lines: of its log, not read yet.
    """

    def __init__(
        self, clock: Sequence[str], reactor: str, options: Sequence[str]
    ) -> None:
        program = [sys.executable, "-m", "soak.clock", *clock]
        twistd = ["-n", "--pidfile=", f"--reactor={reactor}"]
        self.command = [*program, *twistd, "relayd", *options]
        self.lines: deque[str] = deque()
        self._process = subprocess.Popen(  # noqa: S603 - the command is ours
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            # Ctrl-C at the terminal must not reach it: this process ends it.
            start_new_session=True,
        )
        # A thread, since the relay blocks if its log is not read in time.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip("\n"))

    def read(self) -> Reading:
        """Its present figures.

        :raises RelayFailed: it has ended.
        """
        if (status := self._process.poll()) is not None:
            raise RelayFailed(f"the relay ended by itself, with status {status}")
        try:
            return read_process(self._process.pid)
        except OSError as problem:
            raise RelayFailed("the relay is just ending by itself") from problem

    def suspend(self) -> None:
        """Stop it (SIGSTOP)."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue it, if it was stopped."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> tuple[int | None, float]:
        """End it; its exit status, None if it was killed, and the seconds it took."""
        began_at = time.monotonic()
        self.resume()
        self._process.terminate()
        try:
            status: int | None = self._process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = None
        took = time.monotonic() - began_at
        self._reader.join(STOPPING)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status, took
