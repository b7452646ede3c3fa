"""Where the control socket is, and who may use it."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from relayd.configuring.address_grammar import UnixPath
from relayd.core.errors import CannotStart
from relayd.tap.relayd import Options
from tests.configuring.test_metrics import configured, refusal
from tests.support.files import RELAY, config_of, problems

SOCKET = ("--control", "unix:/run/c")
WEB = f"[tcp.web]\n{RELAY}"
LONG = "unix:/" + "c" * 107


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "f.toml"


def test_there_is_none_unless_asked_for() -> None:
    made = configured()
    assert made.control is None
    assert not made.control_uids
    assert not made.control_read_uids


def test_from_the_command_line() -> None:
    """Users by their names, or their numbers."""
    me = pwd.getpwuid(os.getuid())
    made = configured(
        *SOCKET,
        *("--control-uid", "4001", "--control-uid", me.pw_name),
        *("--control-read-uid", "4002"),
    )
    assert made.control == UnixPath("/run/c")
    assert list(made.control_uids) == [4001, me.pw_uid]
    assert list(made.control_read_uids) == [4002]


def test_from_a_file(file: Path) -> None:
    text = 'control = "unix:/run/c"\ncontrol_uid = ["root", 4001]\n'
    made = config_of(file, f"{text}control_read_uid = 4002\n{WEB}")
    assert made.control == UnixPath("/run/c")
    assert list(made.control_uids) == [0, 4001]
    assert list(made.control_read_uids) == [4002]


@pytest.mark.parametrize(
    "where",
    [
        "/run/c",
        "127.0.0.1:9100",
        "unix:c",
        "tcp:80",
        "unix:/run/c:mode=600",
        "80",
        LONG,
    ],
)
def test_it_is_a_unix_socket(where: str, file: Path) -> None:
    expected = (
        "expected the whole path of a UNIX socket, of at most 107 bytes, such as"
        " unix:/run/relayd/control.sock; there is no other kind"
    )
    assert refusal("--control", where) == f"bad --control {where!r}: {expected}"
    [problem] = problems(file, f'control = "{where}"\n{WEB}')
    assert problem.endswith(f", {expected}")
    assert f"control: found {where[:40]!r}"[:-1] in problem


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("no such user", "this machine has no such user"),
        ("\udcff", "this machine has no such user"),
        ("4294967295", "expected the name of a user, or a number from 0 to 4294967294"),
        ("", "expected the name of a user, or a number from 0 to 4294967294"),
    ],
)
@pytest.mark.parametrize("option", ["--control-uid", "--control-read-uid"])
def test_a_user_that_there_is_not(option: str, user: str, why: str) -> None:
    assert refusal(*SOCKET, option, user) == f"bad {option} {user!r}: {why}"


def test_a_user_that_there_is_not_in_a_file(file: Path) -> None:
    text = 'control = "unix:/run/c"\ncontrol_uid = ["root", "nosuch", -1, true]\n'
    expected = "expected the name of a user, or a number from 0 to 4294967294"
    assert problems(file, text + WEB) == [
        "control_uid[1]: 'nosuch': this machine has no such user",
        f"control_uid[2]: found -1, {expected}",
        f"control_uid[3]: found true, {expected}",
    ]


@pytest.mark.parametrize("option", ["--control-uid", "--control-read-uid"])
def test_users_of_nothing(option: str) -> None:
    assert refusal(option, "4001") == (
        f"{option} '4001' does nothing alone: give --control, too"
    )


def test_a_user_who_may_do_all_and_not(file: Path) -> None:
    assert refusal(*SOCKET, "--control-uid", "0", "--control-read-uid", "root") == (
        "--control-read-uid 'root' is a user who may do all, by --control-uid '0':"
        " give one"
    )


def test_a_demo_has_none() -> None:
    with pytest.raises(CannotStart) as caught:
        Options().parseOptions(["--demo", *SOCKET])
    assert str(caught.value) == (
        "relayd: --control 'unix:/run/c' is not for --demo: leave it out"
    )


def test_it_has_a_path_of_its_own(file: Path) -> None:
    text = 'control = "unix:/run/c"\nmetrics = "unix:/run/c"\n'
    [problem] = problems(file, text + WEB)
    assert "is the address of another listener" in problem
    relay = WEB.replace("8080", "unix:/run/c")
    [problem] = problems(file, f'control = "unix:/run/c"\n{relay}')
    assert "is the address of another listener" in problem


def test_the_last_list_has_the_say(file: Path) -> None:
    """Of a file and a command line."""
    file.write_text(f'control = "unix:/run/c"\ncontrol_uid = [1, 2]\n{WEB}')
    options = Options()
    options.parseOptions(["--config", str(file), "--control-uid", "3"])
    assert list(options.config.control_uids) == [3]
    options = Options()
    options.parseOptions(["--config", str(file)])
    assert list(options.config.control_uids) == [1, 2]
