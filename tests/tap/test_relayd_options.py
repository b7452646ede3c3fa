"""The options of `twistd relayd`: what each does, its defaults, and its help."""

from __future__ import annotations

import platform
import re
import shlex
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet import reactor

import relayd
import relayd.stream.relay
import relayd.tap.relayd
import relayd.tap.socks4
import twisted
from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    UdpAddress,
    UnixPath,
)
from relayd.configuring.address_settings import RELAYD
from relayd.configuring.config import (
    DEMO_LISTENER,
    Config,
    Relay,
    StreamSettings,
    UdpRelay,
    UdpSettings,
)
from relayd.configuring.configure import KINDS
from relayd.core.errors import CannotStart, RelayError
from relayd.core.setting_types import Count, Flag, Setting
from relayd.core.settings import UDP
from relayd.tap import socks4
from relayd.tap.relayd import EXAMPLES, Options, makeService
from tests.support.command_lines import GOOD, make


def parse(*argv: str) -> Config:
    """The settings that a command line makes."""
    options = Options()
    options.parseOptions(argv)
    return options.config


def refusal(*argv: str) -> str:
    """What is printed instead of starting; one line, and a status that is not 0."""
    with pytest.raises(CannotStart) as caught:
        Options().parseOptions(argv)
    # Python prints a text that it is to exit with, and exits with status 1.
    message = caught.value.code
    assert isinstance(message, str)
    assert message.startswith("relayd: ")
    assert message.isprintable()
    return message.removeprefix("relayd: ")


# -- options


def test_listeners_and_destinations() -> None:
    """In long and in short, several of each, in all forms of address."""
    assert parse("--listen", "8080", "--dest=example.com:80").relays == (
        Relay((HostPort(None, 8080),), (HostPort("example.com", 80),)),
    )
    relays = parse("-l", "1", "-d", "2", "-d", "unix:/s", "-l", "tcp:3", "-d4").relays
    assert relays == (
        Relay((HostPort(None, 1),), (HostPort(None, 2), UnixPath("/s"))),
        Relay((EndpointString("tcp:3"),), (HostPort(None, 4),)),
    )
    relays = parse("--name", "web", "-l1", "-d2", "--name=dns", "-l3", "-d4").relays
    assert relays == (
        Relay((HostPort(None, 1),), (HostPort(None, 2),), "web"),
        Relay((HostPort(None, 3),), (HostPort(None, 4),), "dns"),
    )


def test_datagrams_beside_streams() -> None:
    """In one process, each listener with destinations of its own kind."""
    relays = parse("-l", "udp:53", "-d", "udp:db:1", "-d", "udp:2", "-l1", "-d2").relays
    assert relays == (
        UdpRelay((UdpAddress(None, 53),), (UdpAddress("db", 1), UdpAddress(None, 2))),
        Relay((HostPort(None, 1),), (HostPort(None, 2),)),
    )


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (("--udp-timeout", "1.5"), "timeout", 1.5),
        (("--udp-unreplied-timeout=0.25",), "unreplied_timeout", 0.25),
        (("--max-flows", "7"), "max_flows", 7),
        (("--max-flows-per-client=3",), "max_flows_per_client", 3),
        (("--no-refresh-inbound",), "refresh_inbound", False),
        (("--reply-cap", "2.5"), "reply_cap", 2.5),
        (("--reply-cap", "0"), "reply_cap", 0.0),
        (("--udp-rcvbuf", "65536"), "receive_buffer", 65536),
    ],
)
def test_an_option_of_datagrams_sets_its_own_and_nothing_else(
    argv: tuple[str, ...], field: str, value: Any
) -> None:
    """Each is seen in the settings, and reaches the relay."""
    listeners = ("-l", "udp:127.0.0.1:0", "-d", "udp:9")
    config = parse(*listeners, *argv)
    [relay] = config.relays
    assert config == Config([attrs.evolve(relay, udp=UdpSettings(**{field: value}))])
    [each] = make(*listeners, *argv).listenings
    nat: Any = each.factory
    reached = {
        **{name: getattr(nat.table, name) for name in ("timeout", "refresh_inbound")},
        "unreplied_timeout": nat.table.unreplied_timeout,
        "max_flows": nat.table.max_flows,
        "max_flows_per_client": nat.table.max_flows_per_client,
        "reply_cap": nat.ledger.reply_cap,
        "receive_buffer": nat.receive_buffer,
    }
    assert reached[field] == value


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ("--udp-timeout", "0"),
            "bad --udp-timeout '0': expected seconds, more than 0",
        ),
        (("--udp-timeout", "soon"), "bad --udp-timeout 'soon': expected seconds"),
        (
            ("--udp-unreplied-timeout", "0"),
            "bad --udp-unreplied-timeout '0': expected seconds",
        ),
        (("--udp-unreplied-timeout=-1",), "bad --udp-unreplied-timeout '-1': exp"),
        (("--max-flows", "0"), "bad --max-flows '0': expected"),
        (("--max-flows", "many"), "bad --max-flows 'many': expected"),
        (("--max-flows-per-client", "0"), "bad --max-flows-per-client '0': expected"),
        (("--reply-cap", "-1"), "bad --reply-cap '-1': expected a number from 0 up"),
        (("--reply-cap", "inf"), "bad --reply-cap 'inf': expected"),
        (("--reply-cap", "nan"), "bad --reply-cap 'nan': expected"),
        (("--reply-cap", "1_0"), "bad --reply-cap '1_0': expected"),
        (("--udp-rcvbuf", "0"), "bad --udp-rcvbuf '0': expected 1 to"),
        (("--udp-rcvbuf", "1073741824"), "bad --udp-rcvbuf '1073741824': expected"),
        (("--udp-rcvbuf", "4M"), "bad --udp-rcvbuf '4M': expected"),
        (("--no-refresh-inbound=1",), "option --no-refresh-inbound must not have"),
        (("-l", "udp:1", "-d", "2"), "--listen 'udp:1' can't be relayed to --dest '2'"),
        (("-l", "1", "-d", "udp:2"), "--listen '1' can't be relayed to --dest 'udp:2'"),
        (("-l", "udp:x"), "bad address 'udp:x': "),
    ],
)
def test_a_bad_option_of_datagrams_is_one_line(
    argv: tuple[str, ...], says: str
) -> None:
    """Which quotes what was wrong."""
    assert refusal("-l", "udp:53", "-d", "udp:9.9.9.9:53", *argv).startswith(says)


def test_a_server_with_an_unknown_interface_is_one_line() -> None:
    """The scope of its address is looked up as the relay is made."""
    options = Options()
    options.parseOptions(["-l", "udp:0", "-d", "udp:[fe80::1%nosuch]:53"])
    with pytest.raises(CannotStart) as caught:
        makeService(options, reactor)
    assert "nosuch" in str(caught.value.code)


@pytest.mark.parametrize(
    ("option", "other"), [("-d", ("-l", "udp:0")), ("-l", ("-d", "udp:9.9.9.9:53"))]
)
def test_a_broadcast_address_of_this_machines_networks_is_one_line(
    option: str, other: tuple[str, str]
) -> None:
    """The kernel knows them; here of the loopback's."""
    options = Options()
    options.parseOptions([*other, option, "udp:127.255.255.255:53"])
    why = "udp:127.255.255.255:53: it is a broadcast address of this machine's networks"
    service: Any = None
    with pytest.raises(CannotStart) as caught:
        service = makeService(options, reactor)
        service.startService()
    assert why in str(caught.value.code)


def test_the_defaults() -> None:
    """Without options, the settings are as their class has them."""
    config = parse(*GOOD)
    assert config == Config(config.relays)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (("--drain-timeout", "1.5"), "drain_timeout", 1.5),
        (("--drain-timeout=0",), "drain_timeout", 0.0),
        (("--shutdown-delay", "2.5"), "shutdown_delay", 2.5),
        (("--verbose",), "verbose", True),
        (("-v",), "verbose", True),
    ],
)
def test_an_option_of_the_process_sets_its_own_and_nothing_else(
    argv: tuple[str, ...], field: str, value: Any
) -> None:
    """Each is seen in the settings."""
    config = parse(*GOOD, *argv)
    assert getattr(config, field) == value
    assert config == Config(**{"relays": config.relays, field: value})


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (("--backlog", "7"), "backlog", 7),
        (("--connect-timeout", "3"), "stream", StreamSettings(connect_timeout=3)),
        (("--stall-timeout", "0.25"), "stream", StreamSettings(stall_timeout=0.25)),
        (("--idle-timeout", "0"), "stream", StreamSettings(idle_timeout=0)),
        (("--half-close-timeout", "9"), "stream", StreamSettings(half_close_timeout=9)),
        (
            ("--handshake-timeout", "0.5"),
            "stream",
            StreamSettings(handshake_timeout=0.5),
        ),
        (("--handshake-timeout=0",), "stream", StreamSettings(handshake_timeout=0)),
        (
            ("--stall-timeout=2", "--idle-timeout=4"),
            "stream",
            StreamSettings(stall_timeout=2, idle_timeout=4),
        ),
    ],
)
def test_an_option_sets_its_own_and_nothing_else(
    argv: tuple[str, ...], field: str, value: Any
) -> None:
    """Each is seen in the settings."""
    [relay] = parse(*GOOD).relays
    assert parse(*GOOD, *argv) == Config([attrs.evolve(relay, **{field: value})])


def test_the_demo_needs_nothing_else() -> None:
    """And takes the other options."""
    demo = Relay((DEMO_LISTENER,), ())
    assert parse("--demo") == Config([demo], demo=True)
    assert parse("--demo", "-v", "--drain-timeout=1", "--backlog=3") == Config(
        [attrs.evolve(demo, backlog=3)], demo=True, verbose=True, drain_timeout=1.0
    )


def test_a_bad_command_line_is_one_line() -> None:
    """Which quotes what was wrong, and says no more than that."""
    for argv, says in (
        ((), "nothing to relay: give --listen and --dest, or try --demo"),
        (("--listen", "99999", "--dest", "80"), "bad address '99999': a port here"),
        (("--listen", "80", "--dest", "nohost"), "bad address 'nohost': "),
        (("--listen", "80", "--dest", "0"), "bad address '0': a port here is 1"),
        (("--listen", "8\n0"), "bad address '8\\n0': "),
        (("--listen", "80"), "--listen '80' has no --dest"),
        (("--dest", "80"), "--dest '80' has no --listen"),
        ((*GOOD, "--idle-timeout", "soon"), "bad --idle-timeout 'soon': expected"),
        ((*GOOD, "--connect-timeout", "-1"), "bad --connect-timeout '-1': expected"),
        ((*GOOD, "--stall-timeout", "1e9"), "bad --stall-timeout '1e9': expected"),
        ((*GOOD, "--half-close-timeout="), "bad --half-close-timeout '': expected"),
        ((*GOOD, "--drain-timeout", "nan"), "bad --drain-timeout 'nan': expected"),
        ((*GOOD, "--backlog", "0"), "bad --backlog '0': expected"),
        ((*GOOD, "8080"), "unexpected argument '8080': relayd takes options only"),
        ((*GOOD, "a\nb"), "unexpected argument 'a\\nb': "),
        ((*GOOD, "--lissten", "80"), "option --lissten not recognized"),
        ((*GOOD, "-x"), "option -x not recognized"),
        (("--listen",), "option --listen requires argument"),
        ((*GOOD, "--verbose=3"), "option --verbose must not have an argument"),
        (
            ("--demo", *GOOD),
            "--demo brings its own listener and destination: leave out --listen '127.",
        ),
        ((*GOOD, "--name", "a b"), "bad --name 'a b': expected 1 to 64 small letters"),
        (("--name", "a", *GOOD, "--name", "a", *GOOD), "bad --name 'a': another"),
        (("--name", "a"), "--name 'a' has no --listen"),
    ):
        assert refusal(*argv).startswith(says)


def test_a_refusal_is_ours_and_the_interpreters() -> None:
    """A program that embeds the options may catch either."""
    for kind in (RelayError, SystemExit, Exception):
        with pytest.raises(kind):
            Options().parseOptions(["--backlog", "x", *GOOD])


def test_the_help_has_every_option_and_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is printed, and the status is 0."""
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert EXAMPLES in printed
    assert "SIGTERM" in printed
    for row in RELAYD:
        assert re.search(rf"^ .*--{row.option}\b", printed, re.MULTILINE), row.option
    assert "--version" in printed
    assert "  -l, --listen=ADDRESS\n" in printed
    assert "      --idle-timeout=SECONDS\n" in printed
    assert "  -v, --verbose\n" in printed
    words = " ".join(printed.split())
    for default in ("10", "3600", "300", "4096"):
        assert f"[default: {default}]" in words


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_help_fits_its_terminal(width: int) -> None:
    """What is written of an option is wrapped, and no option's name is broken."""
    for options in (Options(), socks4.Options()):
        text = options.getUsage(width).removesuffix(options.examples)
        lines = text.splitlines()
        assert all(len(line) <= width for line in lines if line.startswith(" " * 10))
        assert all(f"--{row.option}" in text for row in options.rows)
        assert not re.search(r"-$", text, re.MULTILINE)


def test_the_examples_work(tmp_path: Path) -> None:
    """Each that the help shows is a command line that is understood."""
    file = tmp_path / "relayd.toml"
    file.write_text('[tcp.web]\nlisten = "8080"\ndest = "10.0.0.5:80"\n')
    shown = [line for line in EXAMPLES.splitlines() if "twistd -n " in line]
    assert len(shown) >= 4
    for line in shown:
        command = shlex.split(line)
        assert command[:4] == ["twistd", "-n", "--pidfile=", "relayd"]
        assert parse(
            *[str(file) if "/etc/" in word else word for word in command[4:]]
        ).relays


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """With those of what it runs on, which a bug report needs."""
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert not caught.value.code
    assert capsys.readouterr().out == (
        f"relayd {relayd.__version__} (Twisted {twisted.__version__}, "
        f"Python {platform.python_version()})\n"
    )


# -- an option costs one row


COUNT = Setting[int](
    name="burst-limit",
    type=Count(9),
    default=7,
    help="Limit of whatever comes in bursts.",
    kinds=("udp",),
    group=UDP,
)


FLAG = Setting[bool](
    name="careful",
    type=Flag(),
    default=True,
    help="Be careful.",
    off="Be careless.",
    kinds=("udp",),
    group=UDP,
)


@attrs.frozen(kw_only=True)
class MoreUdpSettings(UdpSettings):
    """What the code that uses them takes."""

    burst_limit: int = COUNT.default
    careful: bool = FLAG.default


@attrs.frozen
class MoreUdpRelay(UdpRelay):
    udp: MoreUdpSettings = attrs.field(factory=MoreUdpSettings, kw_only=True)


class MoreOptions(Options):
    rows = (*RELAYD, COUNT, FLAG)


def test_a_new_row_is_a_new_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read, checked, in the help, and handed over to whoever has its field."""
    monkeypatch.setitem(KINDS, "udp", MoreUdpRelay)

    def given(*argv: str) -> UdpSettings:
        options = MoreOptions()
        options.parseOptions(["-l", "udp:1", "-d", "udp:2", *argv])
        [relay] = options.config.relays
        assert isinstance(relay, MoreUdpRelay)
        return relay.udp

    assert given() == MoreUdpSettings()
    assert given("--burst-limit=3") == MoreUdpSettings(burst_limit=3)
    assert given("--no-careful", "--reply-cap=2") == MoreUdpSettings(
        careful=False, reply_cap=2
    )
    with pytest.raises(CannotStart) as caught:
        given("--burst-limit", "10")
    assert caught.value.code == (
        "relayd: bad --burst-limit '10': expected a number from 1 to 9"
    )
    with pytest.raises(SystemExit):
        given("--help")
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("      --burst-limit=NUMBER")
    assert lines.index("UDP flows:") < at < lines.index("Process:")
    assert lines[at + 1].strip() == "Limit of whatever comes in bursts. [default: 7]"
    assert lines[lines.index("      --no-careful") + 1].strip() == "Be careless."
