"""The unit for systemd in contrib/: it is valid, strict, and a relay works under it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
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
from tests.system.gateway import V4, accepted, asking, gateway, listening, says
from tests.system.namespaces import Machine, made
from tests.system.programs import LIMIT, program, run

pytestmark = pytest.mark.system

UNIT = Path(__file__).parent.parent.parent / "contrib" / "relayd.service"

RELAYCTL = str(Path(TWISTD).with_name("relayctl"))

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
    """The unit, with this environment's `twistd` and `relayctl`."""
    path = tmp_path / "relayd.service"
    text = UNIT.read_text().replace("/usr/bin/twistd", TWISTD)
    path.write_text(text.replace("/usr/bin/relayctl", RELAYCTL))
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


#: The file of a relay that takes what is meant for others.
TRANSPARENT = """\
[tcp.web]
listen = "16000"
dest = "192.168.0.1:80"
transparent = true
intercept = "192.168.0.2:80"

[udp.dns]
listen = "16000"
dest = "original"
transparent = true
intercept = "192.168.0.2:53"
"""


@pytest.fixture
def machine() -> Iterator[Machine]:
    program("nft")
    with made("unit") as [one]:
        yield one


def commands(unit: Path, key: str, file: Path) -> list[list[str]]:
    """What the unit runs there, with another file; each as root, with all rights."""
    found = []
    for line in re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE):
        signs, words = re.fullmatch(r"([-+]*)(.*)", line).groups()  # type: ignore[union-attr]
        assert "+" in signs
        found.append(words.replace("/etc/relayd/relayd.toml", str(file)).split())
    assert found
    return found


def state(machine: Machine) -> str:
    words = ("nft list ruleset", "ip -4 rule", "ip -6 rule")
    routes = [f"ip -{each} route show table all" for each in (4, 6)]
    return "".join(run(*machine.runs(*each.split())) for each in (*words, *routes))


def test_rules_are_there_while_it_runs(
    unit: Path, machine: Machine, tmp_path: Path
) -> None:
    """Once, however often it starts; after it has stopped they are gone, whatever has
    become of the file."""
    there = state(machine)
    file = tmp_path / "relayd.toml"
    file.write_text(TRANSPARENT)
    for _ in range(2):
        for words in commands(unit, "ExecStartPre", file):
            run(*machine.runs(*words))
    assert state(machine).count("redirect to :16000") == 1
    file.write_text("[tcp.web]\nlisten = ")
    for _ in range(2):
        for words in commands(unit, "ExecStopPost", file):
            run(*machine.runs(*words))
        assert state(machine) == there
    # Most relays need none of that, nor what it takes to change rules.
    file.write_text('[tcp.web]\nlisten = "8080"\ndest = "192.168.0.1:80"\n')
    for words in commands(unit, "ExecStartPre", file):
        run(*machine.runs(program("setpriv"), "--bounding-set=-net_admin", *words))


def test_its_rights_are_enough_for_transparent_relays(
    unit: Path, tmp_path: Path
) -> None:
    """And for ports below 1024; they don't let it change rules, which it need not."""
    [line] = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    rights = ",".join(each.lower().replace("cap_", "+") for each in line.split())
    assert rights == "+net_bind_service,+net_raw"
    assert f"AmbientCapabilities={line}\n" in UNIT.read_text()
    drop = (program("setpriv"), f"--bounding-set=-all,{rights}")
    file = tmp_path / "relayd.toml"
    file.write_text(TRANSPARENT.replace("16000", "16"))
    with gateway() as network:
        there = network.state()
        for words in commands(unit, "ExecStartPre", file):
            run(*network.relay.runs(*words))
        running = RelayProcess(
            *("--config", str(file)), twistd=(*network.relay.runs(*drop), *command())
        )
        try:
            running.listening(2)
            caps = Path(f"/proc/{running.process.pid}/status").read_text()
            found = re.search(r"CapEff:\s+(\w+)", caps)
            assert found
            # Bits 10 and 13 of linux/capability.h.
            assert int(found[1], 16) == 1 << 10 | 1 << 13
            with (
                listening(network, V4.server) as to,
                asking(network, V4.asked) as client,
            ):
                server, peer = accepted(to)
                with server:
                    assert peer.startswith(f"{V4.client}:")
                    says(client, server, b"question")
                    says(server, client, b"answer")
            assert not any("CAP_" in each for each in running.lines)
        finally:
            running.stop()
        for words in commands(unit, "ExecStopPost", file):
            run(*network.relay.runs(*words))
        assert network.state() == there
