"""What was given, written as a file: it is read again as the same settings."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relayd.configuring import about_control, bandwidth_settings
from relayd.configuring.about_clients import NEEDS, NEEDS_OF_COMMAND_LINE
from relayd.configuring.address_settings import (
    ACCEPT_PROXY,
    ALLOW_CLIENT,
    ALLOW_DEST,
    CLIENT_PREFIX,
    DENY_CLIENT,
    DENY_DEST,
    DEST,
    HOURS,
    LISTEN,
    MAX_CONNECTS_PER_CLIENT,
    METRICS_ADDRESS,
    NAME,
    RELAYD,
    SEND_PROXY,
    SOCKS4,
    SOCKS4_LISTEN,
    SOCKS4_NAME,
    USERID,
)
from relayd.configuring.config import Config
from relayd.configuring.configure import configure
from relayd.configuring.control_settings import (
    CONTROL,
    CONTROL_READ_UID,
    CONTROL_UID,
)
from relayd.configuring.dial_settings import (
    INTERCEPT,
    INTERFACE,
    KEEPALIVE,
    MARK,
    SOURCE,
    TRANSPARENT,
)
from relayd.configuring.file import read_layers
from relayd.configuring.filter_settings import FILTER
from relayd.configuring.given import Layers
from relayd.configuring.route_settings import ROUTE, SNI
from relayd.configuring.written import as_toml, in_clear, named
from relayd.core.errors import CannotStart, ConfigError
from relayd.core.number_types import MarkBit
from relayd.core.pool_settings import CHECK, ON_DOWN, WHEN_NONE
from relayd.core.process_settings import (
    ACCESS_LOG,
    CONFIG,
    DEMO,
    PRINT_CONFIG,
    QUIET,
    VERBOSE,
)
from relayd.core.setting_types import (
    Choice,
    Count,
    IPv4,
    Ratio,
    Seconds,
    Setting,
    Size,
    Switch,
)
from relayd.core.settings import (
    BIND,
    ENABLED,
    IDENT,
    OPEN,
    SERVER_SPEAKS_FIRST,
    STALL_TIMEOUT,
    USER_TIMEOUT,
)
from relayd.tap import relayd, socks4
from relayd.tap.options import TableOptions
from tests.support.files import layers_of

#: Options that are no settings of a file.
NO_SETTINGS = (CONFIG, PRINT_CONFIG)

#: Options that are refused where all relays are for datagrams.
OF_STREAMS = (
    *("--max-sessions", "--queue", "--max-age", "--accept-proxy"),
    *("--keepalive", "--user-timeout"),
    *("--half-close", "--route", "--max-deciding", "--server-speaks-first"),
)

#: What is given in the order of the relays, and not by `options`.
OF_RELAYS = (LISTEN, DEST, NAME, SNI, INTERCEPT)

TIMES = st.floats(0.001, 1e8).map(repr) | st.sampled_from(
    ["10", "250ms", "1.5m", "1h", "0.001", "1e3", "0.1s"]
)
WORDS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)

#: How rows with a grammar of their own may be given.
WRITTEN: dict[Setting[Any], st.SearchStrategy[str]] = {
    ACCESS_LOG: WORDS,
    METRICS_ADDRESS: st.sampled_from(["127.0.0.1:9100", "[::1]:1", "unix:/run/m"]),
    CONTROL: st.just("unix:/run/control"),
    CONTROL_UID: st.sampled_from(["root", "0", "1000"]),
    CONTROL_READ_UID: st.sampled_from(["1001", "4294967294"]),
    SOCKS4_LISTEN: st.sampled_from(["127.0.0.1:0", "localhost:0", "unix:/run/s"]),
    SOCKS4_NAME: st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True),
    ALLOW_CLIENT: st.sampled_from(
        ["unix", "10.0.0.0/8", "192.0.2.1", "::/0", "fe80::/64"]
    ),
    DENY_CLIENT: st.sampled_from(["10.1.0.0/16", "unix", "::/0"]),
    HOURS: st.sampled_from(["Mon-Fri 08:00-18:00 Europe/Berlin", "22:00-06:00"]),
    MAX_CONNECTS_PER_CLIENT: st.sampled_from(["10/1", "1000/1h"]),
    CLIENT_PREFIX: st.just("24,56"),
    **dict.fromkeys(
        bandwidth_settings.TABLE,
        st.sampled_from(["10MB", "512KiB", "up=1Mbit", "down=1e3,up=0.3kB", "1"]),
    ),
    FILTER: st.sampled_from(
        ["latency", r"deny:a\,b\\,direction=up", "replace:old=a,new=", "first:9"]
    ),
    ROUTE: st.sampled_from(["myroutes:route", "a.b_2:C.route"]),
    ALLOW_DEST: st.sampled_from(["10.0.0.0/8", "*", "*.example.com:80,443", "[::1]:1"]),
    DENY_DEST: st.sampled_from(["*:25", "db", "0.0.0.0/0:1-1024", "2001:db8::/32"]),
    USERID: WORDS.filter(lambda text: len(text.encode()) < 256),
    ACCEPT_PROXY: st.sampled_from(["10.0.0.0/8", "192.0.2.1", "unix"]),
    # Of streams and of datagrams.
    SEND_PROXY: st.just("v2"),
    WHEN_NONE: st.sampled_from(["fail", "try-all", "wait=5", "wait=1.5m"]),
    CHECK: st.sampled_from(
        [
            "tcp port=8008",
            r'tcp port=1 send="PING\r\n" expect="+PONG"',
            "http://:8008/primary expect=up",
            "python:json:loads",
        ]
    ),
    SOURCE: st.just("192.0.2.1"),
    INTERFACE: st.sampled_from(["lo", "eth1"]),
    KEEPALIVE: st.sampled_from(["60,15,4", "1,2,3"]),
    # Off, there would be nothing to do.
    ENABLED: st.just("on"),
    # More than the default stall timeout.
    USER_TIMEOUT: st.sampled_from(["0", "11", "1.5m", "1h"]),
}


def texts(row: Setting[Any]) -> st.SearchStrategy[str]:
    """How a setting may be given; a new row whose type is not here fails."""
    kind: Any = row.type
    if row in WRITTEN:
        return WRITTEN[row]
    if isinstance(kind, Seconds):
        return TIMES | st.just("0") if kind.never else TIMES
    if isinstance(kind, MarkBit):
        return st.integers(0, 31).map(lambda bit: hex(1 << bit))
    if isinstance(kind, Count):
        counts = st.integers(kind.minimum, kind.maximum).map(str)
        return counts | st.just("64KiB") if isinstance(kind, Size) else counts
    if isinstance(kind, Ratio):
        return st.floats(0, allow_infinity=False).map(repr)
    if isinstance(kind, Choice | Switch):
        return st.sampled_from(kind.placeholder.split("|"))
    if isinstance(kind, IPv4):
        return st.sampled_from(["192.0.2.1", "127.0.0.1"])
    return WRITTEN[row]


def options(rows: tuple[Setting[Any], ...]) -> st.SearchStrategy[list[list[str]]]:
    """Options of any of the rows, in any order, as words of a command line."""
    given = [
        st.just([f"--{row.option}"])
        if row.is_flag
        else texts(row).map(lambda text, row=row: [f"--{row.option}={text}"])
        for row in rows
        if row not in (*NO_SETTINGS, *OF_RELAYS, DEMO)
    ]
    once = {row.option for row in rows if not row.repeatable}

    def name(words: list[str]) -> str:
        option = words[0].partition("=")[0].removeprefix("--")
        return option if option in once else str(words)

    return st.lists(st.one_of(given), max_size=8, unique_by=name)


def without(given: list[list[str]], row: Setting[Any]) -> list[list[str]]:
    return [words for words in given if words[0].partition("=")[0] != f"--{row.option}"]


def useful(given: list[list[str]]) -> list[list[str]]:
    """Without what does nothing alone."""
    # The last needs the one before it.
    alone = (*NEEDS_OF_COMMAND_LINE, *about_control.NEEDS)
    for row, *others in (*NEEDS, *NEEDS, *NEEDS, *alone):
        # Of the ways to balance, one asks who the client is.
        there = {
            words[0].partition("=")[0]
            for words in given
            if words[0].endswith("=client-hash") or not words[0].startswith("--balance")
        }
        if not there & {f"--{other.option}" for other in others}:
            given = without(given, row)
    return given


def consistent(given: list[list[str]]) -> list[list[str]]:
    """Without what contradicts something else."""
    names = {words[0].partition("=")[0] for words in given}
    if f"--{ALLOW_CLIENT.option}" in names:
        # Or a listener on a UNIX socket would serve nobody.
        given = [*given, ["--allow-client=unix"]]
    if f"--{SOURCE.option}" in names:
        # Or servers of IPv6 can't be dialled.
        given = [*given, ["--source=2001:db8::1"]]
    given = useful(given)
    for one, other in (
        (VERBOSE, QUIET),
        (TRANSPARENT, SOURCE),
        (ALLOW_CLIENT, OPEN),
        (ACCEPT_PROXY, IDENT),
        (STALL_TIMEOUT, USER_TIMEOUT),
        *((BIND, row) for row in SOCKS4 if row.name in ("bind-any", "bind-address")),
        *((BIND, row) for row in SOCKS4 if row.name == "external-address"),
    ):
        if {f"--{one.option}", f"--{other.option}"} <= names:
            given = without(given, one)
    return given


def possible(given: list[list[str]], relays: list[str]) -> list[list[str]]:
    """Without what one of the relays, or its servers, can't have."""
    if any(word.startswith("tls:") for word in relays):
        given = without(given, SEND_PROXY)
    servers = [b for a, b in pairwise(relays) if a == "--dest"]
    if any(word.startswith(("tls:", "tcp:")) for word in servers):
        for row in (SOURCE, INTERFACE, MARK, TRANSPARENT):
            given = without(given, row)
    if any(word.startswith(("unix:", "tls:", "tcp:")) for word in servers):
        # They have no host at another port of which a check could ask.
        given = without(given, CHECK)
    if ["--udp-balance=datagram"] in given:
        # A datagram is at no server, and waits for none.
        given = without(given, ON_DOWN)
        given = [words for words in given if "=wait" not in words[0]]
        # A server is chosen anew for each.
        anew = ("--balance=round-robin", "--balance=random")
        given = [
            words
            for words in given
            if words[0].startswith(anew) or not words[0].startswith("--balance=")
        ]
        # Nor has it a socket of its client's.
        given = without(given, TRANSPARENT)
    if "--sni" in relays:
        given = without(without(given, ROUTE), SERVER_SPEAKS_FIRST)
    elif any(",pool=" in each for each in servers):
        # Nothing else chooses a pool.
        given = [*without(given, ROUTE), ["--route=pools:of"]]
    listeners = [b for a, b in pairwise(relays) if a == "--listen"]
    if any(each.startswith("unix:") for each in listeners):
        # Its clients have no address.
        given = without(given, TRANSPARENT)
    if "--intercept" in relays or ["--transparent"] in given:
        # It may have the bit of the mark of rules.
        given = without(given, MARK)
    if all(each.startswith("udp:") for each in listeners):
        given = [words for words in given if not words[0].startswith(OF_STREAMS)]
    return useful(given)


HOSTS = st.sampled_from(["", "127.0.0.1:", "localhost:", "[::1]:"])
SERVERS = st.sampled_from(["10.0.0.5:", "db:", "[2001:db8::1]:"])
OTHER_LISTENERS = ["unix:/run/%d", "tcp:%d:interface=127.0.0.1", "systemd:web%d"]
OTHER_SERVERS = ["unix:/run/server", "tls:example.com:443", "tcp:example.com:80"]
SNI_NAMES = st.sampled_from(["www.example.com", "*.Example.com.", "", "a_b"])
SNI_SERVERS = st.sampled_from(
    [
        *("10.0.0.5:443", "443", "[2001:db8::1]:1,weight=0", "dns:db:5432,backup"),
        *("srv:_x._tcp.db,max=3", 'a:1,check=tcp send="a,b" expect=c,disabled'),
    ]
)


NETWORKS = st.sampled_from(["", "10.0.0.0/8", "[2001:db8::/32]", "192.0.2.1"])
OPTIONS = st.sampled_from(["interface=eth1", "by=tproxy", "{1}-{2}", "{0},by=tproxy"])


@st.composite
def names_of(draw: st.DrawFn, servers: list[str]) -> list[str]:
    """Server names of a relay, of which each of its pools has one at least."""
    pools = dict.fromkeys(
        "web" if each.endswith(",pool=web") else "default" for each in servers
    )
    found = [f"{number}.example.com={pool}" for number, pool in enumerate(pools)]
    named = st.tuples(SNI_NAMES, SNI_SERVERS)
    names = draw(st.lists(named, min_size=not servers, max_size=2, unique=True))
    return [*found, *(f"{name}={server}" for name, server in names)]


@st.composite
def relays(draw: st.DrawFn) -> list[str]:
    """One relay or several, each on ports of its own.

    They have server names, all of them that are of streams, or may have pools.
    """
    words: list[str] = []
    pools, has_names = draw(st.booleans()), draw(st.booleans())
    for number in range(draw(st.integers(1, 3))):
        low, udp = 1000 * (number + 1), draw(st.sampled_from(["", "udp:"]))
        size = draw(st.sampled_from([1, 1, 1, 5]))
        ports = f"{low}-{low + size - 1}" if size > 1 else f"{low}"
        listener = f"{udp}{draw(HOSTS)}{ports}"
        servers = [f"{udp}{draw(SERVERS)}{7000 + number}"]
        if draw(st.booleans()) and size > 1:
            servers = [f"{udp}10.0.0.1:7000-{6999 + size}"]
        if draw(st.booleans()) and not udp:
            servers += draw(
                st.lists(st.sampled_from(OTHER_SERVERS), max_size=2, unique=True)
            )
            if size == 1 and draw(st.booleans()):
                listener = draw(st.sampled_from(OTHER_LISTENERS)) % low
        if pools and not udp:
            which = st.sampled_from(["", ",pool=web", ",pool=default"])
            servers = [each + draw(which) for each in servers]
        if has_names and not udp and draw(st.booleans()):
            servers = []
        if draw(st.booleans()):
            words += [
                "--name",
                draw(st.sampled_from(["web", "relay1", "-"])) + str(number),
            ]
        words += ["--listen", listener]
        if listener == f"{udp}{low}" and draw(st.booleans()):
            # No other relay intercepts them.
            option = draw(OPTIONS).format(low + 9, low + 90, low + 99)
            words += ["--intercept", f"{draw(NETWORKS)}:{low},{option}"]
        words += [word for server in servers for word in ("--dest", server)]
        if has_names and not udp:
            found = draw(names_of(servers))
            words += [word for name in found for word in ("--sni", name)]
    return words


def read_again(layers: Layers, path: Path) -> Config:
    """The settings of what was given, written to a file and read."""
    return configure(layers_of(path, as_toml(layers)))


def with_names(config: Config, layers: Layers) -> Config:
    """With the names that relays without one get; the demo's is in no file."""
    if config.demo:
        return config
    return attrs.evolve(
        config,
        relays=[
            attrs.evolve(relay, name=name)
            for relay, (name, _) in zip(config.relays, named(layers), strict=True)
        ],
    )


def check(command: type[TableOptions], words: list[str], path: Path) -> Config:
    """That a command line is the same as the file that it prints."""
    parsed = command()
    parsed.parseOptions(words)
    layers = parsed.layers()
    again = read_again(layers, path)
    # In a file, relays of one kind stand together.
    assert sorted(map(repr, again.relays)) == sorted(
        map(repr, with_names(parsed.config, layers).relays)
    )
    assert attrs.evolve(again, relays=()) == attrs.evolve(parsed.config, relays=())
    assert (
        configure(layers_of(path, as_toml(layers_of(path, as_toml(layers))))) == again
    )
    return again


ANY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


@given(options(RELAYD).map(consistent), relays())
@ANY
def test_a_command_line_of_relays(
    tmp_path: Path, given: list[list[str]], relays: list[str]
) -> None:
    given = possible(given, relays)
    words = [word for words in given for word in words]
    check(relayd.Options, [*words, *relays], tmp_path / "f.toml")


@given(options(SOCKS4).map(consistent))
@ANY
def test_a_command_line_of_a_proxy(tmp_path: Path, given: list[list[str]]) -> None:
    words = [word for words in given for word in words]
    if not any(word.startswith(("--open", "--allow-client")) for word in words):
        # Or it would be an open proxy.
        words.append("--open")
    check(socks4.Options, words, tmp_path / "f.toml")


EXAMPLES = {
    "route": "myroutes:route",
    # The servers that are there must be used.
    "sni": "*.example.com=default",
    "listen": "127.0.0.1:81-85",
    "dest": "10.0.0.1:1-5",
    "name": "web",
    "access-log": "/var/log/relayd\n\u2028\x1b.log",
    "metrics": "unix:/run/metrics",
    "control": "unix:/run/control",
    "control-uid": "1000",
    "control-read-uid": "1000",
    "allow-client": "10.0.0.0/8",
    "deny-client": "unix",
    "hours": "Mon-Fri 08:00-18:00 Europe/Berlin",
    "max-connects-per-client": "10/1",
    "client-prefix": "24,56",
    "bandwidth": "10MB",
    "bandwidth-per-client": "up=1Mbit,down=8Mbit",
    "bandwidth-per-session": "512KiB",
    "allow-dest": "*.example.com:443",
    "filter": r"deny:a\,b,direction=up",
    "deny-dest": "*:25",
    "userid": "b\u00fcrger",
    "accept-proxy": "10.0.0.0/8",
    "send-proxy": "v2",
    "when-none": "wait=5",
    "check": "http://:8008/primary",
    "source": "192.0.2.1",
    "interface": "eth1",
    "intercept": "192.0.2.1:80,from=10.0.0.0/8",
    "netfilter-mark": "0x20",
    "keepalive": "1,2,3",
    "user-timeout": "11",
}


def example(row: Setting[Any]) -> str:
    """A value of a row that is not its default."""
    kind: Any = row.type
    if isinstance(kind, Choice | Switch) and row.name not in EXAMPLES:
        return str(kind.placeholder.split("|")[-1])
    if isinstance(kind, Seconds | Ratio) and row.name not in EXAMPLES:
        return "2.5"
    if isinstance(kind, Count) and row.name not in EXAMPLES:
        return str(kind.minimum + 6)
    return "192.0.2.1" if isinstance(kind, IPv4) else EXAMPLES[row.name]


def needed(row: Setting[Any]) -> list[str]:
    """Options without which another does nothing."""
    for each, other, *_ in (*NEEDS, *NEEDS_OF_COMMAND_LINE, *about_control.NEEDS):
        if each is row:
            return [*needed(other), f"--{other.option}", example(other)]
    # Or nobody could start what is stopped.
    return [f"--{CONTROL.option}", example(CONTROL)] if row is ENABLED else []


@pytest.mark.parametrize(
    ("command", "row"),
    [
        pytest.param(command, row, id=f"{command.service}-{row.name}")
        for command in (relayd.Options, socks4.Options)
        for row in command.rows
        if row not in NO_SETTINGS
    ],
)
def test_each_option_is_in_the_file(
    command: type[TableOptions], row: Setting[Any], tmp_path: Path
) -> None:
    """Of every row of the table, alone; and it makes a difference."""
    words = [] if row.is_flag else [example(row)]
    if row is SOCKS4_LISTEN:
        words = ["127.0.0.1:81"]
    base: list[str] = ["--open"] if row is ACCEPT_PROXY else []
    if command is relayd.Options and row not in (LISTEN, DEMO):
        range_too = "81-85" if row is DEST else "81"
        base = ["--listen", "udp:53", "--dest", "udp:9.9.9.9:53"]
        base += ["--name=b", "--listen", range_too, "--dest", "10.0.0.1:80"]
        if row is NAME:
            base = base[4:]
    elif row is LISTEN:
        words += ["--dest", "10.0.0.1:80"]
    base += needed(row)
    option = [f"--{row.option}", *words]
    if row is NAME:
        base.remove("--name=b")
        found = check(command, [*option, *base], tmp_path / "f")
    else:
        found = check(command, [*base, *option], tmp_path / "f")
    if row not in (LISTEN, DEMO):
        assert found != check(command, base, tmp_path / "f")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("-l 81 --sni =a:1 -l 82 -d a:2 --max-deciding 3", "max_deciding"),
        ("-l 81 -d a:1,check=tcp -l 82 -d a:2 --check-every 3", "check_every"),
    ],
)
def test_what_does_nothing_in_some_relays(tmp_path: Path, words: str, key: str) -> None:
    """Said of all it is no mistake; in the table of one it would be."""
    parsed = relayd.Options()
    parsed.parseOptions(words.split())
    text = as_toml(parsed.layers())
    assert (text.count(key), text.count("[tcp.")) == (1, 2)
    again = layers_of(tmp_path / "f.toml", text)
    assert configure(again)
    assert as_toml(again) == text
    [defaults, *tables] = [f"[defaults]\n{key} = 3\n", *text.split(f"{key} = 3\n")]
    merged = as_toml(layers_of(tmp_path / "f.toml", defaults + "".join(tables)))
    assert merged == text, "as relayctl save writes it"


def test_the_options_of_a_demo(tmp_path: Path) -> None:
    """Whose relay is in no file, but gets the defaults."""
    words = ["--demo", "--idle-timeout", "5"]
    [relay] = check(relayd.Options, words, tmp_path / "f").relays
    assert relay.stream.idle_timeout == 5.0  # type: ignore[union-attr]


def test_a_file_of_all_kinds(tmp_path: Path) -> None:
    """Also with defaults, variables and secrets, whose file is named and not read."""
    secrets, path = tmp_path / "users", tmp_path / "f.toml"
    secrets.write_text("alice\nbob\n")
    text = f"""
env = true
drain_timeout = "1m"
[defaults]
idle_timeout = "5s"
clients = ["allow 10.0.0.0/8"]
[tcp.a]
listen = "8080-8081"
dest = "${{HOST}}:80"
[udp.b]
listen = "53"
dest = ["9.9.9.9:53", "udp:9.9.9.10:53"]
refresh_inbound = false
[socks4.c]
destinations = ["deny *:25", "allow *"]
userid_file = "{secrets}"
[socks4.d]
listen = "unix:/run/x"
clients = []
"""
    layers = layers_of(path, text, HOST="db")
    written = as_toml(layers)
    assert "alice" not in written
    assert configure(layers_of(path, written)) == configure(layers)


def test_what_is_not_unicode_is_one_line() -> None:
    """A command line may have any bytes, a file may not."""
    options = socks4.Options()
    options.parseOptions(["--userid", os.fsdecode(b"\xff")])
    with pytest.raises(ConfigError) as caught:
        as_toml(options.layers())
    assert str(caught.value) == (
        "can't be written as a file: not UTF-8 after 'userid = \"'"
    )
    with pytest.raises(CannotStart, match="^socks4: can't be written as a file"):
        socks4.Options().parseOptions(
            ["--print-config", "--userid", os.fsdecode(b"\xff")]
        )


@pytest.mark.parametrize("command", [relayd.Options, socks4.Options])
def test_the_option_prints_it(
    command: type[TableOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--listen", "localhost:81", "--idle-timeout", "5m", "--print-config"]
    if command is relayd.Options:
        words += ["--dest", "10.0.0.1:80"]
    with pytest.raises(SystemExit) as caught:
        command().parseOptions(words)
    assert caught.value.code == 0
    kind, dest = (
        ("tcp", 'dest = "10.0.0.1:80"\n')
        if command is relayd.Options
        else ("socks4", "")
    )
    assert capsys.readouterr().out == (
        f'[{kind}.relay1]\nlisten = "localhost:81"\n{dest}idle_timeout = 300\n'
    )


def test_what_is_not_for_everybody_is_named(tmp_path: Path) -> None:
    """Values of the environment, and of secret settings, but not names of files."""
    (tmp_path / "users").write_text("joe")
    path = tmp_path / "relayd.toml"
    path.write_text(
        f"""
        env = true
        access_log = "${{LOG}}"
        [defaults]
        filter = [{{name = "deny", pattern = "${{LOG}}"}}, "latency:1ms"]
        idle_timeout = "5s"
        [tcp.web]
        listen = "1"
        dest = ["2", "${{HOST}}:3", "${{HOST}}:4"]
        filter = "latency:1ms"
        idle_timeout = "5m"
        [udp.dns]
        listen = "${{HOST}}:1"
        dest = "2"
        filter = []
        [socks4.a]
        listen = "127.0.0.1:2"
        userid_file = "{tmp_path}/users"
        [socks4.b]
        listen = "127.0.0.1:3"
        userid = "joe"
        filter = []
        """
    )
    layers = read_layers(str(path), environ={"HOST": "127.0.0.1", "LOG": "/log"})
    assert not layers.problems
    assert in_clear(layers) == [
        "access_log",
        "tcp.web.dest",
        "udp.dns.listen",
        "socks4.a.filter",
        "socks4.b.userid",
    ]


@pytest.mark.parametrize("word", ["--print-config", "--help"])
def test_what_can_not_be_printed_is_a_line(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a pipe that nobody reads: no traceback."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as caught:
            relayd.Options().parseOptions(["--listen", "1", "--dest", "2", word])
    assert caught.value.code == "relayd: standard output: No space left on device"
