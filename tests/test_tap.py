"""The command line: what each option does, and how `twistd` and `twist` say no."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.application.service import IServiceMaker, MultiService
from twisted.internet import reactor
from zope.interface.verify import verifyObject

import relayd
import relayd.stream
import relayd.tap.relayd
import twisted
from relayd.bridge import Timeouts
from relayd.config import Config, Relay
from relayd.endpoints import EndpointString, HostPort, UnixPath
from relayd.errors import CannotStart, RelayError
from relayd.observers import SessionLog, VerboseSessionLog
from relayd.service import RelayService
from relayd.tap import socks4
from relayd.tap.relayd import EXAMPLES, Options, makeService
from tests.process import TWISTD, RelayProcess, Server, connect, read_exactly, relay
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
        (("--connect-timeout", "3"), "timeouts", Timeouts(connect=3)),
        (("--stall-timeout", "0.25"), "timeouts", Timeouts(stall=0.25)),
        (("--idle-timeout", "0"), "timeouts", Timeouts(idle=0)),
        (("--half-close-timeout", "9"), "timeouts", Timeouts(half_close=9)),
        (
            ("--stall-timeout=2", "--idle-timeout=4"),
            "timeouts",
            Timeouts(stall=2, idle=4),
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
        (("--demo", *GOOD), "--demo brings its own listener and destination"),
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
    for option in (
        "--listen=",
        "--dest=",
        "--connect-timeout=",
        "--stall-timeout=",
        "--idle-timeout=",
        "--half-close-timeout=",
        "--drain-timeout=",
        "--backlog=",
        "--demo",
        "--verbose",
        "--version",
    ):
        assert option in printed
    words = " ".join(printed.split())
    for default in ("10", "3600", "300", "4096"):
        assert f"[default: {default}]" in words


def test_the_examples_work() -> None:
    """Each that the help shows is a command line that is understood."""
    shown = [line for line in EXAMPLES.splitlines() if "twistd -n relayd" in line]
    assert len(shown) >= 4
    for line in shown:
        command = shlex.split(line)
        assert command[:3] == ["twistd", "-n", "relayd"]
        config = parse(*command[3:])
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
            "-l",
            "unix:/s",
            "-d",
            "81",
        ),
        *("--connect-timeout=1", "--stall-timeout=2", "--idle-timeout=3"),
        *("--half-close-timeout=4", "--drain-timeout=5"),
    )
    assert relays.drain_timeout == 5
    assert [(each.name, each.purpose) for each in relays.listenings] == [
        ("127.0.0.1:0", "relaying to 127.0.0.1:80, db:5432"),
        ("unix:/s", "relaying to 127.0.0.1:81"),
    ]
    for each in relays.listenings:
        assert each.factory.timeouts == Timeouts(1, 2, 3, 4)


def test_the_log_is_as_verbose_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the factories are given to report to."""
    given: list[Any] = []
    monkeypatch.setattr(relayd.stream, "Observers", lambda *them: given.extend(them))
    make(*GOOD)
    make(*GOOD, "-v")
    assert [type(each) for each in given] == [SessionLog, VerboseSessionLog]


def test_what_twisted_can_not_use_is_one_line() -> None:
    """The endpoint strings are only looked into when they are made."""
    for argv, says in (
        (("-l", "tcp:http", "-d", "80"), "bad endpoint 'tcp:http': Twisted can't"),
        (("-l", "80", "-d", "tcp:80"), "bad endpoint 'tcp:80': Twisted can't"),
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
        relayd.tap.relayd, "make_service", lambda _, reactor: given.append(reactor)
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
    assert relayd_plugin.socks4.tapname == "socks4"
    assert relayd_plugin.socks4.options is socks4.Options


def test_socks4_says_that_it_is_not_there_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, whatever it is given; help and version are there."""
    for argv in ([], ["--nonsense"], ["argument"]):
        with pytest.raises(CannotStart, match=r"^socks4: ") as caught:
            socks4.Options().parseOptions(argv)
        assert str(caught.value).isprintable()
    with pytest.raises(CannotStart, match="not built yet"):
        socks4.makeService(socks4.Options())
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as left:
            socks4.Options().parseOptions([option])
        assert not left.value.code
    assert "SOCKS4" in capsys.readouterr().out


# -- real processes


def ending(process: RelayProcess) -> tuple[int, list[str]]:
    """The exit status of a process that ends by itself, and what it wrote."""
    try:
        return process.wait(), process.lines
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
    """`--help` of each through `twistd`, and the refusal of the one to come."""
    shown = RelayProcess("--help")
    refused = RelayProcess(plugin="socks4")
    status, lines = ending(shown)
    assert status == 0
    assert "  twistd -n relayd --demo" in lines
    assert ending(refused) == (1, ["socks4: not built yet; the next release has it"])


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
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


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
