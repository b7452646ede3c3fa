"""A manager of services hears of a reload: systemd's Type=notify-reload.

The manager is a socket of the test's: systemd has that type since its version 253.
"""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.process import PATIENCE, RelayProcess, relay
from tests.system.operators import Operator

pytestmark = pytest.mark.system

RELAY = '[tcp.web]\nlisten = "127.0.0.1:0"\ndest = "127.0.0.1:9"\n'


def now() -> int:
    """CLOCK_MONOTONIC, in microseconds."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


class Managed:
    """A relay, and the socket of its manager."""

    def __init__(self, running: RelayProcess, told: socket.socket) -> None:
        self.relay, self._told = running, told

    def hears(self, first: str) -> list[str]:
        """The lines of the next datagram that begins with one."""
        while True:
            lines = self._told.recv(4096).decode().splitlines()
            if lines[0] == first:
                return lines

    def hears_of_a_reload(self, since: int) -> list[str]:
        """The whole of it; what is said besides, once it is over."""
        _, stamp = self.hears("RELOADING=1")
        found = re.fullmatch(r"MONOTONIC_USEC=(\d+)", stamp)
        assert found is not None
        assert since <= int(found[1]) <= now()
        return self.hears("READY=1")[1:]


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path)


@contextmanager
def managed(operator: Operator) -> Iterator[Managed]:
    head = f'control = "unix:{operator.socket}"\n'
    operator.writes(head + RELAY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(operator.folder / "notify"))
        told.settimeout(PATIENCE)
        env = {"NOTIFY_SOCKET": told.getsockname()}
        with relay("--config", str(operator.file), env=env) as running:
            found = Managed(running, told)
            found.hears("READY=1")
            yield found


def test_a_reload_by_a_signal(operator: Operator) -> None:
    with managed(operator) as it:
        since = now()
        operator.writes(operator.file.read_text() + "idle_timeout = 60\n")
        it.relay.signal(signal.SIGHUP)
        assert it.hears_of_a_reload(since) == []
        it.relay.wait_for("reloaded: changed web")


def test_a_reload_by_relayctl(operator: Operator) -> None:
    with managed(operator) as it:
        since = now()
        operator.runs("reload")
        assert it.hears_of_a_reload(since) == []


@pytest.mark.parametrize("how", ["signal", "relayctl"])
def test_a_reload_that_is_refused_is_over_too(operator: Operator, how: str) -> None:
    """It goes on with what it had, and says so; until the next one."""
    with managed(operator) as it:
        right = operator.file.read_text()
        operator.writes(right + "desst = 1\n")
        since = now()
        if how == "signal":
            it.relay.signal(signal.SIGHUP)
        else:
            operator.runs("reload", code=5)
        [status] = it.hears_of_a_reload(since)
        assert re.fullmatch(
            r"STATUS=0 sessions, 0 flows; the last reload was refused: .*desst.*",
            status,
        )
        operator.writes(right)
        since = now()
        it.relay.signal(signal.SIGHUP)
        assert it.hears_of_a_reload(since) == ["STATUS=0 sessions, 0 flows"]
