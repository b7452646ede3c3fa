"""`relayctl show`: the settings in effect, and where each comes from."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from relayd.configuring.configure import configure
from relayd.configuring.effective import effective
from relayd.configuring.file import read_layers
from relayd.configuring.sections import PROCESS_KEYS, RELAY_KEYS
from relayd.ctl import showing
from relayd.ctl.checking import read
from relayd.ctl.exits import Exit
from relayd.ctl.main import main

Captured = pytest.CaptureFixture[str]

FILE = """\
drain_timeout = 5
[defaults]
connect_timeout = "1500ms"
[tcp.web]
listen = ["8080", "[::1]:8081"]
dest = "10.0.0.5:80"
idle_timeout = "2h"
[udp.dns]
listen = "5300-5302"
dest = [{address = "9.9.9.9:5300-5302", send_proxy = "v2"}, "9.9.9.10:5300-5302"]
udp_rcvbuf = "64KiB"
[socks4.office]
listen = "1080"
clients = ["allow 10.0.0.0/8"]
destinations = ["deny *:25", "allow 10.20.0.0/16"]
bind = false
userid_file = "USERS"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    users = tmp_path / "users"
    users.write_text("alice-secret\nbob-secret\n")
    path = tmp_path / "relayd.toml"
    path.write_text(FILE.replace("USERS", str(users)))
    return path


def shown(path: Path, capsys: Captured, *options: str) -> str:
    assert main(["show", *options, str(path)]) == Exit.DONE
    said = capsys.readouterr()
    assert said.err == ""
    assert "-secret" not in said.out
    return said.out


def test_for_programs(path: Path, capsys: Captured) -> None:
    said = json.loads(shown(path, capsys, "--json"))
    assert said["process"]["drain_timeout"] == {"value": 5, "source": str(path)}
    assert said["process"]["quiet"] == {"value": False, "source": "default"}
    assert said["process"]["access_log"] == {
        "value": None,
        "source": "default",
        "means": "where the log goes",
    }
    assert {name: each["kind"] for name, each in said["relays"].items()} == {
        "web": "tcp",
        "dns": "udp",
        "office": "socks4",
    }
    web = said["relays"]["web"]["settings"]
    assert web["connect_timeout"] == {"value": "1500ms", "source": f"{path}: defaults"}
    assert web["idle_timeout"] == {"value": "2h", "source": f"{path}: tcp.web"}
    assert web["stall_timeout"] == {"value": "10s", "source": "default"}
    assert web["listen"]["value"] == ["8080", "[::1]:8081"]
    dns = said["relays"]["dns"]["settings"]
    assert dns["listen"]["value"] == "5300-5302"
    assert dns["max_flows_per_client"]["means"] == "half of max_flows"
    office = said["relays"]["office"]["settings"]
    assert office["destinations"]["value"] == ["deny *:25", "allow 10.20.0.0/16"]
    assert office["userid_file"]["value"] == str(path.parent / "users")
    assert "userid" not in office


def test_every_setting_is_shown(path: Path) -> None:
    process, *relays = effective(read(str(path))[0])
    assert [each.key for each in process.settings] == list(PROCESS_KEYS)
    for table in relays:
        assert table.kind
        keys = [each.key.removesuffix("_file") for each in table.settings]
        assert keys == list(RELAY_KEYS[table.kind])


def test_as_a_file(path: Path, tmp_path: Path, capsys: Captured) -> None:
    """It says the same, with every setting, and names each one's source."""
    text = shown(path, capsys, "--toml")
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert configure(read_layers(str(again))) == configure(read_layers(str(path)))
    assert f'connect_timeout = "1500ms"  # {path}: defaults\n' in text
    assert 'half_close_timeout = "5m"  # default\n' in text
    assert "# max_flows_per_client: half of max_flows  # default\n" in text
    for key in PROCESS_KEYS:
        assert f"\n{key} = " in f"\n{text}" or f"# {key}: " in text
    # What is none by default is a comment.
    keys = {
        key for key, rows in RELAY_KEYS["tcp"].items() if rows[0].default is not None
    }
    assert set(tomllib.loads(text)["tcp"]["web"]) == keys


def test_a_name_of_a_file_with_a_line_break(tmp_path: Path, capsys: Captured) -> None:
    """It can't end the comment that names it."""
    path = tmp_path / "a\nverbose = true #.toml"
    path.write_text('quiet = true\n[tcp.a]\nlisten = "1"\ndest = "2"\n')
    found = tomllib.loads(shown(path, capsys, "--toml"))
    assert (found["verbose"], found["quiet"]) == (False, True)


def test_where_nobody_looks_it_is_lines(path: Path, capsys: Captured) -> None:
    """One for each setting, which grep and cut understand."""
    lines = shown(path, capsys).splitlines()
    assert all(each.isprintable() and each == each.strip() for each in lines)
    [line] = [each for each in lines if each.startswith("tcp.web.connect_timeout ")]
    assert line.split(maxsplit=2) == [
        "tcp.web.connect_timeout",
        '"1500ms"',
        f"{path}: defaults",
    ]
    tables = effective(read(str(path))[0])
    assert len(lines) == sum(len(each.settings) for each in tables)


def on_terminal(path: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> str:
    """What a terminal gets."""
    screen = io.StringIO()
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TERM", "xterm-256color")

    def console() -> Any:
        return Console(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr("rich.console.Console", console)
    showing.show(effective(read(str(path))[0]))
    return screen.getvalue()


def test_on_a_terminal_it_is_tables(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = on_terminal(path, monkeypatch)
    assert "\x1b[" in said
    for words in ("the process", "[tcp.web]", "[socks4.office]", "connect_timeout"):
        assert words in said


def test_no_color(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours are off, as https://no-color.org wants; bold and dim may stay."""
    said = on_terminal(path, monkeypatch, NO_COLOR="1")
    assert not [code for code in range(30, 38) if f"\x1b[{code}m" in said]


def test_a_bad_file_is_not_shown(path: Path, capsys: Captured) -> None:
    path.write_text("verbos = true")
    assert main(["show", str(path)]) == Exit.INVALID
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{path}: verbos: ")


def test_what_is_shown_can_be_read(path: Path) -> None:
    """Each value, the defaults included, is one that its setting reads."""
    for table in effective(read(str(path))[0]):
        for each in table.settings:
            row = each.rows[0]
            if each.value is not None and not row.repeatable:
                row.type.load(each.value)
