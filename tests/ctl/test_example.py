"""`relayctl example`: a file that is valid, and has every setting in it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.readable import default_of
from relayd.configuring.sections import (
    DEFAULTS_KEYS,
    KINDS,
    PROCESS_KEYS,
    RELAY_KEYS,
)
from relayd.core.setting_types import Kind
from relayd.ctl.example import RELAYS, example
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.ctl.texts import explained

#: A setting, in use or commented out.
SETTING = re.compile(r"^(# )?([a-z0-9_]+) = (.+)$", re.MULTILINE)


def parts() -> dict[str, str]:
    """The text of each table; that of the process has no name."""
    pieces = re.split(r"^\[([a-z0-9_.-]+)\]$", example(), flags=re.MULTILINE)
    return {"": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


def test_it_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example"]) == Exit.DONE
    path = tmp_path / "relayd.toml"
    path.write_text(capsys.readouterr().out)
    assert path.read_text() == example()
    assert main(["check", str(path)]) == Exit.DONE
    assert capsys.readouterr().out == f"{path}: 3 relays, no problems\n"


def test_every_setting_is_in_it_once() -> None:
    found: dict[str, list[str]] = {
        table: [key for _, key, _ in SETTING.findall(text)]
        for table, text in parts().items()
    }
    assert sorted(found.pop("")) == sorted([*PROCESS_KEYS, "env"])
    defaults = found.pop("defaults")
    assert set(defaults) <= set(DEFAULTS_KEYS)
    assert [name.partition(".")[0] for name in found] == list(KINDS)
    for name, keys in found.items():
        kind: Any = name.partition(".")[0]
        every = {*keys, *defaults} - {"userid_file"}
        assert every >= set(RELAY_KEYS[kind])
        assert set(keys) - {"userid_file"} <= set(RELAY_KEYS[kind])
        given = next(each[3] for each in RELAYS if each[0] == kind)
        assert set(keys) & set(defaults) <= set(given)
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_each_has_its_help_and_a_value_that_can_be_read(kind: Kind | None) -> None:
    """Those that are commented out, too."""
    words = " ".join(example().replace("\n# ", " ").split())
    for key, rows in (PROCESS_KEYS if kind is None else RELAY_KEYS[kind]).items():
        row = rows[0]
        assert explained(row) in words
        values = {
            tomllib.loads(f"x = {value}")["x"]
            if value[0] != "["
            else tuple(tomllib.loads(f"x = {value}")["x"])
            for _, other, value in SETTING.findall(example())
            if other == key
        }
        assert values
        for value in values:
            for each in value if isinstance(value, tuple) else (value,):
                said = str(each).removeprefix("allow ").removeprefix("deny ")
                row.type.load(said if row.word else each)


def test_what_is_in_use_is_the_default(tmp_path: Path) -> None:
    """So that a file which leaves all of it out is the same."""
    for table, text in parts().items():
        given = next((own for _, name, _, own in RELAYS if name in table), {})
        for off, key, value in SETTING.findall(text):
            rows = {**DEFAULTS_KEYS, **PROCESS_KEYS}.get(key)
            if not off and rows and key not in given:
                assert tomllib.loads(f"x = {value}")["x"] == default_of(rows[0]), key
    short = tmp_path / "short.toml"
    short.write_text(
        "\n".join(
            f"[{kind}.{name}]\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items())
            for kind, name, _, given in RELAYS
        )
    )
    whole = tmp_path / "whole.toml"
    whole.write_text(example())
    one, other = (configure(read_layers(str(each))) for each in (short, whole))
    assert one == other


def test_lines_are_not_too_long() -> None:
    assert max(map(len, example().splitlines())) <= 88
    assert example().isascii()
