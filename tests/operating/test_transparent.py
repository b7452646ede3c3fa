"""Transparent relays, as their settings say: what they are built of, and their rights.

What they do is tested where that is: :mod:`tests.live`, :mod:`tests.system`.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.configuring.config import FlowPoolSettings
from relayd.configuring.server_grammar import parse_server
from relayd.core.check_grammar import parse_check
from relayd.core.errors import ConfigError
from relayd.core.process_settings import Transport
from relayd.ctl.main import main
from relayd.datagrams.original import OriginalServer
from relayd.net.dial_options import DialOptions
from relayd.net.dialing import SocketEndpoint
from relayd.net.original import OriginalEndpoint, OriginalNameEndpoint
from relayd.operating import checks, units
from relayd.operating.changing import Relays
from relayd.operating.checks import ServerCheckService
from relayd.operating.dial_rights import DialRights
from relayd.operating.endpoints import dialing_endpoint
from relayd.operating.logs import Logs
from relayd.operating.routing import NamedByRoutes
from relayd.operating.servers import Maker
from relayd.operating.service import make_service
from relayd.upstreams.pool import Pool
from tests.support import rights
from tests.support.files import config_of
from tests.support.route_modules import RouteModules, route_modules
from tests.support.steered import HOST, Standing, at, datagrams, running, toml, whole

__all__ = ["route_modules"]

PLAIN: Transport = "twisted"


def relays(path: Path, kind: str = "tcp", **table: Any) -> Relays:
    """The relays of a file that has one."""
    given = {"listen": at(20001), "dest": "10.0.0.1:80", **table}
    text = toml({"transport": "twisted", kind: {"a": given}})
    reactor: Any = Standing()
    logs = Logs(reactor, "relayd")
    return Relays(config_of(path / "relayd.toml", text), reactor, logs)


def part_of(path: Path, kind: str = "tcp", **table: Any) -> Any:
    return relays(path, kind, **table).units["a"].parts[0]


# -- what dials


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("original", OriginalEndpoint, "original"),
        ("10.0.0.1:original", OriginalEndpoint, "10.0.0.1:original"),
        ("[2001:db8::1]:original", OriginalEndpoint, "[2001:db8::1]:original"),
        ("db.example.com:original", OriginalNameEndpoint, ""),
    ],
)
def test_what_dials_where_clients_meant_to_go(text: str, kind: type, name: str) -> None:
    address: Any = parse_server(text)
    endpoint = dialing_endpoint(address, Clock(), PLAIN)
    assert type(endpoint) is kind
    assert getattr(endpoint, "peer_name", "") == name
    assert Maker(Clock(), PLAIN).upstream(address).name == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[fe80::1%no_such]:original", r"bad address '\[fe80::1%no_such\]:original': "),
        ("127.255.255.255:original", "bad address '127.255.255.255:original': "),
    ],
)
def test_hosts_that_can_not_be_dialled(text: str, why: str) -> None:
    address: Any = parse_server(text)
    with pytest.raises(ConfigError, match=why):
        dialing_endpoint(address, Clock(), PLAIN)


@rights.transparent
def test_servers_are_dialled_for_clients_but_for_those_with_a_source(
    tmp_path: Path,
) -> None:
    dest = ["10.0.0.1:80", "10.0.0.2:80,source=127.0.0.2", "unix:/run/web"]
    part = part_of(tmp_path, dest=dest, transparent=True)
    client, own, unix = (each.endpoint for each in part.pools["default"].upstreams)
    assert type(client).options == DialOptions(transparent=True)
    assert type(own).options == DialOptions(source4="127.0.0.2")
    assert type(unix) is SocketEndpoint


def test_servers_are_checked_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who checks them is no client, and dials from an address of this machine."""
    service = ServerCheckService(Clock(), PLAIN)
    monkeypatch.setattr(service.checker, "add", lambda *check: None)
    asked: list[Any] = []
    transparent = DialOptions(transparent=True, mark=7)
    made = Maker(Clock(), PLAIN, transparent)

    def watch(*of_check: Any) -> Any:
        asked.append(of_check[1])

    monkeypatch.setattr(checks, "asks", watch)
    settings = FlowPoolSettings(check=parse_check("tcp port=8008"))
    address: Any = parse_server("10.0.0.1:80")
    server: Any = made.server(address)
    service.add(settings, transparent, None, address, server)
    datagrams: Any = parse_server("udp:10.0.0.1:53")
    service.add_datagrams(settings, transparent, datagrams, server)
    assert type(server.endpoint).options.transparent  # type: ignore[attr-defined]
    own = DialOptions(mark=7)
    stream, flow = asked
    assert type(stream.endpoint).options == own
    for each in (stream, flow):
        assert type(each.endpoint_at(8008)).options == own


# -- what listens


def is_redirected(nat: Any) -> bool:
    """Whether the listeners of a UDP relay learn where datagrams were to go."""
    return bool(getattr(nat.made_of.listener, "redirected", False))


@pytest.mark.parametrize(
    ("table", "redirected"),
    [
        ({}, False),
        ({"intercept": "192.0.2.1:80", "listen": "20001"}, False),
        ({"dest": ["10.0.0.1:80", "original,backup"]}, True),
    ],
)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_relay_is_told_that_it_listens_for_others(
    tmp_path: Path, kind: str, table: dict[str, Any], redirected: bool
) -> None:
    served = part_of(tmp_path, kind, **table).served
    if kind == "tcp":
        assert (served.intercepts is not None) is redirected
    else:
        assert is_redirected(served) is redirected


def test_the_servers_of_flows(tmp_path: Path) -> None:
    [only] = part_of(tmp_path, "udp", dest="original").served.servers
    assert isinstance(only, OriginalServer)
    part = part_of(tmp_path, "udp", dest=["original,max=2", "10.0.0.1:original,name=b"])
    pool = part.pools["default"]
    assert isinstance(pool, Pool)
    assert pool.names == "original, b/10.0.0.1:original"


def test_what_is_listed_of_them(tmp_path: Path) -> None:
    """They have no address of their own."""
    for kind in ("tcp", "udp"):
        for dest in (["original"], ["original", "10.0.0.1:original,name=b"]):
            table = {"listen": at(20001), "dest": dest}
            with running(tmp_path, {"transport": "twisted", kind: {"a": table}}) as one:
                rows = whole(one.steered.servers(None))["servers"]
                names = [(each["name"], each["address"]) for each in rows]
                assert (
                    names
                    == [
                        ("original", "original"),
                        ("b/10.0.0.1:original", "10.0.0.1:original"),
                    ][: len(dest)]
                )


def test_flows_that_take_two_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "possible_flows", lambda **_: 300)
    text = """
[udp.a]
listen = "53"
dest = "10.0.0.1:53"
[udp.b]
listen = "54"
dest = "{}"
"""
    for dest, each in (("10.0.0.1:54", 150), ("original", 100)):
        config = config_of(tmp_path / "f.toml", text.format(dest))
        assert units.FlowLimit.of(config) == units.FlowLimit(2, each, 2, each)


# -- rights


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the right was missing."""

    def check(options: DialOptions) -> None:
        if options.transparent:
            why = "transparent takes the right CAP_NET_RAW"
            raise OSError(errno.EPERM, why)

    monkeypatch.setattr(DialOptions, "check", check)


@pytest.mark.parametrize(
    ("kind", "table", "why"),
    [
        ("tcp", {"transparent": True}, ""),
        ("udp", {"transparent": True}, ""),
        (
            "tcp",
            {"intercept": ":80,by=tproxy", "listen": "20001"},
            "to listen for other addresses: ",
        ),
        ("udp", {"dest": "original"}, "to listen for other addresses: "),
        # What NAT brings takes none.
        ("tcp", {"dest": "original"}, None),
        ("tcp", {"intercept": ":80", "listen": "20001"}, None),
        ("udp", {"intercept": ":80", "listen": "20001"}, None),
    ],
)
def test_a_right_that_is_missing_is_told_at_start(
    kind: str,
    table: dict[str, Any],
    why: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse(monkeypatch)
    make = partial(relays, tmp_path, kind, **table)
    if why is None:
        assert make().units
        return
    with pytest.raises(ConfigError) as caught:
        make()
    told = f"relay a: {why}transparent takes the right CAP_NET_RAW"
    assert str(caught.value) == told


@rights.transparent
def test_they_are_tried_again_by_who_has_become_another_user(tmp_path: Path) -> None:
    text = '[udp.a]\nlisten = "53"\ndest = "original"\n'
    service = make_service(config_of(tmp_path / "f.toml", text), Standing())
    [tried] = [each for each in service if isinstance(each, DialRights)]
    assert tried._relays == [
        ("relay a: to listen for other addresses: ", DialOptions(transparent=True))
    ]
    # A socket that accepts connections is made before, and stays as it is.
    text = '[tcp.a]\nlisten = "53"\ndest = "a:1"\nintercept = ":1,by=tproxy"\n'
    service = make_service(config_of(tmp_path / "f.toml", text), Standing())
    assert not [each for each in service if isinstance(each, DialRights)]


def test_a_file_can_be_checked_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever checks may lack what the service has."""
    refuse(monkeypatch)
    path = tmp_path / "f.toml"
    path.write_text(
        """
[tcp.a]
listen = "20001"
dest = ["original", "10.0.0.1:original"]
transparent = true
intercept = ":80,by=tproxy"
[udp.b]
listen = "53"
dest = "original"
max_flows = 2
transparent = true
intercept = ":53"
"""
    )
    assert (main(["check", str(path)]), capsys.readouterr().err) == (0, "")


# -- routes


def named(text: str, dialing: DialOptions | None = None, *, original: bool) -> Any:
    dialing = dialing or DialOptions()
    made = Maker(Clock(), PLAIN, dialing)
    return NamedByRoutes(made, dialing, original=original)(text)


def test_a_route_may_send_clients_where_they_meant_to_go() -> None:
    """If they are brought here; nobody else's have gone astray."""
    upstream = named("original,name=b,source=127.0.0.2", original=True)
    assert upstream.name == "b/original"
    assert isinstance(upstream.endpoint, OriginalEndpoint)
    with pytest.raises(ConfigError) as caught:
        named("10.0.0.1:original", original=False)
    assert str(caught.value) == (
        "'10.0.0.1:original' is where clients meant to go, and none are brought here:"
        " give the relay --intercept"
    )
    with pytest.raises(ConfigError, match="transparent is not possible for an endpoin"):
        named("tcp:10.0.0.1:80", DialOptions(transparent=True), original=True)


def test_a_relay_with_a_route(tmp_path: Path, route_modules: RouteModules) -> None:
    route_modules.write('return conn.server("original")')
    table = {"listen": "20001", "route": "myroutes:route"}
    for more, redirected in (({}, False), ({"intercept": ":80"}, True)):
        unit = relays(tmp_path, **table, **more).units["a"]  # type: ignore[arg-type]
        assert (unit.parts[0].served.intercepts is not None) is redirected
        if redirected:
            assert unit.router.upstream("original").name == "original"
        else:
            with pytest.raises(ConfigError, match="give the relay --intercept"):
                unit.router.upstream("original")


# -- changes


@rights.transparent
def test_a_udp_relay_that_listens_for_others_from_now_on(tmp_path: Path) -> None:
    """It is another one, by the same socket; flows go on."""
    tables = {"udp": {"a": {"listen": at(20001), "dest": at(20009)}}}
    with (
        running(tmp_path, tables) as relayd,
        datagrams(20009) as server,
        datagrams() as client,
    ):
        before = relayd.served("a")
        client.sendto(b"1", (HOST, 20001))
        relayd.reactor.turn()
        _, flow = server.recvfrom(9)
        relayd.set("a", dest=[at(20009), "original,backup"])
        assert relayd.served("a") is not before
        assert is_redirected(relayd.served("a"))
        assert relayd.service.addresses("a") == [f"udp:{at(20001)}"]
        server.sendto(b"2", flow)
        relayd.reactor.turn()
        assert client.recvfrom(9) == (b"2", (HOST, 20001))
        relayd.set("a", dest=None)
        assert not is_redirected(relayd.served("a"))
        client.sendto(b"3", (HOST, 20001))
        relayd.reactor.turn()
        assert server.recvfrom(9)[0] == b"3"


def test_one_that_does_not_change_in_that_goes_on(tmp_path: Path) -> None:
    tables = {"udp": {"a": {"listen": at(20001), "dest": "original"}}}
    with running(tmp_path, tables) as relayd:
        before = relayd.served("a")
        relayd.set("a", dest=["original", "10.0.0.1:original"])
        assert relayd.served("a") is before


@rights.transparent
def test_what_is_set_while_it_runs(tmp_path: Path) -> None:
    tables = {"tcp": {"a": {"listen": at(20001), "dest": "10.0.0.1:80"}}}
    with running(tmp_path, {"transport": "twisted", **tables}) as relayd:
        what = ["192.0.2.1:80,by=tproxy", "10.0.0.0/8:80,by=tproxy"]
        relayd.set("a", intercept=what, transparent=True)
        settings = relayd.unit("a").settings
        assert list(map(str, settings.intercepts)) == what
        assert settings.dialing.transparent
        [change] = [
            each
            for each in relayd.steered.diff()["changes"]
            if each["key"] == "intercept"
        ]
        assert change["now"] == what
        relayd.set("a", dest="original", intercept=None, transparent=None)
        assert relayd.served("a").intercepts is not None
        with pytest.raises(Exception, match="contradict each other"):
            relayd.set("a", transparent=True, source="192.0.2.1")


@rights.transparent
def test_one_that_has_given_up_the_right_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has listens as before; what is new can't."""
    relay = {"listen": at(20001), "dest": at(20009), "intercept": ":1,by=tproxy"}
    with running(tmp_path, {"transport": "twisted", "tcp": {"a": relay}}) as relayd:
        refuse(monkeypatch)
        relayd.set("a", idle_timeout=7)
        assert relayd.unit("a").settings.stream.idle_timeout == 7
        with pytest.raises(Exception, match="to listen for other addresses: "):
            relayd.set("a", listen=at(20002))


# -- what it costs others

LOOK = """
import sys
from twisted.internet import reactor
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.operating.service import make_service
make_service(configure(read_layers(sys.argv[1])), reactor)
rare = ("net.original", "net.transparent", "datagrams.original", "netfilter")
rare = [f"relayd.{each}" for each in rare]
print([each for each in rare if any(n.startswith(each) for n in sys.modules)])
"""


def test_other_relays_import_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(
        '[tcp.a]\nlisten = "20001"\ndest = "10.0.0.1:80"\n'
        '[udp.b]\nlisten = "20001"\ndest = ["10.0.0.1:53", "db:53"]\n'
    )
    look = [sys.executable, "-c", LOOK, str(path)]
    found = subprocess.run(look, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"
