"""The log of a running relay, whose reader may do as it pleases."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import (
    PATIENCE,
    START,
    TWIST,
    RelayProcess,
    Server,
    command,
    connect,
    eventually,
    own_host,
    read_all,
    relay,
)

#: A request that is denied, and makes a line of more than a kilobyte.
DENIED = b"\x04\x01\x00\x50\x7f\x00\x00\x01" + b"\xff" * 255 + b"\x00"

#: More such lines than a pipe, and what waits behind it, can hold: 64 KiB and 1 MiB.
MANY = 1_250

LOST = re.compile(r"(\d+) lines of the (?:access )?log were lost, (\d+) in all")


@contextmanager
def proxy(
    output: int, *args: str, shell: str = "", runner: tuple[str, ...] = ()
) -> Iterator[Any]:
    """A proxy that denies all, with this standard output; and its port.

    :param shell: what a shell does before.
    :param runner: options of `twistd`.
    """
    with socket.create_server((own_host(), 0)) as probe:
        port = probe.getsockname()[1]
    argv = [*command(), *runner, "socks4", "-l", f"{own_host()}:{port}"]
    argv += ["--deny-dest", "*", *args]
    process = subprocess.Popen(
        ["sh", "-c", f'{shell} exec "$@"', "sh", *argv],
        stdout=output,
        stderr=subprocess.PIPE,
    )
    try:

        def listens() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex((own_host(), port)) == 0

        eventually(listens, "it listens", patience=START)
        yield process, port
    finally:
        process.kill()
        process.communicate()


def deny(port: int, times: int) -> None:
    """Have so many sessions, each of which is answered."""
    for _ in range(times):
        with connect(port, own_host()) as client:
            client.sendall(DENIED)
            assert read_all(client)[1] == 91


def sessions(text: str) -> int:
    """How many whole lines of denied sessions there are."""
    lines = text.splitlines()
    return sum("[relayd.session#info] session=" in x and "denied" in x for x in lines)


def test_a_reader_that_stops_and_comes_back() -> None:
    """Sessions go on; what is lost is counted to the line, and said."""
    reader, writer = os.pipe()
    with open(reader) as log, proxy(writer) as (process, port):
        os.close(writer)
        deny(port, MANY)
        lines = []
        while not (found := LOST.search(line := log.readline())):
            lines.append(line)
        text, lost = "".join(lines), int(found[1])
        assert lost > 0
        assert sessions(text) + lost == MANY
        deny(port, 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        text += log.read()
        assert sessions(text) + lost == MANY + 10
        assert "Server Shut Down." in text


def all_of(reader: int) -> str:
    """What there is to be read."""
    parts = []
    os.set_blocking(reader, False)
    with suppress(BlockingIOError):
        while part := os.read(reader, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode().replace("\r", "")


@pytest.mark.parametrize(
    "kind", ["pipe", "named pipe", "socket", "terminal", "full", "closed"]
)
def test_a_log_that_nobody_reads(kind: str) -> None:
    """SIGTERM ends it as ever, and what is lost is counted: there, or on its errors."""
    count = 20 if kind in ("full", "closed") else MANY
    descriptors = []
    if "pipe" in kind:
        descriptors = list(os.pipe())
    elif kind == "socket":
        descriptors = [each.detach() for each in socket.socketpair()]
    elif kind == "terminal":
        descriptors = list(pty.openpty())
        termios.tcflow(descriptors[1], termios.TCOOFF)
    else:
        descriptors = [-1, os.open("/dev/full", os.O_WRONLY)]
    reader, output = descriptors
    try:
        # Opened by /proc, a pipe is what one with a name is.
        shells = {"closed": "exec >&-;", "named pipe": "exec >/proc/self/fd/1;"}
        shell = shells.get(kind, "")
        with proxy(output, shell=shell) as (process, port):
            deny(port, count)
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0
        if kind == "terminal":
            termios.tcflow(output, termios.TCOON)
        text = error.decode() + (all_of(reader) if reader >= 0 else "")
        found = LOST.search(text)
        assert found is not None, text
        # The others are its own, of its start and its end.
        assert count <= sessions(text) + int(found[2]) <= count + 12
    finally:
        for each in (reader, output):
            if each >= 0:
                os.close(each)


AS_TEXT = (TWIST, "--log-format=text")


@pytest.mark.parametrize("runner", [(), AS_TEXT], ids=["twistd", "twist"])
def test_an_access_log_beside_the_log(runner: tuple[str, ...], tmp_path: Path) -> None:
    """Of sessions and of flows; it goes on by its name on SIGUSR1."""
    path, old = tmp_path / "access", tmp_path / "old"
    with Server() as server:
        running = RelayProcess(
            *("-l", "127.0.0.1:0", "-d", server.address),
            *("-l", "udp:127.0.0.1:0", "-d", f"udp:{server.address}"),
            *("--access-log", str(path)),
            twistd=runner,
        )
        try:
            ports = [int(x.rpartition(":")[2]) for x in running.listening(2)]
            eventually(running.running, "its reactor runs")
            end_a_session(ports[0], server)
            eventually(lambda: "session=1 " in path.read_text(), "it is written")
            path.rename(old)
            running.signal(signal.SIGUSR1)
            running.wait_for(f"SIGUSR1: the log goes on in {re.escape(str(path))}")
            end_a_session(ports[0], server)
            eventually(lambda: "session=2 " in path.read_text(), "it is written")
            running.signal()
            assert running.wait() == 0
        finally:
            running.stop()
    assert "[relayd.flow#info] datagrams relay=" in path.read_text()
    assert not any("session=" in line or "flow" in line for line in running.lines)
    assert len(old.read_text().splitlines()) == 1


def end_a_session(port: int, server: Server) -> None:
    """One that ends well."""
    with connect(port) as client, server.accept() as there:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(there) == b"hello"
        there.close()
        assert read_all(client) == b""


def test_an_access_log_that_can_not_be_opened_is_one_line(tmp_path: Path) -> None:
    """Nothing is started."""
    running = RelayProcess(
        "-l", "127.0.0.1:0", "-d", "80", "--access-log", str(tmp_path / "none" / "log")
    )
    assert running.wait() == 1
    assert running.lines == [
        (
            f"relayd: can't open the access log '{tmp_path}/none/log': No such file or"
            " directory: give another path"
        )
    ]
    running.stop()


def test_a_fifo_whose_reader_comes_later(tmp_path: Path) -> None:
    """Nothing is lost, nothing waits for it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with Server() as server:
        args = ("-l", "127.0.0.1:0", "-d", server.address, "--access-log", str(path))
        with relay(*args) as running:
            end_a_session(running.port, server)
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as log:
                eventually(lambda: "session=1 " in log.readline(), "it is there")
            running.signal()
            assert running.wait() == 0


@pytest.mark.parametrize("option", ["--access-log", "--logfile"])
def test_a_fifo_whose_reader_never_comes(option: str, tmp_path: Path) -> None:
    """What it holds is lost at the end, and counted as what waits is."""
    path, out = tmp_path / "fifo", tmp_path / "out"
    os.mkfifo(path)
    given = (option, str(path))
    args, runner = ((), given) if option == "--logfile" else (given, ())
    with (
        out.open("wb") as output,
        proxy(output.fileno(), *args, runner=runner) as (process, port),
    ):
        deny(port, 20)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    found = LOST.search(out.read_text() + error.decode())
    assert found is not None
    # The log has lines of its start and its end, too.
    assert 20 <= int(found[2]) <= (31 if option == "--logfile" else 20)


def objects(running: RelayProcess) -> list[dict[str, Any]]:
    """Its lines, each of which is a JSON object."""
    return [json.loads(line) for line in running.lines]


def test_a_log_in_json_is_an_object_a_line() -> None:
    """All of it: twistd's own lines, sessions, those that go on, UDP, and the end."""
    with Server() as server:
        server_port = int(server.address.rpartition(":")[2])
        running = RelayProcess(
            *("--name", "web", "-l", "127.0.0.1:0", "-d", server.address),
            *("-l", "udp:127.0.0.1:0", "-d", f"udp:{server.address}"),
            *("--log-format", "json", "--log-interval", "0.3"),
        )
        try:
            ports = [int(x.rpartition(":")[2]) for x in running.listening(2)]
            with connect(ports[0]) as client, server.accept() as there:
                # Without a byte, by the client: it has no line.
                client.close()
                assert there.recv(1) == b""
            end_a_session(ports[0], server)
            with connect(ports[0]) as client, server.accept() as there:
                client.sendall(b"hello")
                assert there.recv(9) == b"hello"
                running.wait_for('"relayd.session.interim"')
            running.signal(signal.SIGHUP)
            running.wait_for("SIGHUP")
            running.signal()
            assert running.wait() == 0
        finally:
            running.stop()
    made = objects(running)
    assert all("@timestamp" in each for each in made)
    assert {each["event.name"] for each in made} == {
        *("relayd.log", "relayd.session.interim", "relayd.session.closed"),
        "relayd.datagrams",
    }
    closed = [each for each in made if each["event.name"].endswith("session.closed")]
    assert [each["client.bytes"] for each in closed] == [5, 5]
    assert {each["relayd.relay"] for each in closed} == {"web"}
    assert closed[0]["event.outcome"] == "success"
    assert closed[0]["server.port"] == server_port
    assert 0 <= closed[0]["relayd.connect_seconds"] < PATIENCE
    [interim, *_] = [each for each in made if each["event.name"].endswith("interim")]
    assert interim["relayd.session.id"] == closed[1]["relayd.session.id"]
    assert interim["event.duration"] < closed[1]["event.duration"]


def test_a_json_log_of_twist_has_the_object_behind_its_own_prefix(
    tmp_path: Path,
) -> None:
    """An access log has nothing in front of it."""
    path = tmp_path / "access"
    for access in ((), ("--access-log", str(path))):
        with Server() as server:
            running = RelayProcess(
                *("-l", "127.0.0.1:0", "-d", server.address),
                *("--log-format", "json", *access),
                twistd=AS_TEXT,
            )
            try:
                eventually(running.running, "its reactor runs", patience=START)
                end_a_session(running.port, server)
                if access:
                    eventually(lambda: path.exists() and path.read_text(), "a line")
                    line = path.read_text()
                else:
                    [found] = running.wait_for(r" \[relayd\.session#info\] (\{.*\})$")
                    line = found[1]
                assert json.loads(line)["event.name"] == "relayd.session.closed"
            finally:
                running.stop()
