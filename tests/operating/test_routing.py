"""The routes of relays: as their settings name them, and the servers that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.errors import ConfigError
from relayd.core.process_settings import Transport
from relayd.net.dial_options import DialOptions
from relayd.operating.changing import Relays
from relayd.operating.logs import Logs
from relayd.operating.routing import NamedByRoutes
from relayd.operating.servers import Maker
from tests.support.route_modules import RouteModules, route_modules
from tests.support.steered import Standing, toml

__all__ = ["route_modules"]

TRANSPORT: Transport = "twisted"


def named(
    text: str, dialing: DialOptions | None = None, told: str | None = None
) -> Any:
    dialing = dialing or DialOptions()
    return NamedByRoutes(Maker(Clock(), TRANSPORT, dialing), dialing, told)(text)


def test_a_server_is_what_its_text_says() -> None:
    upstream = named("10.0.0.5:80,name=blue,send-proxy=v2,source=127.0.0.2")
    assert upstream.name == "blue/10.0.0.5:80"
    assert upstream.preamble is not None
    assert type(upstream.endpoint).options.source4 == "127.0.0.2"
    assert not upstream.counted
    assert named("[2001:db8::1]:443").name == "[2001:db8::1]:443"
    assert named("unix:/run/web").name == "unix:/run/web"
    plain = named("www.example.com:80", DialOptions(source4="127.0.0.3"))
    assert plain.preamble is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.5", "bad address '10.0.0.5': "),
        ("udp:10.0.0.5:53", "'udp:10.0.0.5:53' is for datagrams"),
        ("udp:dns:a.example:53", "'udp:dns:a.example:53' is for datagrams"),
        ("10.0.0.5:80-90", "'10.0.0.5:80-90' has several ports: name one"),
        ("dns:db.example:5432", "several servers: have it be a pool's (--dest dns:db"),
        ("srv:_http._tcp.example", "several servers"),
        ("10.0.0.5:80,weight=2", "'10.0.0.5:80,weight=2': weight is for a server of"),
        ("10.0.0.5:80,backup", "backup is for a server of a pool"),
        ("10.0.0.5:80,max=2", "max is for"),
        ("10.0.0.5:80,check=tcp", "check is for"),
        ("10.0.0.5:80,disabled", "disabled is for"),
        ("10.0.0.5:80,pool=a", "pool is for"),
        ("10.0.0.5:80,send-proxy=v3", "expected send-proxy="),
        ("10.0.0.5:80,source=203.0.113.1", "203.0.113.1"),
        ("nonsense:x", "bad "),
    ],
)
def test_a_server_that_can_not_be(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as problem:
        named(text)
    [line] = str(problem.value).splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tcp:10.0.0.5:80,source=127.0.0.2", "source is not possible for an endpoint"),
        ("tls:10.0.0.5:80,interface=lo", "interface is not possible for an endpoint"),
        ("unix:/run/web,mark=1", "mark is not for UNIX sockets"),
        ("[::1]:80,source=127.0.0.2", "its source is of the other family"),
        ("tls:10.0.0.5:443,send-proxy=v2", "send-proxy is not possible: the header"),
    ],
)
def test_a_server_that_can_not_be_dialled_as_its_text_says(
    text: str, said: str
) -> None:
    """As of a --dest; else it would be dialled in another way, and nobody told."""
    with pytest.raises(ConfigError, match=said):
        named(text)


def test_a_server_that_can_not_be_dialled_as_those_of_its_relay() -> None:
    for dialing, said in (
        (DialOptions(source4="127.0.0.2"), "source"),
        (DialOptions(mark=7), "mark"),
    ):
        with pytest.raises(ConfigError, match=f"{said} is not possible for an"):
            named("tcp:10.0.0.5:80", dialing)
        assert named("unix:/run/web", dialing)
    with pytest.raises(ConfigError, match="send-proxy is not possible"):
        named("tls:10.0.0.5:443", told="v1")
    assert named("tls:10.0.0.5:443").name == "tls:10.0.0.5:443"


def test_a_server_of_a_relay_that_sends_proxy_headers(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write('return conn.server("tls:10.0.0.5:443")')
    [unit] = relays(tmp_path, send_proxy="v1").units.values()
    with pytest.raises(ConfigError, match="send-proxy is not possible"):
        unit.router.upstream("tls:10.0.0.5:443")
    assert unit.router.upstream("10.0.0.5:443")


# -- as the settings are read

WEB = {"listen": "127.0.0.1:20001", "dest": "10.0.0.1:80", "route": "myroutes:route"}


def relays(tmp_path: Path, kind: str = "tcp", **more: Any) -> Relays:
    """The relays of a file with one that has a route."""
    path = tmp_path / "relayd.toml"
    table = {**WEB, **more}
    if kind == "socks4":
        del table["dest"]
    path.write_text(toml({"transport": "twisted", kind: {"web": table}}))
    reactor: Any = Standing()
    return Relays(configure(read_layers(str(path))), reactor, Logs(reactor, "relayd"))


def test_a_relay_asks_its_route(tmp_path: Path, route_modules: RouteModules) -> None:
    route_modules.write('return conn.pool("ssh")')
    pools = ["10.0.0.1:80", "10.0.0.2:22,pool=ssh"]
    unit = relays(tmp_path, dest=pools, max_deciding=7).units["web"]
    [part] = unit.parts
    assert part.served.router is unit.router
    assert unit.router.route.__name__ == "route"
    assert list(unit.router.pools) == ["default", "ssh"]
    assert part.served.handshakes.limit == 7
    assert unit.router.upstream("10.0.0.5:80").name == "10.0.0.5:80"
    route_modules.write("return conn.server(conn.requested)", "proxying")
    proxy = relays(tmp_path, "socks4", route="proxying:route")
    assert proxy.units["web"].router is proxy.units["web"].parts[0].served.router


@pytest.fixture
def modules(route_modules: RouteModules) -> RouteModules:
    route_modules.write(
        "async def route(conn):\n"
        '    return conn.pool("ssh")\n'
        "def plain(conn):\n"
        "    return conn.pool()\n"
        "async def other(conn):\n"
        "    return conn.server(conn.requested)\n"
    )
    route_modules.write("import nothing_at_all\n", "importing")
    route_modules.write("async def route(conn):\n    return (\n", "broken")
    route_modules.write("\n\nraise SystemExit(3)\n", "exits")
    return route_modules


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (
            "no_such_module:route",
            r"route: there is no module no_such_module",
        ),
        (
            "importing:route",
            r"can.t be imported: .*nothing_at_all.*importing\.py:1",
        ),
        ("broken:route", r"broken:route: .*SyntaxError.*broken\.py:2"),
        ("exits:route", r"exits:route: .*SystemExit: 3 .*exits\.py:3"),
        ("myroutes:nothing", r"myroutes:nothing: myroutes has no nothing; it has"),
        ("myroutes:plain", r"myroutes:plain.*async def"),
        (
            "myroutes:route",
            r"conn\.pool\('ssh'\) \(.*myroutes\.py:2\): .*its pools are default",
        ),
    ],
)
def test_a_route_that_can_not_be(
    tmp_path: Path, modules: RouteModules, route: str, said: str
) -> None:
    with pytest.raises(ConfigError) as problem:
        relays(tmp_path, route=route)
    [line] = str(problem.value).splitlines()
    assert line.startswith("relay web: ")
    assert re.search(said, line), line


def test_a_proxy_has_no_pools(tmp_path: Path, modules: RouteModules) -> None:
    with pytest.raises(ConfigError, match=r"conn.pool\('ssh'\).*it has none"):
        relays(tmp_path, "socks4")
