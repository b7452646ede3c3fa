"""The unit for systemd in contrib/: it is valid, strict, and a relay works under it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.process import (
    PATIENCE,
    TWISTD,
    RelayProcess,
    Server,
    UdpServer,
    command,
    connect,
    eventually,
    udp_client,
)
from tests.system.programs import LIMIT, program

pytestmark = pytest.mark.system

UNIT = Path(__file__).parent.parent.parent / "contrib" / "relayd.service"

#: The most that `systemd-analyze security` may find, of 100; a service without any of
#: this has 96.
EXPOSURE = 20

#: The first systemd with `Type=notify-reload`, and what the others say of it.
RELOADS_SINCE = 253
TOO_OLD = "Failed to parse service type, ignoring: notify-reload\n"


def analyze(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `systemd-analyze`."""
    return subprocess.run(
        [program("systemd-analyze"), *args],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def unknown(output: str) -> str:
    """What is said of the unit, but for what this systemd may be too old to know."""
    version = analyze("--version").stdout.split()[1]
    if int(version.partition(".")[0]) >= RELOADS_SINCE:
        return output
    lines = output.splitlines(keepends=True)
    return "".join(each for each in lines if not each.endswith(TOO_OLD))


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with this environment's `twistd`."""
    path = tmp_path / "relayd.service"
    path.write_text(UNIT.read_text().replace("/usr/bin/twistd", TWISTD))
    return path


def test_the_unit_is_valid(unit: Path) -> None:
    """No word in it is unknown to systemd."""
    found = analyze("verify", str(unit))
    assert (found.returncode, unknown(found.stdout + found.stderr)) == (0, "")


def test_the_unit_is_strict(unit: Path) -> None:
    found = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", str(unit))
    assert found.returncode == 0, found.stdout[-2000:]


def calls_of(name: str) -> set[str]:
    """The system calls of a filter's set, with those of the sets in it."""
    lines = analyze("syscall-filter", name).stdout.splitlines()[1:]
    words = [word for line in lines for word in line.split("#")[0].split()]
    sets = [calls_of(word) for word in words if word.startswith("@")]
    return {word for word in words if not word.startswith("@")}.union(*sets)


def allowed() -> set[str]:
    """What the unit's filter allows: the first line is a list, others take away."""
    first, *others = re.findall(
        r"^SystemCallFilter=(.*)$", UNIT.read_text(), re.MULTILINE
    )
    calls = set[str]().union(*map(calls_of, first.split()))
    for line in others:
        assert line.startswith("~")
        calls -= set[str]().union(*map(calls_of, line[1:].split()))
    return calls


def test_a_relay_needs_no_call_that_the_unit_refuses(tmp_path: Path) -> None:
    """From its start to its end, with sessions, flows, a look-up and a reopened log."""
    trace = tmp_path / "trace"
    tracer = (program("strace"), "-f", "-qq", "-o", str(trace))
    with Server() as server, UdpServer() as datagrams:
        running = RelayProcess(
            *("-l", "127.0.0.1:0", "-d", f"localhost:{server.socket.getsockname()[1]}"),
            *("-l", "udp:127.0.0.1:0", "-d", datagrams.address),
            *("-l", f"unix:{tmp_path}/s", "-d", server.address),
            *("--access-log", str(tmp_path / "access")),
            twistd=(*tracer, *command()),
            env={
                "NOTIFY_SOCKET": f"@relayd-{tmp_path.name}",
                "WATCHDOG_USEC": "200000",
            },
        )
        try:
            stream, udp, _ = running.listening(3)
            port = int(stream.rpartition(":")[2])
            # strace's child, which comes first in what it writes.
            pid = int(trace.read_text().split(maxsplit=1)[0])
            for _ in range(2):
                with connect(port) as client, server.accept() as there:
                    there.sendall(bytes(1 << 20))
                    there.shutdown(socket.SHUT_WR)
                    left = 1 << 20
                    while left:
                        left -= len(client.recv(1 << 16))
                os.kill(pid, signal.SIGUSR1)
            with udp_client(int(udp.rpartition(":")[2])) as client:
                client.send(b"question")
                datagrams.send(*datagrams.receive())
                assert client.recv(100) == b"question"
            eventually(lambda: "session=2 " in (tmp_path / "access").read_text())
            os.kill(pid, signal.SIGTERM)
            assert running.wait(PATIENCE) == 0
        finally:
            running.stop()
    text = trace.read_text()
    assert "splice(" in text
    assert "recvmmsg(" in text
    used = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)", text, re.MULTILINE)) - {
        "resumed"
    }
    # What starts it: systemd's own, before the filter is there.
    refused = used - allowed() - {"execve", "exited", "killed"}
    assert refused == set()
