"""Routes of a relay in a process of its own: read as it starts, and by a reload."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.preludes.socks4 import REPLY_SIZE, Code
from tests.live.test_control_socket import ask
from tests.live.test_metrics import METRICS, get
from tests.support.live_relays import once
from tests.support.process import (
    RelayProcess,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
)

pytestmark = pytest.mark.usefixtures("connections_of")

#: Decides by the first word that a client says.
BY_WORD = """\
async def route(conn):
    word = (await conn.until(b"\\n", most=20)).strip().decode()
    conn.facts["word"] = word
    if word == "no":
        conn.reply(b"{}")
        conn.refuse("{}")
    return conn.pool(word) if word in ("default", "blue") else conn.server(word)
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    path = tmp_path / "modules"
    path.mkdir()
    return path


@contextmanager
def routed(
    modules: Path, *args: str, file: Path | None = None
) -> Iterator[RelayProcess]:
    """A relay whose modules are here."""
    options: dict[str, Any] = {"env": {"PYTHONPATH": str(modules)}}
    if file is None:
        args = ("-l", "127.0.0.1:0", "--route", "myroutes:route", *args)
    with relay(*args, **options) as running:
        yield running


def said(running: RelayProcess, word: str) -> bytes:
    """What a client hears that says a word, and ends its side."""
    with connect(running.port) as client:
        client.sendall(word.encode() + b"\n")
        return read_all(client)


def told(server: Server, running: RelayProcess, word: str) -> None:
    """A client that says a word is relayed to this server, which hears all of it."""
    with connect(running.port) as client:
        client.sendall(f"{word}\nmore".encode())
        with server.accept() as far:
            assert read_exactly(far, len(word) + 5) == f"{word}\nmore".encode()
            far.sendall(b"!")
            assert read_exactly(client, 1) == b"!"


def test_a_relay_goes_as_its_route_says(
    server: Server, modules: Path, tmp_path: Path
) -> None:
    """And the log, the metrics, the limits and an explanation say so."""
    (modules / "myroutes.py").write_text(BY_WORD.format("go away", "never"))
    control = tmp_path / "c"
    with Server() as blue, Server() as named:
        args = ("-d", server.address, "-d", f"{blue.address},pool=blue", *METRICS)
        steered = ("--control", f"unix:{control}", "--name", "web")
        with routed(modules, *args, *steered, "--max-deciding", "9") as running:
            for word, where in (
                ("default", server),
                ("blue", blue),
                (named.address, named),
            ):
                told(where, running, word)
            facts = {each["word"]: each for each in running.sessions(3)}
            assert facts["blue"]["pool"] == "blue"
            assert facts[named.address]["upstream"] == named.address
            assert said(running, "no") == b"go away"
            [refused] = running.ended("denied")
            assert (refused["word"], refused["detail"]) == ("no", "'never'")
            with connect(running.port) as silent:

                def deciding() -> bool:
                    _, listed = ask(control, "GET", "/v1/sessions")
                    return [x["stage"] for x in listed["sessions"]] == ["deciding"]

                eventually(deciding, "it is listed")
                assert 'relayd_deciding{relay="web"} 1.0' in get(running, "/metrics")[1]
                _, limits = ask(control, "GET", "/v1/limits")
                rows = {each["what"]: each for each in limits["limits"]}
                assert rows["max_deciding"]["limit"] == 9
                assert rows["max_deciding"]["now"] == 1
                silent.sendall(b"\n")
                running.ended("route_failed")
            body = {"relay": "web", "client": "10.9.9.9", "first": "blue\\n"}
            status, found = ask(control, "POST", "/v1/explain", body)
            assert (status, found["server"]) == (200, f"blue/{blue.address}")


def test_a_proxy_asks_its_route(server: Server, modules: Path) -> None:
    """What its client asks for is judged as ever; what the route names is its own."""
    with Server() as named:
        (modules / "myroutes.py").write_text(
            "async def route(conn):\n"
            "    conn.facts['user_id'] = conn.user_id.decode()\n"
            "    if conn.user_id == b'bad':\n"
            "        conn.refuse('banned')\n"
            "    if conn.user_id == b'other':\n"
            f"        return conn.server('{named.address}')\n"
            "    return conn.server(conn.requested)\n"
        )
        args = ("--listen", "127.0.0.1:0", "--route", "myroutes:route")
        port = int(server.address.rpartition(":")[2])
        with relay(*args, plugin="socks4", env={"PYTHONPATH": str(modules)}) as running:

            def ask_for(user: bytes, host: str = "127.0.0.1") -> socket.socket:
                # By name (4a), whatever it is.
                head = b"\4\1" + port.to_bytes(2) + b"\0\0\0\1" + user + b"\0"
                client = connect(running.port)
                client.sendall(head + host.encode() + b"\0?")
                return client

            for user, where in ((b"me", server), (b"other", named)):
                with ask_for(user) as client, where.accept() as far:
                    assert read_exactly(far, 1) == b"?"
                    assert read_exactly(client, REPLY_SIZE)[1] == Code.GRANTED
            for user, host in (
                (b"bad", "127.0.0.1"),
                (b"me", "255.255.255.255"),
                (b"me", "ssl:h:1:privateKey=/dev/stdin"),
            ):
                with ask_for(user, host) as client:
                    assert read_exactly(client, REPLY_SIZE)[1] == Code.REJECTED
            running.sessions(5)
            assert not [line for line in running.lines if "Traceback" in line]


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (
            "no_such:route",
            r"route no_such:route: there is no module no_such;",
        ),
        ("broken:route", r"broken:route: .*ZeroDivisionError: .*broken\.py:2\)"),
        ("myroutes:route", r"conn\.pool\('ssh'\).*: its pools are default"),
        ("myroutes:plain", "myroutes:plain: .*async def"),
    ],
)
@once
def test_a_route_that_can_not_be(modules: Path, route: str, said: str) -> None:
    (modules / "broken.py").write_text("\n1/0\n")
    (modules / "myroutes.py").write_text(
        'async def route(conn):\n    return conn.pool("ssh")\n'
        "def plain(conn):\n    return conn.pool()\n"
    )
    running = RelayProcess(
        *("-l", "127.0.0.1:0", "-d", "127.0.0.1:9", "--route", route),
        env={"PYTHONPATH": str(modules)},
    )
    try:
        assert running.wait() == 1
    finally:
        running.stop()
    [line] = running.lines
    assert line.startswith("relayd: ")
    assert re.search(said, line), line


@once
def test_a_reload_imports_it_anew(
    server: Server, modules: Path, tmp_path: Path
) -> None:
    """Twice within a second; one that fails changes nothing; nobody is cut off."""
    control, file, module = (tmp_path / "c", tmp_path / "r.toml", "myroutes.py")
    file.write_text(
        f'control = "unix:{control}"\n[tcp.web]\nlisten = "127.0.0.1:0"\n'
        f'dest = "{server.address}"\nroute = "myroutes:route"\n'
    )
    path = modules / module

    def write(reply: str) -> None:
        # Of the same size, and as old, as far as anybody can tell.
        path.write_text(BY_WORD.format(reply, "never"))
        os.utime(path, (1e9, 1e9))

    def reload() -> tuple[int, Any]:
        return ask(control, "POST", "/v1/reload", {})

    write("A")
    with routed(modules, "--config", str(file), file=file) as running:
        assert said(running, "no") == b"A"
        with connect(running.port) as client:
            # In the middle of a decision; it ends by the old one.
            client.sendall(b"no")
            eventually(
                lambda: ask(control, "GET", "/v1/sessions")[1]["sessions"],
                "it is there",
            )
            for reply in ("B", "C"):
                write(reply)
                status, answer = reload()
                assert (status, answer["unchanged"]) == (200, 1)
                assert answer["routes"] == ["myroutes:route"]
                assert said(running, "no") == reply.encode()
            client.sendall(b"\n")
            assert read_all(client) == b"A"
        running.wait_for("reloaded: read anew: the routes myroutes:route", 2)
        path.write_text("async def route(conn):\n    return (\n")
        status, answer = reload()
        assert status == 422
        [line] = answer["problems"]
        assert re.search(r"relay web: .*SyntaxError.*myroutes\.py:2\)", line)
        assert said(running, "no") == b"C"
        told(server, running, "default")
        running.signal(signal.SIGHUP)
        running.wait_for("SyntaxError")
        running.wait_for("nothing has changed")
        assert said(running, "no") == b"C"
        write("D")
        settings = {"settings": {"idle_timeout": 60}}
        assert ask(control, "PATCH", "/v1/relays/web", settings)[0] == 200
        assert said(running, "no") == b"C", "a change imports nothing"
        running.signal(signal.SIGHUP)
        eventually(lambda: said(running, "no") == b"D", "it is read anew")
