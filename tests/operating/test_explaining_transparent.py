"""What is explained of servers that are dialled from the client's address.

It is what a dial says; those are compared here.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.config import UdpRelay
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.datagrams.transparent import check_source
from relayd.net.transparent import be_client
from relayd.operating.explaining import explain
from relayd.operating.explaining_pools import MOST
from tests.support.files import config_of
from tests.support.process import own_host
from tests.support.route_modules import RouteModules, route_modules
from tests.support.steered import toml

__all__ = ["route_modules"]

#: An address of a server elsewhere.
SERVER = "192.0.2.80"


def relay_of(path: Path, kind: str, dest: str | list[str], **more: Any) -> Any:
    table = {"listen": "20001", "dest": dest, "transparent": True, **more}
    return config_of(path / "relayd.toml", toml({kind: {"a": table}})).relays[0]


def said_by_a_dial(kind: str, client: str, server: str) -> str:
    """Why a relay refuses that; empty if it does not."""

    class Sock:
        """One that takes any address."""

        def setsockopt(self, *_: Any) -> None: ...

        def bind(self, _: Any) -> None: ...

    def address(host: str, port: int) -> Any:
        flags = socket.AI_NUMERICHOST
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=flags)
        return found[0][4]

    try:
        if kind == "tcp":
            be_client(Sock(), address(server, 80), client)
        else:
            check_source(address(client, 4000), address(server, 80))
    except OSError as problem:
        return str(problem.strerror)
    return ""


REFUSED = [
    (SERVER, SERVER, f"{SERVER} is the server's own"),
    ("2001:db8::80", "2001:db8::80", "2001:db8::80 is the server's own"),
    ("127.0.0.1", SERVER, "127.0.0.1 never leaves this machine"),
    ("::1", "2001:db8::80", "::1 never leaves this machine"),
    ("255.255.255.255", SERVER, "255.255.255.255 is not that of one host"),
    ("224.0.0.1", SERVER, "224.0.0.1 is not that of one host"),
    ("0.0.0.0", SERVER, "0.0.0.0 is not that of one host"),
    ("2001:db8::1", SERVER, "2001:db8::1 is IPv6, and the server's IPv4"),
    ("192.0.2.1", "2001:db8::80", "192.0.2.1 is IPv4, and the server's IPv6"),
    ("fe80::1%lo", "2001:db8::80", "fe80::1%lo is known on its link only"),
]


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize(("client", "server", "said"), REFUSED)
def test_whom_a_dial_refuses(
    tmp_path: Path, kind: str, client: str, server: str, said: str
) -> None:
    """Whatever port such a client has."""
    host = f"[{server}]" if ":" in server else server
    name = f"[{client}]" if ":" in client else client
    relay = relay_of(tmp_path, kind, f"{host}:80")
    why = f"transparent: the client's address {said}"
    assert said_by_a_dial(kind, client, server) == why
    for each in (client, f"{name}:4000", f"{name}:80"):
        found = explain(relay, each)
        assert (found.admitted, found.server) == (False, None)
        last = found.steps[-1]
        assert (last.step, last.result, last.why) == (
            "transparent",
            "refused",
            f"--{why}",
        )


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_whom_it_does_not(tmp_path: Path, kind: str) -> None:
    """A server on this machine may have its clients there."""
    own = own_host()
    for client, server in (
        ("192.0.2.1", SERVER),
        ("2001:db8::1", "2001:db8::80"),
        ("127.0.0.5", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", own),
        (own, own),
        ("::ffff:192.0.2.1", SERVER),
    ):
        host = f"[{server}]" if ":" in server else server
        relay = relay_of(tmp_path, kind, f"{host}:80")
        found = explain(relay, client)
        assert (found.admitted, found.server) == (True, f"{host}:80")
        what = "address and port" if isinstance(relay, UdpRelay) else "address"
        step = found.said("transparent")
        assert (step.result, step.why) == (
            "its own",
            f"--transparent: a server is dialled from the client's own {what}",
        )
        if "ffff" not in client:
            assert not said_by_a_dial(kind, client, server)


def test_a_flow_is_not_its_own_server(tmp_path: Path) -> None:
    """On this machine, where that is a matter of the port."""
    relay = relay_of(tmp_path, "udp", "127.0.0.1:80")
    assert explain(relay, "127.0.0.1:81").admitted
    found = explain(relay, "127.0.0.1:80")
    why = "--transparent: 127.0.0.1:80 would be its own server"
    assert (found.admitted, found.steps[-1].why) == (False, why)
    # Of that host it has asked for another.
    relay = relay_of(tmp_path, "udp", "127.0.0.1:original")
    assert explain(relay, "127.0.0.1").admitted
    assert explain(relay, "127.0.0.1:80").admitted


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("dest", "client", "admitted"),
    [
        ("original", "192.0.2.1", True),
        ("original", "2001:db8::1", True),
        ("original", "255.255.255.255", False),
        ("original", "unix", False),
        ("192.0.2.80:original", "2001:db8::1", False),
        ("192.0.2.80:original", SERVER, False),
        ("192.0.2.80:original", "192.0.2.1", True),
        ("db.example.com:80", "2001:db8::1", True),
        ("db.example.com:80", "224.0.0.1", False),
        ("192.0.2.80:80,source=127.0.0.1", "2001:db8::1", True),
        ("192.0.2.80:80,source=127.0.0.1", SERVER, True),
        ("80", "127.0.0.5", True),
        ("80", "2001:db8::1", False),
        (["192.0.2.80:80", "192.0.2.81:80"], "2001:db8::1", False),
        (["192.0.2.80:80", "[2001:db8::80]:80"], "2001:db8::1", True),
        (["192.0.2.80:80", "dns:db.example.com:80"], "2001:db8::1", True),
        ("192.0.2.80:80-81", SERVER, False),
    ],
)
def test_servers_of_other_kinds(
    tmp_path: Path, kind: str, dest: Any, client: str, admitted: bool
) -> None:
    """What is not known before does not refuse."""
    listen = "20001-20002" if dest == "192.0.2.80:80-81" else "20001"
    relay = relay_of(tmp_path, kind, dest, listen=listen)
    assert explain(relay, client).admitted is admitted


def test_a_unix_socket_is_dialled_from_nowhere(tmp_path: Path) -> None:
    relay = relay_of(tmp_path, "tcp", ["192.0.2.80:80", "unix:/run/s"])
    for client in (SERVER, "2001:db8::1", "unix"):
        assert explain(relay, client).admitted
    relay = relay_of(tmp_path, "tcp", "192.0.2.80:80")
    assert explain(relay, "unix").steps[-1].why == (
        "--transparent: the client has no address"
    )


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_client_that_one_of_the_servers_can_not_be_shown(
    tmp_path: Path, kind: str
) -> None:
    """It gets another one."""
    dest = ["192.0.2.80:80,name=b", "192.0.2.81:80"]
    relay = relay_of(tmp_path, kind, dest, balance="first")
    found = explain(relay, "192.0.2.1")
    assert (found.admitted, found.server) == (True, "b/192.0.2.80:80")
    found = explain(relay, SERVER)
    assert (found.admitted, found.server) == (True, None)
    assert [each.result for each in found.steps if each.step == "transparent"] == [
        "not to all",
        "its own",
    ]
    assert found.said("transparent").why == (
        f"192.0.2.80:80: the client's address {SERVER} is the server's own"
    )
    last = found.steps[-1]
    assert (last.step, last.result) == ("server", "one of the others")
    found = explain(relay, "192.0.2.81")
    assert (found.admitted, found.server) == (True, "b/192.0.2.80:80")


def test_not_all_of_many_are_named(tmp_path: Path) -> None:
    dest = [f"192.0.2.{number}:80" for number in range(1, MOST + 4)]
    relay = relay_of(tmp_path, "tcp", [*dest, "[2001:db8::1]:80"])
    found = explain(relay, "2001:db8::9")
    told = [each.why for each in found.steps if each.result == "not to all"]
    assert len(told) == MOST + 1
    assert told[-1] == "3 more"


@pytest.mark.parametrize("transparent", [True, False])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_clients_of_a_family_that_is_not_intercepted(
    tmp_path: Path, kind: str, transparent: bool
) -> None:
    """Nobody brings them to a relay that sends them where they meant to go."""

    def admitted(client: str, dest: Any, intercept: Any, **more: Any) -> bool:
        settings = {"transparent": transparent, "intercept": intercept, **more}
        found = explain(relay_of(tmp_path, kind, dest, **settings), client)
        if not found.admitted:
            last = found.steps[-1]
            version = 6 if ":" in client else 4
            assert (last.step, last.result) == ("intercept", "refused")
            assert last.why == (
                f"--intercept brings no IPv{version} clients: it came to the listener"
                " itself, and was not redirected"
            )
        return found.admitted

    ipv4, ipv6 = "192.0.2.0/24:80", "[2001:db8::/32]:80"
    assert not admitted("2001:db8::9", "original", ipv4)
    assert not admitted("192.0.2.9", "original", [ipv6])
    assert admitted("2001:db8::9", "original", [ipv4, ipv6])
    assert admitted("2001:db8::9", "original", ":80")
    assert admitted("192.0.2.9", "original", ipv4)
    if kind == "tcp":
        # A balancer names them.
        assert admitted("2001:db8::9", "original", ipv4, accept_proxy=["10.0.0.1"])
        assert admitted("2001:db8::9", ["original", "unix:/run/s"], ipv4)


def test_only_servers_of_the_clients_pool_are_asked(tmp_path: Path) -> None:
    text = """
[tcp.a]
listen = "20001"
dest = "192.0.2.80:80"
sni = ["=default", "x.example.com=[2001:db8::80]:80"]
transparent = true
"""
    relay = config_of(tmp_path / "f.toml", text).relays[0]
    found = explain(relay, "2001:db8::1", sni="x.example.com")
    assert found.admitted
    assert found.said("transparent").result == "its own"
    assert not explain(relay, "192.0.2.1", sni="x.example.com").admitted


def test_a_server_that_a_route_names(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write('return conn.server("192.0.2.80:80")')
    relay = relay_of(tmp_path, "tcp", "192.0.2.81:80", route="myroutes:route")
    assert explain(relay, "192.0.2.1").server == "192.0.2.80:80"
    found = explain(relay, SERVER)
    assert (found.admitted, found.server) == (False, None)
    assert found.steps[-1].why.endswith("is the server's own")
    assert explain(relay, "192.0.2.81").admitted


def test_what_is_not_transparent_asks_nobody(tmp_path: Path) -> None:
    relay = relay_of(tmp_path, "tcp", "192.0.2.80:80", transparent=False)
    found = explain(relay, SERVER)
    assert found.admitted
    assert "transparent" not in {each.step for each in found.steps}


def test_a_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its exit code is that of any explanation."""
    path = tmp_path / "relayd.toml"
    path.write_text(
        '[tcp.a]\nlisten = "1"\ndest = "192.0.2.80:80"\ntransparent = true\n'
    )
    words = ["explain", "--file", str(path), "--client", SERVER]
    assert main(words) == Exit.DONE
    out = capsys.readouterr().out
    assert f"the client's address {SERVER} is the server's own" in out
    assert main([*words, "--json"]) == Exit.DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["admitted"], found["server"]) == (False, None)
    assert found["steps"][-1] == {
        "step": "transparent",
        "result": "refused",
        "why": f"--transparent: the client's address {SERVER} is the server's own",
    }
