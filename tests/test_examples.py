"""The programs in `examples/`, run as their readers would run them."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from relayd.ctl.control_client import ControlClient
from tests.support.process import (
    PATIENCE,
    START,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
)

EXAMPLES = Path(__file__).parent.parent / "examples"


@contextmanager
def example(name: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The program, and the port that its first line names."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *args],
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout is not None
            line = program.stdout.readline()
            found = re.search(r"(\d+)/?$", line)
            assert found, line
            yield program, int(found[1])
        finally:
            program.kill()


def test_beside_a_site() -> None:
    with example("beside_a_site.py", "0", "0") as (program, port):
        with connect(port) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = read_all(client)
        assert answer.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
        assert answer.endswith(b"hello, 127.0.0.1\n")
        program.terminate()
        # Twisted's reactor dies of the signal that stopped it, or ends.
        assert program.wait(PATIENCE) in (0, -15)


def test_own_endpoint_says_what_is_wrong() -> None:
    for args, says in (
        (["8080"], "usage: own_endpoint.py"),
        (["nonsense:", "1", "2"], "bad address 'nonsense:'"),
        (["192.0.2.1:80", "1", "2"], "can't listen on 192.0.2.1:80"),
    ):
        program = subprocess.run(
            [sys.executable, str(EXAMPLES / "own_endpoint.py"), *args],
            capture_output=True,
            text=True,
            timeout=START,
            check=False,
        )
        assert program.returncode == 1
        [line] = program.stderr.splitlines()
        assert says in line


def test_own_endpoint_turns_to_the_spare() -> None:
    with Server() as main, Server() as spare:
        args = ("127.0.0.1:0", main.address, spare.address)
        with example("own_endpoint.py", *args) as (program, port):
            assert program.stdout is not None
            for server in (main, spare):
                with connect(port) as client:
                    client.sendall(b"hello")
                    upstream = server.accept()
                    assert read_exactly(upstream, 5) == b"hello"
                    upstream.close()
                    assert read_all(client) == b""
                line = program.stdout.readline()
                assert f"-> {server.address}: " in line
                main.close()
            assert "{'done': 2}" in line


class Patroni(BaseHTTPRequestHandler):
    """What says of a database what it is to its cluster."""

    def do_GET(self) -> None:
        server: Any = self.server
        self.send_response(200)
        self.end_headers()
        xlog = {"received_location": 5 << 20, "replayed_location": 4 << 20}
        state = {"state": "running", "role": server.role, "xlog": xlog}
        self.wfile.write(json.dumps(state).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def saying(name: bytes, host: str) -> Iterator[str]:
    """A server that says its name to whoever comes: its address."""
    with Server(address=(host, 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with server.accept() as connection:
                        connection.sendall(name)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.address
        server.socket.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextmanager
def patroni(host: str, port: int) -> Iterator[Any]:
    """What runs beside a database; it has a `role`."""
    with HTTPServer((host, port), Patroni) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def told(port: int) -> bytes:
    """What a client is told; nothing if no server is up."""
    with connect(port) as client, suppress(ConnectionResetError):
        return client.recv(1)
    return b""


def test_replica_checks() -> None:
    """A role that moves from one database to the other, and a relay to each."""
    hosts = "127.0.0.1", "127.0.0.2"
    with ExitStack() as stack:
        first = stack.enter_context(patroni(hosts[0], 0))
        port = first.server_address[1]
        beside = first, stack.enter_context(patroni(hosts[1], port))
        where = [
            stack.enter_context(saying(name, host))
            for name, host in zip((b"0", b"1"), hosts, strict=True)
        ]
        args = ["--check-every", "50ms", "--fall", "1", "--rise", "1"]
        for name in ("primary", "replica"):
            args += ["--listen", "127.0.0.1:0"]
            for each in where:
                args += ["--dest", f"{each},check=python:replica_checks:{name}"]
        env = {"PYTHONPATH": str(EXAMPLES), "PATRONI_PORT": str(port)}
        beside[0].role, beside[1].role = "primary", "replica"
        running = stack.enter_context(relay(*args, env=env))
        to_primary, to_replica = (
            int(each.rpartition(":")[2]) for each in running.listening(2)
        )

        def is_primary(name: bytes, other: bytes) -> bool:
            found = [(told(to_primary), told(to_replica)) for _ in range(2)]
            return found == [(name, other)] * 2

        eventually(lambda: is_primary(b"0", b"1"), "the first is the primary")
        beside[0].role, beside[1].role = "replica", "primary"
        eventually(lambda: is_primary(b"1", b"0"), "the other is the primary")
        beside[1].role = "replica"
        eventually(lambda: told(to_primary) == b"", "there is no primary")


def socks4_answer(port: int, server: Server, user_id: bytes = b"") -> bytes:
    """Ask a proxy for a server, and that for an answer; what the proxy sent."""
    where = int(server.address.rpartition(":")[2]).to_bytes(2)
    with connect(port) as client:
        client.sendall(b"\x04\x01" + where + b"\x7f\x00\x00\x01" + user_id + b"\0hello")
        reply = read_exactly(client, 8)
        if reply[1] != 90:
            return reply + read_all(client)
        with server.accept() as upstream:
            assert read_exactly(upstream, 5) == b"hello"
            upstream.sendall(b"answer")
        return reply + read_all(client)


def test_chained_proxies() -> None:
    with Server() as server, relay("-l", "127.0.0.1:0", plugin="socks4") as second:
        args = ("127.0.0.1:0", f"127.0.0.1:{second.port}")
        with example("chained_proxies.py", *args) as (_, port):
            answer = socks4_answer(port, server)
            assert answer[:2] == b"\0\x5a"
            assert answer[8:] == b"answer"
        [session] = second.ended("done")
        assert session["requested"] == server.address


def test_chained_proxies_pass_a_refusal_on() -> None:
    with Server() as server:
        with relay("-l", "127.0.0.1:0", "--deny-dest", "*", plugin="socks4") as second:
            args = ("127.0.0.1:0", f"127.0.0.1:{second.port}")
            with example("chained_proxies.py", *args) as (_, port):
                assert socks4_answer(port, server) == b"\0\x5b" + bytes(6)


def test_users_table(tmp_path: Path) -> None:
    table = tmp_path / "users.toml"
    with Server() as server:
        port_of = server.address.rpartition(":")[2]
        table.write_text(
            f'[users]\nalice = ["127.0.0.0/8:{port_of}"]\nbob = ["*.example.com"]\n'
        )
        with example("users_table.py", "127.0.0.1:0", str(table)) as (_, port):
            assert socks4_answer(port, server, b"alice")[8:] == b"answer"
            for user_id in (b"bob", b"eve"):
                assert socks4_answer(port, server, user_id) == b"\0\x5b" + bytes(6)


def test_users_table_says_what_is_wrong(tmp_path: Path) -> None:
    table = tmp_path / "users.toml"
    table.write_text('[users]\nbob = ["10.0.0.0/33"]\n')
    program = subprocess.run(
        [sys.executable, str(EXAMPLES / "users_table.py"), "127.0.0.1:0", str(table)],
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert program.returncode == 1
    [line] = program.stderr.splitlines()
    assert "10.0.0.0/33" in line


#: Runs trial where nothing of the tests' own is installed.
PLAIN = """
import sys
for name in ("pytest", "pytest_twisted", "hypothesis", "_pytest", "OpenSSL"):
    sys.modules[name] = None
# The collection after each test need not look at what is imported.
import gc
import relayd.testing
from twisted.internet import reactor
from twisted.scripts import trial
gc.freeze()
sys.argv[0] = "trial"
trial.run()
"""


def test_own_transport_contract_runs_by_trial_without_pytest(tmp_path: Path) -> None:
    program = subprocess.run(
        [sys.executable, "-c", PLAIN, str(EXAMPLES / "own_transport_contract.py")],
        capture_output=True,
        text=True,
        timeout=2 * START,
        cwd=tmp_path,
        check=False,
    )
    assert program.returncode == 0, program.stdout + program.stderr
    assert "PASSED" in program.stdout


def test_gate_by_table(tmp_path: Path) -> None:
    """Who is in the table comes in, as often as it says; a change is seen at once."""
    path = tmp_path / "clients.db"

    def change(statement: str) -> None:
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(statement)

    def is_refused(port: int) -> bool:
        try:
            # It may be reset before this process hears that it is connected.
            with connect(port) as client:
                return client.recv(1) == b"?"
        except ConnectionResetError:
            return True

    change("create table clients (host text primary key, sessions int)")
    with Server() as server:
        args = ("127.0.0.1:0", server.address, str(path))
        with example("gate_by_table.py", *args) as (program, port):
            assert is_refused(port)
            change("insert into clients values ('127.0.0.1', 1)")
            for _ in range(2):
                with connect(port) as client, server.accept() as upstream:
                    client.sendall(b"hello")
                    assert read_exactly(upstream, 5) == b"hello"
                    assert is_refused(port)
                    client.shutdown(socket.SHUT_WR)
                    upstream.close()
                    assert read_all(client) == b""
            program.terminate()
            assert program.wait(PATIENCE) in (0, -15)


def test_gate_by_table_says_what_is_wrong(tmp_path: Path) -> None:
    for args, says in (
        (["8080"], "usage: gate_by_table.py"),
        (["nonsense:", "1", "x.db"], "bad address 'nonsense:'"),
        (["udp:1", "1", "x.db"], "relays streams"),
        (["127.0.0.1:0", "1", str(tmp_path / "none.db")], "no such table: clients"),
    ):
        program = subprocess.run(
            [sys.executable, str(EXAMPLES / "gate_by_table.py"), *args],
            capture_output=True,
            text=True,
            timeout=START,
            check=False,
        )
        assert program.returncode == 1
        [line] = program.stderr.splitlines()
        assert says in line


def test_steered(tmp_path: Path) -> None:
    """It relays, and has a control socket."""
    with (
        Server() as one,
        Server() as other,
        subprocess.Popen(
            [
                *(sys.executable, str(EXAMPLES / "steered.py"), "127.0.0.1:0"),
                *(one.address, other.address),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        ) as program,
    ):
        try:
            assert program.stdout is not None
            lines = iter(program.stdout.readline, "")
            listening = next(line for line in lines if "listening on" in line)
            found = re.search(r"127\.0\.0\.1:(\d+), relay=web", listening)
            assert found is not None
            # It opens after the relays.
            assert any("control socket at" in line for line in lines)
            told = ControlClient(f"unix:{tmp_path}/steered.sock").get("/v1/relays/web")
            assert told["listen"] == [f"127.0.0.1:{found[1]}"]
            # The first server has its turn, or the other.
            dest = told["dest"][0]
            with connect(int(found[1])) as client:
                client.sendall(b"hello")
                server = one if dest == one.address else other
                with server.accept() as upstream:
                    assert read_exactly(upstream, 5) == b"hello"
        finally:
            program.terminate()
            program.communicate(timeout=PATIENCE)
