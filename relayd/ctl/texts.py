"""How settings are written, and explained, in a configuration file.

What the example, the schema, the manual and `relayctl show` have in common.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from relayd.configuring.address_settings import ALL
from relayd.configuring.readable import default_of
from relayd.core.number_types import MarkBit, Percent
from relayd.core.setting_types import (
    Choice,
    Count,
    Flag,
    IPv4,
    Ratio,
    Seconds,
    Setting,
    Size,
)

#: What the keys of a file are called on a command line.
_KEYS: Mapping[str, str] = {row.name: row.key for row in ALL if row.key}

_OPTION = re.compile(r"--(?:no-)?([a-z0-9-]*[a-z0-9])")


def explained(row: Setting[Any]) -> str:
    """What a setting does, in words of the file."""
    return in_keys(row.in_file or row.help)


def in_keys(text: str) -> str:
    """A text in which options are called what a file calls them."""
    return _OPTION.sub(lambda found: _KEYS.get(found[1], found[0]), text)


def default_in_words(row: Setting[Any]) -> str:
    """A default for people to read."""
    found = default_of(row)
    if row.otherwise and not isinstance(found, str):
        return in_keys(row.otherwise)
    return "none" if found is None or found == [] else literal(found)


def literal(value: Any) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{key} = {literal(value[key])}" for key in value)
        return "{" + ", ".join(pairs) + "}"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def type_in_words(rows: Sequence[Setting[Any]]) -> str:
    """What the values of a key are, for people to read."""
    row = rows[0]
    if row.word:
        words = " or ".join(f'"{each.word} {each.type.placeholder}"' for each in rows)
        return f"{words}, or a list of such"
    kind = _one_in_words(row)
    return f"{kind}, or a list of such" if row.repeatable else kind


def _one_in_words(row: Setting[Any]) -> str:
    kind = row.type
    if isinstance(kind, Flag):
        return "true or false"
    if isinstance(kind, Seconds):
        return "a time" if kind.never else "a time, more than 0"
    if isinstance(kind, Size):
        return f"a size, up to {kind.show(kind.maximum)}"
    if isinstance(kind, Percent):
        return kind.describe()
    if isinstance(kind, MarkBit):
        return "a whole number that is a power of two"
    if isinstance(kind, Count):
        return f"a whole number from {kind.minimum} to {kind.maximum}"
    if isinstance(kind, Ratio):
        return "a number from 0 up"
    if isinstance(kind, Choice):
        return " or ".join(f'"{each}"' for each in kind.placeholder.split("|"))
    return kind.describe() if not isinstance(kind, IPv4) else "an IPv4 address"
