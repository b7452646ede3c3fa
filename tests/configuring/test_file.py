"""Files, folders and standard input: what is read, and what can't be."""

from __future__ import annotations

import errno
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relayd.configuring.config import Config, Relay
from relayd.configuring.configure import configure
from relayd.configuring.file import LONGEST, read_layers
from tests.support.files import (
    RELAY,
    config_of,
    json_layers,
    layers_of,
    problems,
    problems_of,
)


def of_json(text: bytes) -> Config:
    return configure(json_layers(text))


def refused_json(text: bytes) -> list[str]:
    """What is wrong with standard input."""
    lines = problems_of(json_layers(text))
    assert all(line.startswith("standard input: ") for line in lines)
    return [line.removeprefix("standard input: ") for line in lines]


# -- one file


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "expected '=' after a key in a key/value pair (at line 1, column 2: the"),
        ("a = 1\n\nb = ", "invalid value (at line 3, column 5: the end)"),
        ("a = 1\nb = [1,\n", "invalid value (at line 3, column 1: the end)"),
        ("a = 1\n[tcp", "expected ']' at the end of a table declaration (at line 2,"),
        ("a = 1\nb == 2\n", "invalid value (at line 2, column 4)"),
        ('a = "\n"', "illegal character '\\n' (at line 1, column 6)"),
        ("a = 1\na = 2\n", "cannot overwrite a value (at line 2, column 6)"),
        ("a = 1979-02-30", "invalid date or datetime (at line 1, column 5)"),
        (f"a = {'9' * 5000}", "a number has too many digits"),
        (f"a = {'[' * 10_000}", "too many tables within tables"),
        (f"a.{'b.' * 200}c = 1", "a key has more than 100 parts"),
        (b"a = 1\n# \xff", "not UTF-8 at line 2"),
        (b"\xff\xfe\x00", "not UTF-8 at line 1"),
        (b"\0" * 100, "invalid statement (at line 1, column 1)"),
    ],
)
def test_what_is_no_toml_is_told_by_line_and_column(
    text: str | bytes, why: str, tmp_path: Path
) -> None:
    [line] = problems(tmp_path / "f.toml", text)
    assert line.startswith(why)


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "[defaults]\n", "[tcp]\n"])
def test_a_file_without_a_relay(text: str, tmp_path: Path) -> None:
    assert problems(tmp_path / "f.toml", text) == [
        "nothing to relay: give a relay, such as [tcp.web] with its listen and dest"
    ]


def test_what_an_editor_may_add(tmp_path: Path) -> None:
    """Line ends of another system, and a mark of the order of bytes."""
    text = f"\ufeff[tcp.a]\n{RELAY}".replace("\n", "\r\n")
    assert len(config_of(tmp_path / "f.toml", text).relays) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "can't be read: No such file or directory"),
        ("f.toml/x", "can't be read: No such file or directory"),
        ("x" * 300, "can't be read: File name too long"),
        ("pipe", "expected a file, not a pipe or a device"),
        ("loop", "can't be read: Too many levels of symbolic links"),
    ],
)
def test_a_file_that_can_not_be_read(name: str, why: str, tmp_path: Path) -> None:
    """At once: a pipe's writer is not waited for."""
    (tmp_path / "f.toml").write_text(RELAY)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    if name == "f.toml/x":
        why = "can't be read: Not a directory"
    assert problems_of(read_layers(str(path))) == [f"{path}: {why}"]


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(name: str) -> None:
    """`-` is for standard input."""
    [line] = problems_of(read_layers(name))
    assert line == f"{name}: expected a file, not a pipe or a device"


def test_a_file_that_is_not_permitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the system call says it here."""

    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "f.toml"
    path.write_text(RELAY)
    for name in ("open", "listdir"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, refuse)
            where = path if name == "open" else tmp_path
            found = read_layers(str(where)).problems
        assert found == [f"{where}: can't be read: Permission denied"]


def test_ten_megabytes_of_garbage(tmp_path: Path) -> None:
    """They are not parsed; what is parsed is no longer than LONGEST."""
    some = random.Random(1).randbytes(1 << 20)
    path = tmp_path / "f.toml"
    assert problems(path, some * 10) == ["longer than 8 MiB"]
    assert len(problems(path, some)) == 1
    assert refused_json(some * 10) == ["longer than 8 MiB"]
    for text in ("[" * LONGEST, "{" * LONGEST, "a." * 50_000 + "a=1\n"):
        assert len(problems(path, text)) == 1


@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    layers = layers_of(tmp_path / "f.toml", content)
    # Nothing of this is a relay.
    assert problems_of(layers)
    assert problems_of(json_layers(content))


# -- a folder


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (
        ("20-b.toml", "[tcp.b]\nlisten='2'\ndest='10.0.0.1:80'\n"),
        ("10-a.toml", "[tcp.a]\nlisten='1'\ndest='10.0.0.1:80'\n[udp.u]\n" + RELAY),
        ("00.toml", "verbose = true\n[defaults]\nidle_timeout = 5\n"),
        (".hidden.toml", "nonsense"),
        ("c.toml~", "nonsense"),
    ):
        (tmp_path / name).write_text(text)
    config = configure(read_layers(str(tmp_path)))
    assert [each.name for each in config.relays] == ["a", "u", "b"]
    assert config.verbose
    for each in config.relays:
        if isinstance(each, Relay):
            assert each.stream.idle_timeout == 5.0


def test_what_several_files_say(tmp_path: Path) -> None:
    """Of each thing, the first has the say, and the others are told."""
    a, b, c = (tmp_path / f"{name}.toml" for name in "abc")
    a.write_text(f"verbose = true\n[defaults]\nidle_timeout = 1\n[tcp.x]\n{RELAY}")
    b.write_text(f"verbose = true\n[defaults]\nidle_timeout = 1\n[tcp.x]\n{RELAY}")
    c.write_text("[udp.x]\nlisten='1'\ndest='10.0.0.1:1'\n[tcp.y]\nlisten='8080'\n")
    assert problems_of(read_layers(str(tmp_path))) == [
        f"{b}: verbose: given by {a} already",
        f"{b}: defaults.idle_timeout: given by {a} already",
        f"{b}: tcp.x: given by {a} already",
        f'{c}: tcp.y: no destination: give dest = "10.0.0.5:80"',
        (
            f"{c}: udp.x: bad name 'x': another relay has it already ({a}: tcp.x); give"
            " each relay its own name"
        ),
        (
            f"{c}: tcp.y.listen: listen = '8080' is the address of another listener,"
            f" listen = '8080' ({a}: tcp.x.listen): give each its own"
        ),
    ]


def test_a_folder_with_nothing_to_read(tmp_path: Path) -> None:
    assert problems_of(read_layers(str(tmp_path))) == [
        f"{tmp_path}: no *.toml in this folder"
    ]


def test_what_is_no_file_in_a_folder(tmp_path: Path) -> None:
    """All is told: what is wrong with each."""
    (tmp_path / "a.toml").mkdir()
    os.mkfifo(tmp_path / "b.toml")
    (tmp_path / "c.toml").symlink_to("missing")
    (tmp_path / "d.toml").write_text("x")
    assert [line[:60] for line in problems_of(read_layers(str(tmp_path)))] == [
        line[:60]
        for line in (
            f"{tmp_path}/a.toml: can't be read: Is a directory",
            f"{tmp_path}/b.toml: expected a file, not a pipe or a device",
            f"{tmp_path}/c.toml: can't be read: No such file or directory",
            f"{tmp_path}/d.toml: expected '=' after a key in a key/value pair",
        )
    ]


# -- JSON


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None for it then."""
    monkeypatch.setattr(sys, "stdin", None)
    assert problems_of(read_layers("-")) == [
        "standard input: can't be read: it is closed"
    ]


def test_json_from_standard_input() -> None:
    config = of_json(
        b'{"drain_timeout": "5s", "defaults": {"idle_timeout": 1.5}, "tcp": {"a":'
        b' {"listen": ["8080"], "dest": "10.0.0.1:80"}}, "socks4": {"b": {}}}'
    )
    a, b = config.relays
    assert (config.drain_timeout, a.name, b.name) == (5.0, "a", "b")
    assert isinstance(a, Relay)
    assert a.stream.idle_timeout == 1.5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "expecting value: line 1 column 1 (char 0)"),
        (
            b"\n{1}",
            "expecting property name enclosed in double quotes: line 2",
        ),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b"{}", "nothing to relay: give a relay, such as [tcp.web] with its listen"),
        (b'{"a": NaN}', "found NaN, which is no number"),
        (b'{"a": -Infinity}', "found -Infinity, which is no number"),
        (b'{"drain_timeout": 1e999}', "drain_timeout: found inf, expected seconds"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        (b'{"a\\n": 1, "a\\n": 2}', "the key 'a\\n' stands twice in one object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has too many digits"),
        (b'{"a": ' + b"[" * 100_000, "too many tables within tables"),
        (b'{"a": "\xff"}', "not UTF-8 at line 1"),
    ],
)
def test_what_is_no_json(text: bytes, why: str) -> None:
    [line] = refused_json(text)
    assert line.startswith(why)
