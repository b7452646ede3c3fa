"""The command line: what each option does, and how `twistd` and `twist` say no."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.application.service import IServiceMaker, MultiService
from twisted.internet import reactor
from twisted.internet.testing import MemoryReactorClock
from zope.interface.verify import verifyObject

import relayd
import relayd.stream.relay
import relayd.tap.relayd
import relayd.tap.socks4
import twisted
from relayd.core.errors import CannotStart, Refused, RelayError
from relayd.core.session import Session
from relayd.core.setting_types import Count, Flag, Setting
from relayd.core.settings import UDP
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog
from relayd.operating.address_settings import RELAYD, SOCKS4
from relayd.operating.config import (
    Config,
    Relay,
    Socks4Config,
    Socks4Settings,
    StreamSettings,
    UdpRelay,
    UdpSettings,
)
from relayd.operating.endpoints import EndpointString, HostPort, UdpAddress, UnixPath
from relayd.operating.running import RelayService
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.socks.rules import parse_rule
from relayd.socks4 import Socks4Factory
from relayd.stream.bridge import Timeouts
from relayd.tap import socks4
from relayd.tap.relayd import EXAMPLES, Options, makeService
from tests.support.process import (
    START,
    TWISTD,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_exactly,
    relay,
)
from twisted.plugins import relayd_plugin

#: The two runners, each writing its log as text and no file at all.
TWIST = str(Path(TWISTD).with_name("twist"))
RUNNERS = {
    "twistd": (TWISTD, "-n", "--pidfile="),
    "twist": (TWIST, "--log-format=text"),
}
runners = pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS.keys())


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


#: A command line that works, to add options to.
GOOD = ("--listen", "127.0.0.1:0", "--dest", "80")


# -- options


def test_listeners_and_destinations() -> None:
    """In long and in short, several of each, in all forms of address."""
    assert parse("--listen", "8080", "--dest=example.com:80").relays == (
        Relay(HostPort(None, 8080), (HostPort("example.com", 80),)),
    )
    relays = parse("-l", "1", "-d", "2", "-d", "unix:/s", "-l", "tcp:3", "-d4").relays
    assert relays == (
        Relay(HostPort(None, 1), (HostPort(None, 2), UnixPath("/s"))),
        Relay(EndpointString("tcp:3"), (HostPort(None, 4),)),
    )
    relays = parse("-l1", "--name", "web", "-d2", "-l3", "-d4", "--name=dns").relays
    assert relays == (
        Relay(HostPort(None, 1), (HostPort(None, 2),), "web"),
        Relay(HostPort(None, 3), (HostPort(None, 4),), "dns"),
    )


def test_datagrams_beside_streams() -> None:
    """In one process, each listener with destinations of its own kind."""
    relays = parse("-l", "udp:53", "-d", "udp:db:1", "-d", "udp:2", "-l1", "-d2").relays
    assert relays == (
        UdpRelay(UdpAddress(None, 53), (UdpAddress("db", 1), UdpAddress(None, 2))),
        Relay(HostPort(None, 1), (HostPort(None, 2),)),
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
    udp = UdpSettings(**{field: value})
    assert config == Config(config.relays, udp=udp)
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


def test_a_server_at_no_interface_of_ours_is_one_line() -> None:
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
        (("--backlog", "7"), "backlog", 7),
        (("--verbose",), "verbose", True),
        (("-v",), "verbose", True),
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
    config = parse(*GOOD, *argv)
    assert getattr(config, field) == value
    assert config == Config(**{"relays": config.relays, field: value})


def test_the_demo_needs_nothing_else() -> None:
    """And takes the other options."""
    assert parse("--demo") == Config((), demo=True)
    assert parse("--demo", "-v", "--drain-timeout=1") == Config(
        (), demo=True, verbose=True, drain_timeout=1.0
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
        ((*GOOD, "--name", "a b"), "bad --name 'a b': expected 1 to 64 letters"),
        ((*GOOD, "--name", "a", *GOOD, "--name", "a"), "bad --name 'a': another"),
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


def test_the_examples_work() -> None:
    """Each that the help shows is a command line that is understood."""
    shown = [line for line in EXAMPLES.splitlines() if "twistd -n " in line]
    assert len(shown) >= 4
    for line in shown:
        command = shlex.split(line)
        assert command[:4] == ["twistd", "-n", "--pidfile=", "relayd"]
        config = parse(*command[4:])
        assert config.demo or config.relays


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
class MoreConfig(Config):
    udp: MoreUdpSettings = attrs.field(factory=MoreUdpSettings, kw_only=True)


class MoreOptions(Options):
    rows = (*RELAYD, COUNT, FLAG)
    kind = MoreConfig


def test_a_row_more_is_an_option_more(capsys: pytest.CaptureFixture[str]) -> None:
    """It is read, checked, in the help, and handed over to whoever has its field."""

    def given(*argv: str) -> UdpSettings:
        options = MoreOptions()
        options.parseOptions([*GOOD, *argv])
        return options.config.udp

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


# -- the service


def make(*argv: str) -> RelayService:
    """The relays that a command line makes."""
    options = Options()
    options.parseOptions(argv)
    service = makeService(options, reactor)
    assert isinstance(service, MultiService)
    [relays] = [each for each in service if isinstance(each, RelayService)]
    return relays


def test_the_settings_reach_the_relays() -> None:
    """Each listener has them, and its own destinations."""
    relays = make(
        *(
            "-l",
            "127.0.0.1:0",
            "-d",
            "80",
            "-d",
            "db:5432",
            "--name=web",
            "-l",
            "unix:/s",
            "-d",
            "81",
        ),
        *("--connect-timeout=1", "--stall-timeout=2", "--idle-timeout=3"),
        *("--half-close-timeout=4", "--drain-timeout=5", "--handshake-timeout=6"),
    )
    assert relays.drain_timeout == 5
    shown = [(each.name, each.factory.name, each.purpose) for each in relays.listenings]
    numbered = shown[1][1]
    assert re.fullmatch(r"relay\d+", numbered)
    assert shown == [
        ("127.0.0.1:0", "web", "relaying to 127.0.0.1:80, db:5432"),
        ("unix:/s", numbered, "relaying to 127.0.0.1:81"),
    ]
    for each in relays.listenings:
        assert each.factory.timeouts == Timeouts(1, 2, 3, 4, 6)


def test_the_log_is_as_verbose_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the factories are given to report to."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.stream.relay, "Observers", lambda *them: given.extend(them)
    )
    make(*GOOD)
    make(*GOOD, "-v")
    assert [type(each) for each in given] == [SessionLog, VerboseSessionLog]


def test_what_twisted_can_not_use_is_one_line() -> None:
    """The endpoint strings are only looked into when they are made."""
    for argv, says in (
        (("-l", "tcp:http", "-d", "80"), "bad endpoint 'tcp:http': 'http' is not"),
        (("-l", "80", "-d", "tcp:80"), "bad endpoint 'tcp:80': it lacks 'port'"),
    ):
        options = Options()
        options.parseOptions(argv)
        with pytest.raises(CannotStart) as caught:
            makeService(options, reactor)
        message = str(caught.value.code)
        assert message.startswith(f"relayd: {says}")
        assert message.isprintable()


def test_the_running_reactor_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`twistd` calls with the options alone."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.tap.relayd,
        "make_service",
        lambda _, reactor, log_file: given.append(reactor),
    )
    options = Options()
    options.parseOptions(GOOD)
    makeService(options)
    assert given == [reactor]


def test_the_plugins_name_their_modules() -> None:
    """`twistd` finds the options and the service by them."""
    assert verifyObject(IServiceMaker, relayd_plugin.relayd)
    assert relayd_plugin.relayd.tapname == "relayd"
    assert relayd_plugin.relayd.options is Options
    assert relayd_plugin.relayd.makeService is makeService
    assert verifyObject(IServiceMaker, relayd_plugin.socks4)
    assert relayd_plugin.socks4.tapname == "socks4"
    assert relayd_plugin.socks4.options is socks4.Options
    assert relayd_plugin.socks4.makeService is socks4.makeService


# -- the proxy's options


def parse_socks4(*argv: str) -> Socks4Config:
    """The settings that a command line of the proxy makes."""
    options = socks4.Options()
    options.parseOptions(argv)
    return options.config


def socks4_refusal(*argv: str) -> str:
    """What is printed instead of starting a proxy."""
    with pytest.raises(CannotStart) as caught:
        parse_socks4(*argv)
    message = caught.value.code
    assert isinstance(message, str)
    assert message.startswith("socks4: ")
    assert message.isprintable()
    return message.removeprefix("socks4: ")


def test_the_proxy_needs_no_options() -> None:
    """It serves this machine then, and the settings are as their class has them."""
    assert parse_socks4() == Socks4Config()


def test_the_proxys_listeners() -> None:
    """In long and in short, several, in all forms of address; the default is gone."""
    config = parse_socks4("-l", "127.0.0.1:1081", "--listen=unix:/s", "-l[::1]:0")
    assert config == Socks4Config(
        listeners=[HostPort("127.0.0.1", 1081), UnixPath("/s"), HostPort("::1", 0)]
    )
    config = parse_socks4("--open", "-l", "1080", "-l", "tcp:1081")
    assert config.listeners == (HostPort(None, 1080), EndpointString("tcp:1081"))


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (("--ident",), "socks4", Socks4Settings(ident=True)),
        (("--no-bind",), "socks4", Socks4Settings(bind=False)),
        (("--bind-any",), "socks4", Socks4Settings(bind_any=True)),
        (
            ("--bind-address", "0.0.0.0"),
            "socks4",
            Socks4Settings(bind_address="0.0.0.0"),
        ),
        (
            ("--bind-address", "192.0.2.1"),
            "socks4",
            Socks4Settings(bind_address="192.0.2.1"),
        ),
        (
            ("--external-address=192.0.2.1",),
            "socks4",
            Socks4Settings(external_address="192.0.2.1"),
        ),
        (
            ("--handshake-timeout", "0.5"),
            "stream",
            StreamSettings(handshake_timeout=0.5),
        ),
        (("--handshake-timeout=0",), "stream", StreamSettings(handshake_timeout=0)),
        (("--bind-timeout", "7"), "socks4", Socks4Settings(bind_timeout=7)),
        (("--max-handshakes", "7"), "socks4", Socks4Settings(max_handshakes=7)),
        (
            ("--max-handshakes-per-client", "7"),
            "socks4",
            Socks4Settings(max_handshakes_per_client=7),
        ),
        (("--max-binds", "7"), "socks4", Socks4Settings(max_binds=7)),
        (
            ("--max-binds-per-client", "7"),
            "socks4",
            Socks4Settings(max_binds_per_client=7),
        ),
        (("--name", "web"), "name", "web"),
        (("--open",), "open", True),
        (("--userid", "joe"), "user_ids", [b"joe"]),
        (("--userid=joe", "--userid", "eve"), "user_ids", [b"joe", b"eve"]),
        (("--allow-client", "10.0.0.0/8"), "clients", [ip_network("10.0.0.0/8")]),
        (
            ("--allow-client=192.0.2.1", "--allow-client=fd00::/8"),
            "clients",
            [ip_network("192.0.2.1/32"), ip_network("fd00::/8")],
        ),
        (("--connect-timeout", "3"), "stream", StreamSettings(connect_timeout=3)),
        (("--stall-timeout", "3"), "stream", StreamSettings(stall_timeout=3)),
        (("--idle-timeout", "3"), "stream", StreamSettings(idle_timeout=3)),
        (("--half-close-timeout", "3"), "stream", StreamSettings(half_close_timeout=3)),
        (("--drain-timeout", "3"), "drain_timeout", 3.0),
        (("--backlog", "3"), "backlog", 3),
        (("--transport", "twisted"), "transport", "twisted"),
        (("--verbose",), "verbose", True),
        (("-v",), "verbose", True),
        (("--quiet",), "quiet", True),
        (("-q",), "quiet", True),
    ],
)
def test_an_option_of_the_proxy_sets_its_own_and_nothing_else(
    argv: tuple[str, ...], field: str, value: Any
) -> None:
    """Each is seen in the settings."""
    assert parse_socks4(*argv) == attrs.evolve(Socks4Config(), **{field: value})


def test_allowing_and_denying_keep_their_order() -> None:
    """Among each other, as the first that matches decides."""
    config = parse_socks4(
        *("--deny-dest", "*:25", "--allow-dest", "10.0.0.0/8", "--userid", "joe"),
        *("--allow-dest=*.example.com:80", "--deny-dest=*"),
    )
    assert config.rules == (
        parse_rule("", "*:25", allow=False),
        parse_rule("", "10.0.0.0/8", allow=True),
        parse_rule("", "*.example.com:80", allow=True),
        parse_rule("", "*", allow=False),
    )


@pytest.mark.parametrize("listener", ["1080", "0.0.0.0:1080", "[::]:1080", "tcp:1080"])
def test_an_open_proxy_takes_a_word(listener: str) -> None:
    """Of whom it is for; wherever it stands on the command line."""
    shown = HostPort(None, 1080) if listener == "1080" else listener
    for argv in (("-l", listener), ("-l", "127.0.0.1:1", "-l", listener, "--ident")):
        assert socks4_refusal(*argv) == (
            f"--listen '{shown}' would be an open proxy, for everybody who can reach"
            " it. Add --allow-client CIDR for your clients (such as --allow-client"
            " 192.168.0.0/16), or --open"
        )
        for word in (("--open",), ("--allow-client", "10.0.0.0/8")):
            assert parse_socks4(*argv, *word) == parse_socks4(*word, *argv)


def test_options_that_contradict_each_other() -> None:
    """Both are named, so that one can be taken away."""
    both = "contradict each other: give one"
    for argv, says in (
        (
            ("--open", "--allow-client", "10.0.0.0/8"),
            f"--open and --allow-client {both}",
        ),
        (("--no-bind", "--bind-any"), f"--no-bind and --bind-any {both}"),
        (
            ("--no-bind", "--bind-address", "192.0.2.1"),
            f"--no-bind and --bind-address {both}",
        ),
        (
            ("--external-address", "192.0.2.1", "--no-bind"),
            f"--no-bind and --external-address {both}",
        ),
        (("-v", "-q"), f"--verbose and --quiet {both}"),
    ):
        assert socks4_refusal(*argv) == says


#: What an operator may get wrong, and the beginning of the line that says so.
BAD_SOCKS4 = [
    (("--listen", "99999"), "bad address '99999': a port here is 0"),
    (("--listen", "nohost"), "bad address 'nohost': "),
    (("--listen=",), "bad address '': "),
    (("--listen",), "option --listen requires argument"),
    (("--listen", "udp:53"), "bad --listen 'udp:53': SOCKS4 is not for datagrams"),
    (("--allow-client", "10.0.0.1/8"), "bad --allow-client '10.0.0.1/8': 10.0.0.1/8 "),
    (("--allow-client", "lan"), "bad --allow-client 'lan': 'lan' does not "),
    (("--allow-client=",), "bad --allow-client '': "),
    (("--allow-client", "10\n"), "bad --allow-client '10\\n': "),
    (("--allow-dest", "10.0.0.0/33"), "bad --allow-dest '10.0.0.0/33': '10."),
    (("--allow-dest", "x y"), "bad --allow-dest 'x y': expected CIDR[:PORTS] or"),
    (("--deny-dest", "*:smtp"), "bad --deny-dest '*:smtp': 'smtp' is not a list"),
    (("--deny-dest", "*\n"), "bad --deny-dest '*\\n': expected CIDR"),
    (("--deny-dest=",), "bad --deny-dest '': expected CIDR"),
    (("--userid=",), "bad --userid '': expected 1 to 255 bytes"),
    (("--userid", "u" * 256), "bad --userid 'uuuu"),
    (("--bind-address", "::1"), "bad --bind-address '::1': expected an IPv4"),
    (("--bind-address=",), "bad --bind-address '': expected an IPv4"),
    (("--no-bind", "--bind-address="), "bad --bind-address '': expected an IPv4"),
    (("--external-address", "me"), "bad --external-address 'me': expected an IPv4"),
    (("--external-address=0.0.0.0",), "bad --external-address '0.0.0.0': expected the"),
    (("--handshake-timeout", "-1"), "bad --handshake-timeout '-1': expected seconds"),
    (("--handshake-timeout=",), "bad --handshake-timeout '': expected seconds"),
    (("--bind-timeout", "soon"), "bad --bind-timeout 'soon': expected seconds"),
    (("--connect-timeout", "nan"), "bad --connect-timeout 'nan': expected seconds"),
    (("--max-handshakes", "0"), "bad --max-handshakes '0': expected a number from 1"),
    (
        ("--max-handshakes-per-client", "x"),
        "bad --max-handshakes-per-client 'x': expected",
    ),
    (("--max-binds", "-1"), "bad --max-binds '-1': expected a number from 1"),
    (("--max-binds-per-client=",), "bad --max-binds-per-client '': expected"),
    (("--deny-dest", "::1:443"), "bad --deny-dest '::1:443': '::1:443' may be an"),
    (("--allow-client", "::1:443"), "bad --allow-client '::1:443': '::1:443' may be"),
    (("--backlog", "0"), "bad --backlog '0': expected"),
    (("--transport", "pigeon"), "bad --transport 'pigeon': expected"),
    (("--name", "a b"), "bad --name 'a b': expected 1 to 64 letters, digits, '-'"),
    (("1080",), "unexpected argument '1080': socks4 takes options only"),
    (("--dest", "80"), "option --dest not recognized"),
    (("--open=yes",), "option --open must not have an argument"),
]


def test_an_address_to_bind_to_must_be_this_machines() -> None:
    options = socks4.Options()
    options.parseOptions(["--bind-address", "192.0.2.1"])
    with pytest.raises(
        CannotStart, match=r"^socks4: bad --bind-address '192\.0\.2\.1'"
    ):
        socks4.makeService(options, MemoryReactorClock())


def test_an_external_address_is_the_proxys_own() -> None:
    options = socks4.Options()
    options.parseOptions(["-l", "[::]:1080", "--open", "--external-address", "8.8.8.8"])
    [proxies] = [
        part
        for part in socks4.makeService(options, MemoryReactorClock())
        if isinstance(part, RelayService)
    ]
    [listening] = proxies.listenings
    factory = listening.factory
    assert isinstance(factory, Socks4Factory)
    session = Session(1, "192.0.2.9:1", "192.0.2.1:1080", 0.0)
    factory.policy.permit("8.8.4.4", 80, "", session)
    with pytest.raises(Refused, match="this machine's own"):
        factory.policy.permit("8.8.8.8", 80, "", session)


@pytest.mark.parametrize(("argv", "says"), BAD_SOCKS4)
def test_a_bad_command_line_of_the_proxy_is_one_line(
    argv: tuple[str, ...], says: str
) -> None:
    """Which quotes what was wrong."""
    assert socks4_refusal(*argv).startswith(says)


def test_the_proxys_help_has_every_option_and_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is printed, and the status is 0; so is the version."""
    with pytest.raises(SystemExit) as caught:
        parse_socks4("--help")
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert socks4.EXAMPLES in printed
    assert [line for line in printed.splitlines() if len(line) > 88] == []
    for row in SOCKS4:
        assert re.search(rf"^ .*--{row.option}\b", printed, re.MULTILINE), row.option
    words = " ".join(printed.split())
    for default in ("30", "120", "256", "8"):
        assert f"[default: {default}]" in words
    assert "[default: a quarter of the limit of open files, at most 4096]" in words
    assert "[default: a quarter of --max-handshakes, at most 1024]" in words
    with pytest.raises(SystemExit) as caught:
        parse_socks4("--version")
    assert not caught.value.code
    assert capsys.readouterr().out.startswith(f"relayd {relayd.__version__} (Twisted ")


def test_the_proxys_examples_work() -> None:
    """Each that the help shows, command lines and rules, is understood."""
    lines = socks4.EXAMPLES.splitlines()
    commands = [shlex.split(line) for line in lines if "twistd -n " in line]
    assert len(commands) >= 3
    for command in commands:
        assert command[:4] == ["twistd", "-n", "--pidfile=", "socks4"]
        parse_socks4(*command[4:])
    rules = [shlex.split(line) for line in lines if re.match(r"  --\w+-dest", line)]
    assert len(rules) >= 3
    for argv in rules:
        assert parse_socks4(*argv).rules


# -- the proxy's service


def make_socks4(*argv: str) -> RelayService:
    """The proxies that a command line makes."""
    options = socks4.Options()
    options.parseOptions(argv)
    service = socks4.makeService(options, reactor)
    [proxies] = [each for each in service if isinstance(each, RelayService)]
    return proxies


def factories(*argv: str) -> list[Any]:
    """What serves the clients of each listener."""
    return [each.factory for each in make_socks4(*argv).listenings]


def test_the_settings_reach_the_proxy() -> None:
    """Each of them."""
    [factory] = factories(
        *("--connect-timeout=1", "--stall-timeout=2", "--idle-timeout=3"),
        *("--half-close-timeout=4", "--handshake-timeout=5", "--bind-timeout=6"),
        *("--ident", "--bind-any", "--bind-address=127.0.0.9", "--userid=joe"),
        *("--external-address=192.0.2.2", "--deny-dest=*:25", "--max-handshakes=2"),
        *("--max-handshakes-per-client=1", "--max-binds=4", "--max-binds-per-client=3"),
    )
    assert factory.timeouts == Timeouts(1, 2, 3, 4, 5)
    assert factory.bind_timeout == 6
    assert (factory.ident, factory.bind, factory.bind_any) == (True, True, True)
    assert factory.bind_address == "127.0.0.9"
    assert factory.external_address == "192.0.2.2"
    assert factory.policy.rules == (parse_rule("", "*:25", allow=False),)
    assert factory.policy.user_ids == {b"joe"}
    assert [
        (waiting.limit, waiting.limit_per_client)
        for waiting in (factory.handshakes, factory.binds)
    ] == [(2, 1), (4, 3)]
    [factory] = factories("--no-bind")
    assert not factory.bind
    assert factory.policy.user_ids is None


def test_a_proxy_is_guarded_where_others_can_reach_it() -> None:
    """Listener by listener, whoever was allowed to."""
    listeners = ("127.0.0.1:0", "0.0.0.0:0", "unix:/s", "0", "tcp:0", "[::1]:0")
    for word in (("--open",), ("--allow-client", "10.0.0.0/8")):
        made = factories(*word, *(f"-l{each}" for each in listeners))
        guarded = [factory.policy.guarded for factory in made]
        assert guarded == [False, True, False, True, True, False]


def test_whose_proxy_it_is() -> None:
    """Is said in the log, and the gate keeps to it."""
    for argv, purpose, strangers in (
        (("-l", "127.0.0.1:0"), "this machine", True),
        (("--open", "-l", "0"), "everybody", True),
        (
            ("-l0", "--allow-client=10.0.0.0/8", "--allow-client=192.0.2.1"),
            "10.0.0.0/8, 192.0.2.1/32",
            False,
        ),
    ):
        [listening] = make_socks4(*argv).listenings
        assert listening.purpose == f"a SOCKS4 proxy for {purpose}"
        factory: Any = listening.factory
        assert (factory.gate is None) == strangers
        for client, comes in (("192.0.2.1:5", True), ("192.0.2.2:5", strangers)):
            session = Session(1, client, "192.0.2.3:1080", 0.0)
            if factory.gate is None:
                assert comes
            elif comes:
                factory.gate.enter(session).release()
            else:
                with pytest.raises(Refused):
                    factory.gate.enter(session)


def test_a_proxy_has_one_name() -> None:
    """However many listeners it has."""
    listeners = ("-l", "127.0.0.1:0", "-l", "[::1]:0")
    made = make_socks4(*listeners, "--name", "socks").listenings
    assert [each.factory.name for each in made] == ["socks", "socks"]
    one, other = factories(*listeners)
    assert one.name == other.name
    assert re.fullmatch(r"relay\d+", one.name)


def test_the_limits_are_on_clients_in_all() -> None:
    """Whichever of the listeners they came by."""
    made = factories("-l", "127.0.0.1:0", "-l", "[::1]:0", "-l", "unix:/s")
    assert len({id(factory.handshakes) for factory in made}) == 1
    assert len({id(factory.binds) for factory in made}) == 1
    assert len({id(factory.policy) for factory in made}) == 3


def test_the_proxys_log_is_as_verbose_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the factories are given to report to."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.stream.relay, "Observers", lambda *them: given.extend(them)
    )
    for argv in ((), ("-v",), ("-q",)):
        make_socks4(*argv)
    kinds = [SessionLog, VerboseSessionLog, QuietSessionLog]
    assert [type(each) for each in given] == kinds


def test_what_twisted_can_not_use_is_one_line_of_the_proxy() -> None:
    """The endpoint strings are only looked into when they are made."""
    options = socks4.Options()
    options.parseOptions(["-l", "tcp:http", "--open"])
    with pytest.raises(CannotStart) as caught:
        socks4.makeService(options, reactor)
    message = str(caught.value.code)
    assert message.startswith("socks4: bad endpoint 'tcp:http': 'http' is not a")
    assert message.isprintable()


def test_the_running_reactor_is_the_proxys_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`twistd` calls with the options alone."""
    given: list[Any] = []
    monkeypatch.setattr(
        relayd.tap.socks4,
        "make_socks4_service",
        lambda _, it, log_file: given.append(it),
    )
    socks4.makeService(socks4.Options())
    assert given == [reactor]


# -- real processes


def ending(process: RelayProcess) -> tuple[int, list[str]]:
    """The exit status of a process that ends by itself, and what it wrote."""
    try:
        return process.wait(START), process.lines
    finally:
        process.stop()


def one_line(lines: list[str]) -> str:
    """What the process says for itself, without what is said of its start."""
    assert not [line for line in lines if "Traceback" in line]
    # The last is how Twisted's own ports say that they open and close.
    others = ("UnixAppLogger", "listening on", " [-] ")
    said = [line for line in lines if not any(other in line for other in others)]
    assert len(said) == 1, "\n".join(lines)
    return said[0]


@runners
def test_a_bad_value_ends_with_one_line(runner: tuple[str, ...]) -> None:
    """At four places where it may be noticed: the option, its pair, the service."""
    commands = {
        ("--listen", "99999", "--dest", "80"): "bad address '99999'",
        ("--listen", "80"): "--listen '80' has no --dest",
        ("--lissten", "80"): "option --lissten not recognized",
        ("-l", "tcp:http", "-d", "80"): "bad endpoint 'tcp:http'",
    }
    processes = {argv: RelayProcess(*argv, twistd=runner) for argv in commands}
    for argv, process in processes.items():
        status, lines = ending(process)
        assert status == 1
        assert one_line(lines).startswith(f"relayd: {commands[argv]}")


def test_the_runner_knows_both_services() -> None:
    """`--help` of each through `twistd`."""
    started = {
        plugin: RelayProcess("--help", plugin=plugin) for plugin in ("relayd", "socks4")
    }
    for plugin, process in started.items():
        status, lines = ending(process)
        assert status == 0
        example = {
            "relayd": "  twistd -n --pidfile= relayd --demo",
            "socks4": "  twistd -n --pidfile= socks4",
        }
        assert example[plugin] in lines


#: Environments in which Python writes ASCII only: in one, it reads no more either.
NARROW = {
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "ascii": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
}
narrow = pytest.mark.parametrize("env", NARROW.values(), ids=NARROW.keys())


@narrow
def test_the_help_is_for_every_locale(env: dict[str, str]) -> None:
    """Of both services, and the list of them."""
    twistd = (TWISTD,)
    started = [
        RelayProcess("--help", plugin="relayd", twistd=twistd, env=env),
        RelayProcess("--help", plugin="socks4", twistd=twistd, env=env),
        RelayProcess(plugin="--help", twistd=twistd, env=env),
    ]
    for process in started:
        status, lines = ending(process)
        assert status == 0, lines[-1:]
        assert "\n".join(lines).isascii()
    assert any("A TCP relay with backpressure" in line for line in lines)
    assert any("A SOCKS4/4a proxy" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "locale"), [("twistd", "C"), ("twistd", "ascii"), ("twist", "ascii")]
)
def test_what_a_locale_lacks_is_escaped(name: str, locale: str, tmp_path: Path) -> None:
    """In the line that says what is wrong, whoever notices it."""
    commands = {
        ("-l", "b\xfccher.example:80", "-d", "80"): "relayd: bad address 'b",
        ("-l", f"unix:{tmp_path}/\xf6/s", "-d", "80"): "unix:",
    }
    started = {
        argv: RelayProcess(
            *argv, twistd=RUNNERS[name], env=NARROW[locale], encoding="utf-8"
        )
        for argv in commands
    }
    for argv, process in started.items():
        status, lines = ending(process)
        assert status == 1
        said = one_line(lines)
        assert commands[argv] in said
        assert "\\" in said
        assert said.isascii()


def test_the_log_is_for_every_locale(tmp_path: Path) -> None:
    """A listener whose name has a character that the locale lacks is logged."""
    for runner in RUNNERS.values():
        args = ("-l", f"unix:{tmp_path}/\xf6", "-d", "80")
        with relay(*args, twistd=runner, env=NARROW["ascii"]) as running:
            assert running.listening() == [f"unix:{tmp_path}/\\xf6"]


@runners
def test_a_bad_value_of_the_proxy_ends_with_one_line(runner: tuple[str, ...]) -> None:
    """An open proxy first: nothing listens, and the line says what to add."""
    commands = {
        ("--listen", "0.0.0.0:0"): (
            "--listen '0.0.0.0:0' would be an open proxy, for everybody who can reach"
            " it. Add --allow-client CIDR for your clients (such as --allow-client"
            " 192.168.0.0/16), or --open"
        ),
        ("--no-bind", "--bind-any"): (
            "--no-bind and --bind-any contradict each other: give one"
        ),
        ("--deny-dest", "10.0.0.1/8"): (
            "bad --deny-dest '10.0.0.1/8': 10.0.0.1/8 has host bits set"
        ),
        ("--max-binds", "0"): (
            "bad --max-binds '0': expected a number from 1 to 9999999"
        ),
    }
    started = {
        argv: RelayProcess(*argv, plugin="socks4", twistd=runner) for argv in commands
    }
    for argv, process in started.items():
        status, lines = ending(process)
        assert status == 1
        assert not [line for line in lines if "listening on" in line]
        assert one_line(lines) == f"socks4: {commands[argv]}"


def test_the_proxys_port_in_use_ends_with_one_line() -> None:
    """By its own name."""
    with Server() as taken:
        process = RelayProcess("-l", taken.address, plugin="socks4")
        status, lines = ending(process)
        assert status == 1
        assert one_line(lines).endswith(
            f"socks4: can't listen on {taken.address}: Address already in use"
        )


@runners
def test_a_proxy_runs_and_ends_well(runner: tuple[str, ...]) -> None:
    """It serves a client, says whose it is, and SIGTERM ends it with status 0."""
    listeners = ("-l", "127.0.0.1:0", "-l", "0.0.0.0:0", "--allow-client", "192.0.2.7")
    with Server() as server:
        port = int(server.address.rpartition(":")[2])
        request = write_request(Command.CONNECT, "127.0.0.1", port, b"joe")
        with relay("-l", "127.0.0.1:0", twistd=runner, plugin="socks4") as running:
            running.wait_for(
                r"listening on 127\.\S+, relay=relay1, a SOCKS4 proxy for this machine"
            )
            with connect(running.port) as client:
                client.sendall(request + b"up")
                granted = write_reply(Code.GRANTED, "127.0.0.1", port)
                assert read_exactly(client, 8) == granted
                with server.accept() as upstream:
                    assert read_exactly(upstream, 2) == b"up"
                    client.shutdown(socket.SHUT_WR)
                    upstream.shutdown(socket.SHUT_WR)
                    [session] = running.ended("done")
            assert session["user"] == "'joe'"
            running.signal(signal.SIGTERM)
            assert running.wait() == 0
        with relay(*listeners, twistd=runner, plugin="socks4") as running:
            # Both, as --allow-client is about the proxy and not about a listener.
            for listener in running.listening(2):
                assert turned_away(int(listener.rpartition(":")[2]), request)
            running.ended("refused", 2)


def turned_away(port: int, request: bytes) -> bool:
    """Whether a client's connection is closed without a byte, as soon as it stands."""
    try:
        with connect(port) as client:
            client.sendall(request)
            return client.recv(1) == b""
    except (ConnectionResetError, BrokenPipeError):
        return True


@runners
def test_a_port_in_use_ends_with_one_line(runner: tuple[str, ...]) -> None:
    """Whether it was given in short or in Twisted's words."""
    with Server() as taken:
        port = taken.socket.getsockname()[1]
        texts = [f"127.0.0.1:{port}", f"tcp:{port}:interface=127.0.0.1"]
        started = [
            RelayProcess("-l", text, "-d", "80", twistd=runner) for text in texts
        ]
        for text, process in zip(texts, started, strict=True):
            status, lines = ending(process)
            assert status == 1
            assert one_line(lines).endswith(
                f"relayd: can't listen on {text}: Address already in use"
            )


def test_an_address_that_is_not_local_ends_with_one_line() -> None:
    """192.0.2.1 is nobody's (RFC 5737)."""
    status, lines = ending(RelayProcess("-l", "192.0.2.1:80", "-d", "80"))
    assert status == 1
    assert one_line(lines).endswith(
        "relayd: can't listen on 192.0.2.1:80: Cannot assign requested address"
    )


def without(capability: int) -> dict[str, Callable[[], None]]:
    """What a process is started with to lack a capability, were it root's."""
    if os.geteuid() != 0:
        return {}
    libc = ctypes.CDLL(None, use_errno=True)

    def drop() -> None:
        # PR_CAPBSET_DROP: what is not in the bounding set is not gained by exec.
        if libc.prctl(24, capability, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the capability can't be dropped")

    return {"preexec_fn": drop}


def _lowest_open_port() -> int:
    path = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(path.read_text()) if path.exists() else 1024


@pytest.mark.skipif(_lowest_open_port() <= 80, reason="anyone may listen on port 80")
def test_a_port_that_is_not_permitted_ends_with_one_line() -> None:
    """The one that everyone tries first."""
    status, lines = ending(
        RelayProcess("-l", "127.0.0.1:80", "-d", "8080", **without(10))
    )
    assert status == 1
    assert one_line(lines).endswith(
        "relayd: can't listen on 127.0.0.1:80: Permission denied"
    )


def test_a_folder_that_is_not_permitted_ends_with_one_line(tmp_path: Path) -> None:
    """The same for a UNIX socket."""
    tmp_path.chmod(0o555)
    try:
        status, lines = ending(
            RelayProcess("-l", f"unix:{tmp_path}/s", "-d", "80", **without(1))
        )
    finally:
        tmp_path.chmod(0o755)
    assert status == 1
    assert one_line(lines).endswith(
        f"relayd: can't listen on unix:{tmp_path}/s: Permission denied"
    )


@pytest.mark.parametrize(
    "runner",
    [(TWISTD, "-n"), (TWIST, "--log-format=text")],
    ids=["twistd", "twist"],
)
@pytest.mark.parametrize(
    "form", ["unix:{}", "unix:{}:mode=600"], ids=["own", "twisted"]
)
def test_all_listeners_or_none(
    runner: tuple[str, ...], form: str, tmp_path: Path
) -> None:
    """The second fails: the first is closed again, and nothing is left of it.

    No socket file, no lock, and no pid file either, though nobody said where.
    """
    with Server() as taken:
        second = taken.address
        status, lines = ending(
            RelayProcess(
                *("-l", form.format(tmp_path / "s"), "-d", "80", "-l", second, "-d80"),
                twistd=runner,
                cwd=tmp_path,
            )
        )
    assert status == 1
    assert one_line(lines).endswith(f"can't listen on {second}: Address already in use")
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_can_not_start_says_so(tmp_path: Path) -> None:
    """Its parent waits for it, prints the reason and fails; no pid file is left."""
    daemon = (TWISTD, f"--pidfile={tmp_path}/pid", f"--logfile={tmp_path}/log")
    status, lines = ending(
        RelayProcess("-l", "192.0.2.1:80", "-d", "80", twistd=daemon, cwd=tmp_path)
    )
    assert status == 1
    assert "can't listen on 192.0.2.1:80" in "\n".join(lines)
    assert not [line for line in lines if "Traceback" in line]
    # Its parent has told, and ended, before it ends itself.
    left = ["log"]
    eventually(lambda: [path.name for path in tmp_path.iterdir()] == left, "no pid")


@runners
def test_a_relay_runs_and_ends_well(runner: tuple[str, ...], tmp_path: Path) -> None:
    """It relays, and SIGTERM ends it with status 0 and nothing left behind."""
    paths = [f"unix:{tmp_path}/ours", f"unix:{tmp_path}/twisteds:mode=600"]
    with Server() as server:
        argv = [
            arg
            for listener in ("127.0.0.1:0", *paths)
            for arg in ("-l", listener, "-d", server.address)
        ]
        with relay(*argv, twistd=runner, cwd=tmp_path) as running:
            assert running.listening(3)[1:] == [
                path.removesuffix(":mode=600") for path in paths
            ]
            with connect(running.port) as client, server.accept() as upstream:
                client.sendall(b"up")
                assert read_exactly(upstream, 2) == b"up"
                upstream.sendall(b"down")
                assert read_exactly(client, 4) == b"down"
                client.shutdown(socket.SHUT_WR)
                upstream.shutdown(socket.SHUT_WR)
                running.ended("done")
            running.signal(signal.SIGTERM)
            assert running.wait() == 0
    assert list(tmp_path.iterdir()) == []
