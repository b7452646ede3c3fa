"""The examples of routes: what they decide, and what a relay makes of that."""

from __future__ import annotations

import importlib.util
import sqlite3
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
from relayd.testing import decide, decide_later
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
