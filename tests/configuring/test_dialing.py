"""How servers are dialled, from a command line and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor

from relayd.configuring.address_grammar import HostPort
from relayd.configuring.config import Config, ServerDialing
from relayd.core.errors import CannotStart, ConfigError
from relayd.net.dial_options import DialOptions
from relayd.net.keepalive import Keepalive, parse_keepalive
from relayd.operating.endpoints import dialing_endpoint
from relayd.operating.service import make_service
from relayd.socks4 import Socks4Factory
from relayd.tap import relayd, socks4
from relayd.tcp import RelayFactory
from tests.support.files import config_of

TO = ("-l", "8080", "-d", "10.0.0.5:80")
ALL = ("--source", "127.0.0.2", "--source", "::1", "--interface", "lo", "--mark", "7")


def parse(*argv: str, plugin: Any = relayd) -> Config:
    options = plugin.Options()
    options.parseOptions(argv)
    config: Config = options.config
    return config


def refusal(*argv: str, plugin: Any = relayd) -> list[str]:
    with pytest.raises(CannotStart) as caught:
        plugin.Options().parseOptions(argv)
    name = plugin.__name__.split(".")[-1]
    lines = str(caught.value.code).splitlines()
    return [line.removeprefix(f"{name}: ").strip() for line in lines]


def test_on_a_command_line_they_are_for_all_relays() -> None:
    one, other = parse(*TO, "-l", "udp:53", "-d", "udp:9.9.9.9:53", *ALL).relays
    options = DialOptions(source4="127.0.0.2", source6="::1", interface="lo", mark=7)
    assert one.dialing.options == other.dialing.options == options
    [proxy] = parse(*ALL, plugin=socks4).relays
    assert proxy.dialing.options == options
    assert parse(*TO).relays[0].dialing == ServerDialing()


def test_how_lost_peers_are_noticed() -> None:
    given = ("--keepalive", "10,5,3", "--user-timeout", "1m")
    [relay] = parse(*TO, *given).relays
    [proxy] = parse(*given, plugin=socks4).relays
    for stream in (relay.stream, proxy.stream):  # type: ignore[union-attr]
        assert stream.keepalive == Keepalive(10, 5, 3)
        assert stream.user_timeout == 60


def test_in_a_file_each_relay_has_its_own(tmp_path: Path) -> None:
    text = """
[defaults]
source = "192.0.2.1"
mark = 0x1f
[tcp.web]
listen = "8080"
dest = "10.0.0.5:80"
keepalive = "10,5,3"
user_timeout = "30s"
[tcp.six]
listen = "8081"
dest = "[2001:db8::5]:80"
source = ["2001:db8::1", "192.0.2.2"]
interface = "eth1"
[udp.dns]
listen = "53"
dest = "9.9.9.9:53"
source = []
"""
    web, six, dns = config_of(tmp_path / "f.toml", text).relays
    assert web.dialing == ServerDialing(sources=["192.0.2.1"], mark=31)
    assert web.stream.keepalive == Keepalive(10, 5, 3)  # type: ignore[union-attr]
    assert six.dialing.options == DialOptions(
        source4="192.0.2.2", source6="2001:db8::1", interface="eth1", mark=31
    )
    assert dns.dialing == ServerDialing(mark=31)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("0x1F", 31), ("0xffffffff", 0xFFFF_FFFF), ("4294967295", 0xFFFF_FFFF)],
)
def test_a_mark_may_be_hexadecimal(text: str, value: int) -> None:
    assert parse(*TO, "--mark", text).relays[0].dialing.mark == value


@pytest.mark.parametrize(
    "text", ["0", "0x0", "-1", "0x", "x", "0xg", "4294967296", "0x1ffffffff", "0x1_0"]
)
def test_what_is_no_mark(text: str) -> None:
    [line] = refusal(*TO, f"--mark={text}")
    assert line == f"bad --mark {text!r}: expected a number from 1 to 4294967295"


@pytest.mark.parametrize("text", ["60,15,4", "1,1,1", "32767,32767,127"])
def test_keepalive_is_written_as_three_numbers(text: str) -> None:
    assert str(parse_keepalive(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "60",
        "60,15",
        "60,15,4,1",
        "0,15,4",
        "60,0,4",
        "60,15,0",
        "32768,1,1",
        "1,32768,1",
        "1,1,128",
        "a,b,c",
        "1.5,1,1",
        " 1,1,1",
        "1" * 9999 + ",1,1",
    ],
)
def test_what_is_no_keepalive(text: str) -> None:
    with pytest.raises(ValueError, match="expected seconds before the first probe"):
        parse_keepalive(text)


def test_figures_that_the_kernel_does_not_take() -> None:
    with pytest.raises(ValueError, match="keepalive's count is a number from 1 to 127"):
        Keepalive(60, 15, 128)


# -- what contradicts itself


def test_one_address_of_each_family() -> None:
    assert refusal(*TO, "--source", "127.0.0.2", "--source", "127.0.0.3") == [
        (
            "--source '127.0.0.3' is the second source for IPv4, after --source"
            " '127.0.0.2': give one of each family"
        )
    ]


@pytest.mark.parametrize(
    ("source", "server", "family"),
    [
        ("192.0.2.1", "[2001:db8::5]:80", "IPv6"),
        ("192.0.2.1", "udp:[2001:db8::5]:80", "IPv6"),
        ("2001:db8::1", "10.0.0.5:80", "IPv4"),
        ("2001:db8::1", "80", "IPv4"),
        ("2001:db8::1", "10.0.0.5:80-89", "IPv4"),
    ],
)
def test_a_server_of_the_other_family(source: str, server: str, family: str) -> None:
    """It would never be dialled."""
    udp, ports = "udp:" * server.startswith("udp"), "-8089" * server.endswith("-89")
    given = ("-l", f"{udp}8080{ports}", "-d", server, "--source", source)
    assert refusal(*given) == [
        (
            f"--source {source!r} is not possible at --dest {server!r}: give a source"
            f" for {family}, too"
        )
    ]


def test_a_server_may_have_its_own() -> None:
    servers = ("-d", "[2001:db8::5]:80,source=2001:db8::1", "-d", "10.0.0.5:80")
    assert parse("-l", "8080", *servers, "--source", "192.0.2.1").relays


def test_of_a_name_it_is_not_known() -> None:
    assert parse("-l", "8080", "-d", "db:80", "--source", "2001:db8::1").relays
    assert parse("-l", "8080", "-d", "10.x:80", "--source", "2001:db8::1").relays


def test_clients_of_a_proxy_ask_for_ipv4() -> None:
    assert refusal("--source", "2001:db8::1", plugin=socks4) == [
        (
            "--source '2001:db8::1' is not enough: clients of SOCKS4 ask for IPv4"
            " addresses; give a source for IPv4, too"
        )
    ]
    assert parse("--source", "192.0.2.1", plugin=socks4).relays


@pytest.mark.parametrize("server", ["tcp:10.0.0.5:80", "tls:db:443", "ssl:db:443"])
def test_an_endpoint_string_is_dialled_by_twisted(server: str) -> None:
    given = ("--source", "192.0.2.1", "--interface", "eth1", "--mark", "7")
    why = f"is not possible at --dest {server!r}, which Twisted dials: write a short"
    assert refusal("-l", "8080", "-d", server, *given) == [
        f"--source '192.0.2.1' {why} form such as 10.0.0.5:80; or give it bindAddress=",
        f"--interface 'eth1' {why} form such as 10.0.0.5:80",
        f"--mark '7' {why} form such as 10.0.0.5:80",
    ]
    # These are set on any connection.
    assert parse("-l", "8080", "-d", server, "--keepalive", "1,2,3").relays


@pytest.mark.parametrize("path", ["unix:/run/x", "unix:path=/run/x"])
def test_unix_sockets_have_none(path: str) -> None:
    given = ("--source", "192.0.2.1", "--interface", "eth1")
    why = "does nothing: all servers are UNIX sockets; leave it out"
    assert refusal("-l", "8080", "-d", path, *given) == [
        f"--source '192.0.2.1' {why}",
        f"--interface 'eth1' {why}",
    ]
    # For one that can, and for the others it means nothing.
    assert parse("-l", "8080", "-d", path, "-d", "10.0.0.5:80", *given).relays
    assert parse("-l", "81", "-d", path, *TO, *given).relays


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (("--user-timeout", "10"), "10"),
        (("--user-timeout", "2", "--stall-timeout", "2.5"), "2.5"),
    ],
)
def test_a_user_timeout_is_longer_than_a_stall(
    given: tuple[str, ...], seconds: str
) -> None:
    assert refusal(*TO, *given) == [
        (
            f"--user-timeout {given[1]!r} must be longer than --stall-timeout, which is"
            f" {seconds}, or 0"
        )
    ]


@pytest.mark.parametrize(
    "given",
    [
        ("--user-timeout", "0", "--stall-timeout", "5"),
        ("--user-timeout", "5", "--stall-timeout", "4"),
        # Without one, nothing is to come first.
        ("--user-timeout", "5", "--stall-timeout", "0"),
    ],
)
def test_or_is_off_or_alone(given: tuple[str, ...]) -> None:
    assert parse(*TO, *given).relays


@pytest.mark.parametrize("option", ["--keepalive=1,2,3", "--user-timeout=30"])
def test_datagrams_have_no_connection(option: str) -> None:
    [line] = refusal("-l", "udp:53", "-d", "udp:9.9.9.9:53", option)
    assert line.endswith("is not for datagrams")


def test_all_problems_of_a_file_have_their_place(tmp_path: Path) -> None:
    text = """
[tcp.web]
listen = "8080"
dest = ["[::1]:80", "tcp:10.0.0.5:80"]
source = "127.0.0.2"
user_timeout = 1
"""
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path / "f.toml", text)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all("f.toml: tcp.web." in line for line in lines)


# -- in Python


def _relay(**keywords: Any) -> Any:
    return RelayFactory(dialing_endpoint(HostPort(None, 9), reactor), **keywords)


def _proxy(**keywords: Any) -> Any:
    return Socks4Factory(reactor, **keywords)


@pytest.mark.parametrize("make", [_relay, _proxy])
def test_a_factory_refuses_a_user_timeout_that_is_too_short(make: Any) -> None:
    with pytest.raises(ValueError, match="longer than the stall timeout, 10 s"):
        make(user_timeout=10)
    with pytest.raises(ValueError, match="must not be negative"):
        make(user_timeout=-1)
    assert make(user_timeout=10, stall_timeout=0).user_timeout == 10
    assert make(keepalive=Keepalive(1, 2, 3)).keepalive == Keepalive(1, 2, 3)
    assert make().keepalive == Keepalive()


# -- tried before anything listens


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("source", '"192.0.2.77"', "source '192.0.2.77' is no address of this machine"),
        ("interface", '"no-such0"', "interface 'no-such0': there is none of that name"),
    ],
)
@pytest.mark.parametrize("kind", ["tcp", "udp", "socks4"])
def test_what_this_machine_lacks(
    kind: str, key: str, value: str, said: str, tmp_path: Path
) -> None:
    """With the relay's name."""
    dest = "" if kind == "socks4" else 'dest = "127.0.0.1:9"\n'
    text = f'[{kind}.web]\nlisten = "127.0.0.1:0"\n{dest}{key} = {value}\n'
    config = config_of(tmp_path / "f.toml", text)
    with pytest.raises(ConfigError) as caught:
        make_service(config, reactor)
    assert str(caught.value) == f"relay web: {said}"
