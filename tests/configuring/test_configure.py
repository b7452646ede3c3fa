"""What was given, in layers: which of it has the say, and what contradicts what."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.configuring.config import Config, Relay, Socks4Relay, UdpRelay
from relayd.core.errors import CannotStart
from relayd.tap.relayd import Options
from tests.support.files import RELAY, config_of, problems

TWO = f"[tcp.web]\n{RELAY}[udp.dns]\nlisten = '53'\ndest = '9.9.9.9:53'\n"


def configured(path: Path, text: str, *words: str) -> Config:
    """The settings of a file, and a command line."""
    path.write_text(text)
    options = Options()
    options.parseOptions(["--config", str(path), *words])
    return options.config


def refused(path: Path, text: str, *words: str) -> list[str]:
    """What is wrong with both."""
    with pytest.raises(CannotStart) as caught:
        configured(path, text, *words)
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith("relayd: ") for line in lines)
    return [line.removeprefix("relayd: ") for line in lines]


def idle_timeouts(config: Config) -> list[float]:
    return [
        each.stream.idle_timeout
        for each in config.relays
        if isinstance(each, Relay | Socks4Relay)
    ]


# -- layers


def test_the_command_line_is_over_the_file_and_that_over_defaults(
    tmp_path: Path,
) -> None:
    path = tmp_path / "f"
    text = f"""
drain_timeout = 3
access_log = "x"
[defaults]
idle_timeout = 1
stall_timeout = 4
[tcp.a]
{RELAY}
idle_timeout = 2
[socks4.b]
"""
    config = configured(path, text)
    assert (config.drain_timeout, config.access_log) == (3.0, "x")
    assert idle_timeouts(config) == [2.0, 1.0]
    config = configured(path, text, "--idle-timeout", "9", "--drain-timeout=1m")
    assert (config.drain_timeout, config.access_log) == (60.0, "x")
    assert idle_timeouts(config) == [9.0, 9.0]
    [a, b] = config.relays
    assert isinstance(a, Relay)
    assert isinstance(b, Socks4Relay)
    assert a.stream.stall_timeout == b.stream.stall_timeout == 4.0


def test_relays_of_the_file_and_of_the_command_line(tmp_path: Path) -> None:
    """The defaults are for all of them."""
    text = f"[defaults]\nidle_timeout = 1\nmax_flows = 5\n{TWO}"
    words = ["--listen", "81", "--dest", "10.0.0.1:80"]
    words += ["--name", "b", "--listen", "udp:5", "--dest", "udp:10.0.0.1:5"]
    config = configured(tmp_path / "f", text, *words)
    assert [each.name for each in config.relays] == ["web", "dns", None, "b"]
    assert idle_timeouts(config) == [1.0, 1.0]
    assert [
        each.udp.max_flows for each in config.relays if isinstance(each, UdpRelay)
    ] == [5, 5]


def test_a_file_of_defaults_alone(tmp_path: Path) -> None:
    """The relays may stand elsewhere."""
    words = ["--listen", "81", "--dest", "10.0.0.1:80"]
    config = configured(tmp_path / "f", "[defaults]\nidle_timeout = 1\n", *words)
    assert idle_timeouts(config) == [1.0]
    config = configured(tmp_path / "f", "demo = true\n[defaults]\nidle_timeout = 1\n")
    assert idle_timeouts(config) == [1.0]


def test_a_flag_that_the_file_has_off(tmp_path: Path) -> None:
    config = configured(tmp_path / "f", f"verbose = false\n{TWO}", "--verbose")
    assert config.verbose


# -- several relays


def test_a_name_used_twice(tmp_path: Path) -> None:
    """Over kinds, and files, and the command line; a file's words name the first."""
    path = tmp_path / "f"
    text = f"[tcp.x]\n{RELAY}[udp.x]\n{RELAY}[socks4.x]\n"
    why = f"bad name 'x': another relay has it already ({path}: tcp.x); give each"
    assert [line.split(" relay its")[0] for line in problems(path, text)] == [
        f"udp.x: {why}",
        f"socks4.x: {why}",
    ]
    words = ["--name", "web", "--listen", "81", "--dest", "10.0.0.1:80"]
    assert refused(path, TWO, *words) == [
        (
            f"bad name 'web': another relay has it already ({path}: tcp.web); give"
            " each relay its own name"
        )
    ]


def test_numbers_are_not_given_where_a_file_has_them(tmp_path: Path) -> None:
    text = f"[tcp.relay1]\n{RELAY}"
    words = ["--listen", "81", "--dest", "10.0.0.1:80"]
    config = configured(tmp_path / "f", text, *words)
    assert [each.name for each in config.relays] == ["relay1", None]


def test_an_address_used_twice(tmp_path: Path) -> None:
    """By the file and the command line."""
    path = tmp_path / "f"
    words = ["--listen", "127.0.0.1:8080", "--dest", "10.0.0.1:80"]
    assert refused(path, TWO, *words) == [
        (
            "--listen '127.0.0.1:8080' is the address of another listener, listen ="
            f" '8080' ({path}: tcp.web.listen): give each its own"
        )
    ]


def test_a_loop_of_relays(tmp_path: Path) -> None:
    path = tmp_path / "f"
    text = (
        "[tcp.a]\nlisten = '81'\ndest = '127.0.0.1:82'\n"
        "[tcp.b]\nlisten = '82'\ndest = '127.0.0.1:81'\n"
        "[udp.c]\nlisten = '5-9'\ndest = '127.0.0.1:5-9'\n"
    )
    assert problems(path, text) == [
        (
            "tcp.a.listen: a loop of relays: listen '81' to '82' to '81': give one"
            " of them another dest"
        ),
        "udp.c.listen: listen = '5-9' is relayed to itself: give another dest",
    ]


# -- one relay


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[tcp.a]\ndest = '10.0.0.1:80'", 'tcp.a: no listener: give listen = "8080"'),
        ("[tcp.a]\ndest = '10.0.0.1:5-6'", 'tcp.a: no listener: give listen = "8080"'),
        (
            "[udp.a]\nlisten = '5'",
            'udp.a: no destination: give dest = "10.0.0.5:80"',
        ),
        (
            "[tcp.a]\nlisten = '1'\ndest = []",
            'tcp.a: no destination: give dest = "10.0.0.5:80"',
        ),
        (
            "[tcp.a]\nlisten = '5-8'\ndest = '10.0.0.1:5-7'",
            (
                "tcp.a.dest: dest = '10.0.0.1:5-7' has 3 ports, and listen = '5-8' has"
                " 4: give as many"
            ),
        ),
        (
            "[tcp.a]\nlisten = '5'\ndest = '10.0.0.1:5-7'",
            (
                "tcp.a.dest: dest = '10.0.0.1:5-7' has 3 ports, and listen = '5' has 1:"
                " give as many"
            ),
        ),
        (
            "[tcp.a]\nlisten = ['5-7', '15-18']\ndest = '10.0.0.1:5'",
            (
                "tcp.a.listen: listen = '15-18' has 4 ports, and listen = '5-7' has 3:"
                " give as many"
            ),
        ),
        (
            "[tcp.a]\nlisten = ['5-7', '8']\ndest = '10.0.0.1:5'",
            (
                "tcp.a.listen: listen = '8' has one port, and listen = '5-7' has 3:"
                " give it a relay of its own"
            ),
        ),
        (
            "[socks4.a]\nopen = true\nclients = 'allow 10.0.0.0/8'",
            "socks4.a.open: open and clients contradict each other: give one",
        ),
        (
            "[socks4.a]\nlisten = '1080'",
            (
                "socks4.a: listen = '1080' would be an open proxy, for everybody who"
                ' can reach it. Add clients = ["allow 192.168.0.0/16"] for your'
                " clients, or open = true"
            ),
        ),
        (
            "[socks4.a]\nbind = false\nbind_any = true",
            "socks4.a.bind: bind and bind_any contradict each other: give one",
        ),
        (
            "verbose = true\nquiet = true\n[socks4.a]\n",
            "verbose: verbose and quiet contradict each other: give one",
        ),
        (
            f"demo = true\n[tcp.a]\n{RELAY}",
            "demo: demo brings its own listener and destination: leave out tcp.a",
        ),
    ],
)
def test_what_does_not_fit_together(text: str, why: str, tmp_path: Path) -> None:
    assert problems(tmp_path / "f", text) == [why]


def test_a_range_and_its_destinations(tmp_path: Path) -> None:
    """A destination may have as many ports, or one for all."""
    text = "[tcp.a]\nlisten = ['5-6', '[::1]:15-16']\ndest = ['db:1-2', 'db:80']\n"
    [relay] = config_of(tmp_path / "f", text).relays
    assert isinstance(relay, Relay)
    assert [str(each) for each in relay.listeners] == [":5-6", "[::1]:15-16"]
    assert [str(each) for each in relay.destinations] == ["db:1-2", "db:80"]


def test_a_setting_of_the_command_line_that_contradicts_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "f"
    assert refused(path, f"verbose = true\n{TWO}", "--quiet") == [
        f"{path}: verbose: verbose and --quiet contradict each other: give one"
    ]
    assert refused(path, TWO, "--demo") == [
        "--demo brings its own listener and destination: leave out tcp.web"
    ]


def test_all_is_told_of_both(tmp_path: Path) -> None:
    path = tmp_path / "f"
    words = ["--listen", "8080", "--dest", "127.0.0.1:8080"]
    lines = refused(path, f"x = 1\n[tcp.a]\n{RELAY}", *words)
    assert [line.split(":")[0] for line in lines] == [
        str(path),
        "--listen '8080' is the address of another listener, listen = '8080' ("
        + str(path),
        "--listen '8080' is relayed to itself",
    ]


# -- relays that are stopped


def enabled(config: Config) -> list[bool]:
    return [each.enabled for each in config.relays]


def test_a_relay_that_is_stopped(tmp_path: Path) -> None:
    """Of each kind; by its table, by the defaults, by the command line."""
    path = tmp_path / "f"
    text = f"{TWO}[socks4.p]\n"
    assert enabled(configured(path, text)) == [True, True, True]
    for number, table in enumerate(("[tcp.web]\n", "[udp.dns]\n", "[socks4.p]\n")):
        stopped = text.replace(table, f"{table}enabled = false\n")
        is_enabled = [each != number for each in range(3)]
        assert enabled(configured(path, stopped)) == is_enabled
    stopped = f"[defaults]\nenabled = false\n{text}enabled = true\n"
    assert enabled(configured(path, stopped)) == [False, False, True]
    assert enabled(configured(path, stopped, "--enabled", "on")) == [True] * 3
    # A file can be read again.
    assert enabled(configured(path, text, "--enabled=off")) == [False] * 3
    words = ["--listen", "81", "--dest", "10.0.0.1:80", "--enabled", "off"]
    assert not any(enabled(configured(path, TWO, *words)))


def test_its_settings_are_checked(tmp_path: Path) -> None:
    text = f"{TWO}[tcp.other]\nenabled = false\nlisten = '81'\nqueue_timeout = 5\n"
    assert len(refused(tmp_path / "f", text)) == 2


def test_it_is_in_nobodys_way(tmp_path: Path) -> None:
    """Its address may be that of another one, or of its own server."""
    path = tmp_path / "f"
    text = f"{TWO}[tcp.other]\nlisten = '8080'\ndest = '8080'\n"
    assert len(refused(path, text)) == 2
    assert enabled(configured(path, f"{text}enabled = false\n")) == [True, False, True]
    text = f"[socks4.a]\n[socks4.b]\n{TWO}"
    assert len(refused(path, text)) == 1
    text = text.replace("[socks4.b]\n", "[socks4.b]\nenabled = false\n")
    assert enabled(configured(path, text)) == [True, True, True, False]


def test_nothing_but_relays_that_are_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a file, nobody could start one."""
    why = (
        "relayd: --enabled 'off' leaves every relay stopped, and nobody could start"
        " one: leave it out, or give --control"
    )
    words = ["--listen", "81", "--dest", "10.0.0.1:80", "--enabled=off"]
    for argv in (words, ["--demo", "--enabled=off"]):
        with pytest.raises(CannotStart) as caught:
            Options().parseOptions(argv)
        assert str(caught.value) == why
    options = Options()
    options.parseOptions([*words, "--control=unix:/run/c"])
    assert enabled(options.config) == [False]
    # As a file it is something to begin with.
    with pytest.raises(SystemExit):
        Options().parseOptions([*words, "--print-config"])
    assert enabled(config_of(tmp_path / "f", capsys.readouterr().out)) == [False]
