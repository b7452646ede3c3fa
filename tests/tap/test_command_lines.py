"""Command lines of real processes: how `twistd` and `twist` run, and refuse."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from tests.support.endings import RUNNERS, ending, one_line, runners
from tests.support.process import (
    TWIST,
    TWISTD,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_exactly,
    relay,
)


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
        plugin: RelayProcess("--help", plugin=plugin, fresh=True)
        for plugin in ("relayd", "socks4")
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
            "bad --deny-dest '10.0.0.1/8': '10.0.0.1/8' has bits beyond its prefix:"
            " you may mean 10.0.0.0/8"
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
        started = relay("-l", "127.0.0.1:0", twistd=runner, plugin="socks4", fresh=True)
        with started as running:
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
        RelayProcess(
            *("-l", "192.0.2.1:80", "-d", "80"), twistd=daemon, cwd=tmp_path, fresh=True
        )
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
        with relay(*argv, twistd=runner, cwd=tmp_path, fresh=True) as running:
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
