"""The control socket of a relay in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    eventually,
    relay,
)


class Connection(HTTPConnection):
    """To a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(path: Path, method: str, target: str, body: Any = None) -> tuple[int, Any]:
    """A request: the status, and the answer."""
    client = Connection(path)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        data = None if body is None else json.dumps(body)
        client.request(method, target, data, headers)
        answer = client.getresponse()
        return answer.status, json.load(answer)
    finally:
        client.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


@pytest.mark.usefixtures("connections_of")
def test_what_runs_is_seen_and_steered(server: Server, path: Path) -> None:
    args = ("--control", f"unix:{path}", "--name", "web")
    with relay(*args, "-l", "127.0.0.1:0", "-d", server.address) as running:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        status, said = ask(path, "GET", "/v1/status")
        assert (status, said["state"], said["relays"]) == (200, "running", 1)
        with connect(running.port) as client, server.accept() as far:
            client.sendall(b"hello")
            assert far.recv(5) == b"hello"
            _, listed = ask(path, "GET", "/v1/sessions?relay=web")
            [session] = listed["sessions"]
            assert session["bytes_up"] == 5
            host, port = client.getsockname()
            assert session["client"] == f"{host}:{port}"
            killed = ask(path, "POST", "/v1/kill", {"sessions": [session["id"]]})
            assert killed == (200, {"killed": 1})
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        me = f"uid {os.getuid()}, pid {os.getpid()}: POST /v1/kill"
        running.wait_for(rf"{me} \{{\"sessions\": \[{session['id']}\]\}}: done")


def relayctl(path: Path, *words: str, **more: Any) -> subprocess.Popen[bytes]:
    """A process of it."""
    program = "from relayd.ctl.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "--control", str(path), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **more)


@pytest.mark.usefixtures("connections_of")
def test_what_a_session_says_is_captured_until_ctrl_c(
    server: Server, path: Path
) -> None:
    """The file has all of it, and its end; faults come and go meanwhile."""
    args = ("--control", f"unix:{path}", "--name", "web")
    with (
        relay(*args, "-l", "127.0.0.1:0", "-d", server.address) as running,
        connect(running.port) as client,
        server.accept() as far,
    ):
        client.sendall(b"hello")
        assert far.recv(5) == b"hello"
        [session] = ask(path, "GET", "/v1/sessions")[1]["sessions"]
        file = path.with_name("s.pcapng")
        with file.open("wb") as output:
            capture = relayctl(path, "capture", str(session["id"]), stdout=output)

        def filters() -> Any:
            return ask(path, "GET", "/v1/sessions")[1]["sessions"][0]["filters"]

        eventually(lambda: filters() == ["capture"], "a capture")
        change = {"settings": {"filter": ["latency:latency=1"]}}
        assert ask(path, "PATCH", "/v1/relays/web", change)[0] == 200
        assert filters() == ["capture", "latency"]
        client.sendall(b"a question")
        assert far.recv(10) == b"a question"
        far.sendall(b"an answer")
        assert client.recv(9) == b"an answer"
        eventually(lambda: b"an answer" in file.read_bytes(), "what it says")
        capture.send_signal(signal.SIGINT)
        _, said = capture.communicate(timeout=PATIENCE)
        assert capture.returncode == 0, said
        assert said == (
            b"the capture has ended: the session goes on; no packet dropped\n"
        )
        assert b"a question" in file.read_bytes()
        change = {"settings": {"filter": None}}
        assert ask(path, "PATCH", "/v1/relays/web", change)[0] == 200
        assert filters() == []
        client.sendall(b"on")
        assert far.recv(2) == b"on"
        what = f"GET /v1/sessions/{session['id']}/capture: ended: its client has ended"
        running.wait_for(f"uid {os.getuid()}, pid {capture.pid}: {what}")


def test_totals_are_of_sessions_from_before_a_change_too(
    server: Server, path: Path
) -> None:
    # Without metrics nobody counts bytes.
    metrics = path.with_name("m")
    args = ("--control", f"unix:{path}", "--metrics", f"unix:{metrics}")
    with relay(
        *args, "--name", "web", "-l", "127.0.0.1:0", "-d", server.address
    ) as running:
        with connect(running.port) as client, server.accept() as far:
            client.sendall(b"hello")
            assert far.recv(5) == b"hello"
            change = {"settings": {"idle_timeout": "10m"}}
            _, row = ask(path, "PATCH", "/v1/relays/web", change)
            assert (row["older_sessions"], row["bytes_up"]) == (1, 5)
        eventually(lambda: ask(path, "GET", "/v1/relays/web")[1]["sessions"] == 0)
        _, row = ask(path, "GET", "/v1/relays/web")
        assert (row["older_sessions"], row["bytes_up"]) == (0, 5)


def test_it_answers_while_the_relay_drains(server: Server, path: Path) -> None:
    args = ("--control", f"unix:{path}", "--drain-timeout", "60")
    with relay(*args, "-l", "127.0.0.1:0", "-d", server.address) as running:
        with connect(running.port), server.accept():
            running.signal(signal.SIGTERM)
            eventually(
                lambda: ask(path, "GET", "/v1/status")[1]["state"] != "running",
                "it says that it stops",
            )
            _, listed = ask(path, "GET", "/v1/sessions")
            assert listed["matched"] == 1
        assert running.wait() == 0
        assert not path.exists()


def test_a_socket_that_can_not_be_opened_is_one_line(tmp_path: Path) -> None:
    where = tmp_path / "no" / "c"
    failed = RelayProcess("--control", f"unix:{where}", "-l", "0", "-d", "127.0.0.1:1")
    status = failed.process.wait(PATIENCE)
    failed.stop()
    assert status == 1
    [line] = [each for each in failed.lines if "--control" in each]
    assert line.endswith(f"there is no folder {where.parent}: make it")
    assert not [each for each in failed.lines if "Traceback" in each]
