"""What a destination says of its server, on a command line and in a file."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    PortRange,
    UnixPath,
)
from relayd.configuring.config import Config, Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.server_grammar import ServersOf, options_of, parse_server
from relayd.configuring.server_options import PLAIN, ServerOptions
from relayd.core.errors import CannotStart, ConfigError
from relayd.net.dial_options import DialOptions
from relayd.tap import relayd


def read(document: Any) -> Config:
    return configure(read_layers("-", io.BytesIO(json.dumps(document).encode()), {}))


def of_command_line(*argv: str) -> Config:
    options = relayd.Options()
    options.parseOptions(argv)
    config: Config = options.config
    return config


ALL_OF_THEM = ServerOptions(
    weight=3, backup=True, max=100, name="db1", disabled=True, send_proxy="v2"
)


@pytest.mark.parametrize(
    ("text", "address", "options"),
    [
        ("10.0.0.5:80", HostPort("10.0.0.5", 80), PLAIN),
        ("80,weight=3", HostPort(None, 80), ServerOptions(weight=3)),
        ("80,weight=0", HostPort(None, 80), ServerOptions(weight=0)),
        (
            "10.0.0.5:80,weight=3,backup,max=100,name=db1,disabled,send-proxy=v2",
            HostPort("10.0.0.5", 80),
            ALL_OF_THEM,
        ),
        ("unix:/run/a,b,backup", UnixPath("/run/a,b"), ServerOptions(backup=True)),
        ("unix:/run/a,backups", UnixPath("/run/a,backups"), PLAIN),
        (
            "tls:a:443:trustRoots=/a,b,max=2",
            EndpointString("tls:a:443:trustRoots=/a,b"),
            ServerOptions(max=2),
        ),
        (
            "10.0.0.5:5000-5001,max=2",
            PortRange(HostPort("10.0.0.5", 5000), 5001),
            ServerOptions(max=2),
        ),
    ],
)
def test_options_behind_an_address(
    text: str, address: Address | PortRange, options: ServerOptions
) -> None:
    found = parse_server(text)
    assert str(found) == str(address)
    assert options_of(found) == options


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("80,weight=", "expected weight=a number from 0 to 256"),
        ("80,weight=257", "expected weight=a number from 0 to 256"),
        ("80,weight=-1", "expected weight=a number from 0 to 256"),
        ("80,max=0", "expected max=a number from 1 to 9999999"),
        ("80,backup=yes", "backup has no value"),
        ("80,max=1,max=2", "max is given twice"),
        ("80,name=Db", "expected name="),
        ("80,send-proxy=v3", "expected send-proxy=v1 or v2"),
        ("80,weight", "expected weight="),
        (",weight=3", "bad address ''"),
        ("80,backup,", "backup has no value"),
        ("80,weigth=3", "there is no 'weigth' in a destination; did you mean weight?"),
        ("80-81,Weight=3", "there is no 'Weight' in a destination; did you mean wei"),
        ("dns:a.b:80,back", "no 'back' in a destination; did you mean backup?"),
        ("udp:80,send_proxy=v2", "did you mean send-proxy?"),
        ("80,backup,wieght=3", "there is no 'wieght' in a destination"),
        ("80,keepalive=9,9,9,wieght=3", "there is no 'wieght' in a destination"),
        ("80,max=1,wait=2", "no 'wait' in a destination; it has weight, backup, max,"),
        ("80,max=0,wait=2", "expected max=a number from 1"),
        ("a b,wait=2", "bad address 'a b,wait=2'"),
        ("unix:/" + "a" * 110 + ",wait=2", "a UNIX socket's path has at most"),
    ],
)
def test_what_is_wrong_is_told(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_server(text)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.text(st.sampled_from("80,=weightmaxbckup.v12-"), max_size=40))
def test_any_text_is_an_address_or_an_error(text: str) -> None:
    try:
        parse_server(text)
    except ConfigError as problem:
        assert "\n" not in str(problem)


def test_a_file_has_tables_or_texts() -> None:
    table = {
        "address": "10.0.0.5:80",
        "weight": 3,
        "backup": True,
        "max": 100,
        "name": "db1",
        "disabled": True,
        "send_proxy": "v2",
    }
    config = read({"tcp": {"web": {"listen": "1", "dest": [table, "10.0.0.6:80"]}}})
    [relay] = config.relays
    assert isinstance(relay, Relay)
    first, second = relay.destinations
    assert options_of(first) == ALL_OF_THEM
    assert options_of(second) == PLAIN
    [alone] = read({"tcp": {"web": {"listen": "1", "dest": table}}}).relays
    assert isinstance(alone, Relay)
    assert [options_of(each) for each in alone.destinations] == [ALL_OF_THEM]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({}, 'expected address = "10.0.0.5:80"'),
        ({"address": 80}, 'expected address = "10.0.0.5:80"'),
        ({"address": "x y"}, "bad address 'x y'"),
        ({"address": "80", "weight": "3"}, "weight: expected a number from 0 to 256"),
        ({"address": "80", "weight": True}, "weight: expected a number"),
        ({"address": "80", "backup": 1}, "backup: expected true or false"),
        ({"address": "80", "wait": 1}, "there is no 'wait' in a destination"),
        ({"address": "80", "wait": 1}, "it has address, weight, backup, max, name,"),
        ({"address": "80", "weigth": 1}, "did you mean weight?"),
        ({"address": "80", "send-proxy": "v1"}, "there is no 'send-proxy'"),
        ({"address": "80", "send-proxy": "v1"}, "did you mean send_proxy?"),
        ({"address": "80", "name": {}}, "name: expected"),
    ],
)
def test_what_is_wrong_in_a_table_is_told(table: Any, why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read({"tcp": {"web": {"listen": "1", "dest": [table]}}})
    line = str(raised.value)
    assert line.startswith("standard input: tcp.web.dest[0]: "), line
    assert why in line
    assert "\n" not in line


def test_a_name_is_one_servers() -> None:
    with pytest.raises(CannotStart) as raised:
        of_command_line("-l", "1", "-d", "80,name=a", "-d", "81,name=a")
    assert str(raised.value) == (
        "relayd: --dest '81,name=a' has the name 'a', as --dest '80,name=a' has: give"
        " each server its own"
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("10.0.0.5:80", "10.0.0.5:80"),
        ("10.0.0.5:80", "10.0.0.5:80,weight=2,backup"),
        ("80,pool=default", "127.0.0.1:80"),
        ("80-81", "127.0.0.1:80-81"),
        ("[::1]:80", "[::1]:80"),
        ("unix:/a", "unix:/a,disabled"),
        ("tls:a:443", "tls:a:443"),
        ("dns:a.b:80", "dns:a.b:80"),
        ("original", "original"),
    ],
)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_server_is_there_once(kind: str, first: str, second: str) -> None:
    if kind == "udp" and first.startswith(("unix", "tls", "80,pool")):
        return
    listen = "1-2" if "-" in first else "1"
    relay: dict[str, Any] = {"listen": listen, "dest": [first, second]}
    if first == "original":
        relay["intercept"] = "0.0.0.0/0:80"
    with pytest.raises(ConfigError) as raised:
        read({kind: {"web": relay}})
    assert str(raised.value) == (
        f"standard input: {kind}.web.dest: dest = {second!r} is the same server as dest"
        f" = {first!r}: leave one out, or give each a name of its own (name=)"
    )
    relay["dest"] = [f"{first},name=a", f"{second},name=b"]
    read({kind: {"web": relay}})


def test_a_server_of_a_server_name_is_there_once() -> None:
    relay: dict[str, Any] = {
        "listen": "1",
        "dest": ["10.0.0.5:80", "10.0.0.5:80,pool=b", "10.0.0.5:80,name=x"],
        "sni": ["=default", "*.b.com=b", "a.com=10.0.0.5:80", "c.com=10.0.0.5:80"],
    }
    read({"tcp": {"web": relay}})
    relay["sni"].append("A.com=10.0.0.5:80")
    with pytest.raises(ConfigError) as raised:
        read({"tcp": {"web": relay}})
    assert str(raised.value) == (
        "standard input: tcp.web.sni: sni = 'A.com=10.0.0.5:80' is the same server as"
        " sni = 'a.com=10.0.0.5:80': leave one out, or give each a name of its own"
        " (name=)"
    )


def test_what_is_not_for_datagrams_is_told() -> None:
    with pytest.raises(CannotStart) as raised:
        of_command_line("-l", "udp:1", "-d", "udp:80,keepalive=9,9,9,user-timeout=5")
    server = "relayd: --dest 'udp:80,keepalive=9,9,9,user-timeout=5'"
    assert str(raised.value).splitlines() == [
        f"{server}: keepalive is not for a server of udp",
        f"{server}: user_timeout is not for a server of udp",
    ]


@pytest.mark.parametrize("udp", ["", "udp:"])
def test_a_source_is_of_the_servers_family(udp: str) -> None:
    with pytest.raises(CannotStart) as raised:
        of_command_line("-l", f"{udp}1", "-d", f"{udp}[::1]:80,source=10.0.0.1")
    assert str(raised.value) == (
        f"relayd: --dest '{udp}[::1]:80,source=10.0.0.1': its source is of the other"
        " family"
    )


@pytest.mark.parametrize(
    ("text", "how", "name", "port"),
    [
        ("dns:db.example.com:5432", "dns", "db.example.com", 5432),
        ("srv:_http._tcp.example.com", "srv", "_http._tcp.example.com", 0),
        ("srv:_http.example.com.", "srv", "_http.example.com", 0),
    ],
)
def test_names_that_stand_for_several_servers(
    text: str, how: str, name: str, port: int
) -> None:
    found = parse_server(f"{text},backup")
    assert isinstance(found, ServersOf)
    assert (found.how, found.name, found.port, found.udp) == (how, name, port, False)
    assert found.options == ServerOptions(backup=True)
    assert str(found) == text.removesuffix(".")
    datagrams = parse_server(f"udp:{text}")
    assert isinstance(datagrams, ServersOf)
    assert datagrams.udp


@pytest.mark.parametrize(
    "text",
    [
        *("dns:10.0.0.5:80", "dns:80", "dns:db", "dns:", "dns:unix:/x", "dns:db:0"),
        *("srv:", "srv:example.com", "srv:_http", "srv:_http._tcp.", "srv:_x._tcp.a b"),
        *("dns:db:80-90", "srv:_http._tcp.example.com:80", "udp:dns:dns:db:80"),
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="bad address") as raised:
        parse_server(text)
    assert "\n" not in str(raised.value)


def test_names_and_options_of_a_relay_of_datagrams() -> None:
    """As those of connections, with settings of their own."""
    config = of_command_line(
        *("-l", "udp:1", "-d", "udp:dns:db:80,weight=2", "-d", "udp:81,backup,max=3"),
        *("--balance", "least-sessions", "--max-fails", "2", "--resolve-every", "7"),
    )
    [udp] = config.relays
    assert isinstance(udp, UdpRelay)
    assert [options_of(each) for each in udp.destinations] == [
        ServerOptions(weight=2),
        ServerOptions(backup=True, max=3),
    ]
    assert udp.pool.balance == "least-sessions"
    assert (udp.pool.max_fails, udp.pool.resolve_every) == (2, 7)


def test_a_check_of_a_server_of_datagrams_needs_a_port() -> None:
    with pytest.raises(CannotStart) as raised:
        of_command_line("-l", "udp:1", "-d", "udp:80,check=tcp")
    assert str(raised.value) == (
        "relayd: --dest 'udp:80,check=tcp': check=tcp needs a port for udp, such as"
        " port=8008"
    )


def test_how_a_server_is_dialled_and_checked() -> None:
    text = (
        "10.0.0.5:80,source=10.0.0.1,interface=eth1,mark=0x1f,keepalive=30,10,3"
        ',user-timeout=60,check=tcp send="a,b" expect=c,weight=2'
    )
    options = options_of(parse_server(text))
    assert options.weight == 2
    assert str(options.keepalive) == "30,10,3"
    assert options.check is not None
    assert options.check.text == 'tcp send="a,b" expect=c'
    dialing = options.dialing(DialOptions(source4="10.0.0.9", source6="fe80::1%eth0"))
    assert dialing == DialOptions(
        source4="10.0.0.1",
        interface="eth1",
        mark=31,
        keepalive=options.keepalive,
        user_timeout=60.0,
    )
    relays = DialOptions(mark=1)
    assert PLAIN.dialing(relays) is relays
    assert PLAIN.dialing(None) is None
    assert ServerOptions(source="::1").dialing(None) == DialOptions(source6="::1")


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("tls:a:443,source=10.0.0.1", "source is not possible for an endpoint string"),
        ("unix:/run/x,mark=1", "mark is not for UNIX sockets"),
        ("80,user-timeout=10", "user_timeout must be longer than --stall-timeout"),
    ],
)
def test_what_can_t_be_set_on_a_servers_sockets(server: str, why: str) -> None:
    with pytest.raises(CannotStart) as raised:
        of_command_line("-l", "1", "-d", server)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


NOBODY_STAYS = ": nothing stays at a server, or waits for one"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            "--balance client-hash",
            "{0} goes with --balance round-robin or random, not client-hash",
        ),
        (
            "--send-proxy v2-first",
            "{0} needs --send-proxy v2: each server is to know whose a datagram is",
        ),
        (
            "--when-none wait=5",
            "--when-none 'wait=5' is not for {0}" + NOBODY_STAYS,
        ),
        (
            "--on-down cut --check python:json:loads",
            "--on-down 'cut' is not for {0}" + NOBODY_STAYS,
        ),
        ("-d udp:81,max=3", "--dest 'udp:81,max=3': max is not for {0}"),
        (
            "-d udp:81,send-proxy=v2",
            "--dest 'udp:81,send-proxy=v2': send_proxy is not for {0}",
        ),
    ],
)
def test_datagrams_that_can_not_be_spread(given: str, problem: str) -> None:
    args = f"-l udp:1 -d udp:80 --udp-balance datagram {given}"
    with pytest.raises(CannotStart) as raised:
        of_command_line(*args.split())
    told = problem.format("--udp-balance 'datagram'")
    assert str(raised.value) == f"relayd: {told}"
