"""Relays from a configuration file, in a real process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from tests.support.endings import ending, one_line, runners
from tests.support.live_udp import exchange
from tests.support.process import (
    START,
    TWISTD,
    RelayProcess,
    Server,
    UdpServer,
    connect,
    eventually,
    own_host,
    read_all,
    read_exactly,
    relay,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@contextmanager
def from_file(path: Path, text: str, *words: str) -> Iterator[RelayProcess]:
    """A relay by a file, and further words of a command line."""
    path.write_text(text)
    with relay("--config", str(path), *words) as running:
        yield running


def echo(
    port: int, server: Server, host: str = "127.0.0.1", hello: bytes = b""
) -> None:
    """One session, from its beginning to its end; `hello` goes first."""
    with connect(port, host) as client:
        client.sendall(hello + b"up")
        if hello:
            assert read_exactly(client, 8)[:2] == write_reply(Code.GRANTED)[:2]
        with server.accept() as upstream:
            assert read_exactly(upstream, 2) == b"up"
            upstream.sendall(b"down")
            upstream.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"down"
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b""


def ports(running: RelayProcess, count: int) -> list[int]:
    return [int(each.rpartition(":")[2]) for each in running.listening(count)]


def test_one_process_serves_all_kinds(tmp_path: Path) -> None:
    """Each relay by its name, which is in the log."""
    with Server() as server, UdpServer() as datagrams:
        text = f"""
[tcp.web]
listen = ["127.0.0.1:0", "unix:{tmp_path}/web"]
dest = "{server.address}"
[udp.dns]
listen = "127.0.0.1:0"
dest = "{datagrams.address}"
udp_unreplied_timeout = "200ms"
[socks4.office]
listen = "127.0.0.1:0"
"""
        with from_file(tmp_path / "f.toml", text) as running:
            running.listening(4)
            for name in ("web", "dns", "office"):
                running.wait_for(f"listening on .* relay={name}, ")
            tcp, _, udp, socks = (
                each.rpartition(":")[2] for each in running.listening(4)
            )
            echo(int(tcp), server)
            with udp_client(int(udp)) as client:
                exchange(client, datagrams, b"ask", b"answer")
            host, _, port = server.address.partition(":")
            hello = write_request(Command.CONNECT, host, int(port))
            echo(int(socks), server, hello=hello)
            names = [each["relay"] for each in running.ended("done", 2)]
            assert names == ["web", "office"]
            assert running.flows()[0]["relay"] == "dns"


@runners
def test_a_bad_file_ends_with_all_its_lines(
    runner: tuple[str, ...], tmp_path: Path
) -> None:
    """And nothing was opened."""
    path = tmp_path / "f.toml"
    path.write_text(
        f"[tcp.a]\nlisten = 'unix:{tmp_path}/a'\ndest = '127.0.0.1:80'\n"
        "[tcp.b]\nlisten = '99999'\n[tcp.c]\nx = 1\n"
    )
    status, lines = ending(RelayProcess("--config", str(path), twistd=runner))
    assert status == 1
    ours = [line for line in lines if line.startswith("relayd: ")]
    assert [line.removeprefix(f"relayd: {path}: ")[:28] for line in ours] == [
        "tcp.b.listen: bad address '9",
        "tcp.c.x: no such key; see `r",
        "tcp.b: no destination: give ",
        "tcp.c: no listener: give lis",
        "tcp.c: no destination: give ",
    ]
    assert not [line for line in lines if "Traceback" in line or "listening" in line]
    assert list(tmp_path.iterdir()) == [path]


def test_json_from_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "generated"
    with Server() as server:
        relays = {"web": {"listen": ["127.0.0.1:0"], "dest": server.address}}
        path.write_text(json.dumps({"tcp": relays}))
        with (
            path.open() as stdin,
            relay("--config", "-", stdin=stdin, cwd=tmp_path) as running,
        ):
            echo(running.port, server)
            assert running.ended("done")[0]["relay"] == "web"


def test_a_folder_and_the_command_line(tmp_path: Path) -> None:
    """Relays of all of them; options are about each."""
    folder = tmp_path / "relayd.d"
    folder.mkdir()
    with Server() as server:
        for name in "ab":
            (folder / f"{name}.toml").write_text(
                f"[tcp.{name}]\nlisten = '127.0.0.1:0'\ndest = '{server.address}'\n"
                "idle_timeout = '1h'\n"
            )
        words = ["--name", "c", "--listen", "127.0.0.1:0", "--dest", server.address]
        with relay("--config", str(folder), "--idle-timeout", "1", *words) as running:
            for port in ports(running, 3):
                echo(port, server)
            names = [each["relay"] for each in running.ended("done", 3)]
            assert names == ["a", "b", "c"]
            with connect(ports(running, 3)[0]), server.accept():
                assert running.ended("idle")[0]["relay"] == "a"


def test_a_range_of_ports(tmp_path: Path) -> None:
    """Each is relayed to the port of the same number; TCP and UDP."""
    host = own_host()
    with ExitStack() as held:
        servers = [
            held.enter_context(Server(address=(host, port))) for port in (6000, 6001)
        ]
        hearing = [held.enter_context(UdpServer(host, port)) for port in (6000, 6001)]
        text = f"""
[tcp.web]
listen = "{host}:5000-5001"
dest = "{host}:6000-6001"
[udp.dns]
listen = "{host}:5000-5001"
dest = "{host}:6000-6001"
"""
        running = held.enter_context(from_file(tmp_path / "f.toml", text))
        assert running.listening(4) == [
            f"{udp}{host}:{port}" for udp in ("", "udp:") for port in (5000, 5001)
        ]
        for port, server in zip((5001, 5000), reversed(servers), strict=True):
            echo(port, server, host)
        for port, other in zip((5001, 5000), reversed(hearing), strict=True):
            with udp_client(port, host) as client:
                exchange(client, other, b"ask", b"answer")
        # Another relay of these ports finds the first in use.
        status, lines = ending(
            RelayProcess("-l", f"{host}:4999-5001", "-d", f"{host}:6000")
        )
        assert status == 1
        assert one_line(lines).endswith(
            f"relayd: can't listen on {host}:5000: Address already in use"
        )


def test_listeners_of_one_relay_of_datagrams(tmp_path: Path) -> None:
    """They share a table and its limit; a flow keeps the listener it came by."""
    with UdpServer() as server:
        text = (
            "[udp.dns]\nlisten = ['127.0.0.1:0', '127.0.0.1:0']\n"
            f"dest = '{server.address}'\nmax_flows = 2\nmax_flows_per_client = 2\n"
        )
        with (
            from_file(tmp_path / "f.toml", text) as running,
            ExitStack() as held,
        ):
            one, other = ports(running, 2)
            clients = [
                held.enter_context(udp_client(port)) for port in (one, other, one)
            ]
            # Each is connected to its listener, and hears that one only.
            for number, client in enumerate(clients):
                exchange(client, server, b"ask %d" % number, b"answer")
            [evicted] = running.flows(1, "ending=evicted")
            assert evicted["listener"] == f"127.0.0.1:{one}"
            exchange(clients[1], server, b"again", b"answer")
            exchange(clients[2], server, b"again", b"answer")


def test_a_name_is_before_its_listener() -> None:
    with Server() as server:
        to = ("--listen", "127.0.0.1:0", "--dest", server.address)
        with relay("--name", "a", *to, *to, "--name", "b", *to) as running:
            for port in ports(running, 3):
                echo(port, server)
            names = [each["relay"] for each in running.ended("done", 3)]
            assert names == ["a", "relay1", "b"]


def test_a_daemon_reads_a_relative_name(tmp_path: Path) -> None:
    """Before it goes to another folder; that of a file of secrets, too."""
    with Server() as server:
        (tmp_path / "users").write_text("bob")
        (tmp_path / "f.toml").write_text(
            f"[tcp.web]\nlisten = 'unix:{tmp_path}/web'\ndest = '{server.address}'\n"
            "[socks4.a]\nlisten = '127.0.0.1:0'\nuserid_file = 'users'\n"
        )
        files = (f"--pidfile={tmp_path}/pid", f"--logfile={tmp_path}/log")
        subprocess.run(
            [TWISTD, *files, "--rundir=/", "relayd", "--config", "f.toml"],
            cwd=tmp_path,
            check=True,
            timeout=START,
        )
        pid = int((tmp_path / "pid").read_text())
        try:
            eventually((tmp_path / "web").exists, "it listens")
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "web"))
                client.sendall(b"up")
                with server.accept() as upstream:
                    assert read_exactly(upstream, 2) == b"up"
            os.kill(pid, signal.SIGTERM)
            eventually(lambda: not (tmp_path / "pid").exists(), "it ends")
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_what_the_machine_can_not_give_is_told_of_each_relay(tmp_path: Path) -> None:
    """By the name of the relay, and the setting."""
    path = tmp_path / "f.toml"
    path.write_text(
        "[udp.dns]\nlisten = '127.0.0.1:0'\ndest = '127.0.0.1:9'\n"
        "max_flows = 9999999\n"
        "[socks4.office]\nlisten = '127.0.0.1:0'\nbind_address = '192.0.2.1'\n"
    )
    status, lines = ending(RelayProcess("--config", str(path)))
    assert status == 1
    dns, office = (line for line in lines if line.startswith("relayd: "))
    assert dns.startswith(
        "relayd: relay dns: max-flows 9999999 is more than this process can have"
    )
    assert office == (
        "relayd: relay office: bind-address '192.0.2.1' is no address of this machine"
    )
