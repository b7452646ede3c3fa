"""The examples of routes: what they decide, and what a relay makes of that."""

from __future__ import annotations

import importlib.util
import re
import shlex
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError

import pytest
from pytest_twisted import ensureDeferred

from relayd.filters.capture import Capture
from relayd.preludes.client_hello import hello_of
from relayd.tap.relayd import Options
from relayd.testing import decide, decide_later
from tests.support.captures import sections_of, streams_of
from tests.support.process import PATIENCE, RelayProcess, Server, relay
from tests.test_examples import EXAMPLES

NAMES = ("several_protocols", "tenant_by_sni", "ban_list", "canary")
ALL = (*NAMES, "capture_one_client")


def example(name: str) -> ModuleType:
    """The module, as new."""
    found = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ALL)
def test_each_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 30


# -- several protocols on one port


@pytest.mark.parametrize(
    ("first", "pool"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "ssh"),
        (b"\x16\x03\x01\x02\x00\x01", "tls"),
        (hello_of("www.example.com"), "tls"),
        (b"GET / HTTP/1.1\r\n", "http"),
        (b"OPTIONS * HTTP/1.1\r\n", "http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http"),
    ],
)
def test_each_protocol_has_its_pool(first: bytes, pool: str) -> None:
    route = example("several_protocols").route
    assert decide(route, first=first, pools=["ssh", "tls", "http"]).pool == pool


@pytest.mark.parametrize("first", [b"\x00\x01\x02\x03\x04", b"HELO mail\r\n", b"G"])
def test_another_protocol_is_refused(first: bytes) -> None:
    route = example("several_protocols").route
    decision = decide(route, first=first)
    assert decision.refused == "neither SSH nor TLS nor HTTP"


def test_who_says_nothing_is_an_ssh_client() -> None:
    route = example("several_protocols").route
    assert decide(route).pool == decide(route, ended=True).pool == "ssh"


# -- a tenant by its server name


def make_table(path: Path, *rows: tuple[str, str, str]) -> None:
    """What the example's docstring makes."""
    with closing(sqlite3.connect(path)) as table:
        table.execute(
            "CREATE TABLE IF NOT EXISTS names (name PRIMARY KEY, tenant, server)"
        )
        table.executemany("INSERT INTO names VALUES (?, ?, ?)", rows)
        table.commit()


@ensureDeferred
async def test_a_tenant_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tenants.db"
    make_table(path, ("a.example", "a", "10.0.0.5:443"))
    monkeypatch.setenv("TENANTS", str(path))
    route = example("tenant_by_sni").route
    decision = await decide_later(route, sni="A.example")
    assert decision.server == "10.0.0.5:443"
    assert decision.facts == {"tenant": "a"}
    for first in (hello_of("b.example"), b"GET / HTTP/1.1\r\n"):
        decision = await decide_later(route, first=first)
        assert decision.refused == "no tenant has this name"
    # A change is seen by the next client.
    make_table(path, ("b.example", "b", "10.0.0.6:443"))
    decision = await decide_later(route, sni="b.example")
    assert decision.facts == {"tenant": "b"}


# -- a ban list


@contextmanager
def listed(*networks: str) -> Iterator[Any]:
    """A list at a URL; `web.networks` may change, and `web.asked` counts."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.asked += 1  # type: ignore[attr-defined]
            networks = web.networks  # type: ignore[attr-defined]
            self.send_response(200 if networks is not None else 503)
            self.end_headers()
            self.wfile.write("".join(f"{each}\n" for each in networks or ()).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing is logged."""

    web = HTTPServer(("127.0.0.1", 0), Answers)
    web.networks, web.asked = networks, 0  # type: ignore[attr-defined]
    web.url = f"http://127.0.0.1:{web.server_address[1]}/"  # type: ignore[attr-defined]
    thread = threading.Thread(target=web.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


@ensureDeferred
async def test_a_ban_list_is_read_once_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listed("203.0.113.0/24", "2001:db8::/32") as web:
        monkeypatch.setenv("BAN_LIST", web.url)
        bans = example("ban_list")

        async def refused(client: str) -> str | None:
            refused: str | None = (
                await decide_later(bans.route, client=client)
            ).refused
            return refused

        assert await refused("203.0.113.9:40000") == "banned"
        assert await refused("[2001:db8::9]:40000") == "banned"
        assert await refused("192.0.2.1:40000") is None
        assert web.asked == 1
        web.networks = ["192.0.2.0/24"]
        bans.BANS["due"] = 0.0
        assert await refused("192.0.2.1:40000") == "banned"
        assert await refused("203.0.113.9:40000") is None
        assert web.asked == 2


@ensureDeferred
async def test_a_ban_list_that_cannot_be_read_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One client finds out, which is logged; the others go by the old list."""
    with listed("203.0.113.0/24") as web:
        monkeypatch.setenv("BAN_LIST", web.url)
        bans = example("ban_list")
        await decide_later(bans.route)
        web.networks = None
        bans.BANS["due"] = 0.0
        with pytest.raises(HTTPError, match="503") as caught:
            await decide_later(bans.route)
        caught.value.close()
        decision = await decide_later(bans.route, client="203.0.113.9:40000")
        assert decision.refused == "banned"
        assert web.asked == 2


@ensureDeferred
async def test_a_ban_list_that_was_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is served by it."""
    with listed() as web:
        web.networks = None
        monkeypatch.setenv("BAN_LIST", web.url)
        bans = example("ban_list")
        with pytest.raises(HTTPError, match="503") as caught:
            await decide_later(bans.route)
        caught.value.close()
        decision = await decide_later(bans.route)
        assert decision.refused == "the list was not read yet"


@ensureDeferred
async def test_a_ban_list_may_be_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "banned"
    path.write_text("203.0.113.0/24\n198.51.100.7\n")
    monkeypatch.setenv("BAN_LIST", path.as_uri())
    route = example("ban_list").route
    decision = await decide_later(route, client="198.51.100.7:40000")
    assert decision.refused == "banned"


# -- a canary


def test_a_share_of_the_clients_goes_to_the_canary() -> None:
    route = example("canary").route
    hosts = [f"10.1.{n // 250}.{n % 250}" for n in range(5000)]
    pools = [
        [decide(route, client=f"{host}:{port}").pool for host in hosts]
        for port in (40000, 50000)
    ]
    assert pools[0] == pools[1], "a client has moved"
    assert set(pools[0]) == {"canary", "default"}
    assert 0.04 < pools[0].count("canary") / len(hosts) < 0.06


# -- a capture of one client


def test_one_client_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.pcapng"
    monkeypatch.setenv("CAPTURE", "192.0.2.7")
    monkeypatch.setenv("CAPTURE_FILE", str(path))
    route = example("capture_one_client").route
    [made] = decide(route, client="192.0.2.7:40000").filters
    assert made == Capture(str(path))
    other = decide(route, client="192.0.2.8:40000")
    assert other.pool == "default"
    assert not other.filters


# -- the page

PAGE = (EXAMPLES.parent / "docs" / "routes.md").read_text()
README = (EXAMPLES.parent / "README.md").read_text()


def blocks_with(text: str) -> list[str]:
    """The page's blocks of Python that have this."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [each for each in found if text in each]


def test_the_pages_first_route_and_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand as they are in files of a reader's own."""
    module = ModuleType("myroutes")
    exec(blocks_with("neither HTTP nor SSH")[0], module.__dict__)
    decision = decide(module.route, first=b"GET / HTTP/1.1\r\n")
    assert decision.pool == "default"
    assert decision.facts == {"method": "GET"}
    monkeypatch.setitem(sys.modules, "myroutes", module)
    tests: dict[str, Any] = {}
    exec(blocks_with("def test_")[0], tests)
    found = [each for name, each in tests.items() if name.startswith("test_")]
    assert len(found) == 2
    for each in found:
        each()


def test_the_pages_route_of_a_proxy() -> None:
    names: dict[str, Any] = {}
    exec(blocks_with("conn.requested")[0], names)
    route = names["route"]
    assert decide(route, requested="192.0.2.9:80").server == "192.0.2.9:80"
    assert decide(route, requested="intranet.example:80").server == "10.0.0.80:80"
    assert decide(route, requested="192.0.2.9:25").refused == "no mail from here"


def test_the_command_lines_can_be_read() -> None:
    """Those of the page, of README about routes, and of the examples."""
    texts = [PAGE, README, *((EXAMPLES / f"{name}.py").read_text() for name in ALL)]
    written = [
        re.sub(r"\\+\n\s*", "", command)
        for text in texts
        for command in re.findall(
            r"twistd -n --pidfile= relayd ((?:[^\n]*\\\n)*[^\n\"]*)", text
        )
    ]
    lines = [each for each in written if re.search(r"--(route|sni)\b", each)]
    assert len(lines) >= 8
    for line in lines:
        options = Options()
        # What is left out stands for a listener and a server.
        options.parseOptions(
            shlex.split(
                line.replace("\N{HORIZONTAL ELLIPSIS}", "-l 8080 -d 10.0.0.5:80")
            )
        )


# -- all of them, in a relay


class Relayed:
    """One relay of a process, and what its clients meet.

    :param name: the relay's.
    """

    def __init__(self, running: RelayProcess, name: str) -> None:
        self.running, self.name = running, name
        [listening] = running.wait_for(rf"listening on \S+:(\d+), relay={name},")
        self.port = int(listening[1])

    def _connect(self, client: str) -> socket.socket:
        there = ("127.0.0.1", self.port)
        return socket.create_connection(there, PATIENCE, (client, 0))

    def reaches(self, server: Server, first: bytes, client: str = "127.0.0.1") -> None:
        """A client that begins so reaches a server, which gets just that."""
        with self._connect(client) as connection:
            connection.sendall(first)
            with server.accept() as upstream:
                got = b""
                while len(got) < len(first):
                    got += upstream.recv(65536)
                assert got == first
                upstream.sendall(b"answer")
                assert connection.recv(6) == b"answer"

    def refuses(self, first: bytes, client: str = "127.0.0.1") -> None:
        """A client that begins so is reset: maybe before it has sent that."""
        with (
            pytest.raises(ConnectionResetError),
            self._connect(client) as connection,
        ):
            connection.sendall(first)
            connection.recv(1)

    def line(self, fact: str) -> str:
        """A line of the log about one of its sessions."""
        [found, *_] = self.running.wait_for(rf"session=.* relay={self.name} .*{fact}.*")
        return found[0]


def test_they_relay(tmp_path: Path) -> None:
    """In one process: each decides where its clients go."""
    place = example("canary").place
    hosts = [f"127.0.1.{n}" for n in range(1, 250)]
    early = next(host for host in hosts if place(host) < 0.05)
    late = next(host for host in hosts if place(host) >= 0.05)
    capture = tmp_path / "one.pcapng"
    with (
        Server() as one,
        Server() as two,
        Server() as three,
        listed("127.0.0.2") as web,
    ):
        make_table(
            tmp_path / "tenants.db",
            ("a.example", "a", one.address),
            ("b.example", "b", two.address),
        )
        dests = {
            "several_protocols": [
                f"{server.address},pool={pool}"
                for server, pool in ((one, "ssh"), (two, "tls"), (three, "http"))
            ],
            "tenant_by_sni": [],
            "ban_list": [one.address],
            "canary": [one.address, f"{two.address},pool=canary"],
            "capture_one_client": [one.address],
        }
        path = tmp_path / "relayd.toml"
        path.write_text(
            "".join(
                f"[tcp.{name}]\nlisten = '127.0.0.1:0'\nroute = '{name}:route'\n"
                + (f"dest = {found}\n" if found else "")
                for name, found in dests.items()
            )
        )
        environment = {
            "PYTHONPATH": str(EXAMPLES),
            "TENANTS": str(tmp_path / "tenants.db"),
            "BAN_LIST": web.url,
            "CAPTURE": "127.0.0.1",
            "CAPTURE_FILE": str(capture),
        }
        with relay("--config", str(path), env=environment) as running:
            running.listening(len(dests))
            protocols = Relayed(running, "several_protocols")
            protocols.reaches(one, b"SSH-2.0-OpenSSH_9.2p1\r\n")
            protocols.reaches(two, hello_of("www.example.com"))
            protocols.reaches(three, b"GET / HTTP/1.1\r\n")
            protocols.refuses(b"HELO mail\r\n")
            assert "neither SSH nor TLS nor HTTP" in protocols.line("ending=denied")

            tenants = Relayed(running, "tenant_by_sni")
            tenants.reaches(one, hello_of("a.example"))
            tenants.reaches(two, hello_of("b.example"))
            tenants.refuses(hello_of("c.example"))
            assert "tenant=a" in tenants.line(f"upstream={one.address}")

            bans = Relayed(running, "ban_list")
            bans.reaches(one, b"hello")
            bans.refuses(b"hello", "127.0.0.2")
            assert web.asked == 1

            canary = Relayed(running, "canary")
            for _ in range(2):
                canary.reaches(two, b"hello", early)
                canary.reaches(one, b"hello", late)
            assert "pool=canary" in canary.line(f"upstream={two.address}")

            captured = Relayed(running, "capture_one_client")
            captured.reaches(one, b"seen")
            captured.reaches(one, b"not seen", "127.0.0.2")
            captured.line(r"client=127\.0\.0\.1:")
            captured.line(r"client=127\.0\.0\.2:")
            running.signal()
            running.wait()
    [section] = sections_of(capture.read_bytes())
    [stream] = streams_of(section)
    assert stream.said == (b"seen", b"answer")
