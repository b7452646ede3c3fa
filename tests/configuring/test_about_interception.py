"""Transparent relaying: which settings contradict each other, in a line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.core.errors import CannotStart, ConfigError
from relayd.core.interception import parse_intercept
from relayd.net.dial_options import DialOptions
from relayd.tap import relayd
from tests.support.files import layers_of

TCP = "-l 16000 -d 192.168.0.1:80 "
UDP = "-l udp:5353 -d udp:192.168.0.1:53 "


def parse(words: str) -> relayd.Options:
    options = relayd.Options()
    options.parseOptions(words.split())
    return options


@pytest.mark.parametrize(
    "words",
    [
        TCP + "--transparent",
        TCP + "--intercept 192.168.0.2:80 --transparent --manage-netfilter",
        TCP + "--intercept :80 --intercept [::/0]:443,from=2001:db8::/32",
        "-l 16000 -d original",
        "-l 16000 -d original --transparent --intercept :*",
        "-l 16000 -d 192.168.0.10:original,weight=3 -d original,backup,max=3",
        "-l 16000 -d db.example.com:original --source 192.0.2.1",
        "-l 16000 -d original,source=192.0.2.1 --transparent",
        "-l 16000 -d original -d 10.0.0.1:80,check=tcp",
        "-l 16000 -d original --send-proxy v2 --balance client-hash",
        "-l tcp:16000 -d original",
        "-l unix:/run/s -d original --accept-proxy unix",
        "-l 16000-16002 -d original",
        # One of two families is enough for what is about both.
        "-l 0.0.0.0:16000 -d 10.0.0.1:80 --intercept :80",
        "-l 127.0.0.1:16000 -d 10.0.0.1:80 --intercept :80,by=tproxy",
        UDP + "--transparent --intercept 192.168.0.2:53,by=redirect",
        "-l udp:5353 -d udp:original --intercept :53 --transparent",
        # Each belongs to the listener before it.
        "-l 1 -d a:80 --intercept :80 -l udp:1 -d udp:b:53 --intercept :80",
        "-l 1 -d a:80 --intercept :80 -l 2 -d b:80 --intercept :81",
        "-l udp:5353 -d udp:192.168.0.10:original --source 192.0.2.1",
        # Of two relays, ports that both can have, and families.
        TCP + "--intercept :80 " + UDP,
        TCP + "--transparent --mark 0x20",
        TCP + "--mark 0x1000",
    ],
)
def test_what_goes_together(words: str) -> None:
    assert parse(words).config.relays


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            TCP + "--transparent --source 192.0.2.1",
            "--transparent and --source contradict each other: give one",
        ),
        (
            "-l 1 -d tcp:10.0.0.1:80 --transparent",
            (
                "--transparent is not possible at --dest 'tcp:10.0.0.1:80', which"
                " Twisted dials: write a short form such as 10.0.0.5:80"
            ),
        ),
        (
            "-l 1 -d unix:/run/s --transparent",
            "--transparent does nothing: all servers are UNIX sockets; leave it out",
        ),
        (
            "-l unix:/run/l -d 10.0.0.1:80 --transparent",
            (
                "--transparent is not possible at --listen 'unix:/run/l': clients of"
                " UNIX sockets have no address; leave it out"
            ),
        ),
        (
            UDP + "--udp-balance datagram --transparent",
            (
                "--transparent is not for --udp-balance 'datagram': each client has"
                " a socket of its own; leave that out"
            ),
        ),
        (
            UDP + "-d udp:original --udp-balance datagram",
            (
                "--dest 'udp:original' is not for --udp-balance 'datagram': each"
                " client has a socket of its own; leave that out"
            ),
        ),
        (
            "-l unix:/run/l -d original",
            (
                "--dest 'original' is not possible at --listen 'unix:/run/l': clients"
                " of UNIX sockets meant to go nowhere else; leave it out"
            ),
        ),
        (
            "-l original -d 10.0.0.1:80",
            (
                "bad address 'original': original is where clients meant to go, a"
                " destination: give a listener its port"
            ),
        ),
        (
            "-l 1 -d original --check tcp",
            (
                "--check 'tcp' is not possible at --dest 'original', which has no"
                " address of its own to check: leave it out, or give other servers a"
                " check= of their own"
            ),
        ),
        (
            "-l 1 -d 10.0.0.1:original,check=tcp",
            (
                "check=tcp is not possible at --dest '10.0.0.1:original,check=tcp',"
                " which has no address of its own to check: leave it out, or give"
                " other servers a check= of their own"
            ),
        ),
        (
            "-l 1 -d [2001:db8::1]:original --source 192.0.2.1",
            (
                "--source '192.0.2.1' is not possible at --dest"
                " '[2001:db8::1]:original': give a source for IPv6, too"
            ),
        ),
        (
            "-l 1 -d 10.0.0.1:original,source=::1",
            "--dest '10.0.0.1:original,source=::1': its source is of the other family",
        ),
        (
            "-l 1 -d udp:original",
            (
                "--listen '1' can't be relayed to --dest 'udp:original': datagrams"
                " go to datagrams, write udp: before both or neither"
            ),
        ),
        *(
            (
                f"-l {listen} -d 10.0.0.1:80 --intercept 192.168.0.2:80",
                (
                    "--intercept '192.168.0.2:80' is not possible at --listen"
                    f" '{listen}': rules can lead to a listener of IPv4 that is one"
                    " port, or an address and a port; give one, such as 16000"
                ),
            )
            for listen in (
                *("0", "81-82", "unix:/run/l", "tcp:81", "systemd:web", "[::]:81"),
                *("db:81", "[2001:db8::1]:81"),
            )
        ),
        (
            "-l tcp:81 -d 10.0.0.1:80 --intercept :80",
            (
                "--intercept ':80' is not possible at --listen 'tcp:81': rules can"
                " lead to a listener that is one port, or an address and a port;"
                " give one, such as 16000"
            ),
        ),
        (
            "-l localhost:81 -d 10.0.0.1:80 --intercept :80",
            (
                "--intercept ':80' is not possible by redirect: the kernel drops"
                " what is redirected to loopback from elsewhere; give a listener"
                " without an address, or by=tproxy"
            ),
        ),
        (
            "-l 127.0.0.2:81 -d 10.0.0.1:80 --intercept 192.0.2.1:80",
            "--intercept '192.0.2.1:80' is not possible by redirect: the kernel drops",
        ),
        (
            "-l udp:1 -d udp:original --intercept :53,by=redirect",
            (
                "--intercept ':53,by=redirect' is not possible by redirect:"
                " datagrams lose where their client meant to go; leave out"
                " by=redirect"
            ),
        ),
        (
            "-l udp:1 -d udp:a.example:53 --transparent --intercept :53,by=redirect",
            (
                "--intercept ':53,by=redirect' is not possible by redirect for a"
                " transparent relay that goes where its clients meant to go:"
                " connection tracking would take its dials for their datagrams;"
                " leave out by=redirect"
            ),
        ),
        (
            "-l 1 -d 10.0.0.1:80 --transparent --intercept 10.0.0.0/8:80,by=redirect",
            "connection tracking would take its dials for their connections;",
        ),
        (
            "-l 1 -d 10.0.0.1:80 --intercept :80,interface=lo",
            (
                "--intercept ':80,interface=lo' is not possible by redirect: the"
                " kernel redirects nothing that arrives at lo; give by=tproxy"
            ),
        ),
        (
            "-l 1 -d original --transparent --intercept :80,by=redirect",
            (
                "--intercept ':80,by=redirect' is not possible by redirect for a"
                " transparent relay that goes where its clients meant to go:"
                " connection tracking would take its dials for their connections;"
                " leave out by=redirect"
            ),
        ),
        (
            TCP + "--intercept 10.0.0.0/9:http",
            (
                "bad --intercept '10.0.0.0/9:http': 'http' is not a list of ports"
                " such as 443, 80,443 or 8000-8999, and not * for all"
            ),
        ),
        (
            TCP + "--transparent --mark 0x3000",
            (
                "--mark '0x3000' has the bit of --netfilter-mark, which is 0x1000:"
                " give another of them"
            ),
        ),
        (
            "-l 1 -d 10.0.0.1:80,mark=33 --intercept :80 --netfilter-mark 0x20",
            (
                "--dest '10.0.0.1:80,mark=33' has the bit of --netfilter-mark, which"
                " is 0x20: give another of them"
            ),
        ),
        (
            "--intercept :80 -l 1 -d a:1 -l 2 -d b:1",
            (
                "--intercept ':80' stands before the first of several --listen: put"
                " each --intercept after the --listen that it belongs to"
            ),
        ),
        (
            "-l 1 -d a:1 --intercept :80-90 -l 2 -d b:1 --intercept :90",
            (
                "--intercept ':90' is intercepted already, by --intercept ':80-90':"
                " give each its own"
            ),
        ),
        (
            TCP + "--netfilter-mark 3",
            (
                "bad --netfilter-mark '3': expected a number that is one bit of a"
                " firewall mark, such as 0x1000"
            ),
        ),
    ],
)
def test_what_contradicts_itself(words: str, why: str) -> None:
    with pytest.raises(CannotStart) as caught:
        parse(words)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def problems(path: Path, text: str) -> list[str]:
    try:
        configure(layers_of(path, text))
    except ConfigError as problem:
        return [line.removeprefix(f"{path}: ") for line in str(problem).splitlines()]
    return []


TWO = """
[tcp.a]
listen = "16000"
dest = "192.168.0.1:80"
intercept = {}
[{}.b]
listen = "16001"
dest = "192.168.0.1:81"
intercept = {}
"""


@pytest.mark.parametrize(
    ("one", "kind", "other", "clash"),
    [
        ('":80"', "tcp", '":80"', True),
        ('[":79", ":80-90"]', "tcp", '[":85"]', True),
        ('":85"', "tcp", '":80-90"', True),
        ('":*"', "tcp", '":85"', True),
        ('":85"', "tcp", '":*"', True),
        ('":80"', "tcp", '":81"', False),
        ('":80"', "udp", '":80"', False),
        # Which of them the kernel asks first changes as relays start and stop.
        ('"10.0.0.0/8:80"', "tcp", '":80"', True),
        ('":80"', "tcp", '"10.1.0.0/16:1-90"', True),
        ('":80,from=10.0.0.0/8"', "tcp", '":80"', True),
        ('":80,from=10.0.0.0/8"', "tcp", '"192.168.0.2:80"', True),
        ('":80,from=10.0.0.0/8"', "tcp", '":80,from=10.1.0.0/16"', True),
        ('":80,from=10.0.0.0/8"', "tcp", '":80,from=11.0.0.0/8"', False),
        ('"10.0.0.0/9:80"', "tcp", '"10.128.0.0/9:80"', False),
        ('"10.0.0.0/8:80"', "tcp", '"[::/0]:80"', False),
        ('":80,interface=eth1"', "tcp", '":80"', True),
        ('":80,interface=eth1"', "tcp", '":80,interface=eth2"', False),
        # Of one relay, it is all the same.
        ('[":80", "10.0.0.0/8:80"]', "tcp", '":81"', False),
    ],
)
def test_what_two_relays_intercept(
    tmp_path: Path, one: str, kind: str, other: str, clash: bool
) -> None:
    text = TWO.format(one, kind, other)
    if kind == "udp":
        text = text.replace('"192.168.0.1:81"', '"udp:192.168.0.1:81"')
    found = problems(tmp_path / "f.toml", text)
    assert len(found) == clash
    if clash:
        assert "is intercepted already, by intercept = " in found[0]
        assert "give each its own" in found[0]
        # One that is stopped is in nobody's way.
        assert problems(tmp_path / "f.toml", text + "enabled = false") == []


def test_what_a_relay_is_given(tmp_path: Path) -> None:
    """By a file; one relay may be without what all others are."""
    config = configure(
        layers_of(
            tmp_path / "f.toml",
            """
netfilter_mark = 0x20
manage_netfilter = true
[defaults]
transparent = true
[tcp.a]
listen = "16000"
dest = [{address = "original", weight = 2}, "10.0.0.1:original,source=192.0.2.1"]
intercept = ["192.168.0.2:80", ":443,by=tproxy"]
[tcp.b]
listen = "16001"
dest = "tcp:10.0.0.1:80"
transparent = false
[tcp.d]
listen = ["db:16003", "16002", "unix:/run/s"]
dest = "10.0.0.1:80"
intercept = ":81"
[udp.c]
listen = "53"
dest = "10.0.0.1:53"
intercept = "192.168.0.2:53"
""",
        )
    )
    assert (config.manage_netfilter, config.netfilter_mark) == (True, 0x20)
    one, two, _, three = config.relays
    assert isinstance(one, Relay)
    assert isinstance(two, Relay)
    assert isinstance(three, UdpRelay)
    texts = ["192.168.0.2:80", ":443,by=tproxy"]
    assert one.intercepts == tuple(map(parse_intercept, texts))
    assert three.intercepts == (parse_intercept("192.168.0.2:53"),)
    assert one.dialing.options == DialOptions(transparent=True)
    assert two.dialing.options == DialOptions()
    every, near = one.destinations
    assert every.options.dialing(one.dialing.options) == one.dialing.options  # type: ignore[union-attr]
    # Its own source has the say.
    assert near.options.dialing(one.dialing.options) == DialOptions(source4="192.0.2.1")  # type: ignore[union-attr]


def test_one_family_that_would_be_lost(tmp_path: Path) -> None:
    """Of two to which rules lead, one can't be reached so; nobody would notice."""
    text = """
[tcp.a]
listen = ["127.0.0.1:1", "[2001:db8::1]:1"]
dest = "192.168.0.1:80"
intercept = "{}"
"""
    assert problems(tmp_path / "f.toml", text.format("[::/0]:80")) == []
    assert problems(tmp_path / "f.toml", text.format(":80,by=tproxy")) == []
    [found] = problems(tmp_path / "f.toml", text.format(":80"))
    assert "is not possible by redirect: the kernel drops" in found
