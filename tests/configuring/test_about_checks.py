"""Which servers can't be checked as is said: one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.config import Relay, UdpRelay
from relayd.core.check_grammar import HttpCheck, TcpCheck
from relayd.core.errors import CannotStart, ConfigError
from relayd.tap import relayd
from tests.support.files import config_of

UDP = ("-l", "udp:53", "-d", "udp:10.0.0.5:53")
TCP = ("-l", "80", "-d", "10.0.0.5:80")
UNIX = ("-l", "80", "-d", "10.0.0.5:80", "-d", "unix:/run/x")


def config_from(*args: str) -> Any:
    options = relayd.Options()
    options.parseOptions(list(args))
    return options.config


def test_a_command_line() -> None:
    found = config_from(
        *(*TCP, "--check", "tcp", "--check-every", "500ms", "--check-timeout", "1"),
        *("--rise", "4", "--fall", "5"),
    )
    pool = found.relays[0].pool
    assert pool.check == TcpCheck(text="")
    assert (pool.check_every, pool.check_timeout) == (0.5, 1.0)
    assert (pool.rise, pool.fall) == (4, 5)


def test_in_a_file_each_relay_has_its_own(tmp_path: Path) -> None:
    found = config_of(
        tmp_path / "relayd.toml",
        """
        [defaults]
        check = "http://:8008/primary"
        rise = 7
        [tcp.a]
        listen = "8080"
        dest = "10.0.0.5:80"
        check = 'tcp send="PING\\r\\n" expect="+PONG"'
        [tcp.b]
        listen = "8081"
        dest = "10.0.0.5:80"
        [udp.c]
        listen = "53"
        dest = "10.0.0.5:53"
        """,
    )
    a, b, c = found.relays
    assert isinstance(a, Relay)
    assert isinstance(b, Relay)
    assert isinstance(c, UdpRelay)
    http = HttpCheck(text="", port=8008, path="/primary")
    assert a.pool.check == TcpCheck(text="", send=b"PING\r\n", expect=b"+PONG")
    assert b.pool.check == c.pool.check == http
    assert a.pool.rise == c.pool.rise == 7


@pytest.mark.parametrize(
    "args",
    [
        (*UDP, "--check", "http://:8008/"),
        (*UDP, "--check", "tcp port=53"),
        (*UDP, "--check", "udp send=x"),
        (*UDP, "--check", "python:a:b"),
        (*UNIX, "--check", "http:///"),
        (*UNIX, "--check", "tcp"),
        (*TCP, "--check", "tcp port=1"),
        ("-l", "80", "-d", "unix:/x,check=tcp", "-d", "2", "--check", "tcp port=1"),
        ("-l", "80", "-d", "tls:db:443", "--check", "http://:8008/"),
    ],
)
def test_what_can_be_checked(args: tuple[str, ...]) -> None:
    [relay] = config_from(*args).relays
    assert relay.pool.check is not None


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            (*UDP, "--check", "tcp"),
            "--check 'tcp' needs a port for udp, such as port=8008",
        ),
        (
            (*UDP, "--check", "http:///"),
            "--check 'http:///' needs a port for udp, such as http://:8008/",
        ),
        (
            (*TCP, "--check", "udp send=x"),
            (
                "--check 'udp send=x' is not for tcp: give tcp, http://:PORT/PATH or"
                " python:MODULE:FUNCTION"
            ),
        ),
        (
            (*UNIX, "--check", "tcp port=1"),
            (
                "--check 'tcp port=1' is not possible at --dest 'unix:/run/x', which"
                " has no other port: leave it out"
            ),
        ),
        (
            ("-l", "80", "-d", "unix:/run/x,check=tcp port=1"),
            (
                "check=tcp port=1 is not possible at --dest 'unix:/run/x,check=tcp"
                " port=1', which has no other port: leave it out"
            ),
        ),
        (
            ("-l", "80", "-d", "1,check=udp send=x"),
            "--dest '1,check=udp send=x': a check by udp is not for tcp: give",
        ),
        (
            (*TCP, "--check", "ping"),
            (
                "bad --check 'ping': expected tcp, http://:PORT/PATH or"
                " python:MODULE:FUNCTION; tcp may have port=, send= and expect=, http"
                " expect=, udp send= and expect="
            ),
        ),
        (
            ("--demo", "--check", "tcp"),
            "--check 'tcp' is not for --demo: leave it out",
        ),
        ((*TCP, "--check", "tcp", "--rise", "0"), "bad --rise '0': expected a number"),
        (
            (*TCP, "--check", "tcp", "--check-every", "0"),
            "bad --check-every '0': expected seconds, more than 0",
        ),
    ],
)
def test_what_can_t_be_checked(args: tuple[str, ...], line: str) -> None:
    with pytest.raises(CannotStart) as problem:
        config_from(*args)
    assert str(problem.value).startswith(f"relayd: {line}")
    assert "\n" not in str(problem.value)


def test_of_a_file(tmp_path: Path) -> None:
    text = '[tcp.a]\nlisten = "1"\ndest = "unix:/x"\ncheck = "http://:1/"\n'
    text += '[udp.b]\nlisten = "2"\ndest = "3"\ncheck = "tcp"'
    with pytest.raises(ConfigError) as problem:
        config_of(tmp_path / "c.toml", text)
    name = tmp_path / "c.toml"
    assert str(problem.value).splitlines() == [
        (
            f"{name}: tcp.a.dest: check = 'http://:1/' is not possible at dest ="
            " 'unix:/x', which has no other port: leave it out"
        ),
        f"{name}: udp.b.check: check = 'tcp' needs a port for udp, such as port=8008",
    ]
