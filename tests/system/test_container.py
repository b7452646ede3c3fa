"""The first process of a container, which is a pid namespace.

The kernel drops what such a process has no handler for, SIGTERM among that; so whatever
ends a container waits for its grace, ten seconds mostly, and then kills it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.process import (
    PATIENCE,
    START,
    RelayProcess,
    Server,
    command,
    eventually,
)
from tests.system.programs import lacking, program

pytestmark = pytest.mark.system


@contextmanager
def first_process(*args: str) -> Iterator[tuple[RelayProcess, int]]:
    """A relay as process 1 of a namespace of its own, and its number out here."""
    unshare = program("unshare")
    if os.geteuid() != 0:
        lacking("a pid namespace takes root")
    inside = (unshare, "--pid", "--fork", "--mount-proc", "--kill-child")
    running = RelayProcess(*args, twistd=(*inside, *command()))
    try:
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}")
        eventually(lambda: (children / "children").read_text().strip(), "it is forked")
        yield running, int((children / "children").read_text())
    finally:
        running.stop()


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = [line for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_signal_that_comes_before_the_relay_runs() -> None:
    """It is kept from when our own code is loaded; the relay stops as it has begun."""
    with first_process("-l", "127.0.0.1:0", "-d", "80") as (running, pid):
        limit = time.monotonic() + START
        while not handles(pid, signal.SIGTERM):
            assert time.monotonic() < limit
            time.sleep(0.001)
        # It may go on before the signal comes.
        begun = any("listening" in line for line in running.lines)
        os.kill(pid, signal.SIGTERM)
        assert not begun
        assert running.wait(START) == 0
        running.wait_for("SIGTERM: stopping")


def test_a_signal_that_comes_when_the_relay_runs() -> None:
    """And one that has no meaning for it ends nothing."""
    with (
        Server() as server,
        first_process("-l", "127.0.0.1:0", "-d", server.address) as (running, pid),
    ):
        running.listening()
        eventually(lambda: handles(pid, signal.SIGCHLD))
        for number, says in (
            (signal.SIGHUP, "SIGHUP: "),
            (signal.SIGUSR1, "SIGUSR1: no log file to reopen"),
            (signal.SIGTERM, "SIGTERM: stopping"),
        ):
            os.kill(pid, number)
            running.wait_for(says)
        assert running.wait(PATIENCE) == 0
