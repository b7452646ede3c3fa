"""A relay with several pools, in a process of its own: seen, steered and changed.

Its clients ask for a server name, which says whose pool they are for.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.preludes.client_hello import hello_of
from tests.live.test_control_socket import ask, relayctl
from tests.live.test_metrics import Samples, get
from tests.support.live_relays import refused_address
from tests.support.process import (
    PATIENCE,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@contextmanager
def session(port: int, name: str, server: Server) -> Iterator[socket.socket]:
    """A client that asks for a name, and is relayed to this server."""
    hello = hello_of(name)
    with connect(port) as client:
        client.sendall(hello)
        with server.accept() as far:
            assert read_exactly(far, len(hello)) == hello
            yield client
            client.sendall(b"on")
            assert read_exactly(far, 2) == b"on"


CHECKS = 'check_every = "50ms"\nfall = 1'


def settings(tmp_path: Path, dest: list[str], sni: list[str], more: str = "") -> str:
    """A file with a relay `web`."""
    return f"""
control = "unix:{tmp_path}/c"
metrics = "127.0.0.1:0"
[tcp.web]
listen = "127.0.0.1:0"
dest = {dest}
sni = {sni}
{more}
"""


def told(tmp_path: Path) -> dict[str, Any]:
    """The servers of the relay, by name."""
    _, answer = ask(tmp_path / "c", "GET", "/v1/servers?relay=web")
    return {each["name"]: each for each in answer["servers"]}


def test_a_change_of_one_pool_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    """Its sessions, what its checks have found, and its operator's word."""
    file, dead = tmp_path / "r.toml", refused_address()
    with Server() as web, Server() as ssh, Server() as late:
        others = f"{dead},pool=ssh,check=tcp"
        dest = [web.address, f"{ssh.address},pool=ssh", others]
        sni = ["=default", "*.ssh.example=ssh"]
        file.write_text(settings(tmp_path, dest, sni, CHECKS))
        with relay("--config", str(file)) as running:
            running.wait_for(rf"web: ssh/{dead} is down: ")
            path = f"/v1/relays/web/servers/{web.address}"
            assert ask(tmp_path / "c", "PATCH", path, {"weight": 7})[0] == 200
            with (
                session(running.port, "a.ssh.example", ssh),
                session(running.port, "b.example", web),
            ):
                # One pool gets another server, another name leads to it, and one more
                # pool is there.
                dest.append(f"{late.address},pool=ssh,name=late")
                sni += ["d.example=ssh", f"e.example={late.address}"]
                file.write_text(settings(tmp_path, dest, sni, CHECKS))
                status, _ = ask(tmp_path / "c", "POST", "/v1/reload", {})
                assert status == 200
                now = told(tmp_path)
                assert {
                    name: (each["pool"], each["sessions"], each["weight"])
                    for name, each in now.items()
                } == {
                    web.address: ("default", 1, 7),
                    f"ssh/{ssh.address}": ("ssh", 1, 1),
                    f"ssh/{dead}": ("ssh", 0, 1),
                    f"ssh/late/{late.address}": ("ssh", 0, 1),
                    f"e.example/{late.address}": ("e.example", 0, 1),
                }
                assert now[f"ssh/{dead}"]["state"] == "down"
                with session(running.port, "e.example", late):
                    pass
            ended = running.sessions(3)
            assert {each["ending"] for each in ended} == {"done"}
            assert {(each["sni"], each.get("pool")) for each in ended} == {
                ("a.ssh.example", "ssh"),
                ("b.example", None),
                ("e.example", "e.example"),
            }


def test_a_server_is_drained_in_one_pool_and_serves_in_the_other(
    tmp_path: Path,
) -> None:
    """The same address stands in both."""
    file = tmp_path / "r.toml"
    with Server() as both, Server() as other:
        dest = [
            f"{each.address}{of}" for of in ("", ",pool=b") for each in (both, other)
        ]
        file.write_text(settings(tmp_path, dest, ["=default", "b.example=b"]))
        with relay("--config", str(file)) as running:
            drained = relayctl(
                *(tmp_path / "c", "server", f"web/b/{both.address}", "drain")
            )
            assert drained.communicate(timeout=PATIENCE)[1] == b""
            assert drained.returncode == 0
            words = {name: each["operator"] for name, each in told(tmp_path).items()}
            assert [name for name, word in words.items() if word == "drain"] == [
                f"b/{both.address}"
            ]
            for _ in range(3):
                with session(running.port, "b.example", other):
                    pass
            for server in (both, other):
                with session(running.port, "a.example", server):
                    pass
            running.sessions(5)
            said = Samples(running)
            connects = "relayd_upstream_connects_total"
            of_web = {"relay": "web", "result": "connected"}
            for name, count in (
                (both.address, 1),
                (other.address, 1),
                (f"b/{both.address}", 0),
                (f"b/{other.address}", 3),
            ):
                assert said(connects, upstream=name, **of_web) == count
                weight = said("relayd_upstream_weight", relay="web", upstream=name)
                assert weight == (0 if name == f"b/{both.address}" else 1)


def test_it_is_ready_while_one_pool_has_a_server(tmp_path: Path) -> None:
    """And those of a pool without one are told so."""
    file = tmp_path / "r.toml"
    with Server() as web, Server() as ssh:
        dest = [web.address, f"{ssh.address},pool=ssh"]
        file.write_text(settings(tmp_path, dest, ["=default", "ssh=ssh"]))
        with relay("--config", str(file)) as running:
            path = f"/v1/relays/web/servers/ssh%2F{ssh.address}"
            assert ask(tmp_path / "c", "PATCH", path, {"state": "down"})[0] == 200
            assert get(running, "/readyz/web") == (200, "ok\n")
            with connect(running.port) as client:
                client.sendall(hello_of("ssh"))
                assert read_all(client) == b""
            [refused] = running.ended("no_upstream")
            assert (refused["sni"], refused["pool"]) == ("ssh", "ssh")
            path = f"/v1/relays/web/servers/{web.address}"
            assert ask(tmp_path / "c", "PATCH", path, {"state": "down"})[0] == 200
            why = "none of its servers can have a client\n"
            assert get(running, "/readyz/web") == (503, why)
