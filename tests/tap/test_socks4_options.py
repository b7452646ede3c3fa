"""The options of `twistd socks4`: what each does, its defaults, and its help."""

from __future__ import annotations

import re
import shlex
from typing import Any

import attrs
import pytest
from twisted.internet.testing import MemoryReactorClock

import relayd
import relayd.stream.relay
import relayd.tap.relayd
import relayd.tap.socks4
from relayd.admission.client_rules import parse_client_rule
from relayd.configuring.address_grammar import EndpointString, HostPort, UnixPath
from relayd.configuring.address_settings import SOCKS4
from relayd.configuring.config import (
    Admission,
    Config,
    Socks4Relay,
    Socks4Settings,
    StreamSettings,
)
from relayd.core.errors import CannotStart, Refused
from relayd.core.session import Session
from relayd.operating.running import RelayService
from relayd.socks.rules import parse_rule
from relayd.socks4 import Socks4Factory
from relayd.tap import socks4


def parse_config(*argv: str) -> Config:
    """The settings that a command line makes."""
    options = socks4.Options()
    options.parseOptions(argv)
    return options.config


def parse_socks4(*argv: str) -> Socks4Relay:
    """Those of the proxy."""
    [proxy] = parse_config(*argv).relays
    assert isinstance(proxy, Socks4Relay)
    return proxy


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
    assert parse_socks4() == Socks4Relay()


def test_the_proxys_listeners() -> None:
    """In long and in short, several, in all forms of address; the default is gone."""
    config = parse_socks4("-l", "127.0.0.1:1081", "--listen=unix:/s", "-l[::1]:0")
    assert config == Socks4Relay(
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
        (
            ("--allow-client", "10.0.0.0/8"),
            "admission",
            Admission(clients=[parse_client_rule("10.0.0.0/8", allow=True)]),
        ),
        (
            ("--deny-client=192.0.2.1", "--allow-client=fd00::/8", "--max-age=9"),
            "admission",
            Admission(
                clients=[
                    parse_client_rule("192.0.2.1", allow=False),
                    parse_client_rule("fd00::/8", allow=True),
                ],
                max_age=9,
            ),
        ),
        (("--connect-timeout", "3"), "stream", StreamSettings(connect_timeout=3)),
        (("--stall-timeout", "3"), "stream", StreamSettings(stall_timeout=3)),
        (("--idle-timeout", "3"), "stream", StreamSettings(idle_timeout=3)),
        (("--half-close-timeout", "3"), "stream", StreamSettings(half_close_timeout=3)),
        (("--backlog", "3"), "backlog", 3),
    ],
)
def test_an_option_of_the_proxy_sets_its_own_and_nothing_else(
    argv: tuple[str, ...], field: str, value: Any
) -> None:
    """Each is seen in the settings."""
    assert parse_socks4(*argv) == attrs.evolve(Socks4Relay(), **{field: value})


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (("--drain-timeout", "3"), "drain_timeout", 3.0),
        (("--shutdown-delay", "4"), "shutdown_delay", 4.0),
        (("--transport", "twisted"), "transport", "twisted"),
        (("--verbose",), "verbose", True),
        (("-v",), "verbose", True),
        (("--quiet",), "quiet", True),
        (("-q",), "quiet", True),
    ],
)
def test_an_option_of_the_process_sets_its_own_and_nothing_else(
    argv: tuple[str, ...], field: str, value: Any
) -> None:
    """Each is seen in the settings."""
    assert parse_config(*argv) == Config([Socks4Relay()], **{field: value})


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
def test_an_open_proxy_needs_the_option(listener: str) -> None:
    """Of whom it is for; wherever it stands on the command line."""
    for argv in (("-l", listener), ("-l", "127.0.0.1:1", "-l", listener, "--ident")):
        assert socks4_refusal(*argv) == (
            f"--listen '{listener}' would be an open proxy, for everybody who can reach"
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
    (
        ("--allow-client", "10.0.0.1/8"),
        "bad --allow-client '10.0.0.1/8': '10.0.0.1/8' ",
    ),
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
    (("--name", "a b"), "bad --name 'a b': expected 1 to 64 small letters"),
    (("1080",), "unexpected argument '1080': socks4 takes options only"),
    (("--dest", "80"), "option --dest not recognized"),
    (("--open=yes",), "option --open must not have an argument"),
]


def test_a_bind_address_must_be_this_machines() -> None:
    options = socks4.Options()
    options.parseOptions(["--bind-address", "192.0.2.1"])
    with pytest.raises(
        CannotStart, match=r"^socks4: bind-address '192\.0\.2\.1' is no address"
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
