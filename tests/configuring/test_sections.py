"""The tables of a file: what each key gives, and what is said of what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayd.configuring.address_grammar import HostPort, PortRange, UdpAddress
from relayd.configuring.config import Config, Relay, Socks4Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.given import Layers
from relayd.configuring.sections import (
    DEFAULTS_KEYS,
    PROCESS_KEYS,
    RELAY_KEYS,
    read_document,
)
from relayd.core.errors import ConfigError
from tests.support.files import RELAY, config_of, json_layers, layers_of, problems

FILE = "relayd.toml"

ISSUE = """
drain_timeout = "10s"

[defaults]
connect_timeout = "5s"

[tcp.web]
listen = ["8080", "[::1]:8081"]
dest = ["10.0.0.5:80", "10.0.0.6:80"]

[udp.dns]
listen = "53"
dest = "9.9.9.9:53"

[socks4.office]
listen = "127.0.0.1:1080"
clients = ["allow 10.0.0.0/8"]
destinations = ["deny *:25", "allow 10.20.0.0/16"]
"""


def test_a_file_with_relays_of_all_kinds(tmp_path: Path) -> None:
    config = config_of(tmp_path / FILE, ISSUE)
    web, dns, office = config.relays
    assert config.drain_timeout == 10.0
    assert isinstance(web, Relay)
    assert web.name == "web"
    assert web.listeners == (HostPort(None, 8080), HostPort("::1", 8081))
    assert web.destinations == (HostPort("10.0.0.5", 80), HostPort("10.0.0.6", 80))
    assert web.stream.connect_timeout == 5.0
    assert isinstance(dns, UdpRelay)
    assert dns.listeners == (UdpAddress(None, 53),)
    assert dns.destinations == (UdpAddress("9.9.9.9", 53),)
    assert isinstance(office, Socks4Relay)
    assert list(map(str, office.admission.clients)) == ["10.0.0.0/8"]
    assert [rule.allow for rule in office.rules] == [False, True]
    assert office.stream.connect_timeout == 5.0


def test_times_and_sizes(tmp_path: Path) -> None:
    """Numbers, or with their units."""
    config = config_of(
        tmp_path / FILE,
        "drain_timeout = 1.5\nshutdown_delay = '250ms'\n"
        f"[tcp.a]\n{RELAY}idle_timeout = '5m'\nstall_timeout = 3\n"
        f"[udp.b]\n{RELAY}udp_rcvbuf = '64KiB'\nudp_timeout = '1h'\n",
    )
    tcp, udp = config.relays
    assert isinstance(tcp, Relay)
    assert isinstance(udp, UdpRelay)
    assert (config.drain_timeout, config.shutdown_delay) == (1.5, 0.25)
    assert (tcp.stream.idle_timeout, tcp.stream.stall_timeout) == (300.0, 3.0)
    assert (udp.udp.receive_buffer, udp.udp.timeout) == (65536, 3600.0)


def test_a_range_of_ports(tmp_path: Path) -> None:
    [relay] = config_of(
        tmp_path / FILE, "[udp.a]\nlisten = '5-7'\ndest = '10.0.0.1:15-17'\n"
    ).relays
    assert isinstance(relay, UdpRelay)
    assert relay.listeners == (PortRange(UdpAddress(None, 5), 7),)
    assert relay.destinations == (PortRange(UdpAddress("10.0.0.1", 15), 17),)


def test_defaults_are_for_the_kinds_that_have_them(tmp_path: Path) -> None:
    """And a relay's own settings are above them; a list replaces the other."""
    text = f"""
[defaults]
idle_timeout = 1
max_flows = 3
clients = ["allow 10.0.0.0/8", "allow 10.1.0.0/16"]
[tcp.a]
{RELAY}
[tcp.b]
listen = "1"
dest = "2"
idle_timeout = 2
[udp.c]
{RELAY}
[socks4.d]
[socks4.e]
listen = "unix:/run/e"
clients = ["allow 192.0.2.1", "allow unix"]
[socks4.f]
listen = "unix:/run/f"
clients = []
"""
    a, b, c, d, e, f = config_of(tmp_path / FILE, text).relays
    assert isinstance(a, Relay)
    assert isinstance(b, Relay)
    assert isinstance(c, UdpRelay)
    assert (a.stream.idle_timeout, b.stream.idle_timeout) == (1.0, 2.0)
    assert c.udp.max_flows == 3
    clients = [
        [str(one) for one in each.admission.clients]
        for each in (d, e, f)
        if isinstance(each, Socks4Relay)
    ]
    assert clients == [["10.0.0.0/8", "10.1.0.0/16"], ["192.0.2.1", "unix"], []]


def test_variables_only_where_the_file_says_so(tmp_path: Path) -> None:
    text = "access_log = '/${NAME}/$$x'\n[tcp.a]\nlisten = '8080'\ndest = '${HOST}:80'"
    path = tmp_path / FILE
    found = config_of(path, f"env = true\n{text}", NAME="log", HOST="db")
    assert found.access_log == "/log/$x"
    [relay] = found.relays
    assert isinstance(relay, Relay)
    assert relay.destinations == (HostPort("db", 80),)
    assert problems(path, f"env = true\n{text}", NAME="log") == [
        "tcp.a.dest: there is no variable 'HOST' in the environment"
    ]
    several = "env = true\nverbose = '${YES}'\n[tcp.a]\nlisten = ['80', '${IP}:81']"
    assert problems(path, f"{several}\ndest = '1'") == [
        "verbose: there is no variable 'YES' in the environment",
        "tcp.a.listen[1]: there is no variable 'IP' in the environment",
    ]
    literal = text.replace("${HOST}", "db")
    for no in ("", "env = false\n"):
        assert config_of(path, no + literal, HOST="db").access_log == "/${NAME}/$$x"


def test_secrets_in_a_file_of_their_own(tmp_path: Path) -> None:
    secrets, path = tmp_path / "users", tmp_path / FILE
    secrets.write_text("alice\n\nbob\r\n")
    text = f"[socks4.a]\nuserid_file = '{secrets}'\n"
    [relay] = config_of(path, text).relays
    assert isinstance(relay, Socks4Relay)
    assert relay.user_ids == (b"alice", b"bob")
    [section] = layers_of(path, text).relays
    assert "alice" not in "".join(map(str, section.given))


def test_a_secret_is_never_told(tmp_path: Path) -> None:
    secrets, path = tmp_path / "users", tmp_path / FILE
    secrets.write_text("bob\n" + 256 * "secret")
    assert problems(path, f"[socks4.a]\nuserid_file = '{secrets}'\n") == [
        (
            f"socks4.a.userid_file: '{secrets}', value [1] is bad: expected 1 to 255"
            " bytes, none of them 0"
        )
    ]


def test_a_file_of_secrets_that_is_none(tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.write_text("\n")
    other.write_bytes(b"x\n\xff")
    for name, why in (
        (f"'{empty}'", f"'{empty}' is empty: expected a value a line"),
        (f"'{other}'", f"'{other}': not UTF-8 at line 2"),
        ("'/dev/zero'", "'/dev/zero': expected a file, not a pipe or a device"),
        ("'/'", "'/' can't be read: Is a directory"),
        (f"'{tmp_path}/x'", f"'{tmp_path}/x' can't be read: No such file or directory"),
        ("''", "found '', expected the name of a file"),
        ('"a\\u0000"', "found 'a\\x00', expected the name of a file"),
        ("3", "found 3, expected the name of a file"),
    ):
        text = f"[socks4.a]\nuserid_file = {name}\n"
        assert problems(tmp_path / FILE, text) == [f"socks4.a.userid_file: {why}"]
    assert problems(
        tmp_path / FILE, f"[socks4.a]\nuserid = 'x'\nuserid_file = '{tmp_path}/{FILE}'"
    ) == ["socks4.a.userid_file: userid is given, too: give one"]


# -- what is wrong


SECONDS = "seconds, from 0 to 100000000, or a time such as 250ms, 10s, 5m or 1h"
TABLE = "expected a table for each relay, such as [tcp.web]"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        # Keys.
        ("[tcp.a]\nlisen = 1", "tcp.a.lisen: no such key; did you mean listen?"),
        ("[tcp.a]\nx = 1", "tcp.a.x: no such key; see `relayd.toml(5)`"),
        ("tpc = 1", "tpc: no such key; did you mean tcp?"),
        ("[Defaults]", "Defaults: no such key; did you mean defaults?"),
        ("[TCP.web]", "TCP: no such key; did you mean tcp?"),
        (
            "drain-timeout = 1",
            "drain-timeout: no such key; did you mean drain_timeout?",
        ),
        (
            "log_format = 'json'\n[log]\nformat = 'json'",
            "log.format: the same as log_format: give one",
        ),
        (
            "[tcp.a]\ndrain_timout = 1",
            (
                "tcp.a.drain_timout: no such key; did you mean drain_timeout? it"
                " belongs to the top, before all tables"
            ),
        ),
        (
            "idle_timeout = 1",
            (
                "idle_timeout: no such key; it belongs to [tcp.NAME], [socks4.NAME] or"
                " [defaults]"
            ),
        ),
        (
            "[defaults]\ndest = '1'",
            "defaults.dest: no such key; it belongs to [tcp.NAME], [udp.NAME]",
        ),
        (
            "[tcp.a]\nmax_binds = 1",
            "tcp.a.max_binds: no such key; it belongs to [socks4.NAME] or [defaults]",
        ),
        (
            "[tcp.a]\nname = 'b'",
            "tcp.a.name: no such key; it belongs to the command line",
        ),
        ('["a\\n".b]', '"a\\n": no such key; see `relayd.toml(5)`'),
        # Tables.
        ("tcp = 1", f"tcp: found 1, {TABLE}"),
        ("[tcp]\nlisten = '1'", f"tcp.listen: found '1', {TABLE}"),
        ("[[tcp]]\nlisten = '1'", f"tcp: found a list, {TABLE}"),
        ("defaults = 1", "defaults: found 1, expected a table"),
        ("log = 'x'", "log: found 'x', expected a table"),
        ("env = 1", "env: found 1, expected true or false"),
        # Names.
        (
            f"[tcp.Web]\n{RELAY}",
            "tcp.Web: bad name Web: expected 1 to 64 small letters, digits, '-' or '_'",
        ),
        (
            f'[tcp."a\\u0000b"]\n{RELAY}',
            (
                'tcp."a\\u0000b": bad name "a\\u0000b": expected 1 to 64 small letters,'
                " digits, '-' or '_'"
            ),
        ),
        # Values.
        ("drain_timeout = -1", f"drain_timeout: found -1, expected {SECONDS}"),
        ("drain_timeout = '-1s'", f"drain_timeout: found '-1s', expected {SECONDS}"),
        ("drain_timeout = nan", f"drain_timeout: found nan, expected {SECONDS}"),
        ("drain_timeout = inf", f"drain_timeout: found inf, expected {SECONDS}"),
        ("drain_timeout = true", f"drain_timeout: found true, expected {SECONDS}"),
        ("drain_timeout = [1]", f"drain_timeout: found a list, expected {SECONDS}"),
        (
            "drain_timeout = 1979-05-27T07:32:00Z",
            f"drain_timeout: found 1979-05-27 07:32:00+00:00, expected {SECONDS}",
        ),
        (
            "drain_timeout = 07:32:00",
            "drain_timeout: found 07:32:00, expected",
        ),
        (
            f"drain_timeout = {'9' * 400}",
            f"drain_timeout: found a number with many digits, expected {SECONDS}",
        ),
        (
            f"drain_timeout = 0x{'f' * 9000}",
            f"drain_timeout: found a number with many digits, expected {SECONDS}",
        ),
        ("verbose = 'on'", "verbose: found 'on', expected true or false"),
        ("verbose = 1", "verbose: found 1, expected true or false"),
        (
            "transport = 'x'",
            "transport: found 'x', expected auto, plane or twisted",
        ),
        (
            f"[tcp.a]\n{RELAY}backlog = 1.0",
            "tcp.a.backlog: found 1.0, expected a number from 1 to 65535",
        ),
        (
            "[tcp.a]\nlisten = 8080\ndest = '1'",
            (
                "tcp.a.listen: found 8080, expected an address to listen on, as a"
                ' string: "8080"'
            ),
        ),
        (
            "[tcp.a]\nlisten = ['1', [2]]\ndest = '1'",
            (
                "tcp.a.listen[1]: found a list, expected an address to listen on, as a"
                " string"
            ),
        ),
        (
            "[tcp.a]\nlisten = 'udp:53'\ndest = '10.0.0.1:80'",
            "tcp.a.listen: 'udp:53': it is for datagrams: give it to a relay of [udp]",
        ),
        (
            "[udp.a]\nlisten = '53'\ndest = 'unix:/x'",
            "udp.a.dest: bad address 'unix:/x': expected udp:host:port or udp:port",
        ),
        (
            "[udp.a]\nlisten = '1-99999'\ndest = '1'",
            "udp.a.listen: bad address '1-99999': a port here is 0 to 65535, not 99999",
        ),
        (
            "[socks4.a]\nlisten = 'udp:1080'",
            "socks4.a.listen: 'udp:1080': SOCKS4 is not for datagrams",
        ),
        (
            "[socks4.a]\nclients = '10.0.0.0/8'",
            (
                "socks4.a.clients: found '10.0.0.0/8', expected \"allow RULE\" or"
                ' "deny RULE"'
            ),
        ),
        (
            "[socks4.a]\ndestinations = ['allow', 'alow *']",
            (
                "socks4.a.destinations[0]: found 'allow', expected \"allow RULE\" or"
                ' "deny RULE"\n'
                "socks4.a.destinations[1]: found 'alow *', expected \"allow RULE\" or"
                ' "deny RULE"'
            ),
        ),
        (
            "[socks4.a]\ndestinations = 'deny *:99999'",
            "socks4.a.destinations: 'deny *:99999': ",
        ),
        (
            f"access_log = '{'x' * 5000}'",
            (
                f"access_log: found '{'x' * 59}..., expected at most 4096 characters,"
                " not 5000"
            ),
        ),
    ],
)
def test_what_is_wrong_is_told(text: str, why: str, tmp_path: Path) -> None:
    """With the file, the key's path, what was found and what is expected."""
    lines = why.split("\n")
    told = problems(tmp_path / FILE, text)
    assert [line[: len(why)] for line, why in zip(told, lines, strict=False)] == lines


def test_all_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    """What is right beside what is wrong takes part in the other checks."""
    text = f"""
drain_timeout = -1
[defaults]
connect_timeout = "x"
[tcp.a]
listen = "1"
dest = "10.0.0.1:80"
idle_timeout = -1
[tcp.b]
listen = "[::1]:1"
[tcp.c]
listen = 2
dest = "10.0.0.1:80"
[udp.a]
{RELAY}
x = 1
"""
    assert [line.split(";")[0] for line in problems(tmp_path / FILE, text)] == [
        f"drain_timeout: found -1, expected {SECONDS}",
        f"defaults.connect_timeout: found 'x', expected {SECONDS}",
        f"tcp.a.idle_timeout: found -1, expected {SECONDS}",
        'tcp.c.listen: found 2, expected an address to listen on, as a string: "2"',
        "udp.a.x: no such key",
        'tcp.b: no destination: give dest = "10.0.0.5:80"',
        f"udp.a: bad name 'a': another relay has it already ({tmp_path / FILE}: tcp.a)",
        (
            "tcp.b.listen: listen = '[::1]:1' is the address of another listener,"
            f" listen = '1' ({tmp_path / FILE}: tcp.a.listen): give each its own"
        ),
    ]


def test_what_could_not_be_read_is_not_said_to_be_missing(tmp_path: Path) -> None:
    """Nor is a proxy open because its clients could not be read."""
    text = "[tcp.a]\nlisten = 1\ndest = 2\n[socks4.b]\nlisten = '1'\nclients = 'all'\n"
    assert [line.split(":")[0] for line in problems(tmp_path / FILE, text)] == [
        *("tcp.a.listen", "tcp.a.dest", "socks4.b.clients")
    ]


def test_of_many_unknown_keys_some_are_told(tmp_path: Path) -> None:
    keys = "".join(f"k{number:03} = 1\n" for number in range(25))
    top = problems(tmp_path / FILE, keys)
    assert len(top) == 21
    assert top[-1] == "the top: 5 more keys that there are not"
    assert problems(tmp_path / FILE, f"[tcp.a]\n{RELAY}{keys}")[-1] == (
        "tcp.a: 5 more keys that there are not"
    )


def test_half_a_character_of_json() -> None:
    for text, why in (
        (b'{"access_log": "\\ud800"}', "access_log: found '\\ud800', expected Unicode"),
        (
            b'{"socks4": {"a": {"userid_file": "\\ud800"}}}',
            "socks4.a.userid_file: found '\\ud800', expected Unicode text",
        ),
        (b'{"\\ud800": 1}', '"\\ud800": no such key; see `relayd.toml(5)`'),
        (b'{"verbose": null}', "verbose: found null, expected true or false"),
    ):
        [problem, *_] = json_layers(text).problems
        assert problem.startswith(f"standard input: {why}")


# -- anything


KEYS = sorted(
    {*PROCESS_KEYS, *DEFAULTS_KEYS}.union(*RELAY_KEYS.values())
    | {"env", "log", "userid_file", "x", "", "\0", "\ud800", "a b"}
)
LEAVES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(st.characters())
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.sampled_from(
        [
            *("8080", "1-3", "10.0.0.1:80", "udp:53", "unix:/x", "allow *", "5s"),
            *("allow 10.0.0.0/8", "deny ::/0", "-", "${X}", "$$", "tcp:80", "\x1b[2J"),
        ]
    )
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)
TABLES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6) | VALUES
NAMES = st.sampled_from(["a", "b", "A", "", "\n"]) | st.text()


@given(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    st.dictionaries(st.sampled_from(["defaults", "log"]), TABLES),
    st.dictionaries(
        st.sampled_from(["tcp", "udp", "socks4"]),
        st.dictionaries(NAMES, TABLES, max_size=3) | VALUES,
    ),
)
@settings(max_examples=200)
def test_any_content_is_read_or_refused(
    top: dict[str, Any], tables: dict[str, Any], relays: dict[str, Any]
) -> None:
    """In printable lines that begin with the file's name; nothing else is raised."""
    document = read_document({**top, **tables, **relays}, "f.toml", {"X": "1"})
    layers = Layers(
        document.process,
        document.relays,
        problems=document.problems,
        defaults=document.defaults,
        source="f.toml",
    )
    try:
        assert isinstance(configure(layers, own=lambda _: True), Config)
    except ConfigError as problem:
        for line in str(problem).split("\n"):
            assert line.isprintable()
            assert line.startswith("f.toml: ")
            assert len(line) < 10_000


@pytest.mark.parametrize("inner", ['{"a":', "["])
def test_what_is_deep_is_refused(inner: str) -> None:
    """However deep it is: at some depth, only what reads it further has no room."""
    for depth in (5, 100, 300, 450, 900, 100_000):
        close = "}" if inner.startswith("{") else "]"
        value = inner * depth + "1" + close * depth
        text = f'{{"env": true, "tcp": {{"a": {{"dest": {value}}}}}}}'
        assert json_layers(text.encode()).problems


def test_the_working_folder_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name of a file of secrets is not relative to the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users").write_text("bob")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / FILE).write_text("[socks4.a]\nuserid_file = 'users'\n")
    [relay] = configure(read_layers(f"etc/{FILE}")).relays
    assert isinstance(relay, Socks4Relay)
    assert relay.user_ids == (b"bob",)
