"""Routes, pools and server names: what they may be, and what contradicts what."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    OriginalAddress,
    UnixPath,
)
from relayd.configuring.config import Config, Relay, Socks4Relay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.pools_of_relay import as_server, servers_given, sni_table
from relayd.configuring.route_settings import SniEntry, parse_sni
from relayd.configuring.server_grammar import ServersOf, options_of
from relayd.configuring.server_options import ServerOptions
from relayd.core.check_grammar import TcpCheck
from relayd.core.errors import ConfigError
from relayd.core.route_spec import EXPECTED_POOL, RouteSpec
from relayd.tap import relayd, socks4
from tests.configuring.test_about_clients import in_file, refusal

LISTEN = ("-l", "443")


def relays(*words: str) -> list[Any]:
    """The relays of a command line."""
    options = relayd.Options()
    options.parseOptions(words)
    return list(options.config.relays)


def read(document: Any) -> Config:
    """The settings of a file, as JSON."""
    return configure(read_layers("-", io.BytesIO(json.dumps(document).encode()), {}))


# -- what may be written


def test_a_route_is_a_module_and_a_function() -> None:
    [relay] = relays(*LISTEN, "--route", "my.routes:Tenants.route")
    assert relay.route == RouteSpec("my.routes", "Tenants.route")
    assert str(relay.route) == "my.routes:Tenants.route"
    assert not relay.destinations
    options = socks4.Options()
    options.parseOptions(["--route", "a:b"])
    [proxy] = options.config.relays
    assert isinstance(proxy, Socks4Relay)
    assert proxy.route == RouteSpec("a", "b")


def test_settings_of_a_route() -> None:
    table = {"listen": "1", "route": "a:b", "max_deciding": 7}
    made = read({"tcp": {"web": {**table, "server_speaks_first": True}}})
    options = ("--route", "a:b", "--max-deciding", "7", "--server-speaks-first")
    for relay in (*made.relays, *relays("-l", "1", *options)):
        assert isinstance(relay, Relay)
        assert (relay.max_deciding, relay.server_speaks_first) == (7, True)


@pytest.mark.parametrize(
    ("text", "pattern", "target"),
    [
        ("www.example.com=10.0.0.5:443", "www.example.com", HostPort("10.0.0.5", 443)),
        ("WWW.Example.COM.=8443", "www.example.com", HostPort(None, 8443)),
        ("*.Example.com=[::1]:1", "*.example.com", HostPort("::1", 1)),
        ("=unix:/run/a=b", "", UnixPath("/run/a=b")),
        ("a_b-c=tls:x:443", "a_b-c", EndpointString("tls:x:443")),
        ("*.com.=dns:db:5432", "*.com", ServersOf("dns", "db", 5432)),
        ("xn--p1ai=srv:_x._tcp.db", "xn--p1ai", ServersOf("srv", "_x._tcp.db")),
        ("www=default", "www", "default"),
        ("www=original", "www", OriginalAddress()),
        ("www=10.0.0.1:original", "www", OriginalAddress("10.0.0.1")),
        ("=web-2_b", "", "web-2_b"),
        (f"{'a.' * 126}a=1", f"{'a.' * 126}a", HostPort(None, 1)),
    ],
)
def test_a_server_name_and_where_it_leads(
    text: str, pattern: str, target: object
) -> None:
    assert parse_sni(text) == SniEntry(pattern, target)  # type: ignore[arg-type]


def test_a_server_of_a_name_has_options() -> None:
    found = parse_sni('www=a:1,weight=3,check=tcp send="a,b" expect=c,backup')
    assert found.pool == "www"
    assert isinstance(found.target, HostPort)
    check = TcpCheck(text="", send=b"a,b", expect=b"c")
    assert found.target.options == ServerOptions(weight=3, backup=True, check=check)


@given(st.text(st.sampled_from("*.=,:@ aW1-_\u212a"), max_size=20))
def test_any_text_is_a_server_name_or_an_error(text: str) -> None:
    try:
        found = parse_sni(text)
    except ValueError as problem:
        assert "\n" not in str(problem)
    else:
        assert found.pattern.isascii()
        assert found.pattern == found.pattern.lower()


NO_NAME = (
    "is no server name; expected www.example.com, or *.example.com for all names below"
    " it (write an international name in its xn-- form)"
)
NOWHERE = (
    "is neither an address, such as 10.0.0.5:443, nor the name of a pool:"
    f" {EXPECTED_POOL}"
)
EXPECTED_SNI = (
    "expected NAME=DEST, such as www.example.com=10.0.0.5:443, or *.example.com=web,"
    " where web is a pool of the relay"
)


@pytest.mark.parametrize(
    ("option", "text", "why"),
    [
        *(
            ("route", text, "expected MODULE:FUNCTION, such as myroutes:route")
            for text in ("x", "x:", ":x", "a:b c", "a..b:c", "/a:b", "a:b:c", "a:1")
        ),
        ("route", "a.py:b", "expected a module, not its file: a:b"),
        *(("sni", text, EXPECTED_SNI) for text in ("www", "", "www=", "=")),
        *(
            ("sni", f"{name}=1", f"{name!r} {NO_NAME}")
            for name in (
                *(".", "*.", "*..", "a..b", "a.*.b", "*.*.b", "*a", "a*", " a", "a:1"),
                *("b\u00fccher.de", "\u212a.de", "a" * 64, f"{'a' * 63}." * 4),
            )
        ),
        ("sni", "*=1", "for any other name write none: =DEST"),
        *(
            (
                "sni",
                f"{name}=1",
                f"clients ask for no address such as {name!r}, but for a name",
            )
            for name in ("10.0.0.1", "*.10.0.0.1", "::1", "[::1]", "443")
        ),
        *(
            ("sni", f"a={where}", f"{where!r} {NOWHERE}")
            for where in ("Web", "web.b", "web,weight=2", "10.0.0.5", "-a", "a" * 65)
        ),
        (
            "sni",
            "a=b:",
            (
                "bad address 'b:': '' is not a port; expected a port, host:port,"
                " [ipv6]:port, unix:/path or a Twisted endpoint string"
            ),
        ),
        (
            "sni",
            "a=b:1,weight=x",
            "bad address 'b:1,weight=x': expected weight=a number from 0 to 256",
        ),
        ("sni", "a=b:1-2", "'b:1-2' has several ports: give one"),
        ("sni", "a=1-2,backup", "'1-2,backup' has several ports: give one"),
        ("sni", "a=udp:1", "'udp:1' is for datagrams, which have no server name"),
        (
            "sni",
            "a=udp:dns:b:1",
            "'udp:dns:b:1' is for datagrams, which have no server name",
        ),
        (
            "sni",
            "a=b:1,pool=c",
            ("pool= is for --dest: for its servers write 'c' in place of an address"),
        ),
        ("max-deciding", "0", "expected a number from 1 to 9999999"),
    ],
)
def test_what_is_not_one_is_told(
    option: str, text: str, why: str, tmp_path: Path
) -> None:
    assert refusal(*LISTEN, f"--{option}={text}") == f"bad --{option} {text!r}: {why}"
    if option == "max-deciding":
        return
    # A text for TOML, and what was found before what is expected.
    table = f"[tcp.web]\nlisten = '443'\n{option} = {json.dumps(text)}\n"
    quoted = repr(text) if len(repr(text)) <= 60 else f"{text!r:.60}..."
    found = f"found {quoted}, " if why.startswith("expected") else f"{quoted}: "
    found = "" if why.startswith("bad ") else found
    assert in_file(tmp_path, table) == f"tcp.web.{option}: {found}{why}"


@pytest.mark.parametrize(
    "name", ["Web", "9a", "-a", "", "a b", "a.b", "a" * 65, "original"]
)
def test_the_name_of_a_pool(name: str) -> None:
    text = f"80,pool={name}"
    assert refusal(*LISTEN, "-d", text) == (
        f"bad address {text!r}: expected pool={EXPECTED_POOL}"
    )
    table = {"listen": "1", "dest": {"address": "80", "pool": name}}
    with pytest.raises(ConfigError) as raised:
        read({"tcp": {"web": table}})
    assert str(raised.value).endswith(f"pool: expected {EXPECTED_POOL}")


# -- whose they are


def test_server_names_belong_to_the_listener_before_them() -> None:
    one, two, three = relays(
        *("-l", "1", "--sni", "a=x:1", "--sni", "=x:2"),
        *("-l", "2", "-d", "x:3", "-l", "3", "--sni", "a=x:4"),
    )
    assert [str(each) for each in one.sni] == ["a=x:1", "=x:2"]
    assert not two.sni
    assert [str(each) for each in three.sni] == ["a=x:4"]
    # With one listener they may stand anywhere, as destinations.
    [alone] = relays("--sni", "=x:1", "-l", "1")
    assert sni_table(alone) == {"": "*"}


def test_a_route_is_of_all_relays_of_the_command_line() -> None:
    words = ("--route", "a:b", "-l", "1", "-l", "2", "-d", "3", "-l", "udp:4")
    found = relays(*words, "-d", "udp:5")
    assert [getattr(each, "route", None) for each in found] == [
        *[RouteSpec("a", "b")] * 2,
        None,
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("-l", "1"), "--listen '1' has no --dest: say where to relay to"),
        (
            ("-l", "udp:1"),
            "--listen 'udp:1' has no --dest: say where to relay to",
        ),
        (
            ("-l", "1", "--sni", "=a:1", "-l", "2"),
            "--listen '2' has no --dest: say where to relay to",
        ),
        (("--sni", "=a:1"), "--sni '=a:1' has no --listen: say where clients connect"),
        (
            ("--sni", "=a:1", "-l", "1", "-l", "2"),
            (
                "--sni '=a:1' stands before the first of several --listen: put each"
                " --sni after the --listen that it belongs to"
            ),
        ),
        (
            ("-l", "udp:1", "-d", "udp:2", "--sni", "=a:1"),
            "--sni '=a:1' is not for --listen 'udp:1': datagrams have no server name",
        ),
        (
            ("--demo", "--sni", "=a:1"),
            ("--demo brings its own listener and destination: leave out --sni '=a:1'"),
        ),
        (("--demo", "--route", "a:b"), "--route 'a:b' is not for --demo: leave it out"),
        *(
            (("-l", "udp:1", "-d", "udp:2", *words), f"{what} is not for datagrams")
            for words, what in (
                (("--server-speaks-first",), "--server-speaks-first"),
                (("--max-deciding", "5"), "--max-deciding '5'"),
            )
        ),
    ],
)
def test_what_has_no_place(words: tuple[str, ...], why: str) -> None:
    assert why in refusal(*words).splitlines()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "[tcp.web]\nlisten = '1'\n",
            'tcp.web: no destination: give dest = "10.0.0.5:80"',
        ),
        (
            "[tcp.web]\nlisten = '1'\nsni = []\n",
            'tcp.web: no destination: give dest = "10.0.0.5:80"',
        ),
        (
            "[udp.dns]\nlisten = '1'\ndest = '2'\nsni = '=a:1'\n",
            "udp.dns.sni: no such key; it belongs to [tcp.NAME] or [defaults]",
        ),
        (
            "[socks4.a]\nmax_deciding = 5\n",
            "socks4.a.max_deciding: no such key; it belongs to [tcp.NAME] or",
        ),
        ("demo = true\n[defaults]\nsni = '=a:1'", "sni = '=a:1' is not for demo"),
    ],
)
def test_what_has_no_place_in_a_file(text: str, why: str, tmp_path: Path) -> None:
    assert why in in_file(tmp_path, text)


def test_defaults_may_have_a_route_for_those_without_servers() -> None:
    made = read(
        {
            "defaults": {"route": "a:b", "server_speaks_first": True},
            "tcp": {"a": {"listen": "1"}, "b": {"listen": "2", "dest": "3"}},
            "udp": {"c": {"listen": "4", "dest": "5"}},
        }
    )
    assert [getattr(each, "route", None) for each in made.relays] == [
        *[RouteSpec("a", "b")] * 2,
        None,
    ]


# -- what contradicts what

#: A listener that ends TLS.
SSL = "ssl:443:privateKey=k.pem"


#: Words of a command line, and what it is refused for.
REFUSED = """
-d a:1 --sni www=default --route x:y
    --route and --sni contradict each other: give one
--sni =a:1 --server-speaks-first
    --server-speaks-first and --sni contradict each other: give one
--sni =a:1 -l ssl:443:privateKey=k.pem
    --sni '=a:1' is not possible at --listen 'ssl:443:privateKey=k.pem', which ends
    TLS itself: listen without it; or ask for the name in a route
--sni x=web
    --sni 'x=web': there is no pool 'web': give --dest 10.0.0.5:443,pool=web, or an
    address in its place
-d a:1,pool=b --sni x=b --sni =default
    --sni '=default': there is no pool 'default': give --dest 10.0.0.5:443, or an
    address in its place
-d a:1 --sni x=b:1
    nothing leads to --dest 'a:1', which is of the pool 'default': give --sni
    =default, or leave it out
-d a:1 -d a:2,pool=b -d a:3,pool=b --sni =default
    nothing leads to --dest 'a:2,pool=b', which is of the pool 'b': give --sni =b,
    or leave it out
-d a:1 -d a:2,pool=b
    nothing leads to --dest 'a:2,pool=b', which is of the pool 'b': give --sni
    www.example.com=b, or --route MODULE:FUNCTION
--sni x=a:1 -d a:2 --sni X.=default
    --sni 'X.=default' and --sni 'x=a:1' are about the same name: give it one pool,
    or addresses only
-d a:1 --sni =default --sni =default
    --sni '=default' and --sni '=default' are about the same name: give it one pool,
    or addresses only
-d a:1,pool=b --sni b=c:1
    --sni 'b=c:1': its pool would be called 'b', as that of --dest 'a:1,pool=b':
    give that one another name
--sni default=a:1
    --sni 'default=a:1': its pool would be called 'default', as the relay's own:
    give its servers a pool= of another name, and --sni default=NAME
-d a:1 --max-deciding 5
    --max-deciding '5' does nothing alone: give --route or --sni, too
-d a:1 --server-speaks-first
    --server-speaks-first does nothing alone: give --route, too
-d a:1,name=n --sni x=a:2,name=n --sni =default
    --sni 'x=a:2,name=n' has the name 'n', as --dest 'a:1,name=n' has: give each
    server its own
-d a:1,name=n -d a:2,pool=b,name=n --route a:b
    --dest 'a:2,pool=b,name=n' has the name 'n', as --dest 'a:1,name=n' has: give
    each server its own
--sni =tls:a:443 --send-proxy v2
    --send-proxy 'v2' is not possible at --sni '=tls:a:443': the header goes before
    the TLS handshake, with which Twisted begins
--sni =tls:a:443,send-proxy=v1
    send-proxy is not possible at --sni '=tls:a:443,send-proxy=v1': the header goes
    before the TLS handshake, with which Twisted begins
--sni =[::1]:1 --source 10.0.0.1
    --source '10.0.0.1' is not possible at --sni '=[::1]:1': give a source for IPv6,
    too
--sni =tls:a:1 --mark 5
    --mark '5' is not possible at --sni '=tls:a:1', which Twisted dials: write a
    short form such as 10.0.0.5:80
--sni =unix:/x --mark 5
    --mark '5' does nothing: all servers are UNIX sockets; leave it out
--sni =unix:/x,mark=5
    --sni '=unix:/x,mark=5': mark is not for UNIX sockets
--sni =a:1,user-timeout=1
    --sni '=a:1,user-timeout=1': user_timeout must be longer than --stall-timeout,
    which is 10, or 0
--sni =unix:/x --check http://:80/
    --check 'http://:80/' is not possible at --sni '=unix:/x', which has no other
    port: leave it out
-l 127.0.0.1:9 --sni x=a:1 --sni =127.0.0.1:9
    --listen '127.0.0.1:9' is relayed to itself: give another --sni
-l 127.0.0.1:9 --sni =127.0.0.1:8 -l 127.0.0.1:8 -d 127.0.0.1:9
    a loop of relays: --listen '127.0.0.1:9' to '127.0.0.1:8' to '127.0.0.1:9': give
    one of them another --sni or --dest
-l 127.0.0.1:5-9 --sni =127.0.0.1:7
    --listen '127.0.0.1:5-9' is relayed to itself: give another --sni
-l 1-5 -d a:1-4,pool=b --sni =b
    --dest 'a:1-4,pool=b' has 4 ports, and --listen '1-5' has 5: give as many
"""


def refused() -> list[list[str]]:
    """Each command line, and its line."""
    found: list[list[str]] = []
    for line in REFUSED.strip().splitlines():
        if line[0] == " ":
            found[-1][1] += f" {line.strip()}"
        else:
            found.append([line, ""])
    return found


@pytest.mark.parametrize(("words", "why"), refused())
def test_what_does_not_go_together(words: str, why: str) -> None:
    listen = () if "-l" in words.split() else LISTEN
    assert refusal(*listen, *words.split()) == why.strip()


def test_a_pool_is_of_streams() -> None:
    assert refusal("-l", "udp:1", "-d", "udp:2,pool=default") == (
        "--dest 'udp:2,pool=default': pool is not for a server of udp"
    )
    document = {"listen": "1", "dest": {"address": "2", "pool": "a"}}
    with pytest.raises(ConfigError) as raised:
        read({"udp": {"dns": document}})
    assert str(raised.value).endswith(": pool is not for a server of udp")
    assert "\n" not in str(raised.value)


#: The table of a relay, and what is told of it.
REFUSED_TABLES: list[tuple[dict[str, Any], str]] = [
    (
        {"sni": "=a:1", "route": "a:b"},
        "route: route and sni contradict each other: give one",
    ),
    (
        {"sni": "=a:1", "server_speaks_first": True},
        (
            "server_speaks_first: server_speaks_first and sni contradict each other:"
            " give one"
        ),
    ),
    (
        {"sni": ["x=web", "=a:1"]},
        (
            "sni: sni = 'x=web': there is no pool 'web': give dest ="
            ' "10.0.0.5:443,pool=web", or an address in its place'
        ),
    ),
    (
        {"dest": {"address": "a:1", "pool": "b"}},
        (
            "dest: nothing leads to dest = 'a:1,pool=b', which is of the pool 'b': give"
            ' sni = "www.example.com=b", or route = "MODULE:FUNCTION"'
        ),
    ),
    (
        {"dest": "a:1", "sni": "x=a:2"},
        (
            "dest: nothing leads to dest = 'a:1', which is of the pool 'default': give"
            ' sni = "=default", or leave it out'
        ),
    ),
    (
        {"sni": "=a:1", "listen": SSL},
        (
            f"listen: sni = '=a:1' is not possible at listen = '{SSL}', which ends TLS"
            " itself: listen without it; or ask for the name in a route"
        ),
    ),
    (
        {"sni": ["=a:1", "=a:2,check=tcp expect=220"]},
        (
            "sni: sni = '=a:2,check=tcp expect=220': check=tcp expect=220 says that"
            " servers speak first, and sni is for TLS, where clients do: leave one of"
            " them out"
        ),
    ),
    (
        {"dest": "a:1", "max_deciding": 5},
        "max_deciding: max_deciding = '5' does nothing alone: give route or sni, too",
    ),
]


@pytest.mark.parametrize(("table", "why"), REFUSED_TABLES)
def test_what_does_not_go_together_in_a_file(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read({"tcp": {"web": {"listen": "443", **table}}})
    assert str(raised.value) == f"standard input: tcp.web.{why}"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--check", "tcp expect=220"), "--check 'tcp expect=220'"),
        (
            ("-d", "b:1,check=tcp expect=220", "--sni", "=default"),
            "--dest 'b:1,check=tcp expect=220': check=tcp expect=220",
        ),
        (
            ("--sni", "=b:1,check=tcp expect=220"),
            "--sni '=b:1,check=tcp expect=220': check=tcp expect=220",
        ),
    ],
)
def test_servers_that_speak_first(words: tuple[str, ...], what: str) -> None:
    assert refusal(*LISTEN, "--sni", "x=a:1", *words) == (
        f"{what} says that servers speak first, and --sni is for TLS, where clients"
        " do: leave one of them out"
    )


@pytest.mark.parametrize(
    "words",
    [
        # Each server has a check of its own.
        ("--check", "tcp expect=220", "--sni", "=b:1,check=tcp port=1"),
        ("--check", "tcp send=a expect=220", "--sni", "=b:1,check=tcp"),
        # At another port there is another service.
        ("--check", "tcp port=25 expect=220", "--sni", "=a:1"),
        ("--check", "http:///x expect=220", "--sni", "=a:1"),
        ("--check", "tcp expect=220", "-d", "a:1", "--route", "x:y"),
    ],
)
def test_checks_of_servers_that_do_not_speak_first(words: tuple[str, ...]) -> None:
    assert relays(*LISTEN, *words)


@pytest.mark.parametrize(
    "words",
    [
        "-d a:1,pool=default",
        "-d a:1 -d a:1,pool=b -d a:1,pool=c --route x:y",
        "-d a:1,pool=b --route x:y --server-speaks-first --max-deciding 1",
        "-d a:1 --route x:y --check tcp",
        "--sni =a:1",
        "--sni x=a:1 --sni x=a:2 --max-deciding 1",
        "-d a:1 -d a:1,pool=b --sni x=b --sni y=b --sni =default",
        "-d unix:/x --route x:y --mark 5",
        "-l 1-3 -d a:1-3,pool=b -d c:1,pool=d --sni x=b --sni =d --sni *.z=e:1",
        "-l unix:/x --sni =a:1 --accept-proxy unix",
    ],
)
def test_what_goes_together(words: str) -> None:
    listen = () if "-l" in words.split() else LISTEN
    assert relays(*listen, *words.split())


def test_what_could_not_be_read_is_told_once(tmp_path: Path) -> None:
    """What else there may be of it is not guessed."""
    for table, key in (
        ("dest = ['a:1,pool=b', 'x y,pool=c']\nsni = '=c'", "dest[1]"),
        ("dest = 'a:1,pool=b'\nsni = ['=b', 'x']", "sni[1]"),
        ("dest = 'a:1,pool=b'\nroute = 'x'", "route"),
    ):
        line = in_file(tmp_path, f"[tcp.web]\nlisten = '1'\n{table}")
        assert line.startswith(f"tcp.web.{key}: ")
        assert "\n" not in line


# -- for other parts


def test_all_servers_of_a_relay_as_they_were_given() -> None:
    options = relayd.Options()
    words = ("-d", "a:1,pool=b", "--sni", "x=b", "--sni", "=c:2,weight=2")
    options.parseOptions([*LISTEN, *words])
    [section] = options.layers().sections
    dest, sni = servers_given(section)
    assert [str(dest), str(sni)] == ["--dest 'a:1,pool=b'", "--sni '=c:2,weight=2'"]
    assert str(sni.value) == "c:2"
    assert options_of(sni.value) == ServerOptions(weight=2)
    assert as_server(dest) is dest
    pool = next(each for each in section.given if each.text == "x=b")
    assert as_server(pool) is pool
