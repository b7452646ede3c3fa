"""What `relayctl set` and `relayctl server` are told: `key=value`, NAME/SERVER.

A value is written as in a file or as on a command line: it is one of TOML, if it reads
as one and the setting takes it so, and else text.  `max_sessions=100` is a number,
`listen=8080` is text, as `listen="8080"` is.  Nothing here judges a value: relayd does.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relayd.core.setting_types import Setting


class Misspelt(ValueError):
    """It can't be read; the message says what is expected."""


def server_name(text: str) -> tuple[str, str]:
    """A relay, and a server of it, by NAME/SERVER.

    The name of a relay has no slash; that of a server may have some.

    :raises Misspelt: it is none.
    """
    relay, _, server = text.partition("/")
    if not (relay and server):
        raise Misspelt(
            f"{text!r}: expected NAME/SERVER: a relay, and the name or the address of"
            " a server of it, such as web/10.0.0.5:80"
        )
    return relay, server


def settings(words: Iterable[str]) -> dict[str, Any]:
    """What several `key=value` say together.

    :return: by key; None: back to what the file says.  A key that comes several times
        has a list.
    :raises Misspelt: a word is none.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if not (key and equals):
            raise Misspelt(
                f"{word!r}: expected key=value, such as idle_timeout=5m, or key= for"
                " what the file says"
            )
        found.setdefault(key, []).append(text.strip())
    return {key: _together(key, texts) for key, texts in found.items()}


def _together(key: str, texts: list[str]) -> Any:
    if len(texts) == 1:
        return value(key, texts[0]) if texts[0] else None
    if "" in texts:
        raise Misspelt(f"{key}= says: as the file has it; give no other {key} with it")
    values: list[Any] = []
    for text in texts:
        one = value(key, text)
        values += one if isinstance(one, list) else [one]
    return values


def value(key: str, text: str) -> Any:
    """One value of a setting, as a file has it."""
    found = _toml(text)
    rows = _rows(key)
    if isinstance(found, bool | int | float):
        return text if any(_wants_text(row, found) for row in rows) else found
    if isinstance(found, str):
        for row in rows:
            if _is_number(row):
                return _as_in_a_file(row, found)
    return found


def _toml(text: str) -> Any:
    try:
        # In brackets, too: then there is neither a comment, a second key nor a comma.
        tomllib.loads(f"x = {text}")
        [found] = tomllib.loads(f"x = [{text}]")["x"]
    except (ValueError, RecursionError):
        return text
    return found if _is_json(found) else text


def _is_json(found: Any) -> bool:
    """Whether JSON can say it, which has no dates and no infinity."""
    if isinstance(found, list):
        return all(map(_is_json, found))
    if isinstance(found, dict):
        return all(map(_is_json, found.values()))
    if isinstance(found, int | float):
        return math.isfinite(found)
    return isinstance(found, str)


def _rows(key: str) -> list[Setting[Any]]:
    from relayd.configuring.address_settings import ALL

    return [row for row in ALL if row.key == key]


def _wants_text(row: Setting[Any], found: float) -> bool:
    """Whether what looks like a number is to be text: a port, a prefix."""
    try:
        row.type.load(found)
    except ValueError as problem:
        return "as a string" in str(problem)
    return False


def _is_number(row: Setting[Any]) -> bool:
    from relayd.core.setting_types import Flag, Switch

    return isinstance(row.type, Flag | Switch) or hasattr(row.type, "minimum")


def _as_in_a_file(row: Setting[Any], text: str) -> Any:
    """`off` of a command line is false in a file."""
    try:
        row.type.load(text)
    except ValueError:
        try:
            found = row.type.parse(text)
        except ValueError:
            return text
        return found if isinstance(found, bool | int | float) else text
    return text
