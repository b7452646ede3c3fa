"""`--accept-proxy` and `--send-proxy`, from a command line and from a file."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor

from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    PortRange,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.config import Config, Relay, Socks4Relay, UdpRelay
from relayd.configuring.server_grammar import parse_server
from relayd.configuring.server_options import ServerOptions
from relayd.core.errors import CannotStart, ConfigError
from relayd.observing.line_log import EVENTS
from relayd.operating.relays import unit_of
from relayd.operating.units import Workshop
from relayd.tap import relayd, socks4

V1, V2 = ServerOptions(send_proxy="v1"), ServerOptions(send_proxy="v2")
NETWORKS = (ipaddress.ip_network("10.0.0.0/8"), "unix")


def parse(*argv: str, plugin: Any = relayd) -> Config:
    options = plugin.Options()
    options.parseOptions(argv)
    config: Config = options.config
    return config


def refusal(*argv: str, plugin: Any = relayd) -> str:
    with pytest.raises(CannotStart) as caught:
        plugin.Options().parseOptions(argv)
    return str(caught.value.code).removeprefix(f"{plugin.__name__.split('.')[-1]}: ")


def from_file(folder: Path, text: str) -> Config:
    path = folder / "relayd.toml"
    path.write_text(text)
    return parse("--config", str(path))


def test_on_a_command_line_they_are_for_all_relays() -> None:
    one, other, datagrams = parse(
        *("-l", "8080", "-d", "10.0.0.5:80", "-l", "8081", "-d", "10.0.0.6:80"),
        *("-l", "udp:53", "-d", "udp:10.0.0.5:53"),
        *("--accept-proxy", "10.0.0.0/8", "--accept-proxy", "unix"),
        *("--send-proxy", "v2"),
    ).relays
    assert isinstance(one, Relay)
    assert isinstance(other, Relay)
    assert isinstance(datagrams, UdpRelay)
    assert one.stream.accept_proxy == other.stream.accept_proxy == NETWORKS
    assert one.stream.send_proxy == datagrams.udp.send_proxy == "v2"


def test_in_a_file_each_relay_has_its_own(tmp_path: Path) -> None:
    found = from_file(
        tmp_path,
        """
        [defaults]
        send_proxy = "v2"
        [tcp.web]
        listen = "8080"
        dest = ["10.0.0.5:80,send-proxy=v1", "10.0.0.6:80"]
        accept_proxy = ["10.0.0.0/8", "unix"]
        [tcp.other]
        listen = "8081"
        dest = "10.0.0.5:80"
        [udp.dns]
        listen = "53"
        dest = "10.0.0.5:53"
        send_proxy = "v2-first"
        """,
    )
    web, other, dns = found.relays
    assert isinstance(web, Relay)
    assert isinstance(other, Relay)
    assert isinstance(dns, UdpRelay)
    assert web.stream.accept_proxy == NETWORKS
    assert other.stream.accept_proxy == ()
    assert web.stream.send_proxy == other.stream.send_proxy == "v2"
    assert dns.udp.send_proxy == "v2-first"
    [listening] = unit_of(web, Workshop(found, reactor, EVENTS)).listenings
    factory: Any = listening.factory
    assert [each.preamble is None for each in factory.pool.upstreams] == [False, True]
    assert factory.preamble is not None
    assert "10.1.2.3:1" in factory.introduction.peers
    [listening] = unit_of(other, Workshop(found, reactor, EVENTS)).listenings
    factory = listening.factory
    assert factory.introduction is None


def test_a_proxy_has_both() -> None:
    found = parse(
        *("--allow-client", "192.0.2.0/24", "--accept-proxy", "127.0.0.1"),
        *("--send-proxy", "v1"),
        plugin=socks4,
    )
    [proxy] = found.relays
    assert isinstance(proxy, Socks4Relay)
    [listening] = unit_of(proxy, Workshop(found, reactor, EVENTS)).listenings
    factory: Any = listening.factory
    assert "127.0.0.1:80" in factory.introduction.peers
    assert factory.preamble is not None
    assert factory.policy.guarded, "others than this machine's come by the balancer"


def test_the_servers_of_a_udp_relay() -> None:
    found = parse(
        *("-l", "udp:127.0.0.1:0", "-d", "udp:10.0.0.5:53,send-proxy=v2-first"),
        *("-d", "udp:10.0.0.6:53"),
    )
    [relay] = found.relays
    assert isinstance(relay, UdpRelay)
    [listening] = unit_of(relay, Workshop(found, reactor, EVENTS)).listenings
    factory: Any = listening.factory
    first, second = factory.servers
    assert first.preamble.first
    assert second.preamble is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.5:80", HostPort("10.0.0.5", 80)),
        (
            "10.0.0.5:80,send-proxy=v1",
            HostPort("10.0.0.5", 80, options=V1),
        ),
        (
            "80,send-proxy=v2",
            HostPort(None, 80, options=V2),
        ),
        (
            "unix:/run/x,send-proxy=v2",
            UnixPath("/run/x", options=V2),
        ),
        ("unix:/run/x,y", UnixPath("/run/x,y")),
        (
            "udp:[::1]:53,send-proxy=v2",
            UdpAddress("::1", 53, options=V2),
        ),
        (
            "tcp:host=a:port=80,send-proxy=v1",
            EndpointString("tcp:host=a:port=80", options=V1),
        ),
        ("tls:a:443:trustRoots=/a,b", EndpointString("tls:a:443:trustRoots=/a,b")),
        (
            "10.0.0.5:5000-5001,send-proxy=v2",
            PortRange(HostPort("10.0.0.5", 5000, options=V2), 5001),
        ),
    ],
)
def test_a_server_with_an_option_of_its_own(text: str, address: Any) -> None:
    assert parse_server(text) == address
    if isinstance(address, PortRange):
        assert address[1] == HostPort("10.0.0.5", 5001, options=V2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("80,send-proxy=v3", "expected send-proxy=v1 or v2"),
        ("80,send-proxy=", "expected send-proxy=v1 or v2"),
        ("80,send-proxy=v2-first", "expected send-proxy=v1 or v2"),
        ("udp:53,send-proxy=v1", "expected send-proxy=v2 or v2-first"),
    ],
)
def test_an_option_that_is_none(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_server(text)
    assert str(caught.value) == f"bad address {text!r}: {why}"
    for other in ("80,weigh=3", ",send-proxy=v2", "80,send-proxy=v2,x=y"):
        with pytest.raises(ConfigError):
            parse_server(other)


WEB = ("-l", "8080", "-d", "10.0.0.5:80")
DNS = ("-l", "udp:53", "-d", "udp:10.0.0.5:53")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (
            (*WEB, "--accept-proxy", "nobody"),
            (
                "bad --accept-proxy 'nobody': 'nobody' does not appear to be an IPv4 or"
                " IPv6 network; expected an address, a network such as 192.168.0.0/16,"
                " or unix"
            ),
        ),
        (
            (*WEB, "--accept-proxy", "10.0.0.1/8"),
            (
                "bad --accept-proxy '10.0.0.1/8': '10.0.0.1/8' has bits beyond its"
                " prefix: you may mean 10.0.0.0/8"
            ),
        ),
        (
            (*WEB, "--send-proxy", "v3"),
            "bad --send-proxy 'v3': expected v1, v2 or v2-first",
        ),
        (
            (*WEB, "--send-proxy", "v2-first"),
            "--send-proxy 'v2-first' is not for tcp: give v1 or v2",
        ),
        (
            (*DNS, "--send-proxy", "v1"),
            "--send-proxy 'v1' is not for udp: give v2 or v2-first",
        ),
        (
            (*DNS, "--accept-proxy", "10.0.0.1"),
            "--accept-proxy '10.0.0.1' is not for datagrams",
        ),
        (
            ("-l", "ssl:443:privateKey=k.pem", "-d", "80", "--accept-proxy", "unix"),
            (
                "--accept-proxy 'unix' is not possible at --listen"
                " 'ssl:443:privateKey=k.pem': a PROXY header comes before TLS, which"
                " this listener ends; let the balancer end it"
            ),
        ),
        (
            ("-l", "80", "-d", "tls:example.com:443", "--send-proxy", "v2"),
            (
                "--send-proxy 'v2' is not possible at --dest 'tls:example.com:443': the"
                " header goes before the TLS handshake, with which Twisted begins"
            ),
        ),
        (
            ("-l", "80", "-d", "tls:example.com:443,send-proxy=v1"),
            (
                "send-proxy is not possible at --dest"
                " 'tls:example.com:443,send-proxy=v1': the header goes before the TLS"
                " handshake, with which Twisted begins"
            ),
        ),
        (
            ("-l", "haproxy:tcp:8080", "-d", "80"),
            (
                "bad --listen 'haproxy:tcp:8080': haproxy: is not supported; write the"
                " listener that is in it, and give --accept-proxy (in a file:"
                " accept_proxy) with the balancer's network"
            ),
        ),
    ],
)
def test_what_can_not_be(argv: tuple[str, ...], why: str) -> None:
    said = refusal(*argv)
    assert said.startswith(why) or said.replace("bad address", "bad --listen") == why


def test_what_can_not_be_of_a_proxy() -> None:
    accept = ("--accept-proxy", "127.0.0.1")
    for listener in ((), ("-l", "127.0.0.1:1080")):
        said = refusal(*accept, *listener, plugin=socks4)
        assert "would be an open proxy, for everybody who can reach it" in said
        assert "127.0.0.1:1080" in said
    assert refusal(*accept, "--open", "--ident", plugin=socks4) == (
        "--ident can't be combined with --accept-proxy: the identd of a client behind a"
        " balancer can't be asked"
    )


def test_a_file_says_where(tmp_path: Path) -> None:
    with pytest.raises(CannotStart) as caught:
        from_file(
            tmp_path,
            '[tcp.web]\nlisten = "1"\ndest = "2"\nsend_proxy = "v2-first"\n',
        )
    assert "tcp.web.send_proxy: send_proxy = 'v2-first' is not for tcp" in str(
        caught.value.code
    )
