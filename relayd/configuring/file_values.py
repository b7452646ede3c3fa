"""The values of a configuration file: each is read by its row of the table of settings.

A key has a row, or several whose values begin with a word (`allow`, `deny`).  What is
wrong with a value is told as people read it: what was found, and what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.given import NOTHING
from relayd.configuring.server_grammar import is_udp
from relayd.configuring.server_options import ADDRESS, text_of
from relayd.configuring.texts import read_text
from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.setting_types import Kind, Plain, Setting

#: The end of a key whose value is the name of a file that has the values.
FROM_FILE = "_file"

#: The longest value that an error quotes whole, and the longest that there may be: the
#: longest path, in characters.
_QUOTED, _LONGEST = 60, 4096

#: The longest file of secrets, in bytes.
_LONGEST_SECRETS = 1 << 20

Rows = Sequence[Setting[Any]]
Keys = Mapping[str, Rows]


class Wrong(Exception):
    """What is wrong with a value: the end of the path, and the reason, of each."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(problems)
        self.problems = problems


@attrs.frozen
class Read:
    """A setting that was read; it does not know yet from where."""

    setting: Setting[Any]
    text: str
    value: Any
    plain: Plain


def shown(value: object) -> str:
    """A value as an error quotes it, in the words of a file."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 4 * _QUOTED:
        # Python refuses to write out the longest ones.
        return "a number with many digits"
    # Else it is a date or a time.
    text = repr(value) if isinstance(value, str | int | float) else str(value)
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."


def found(value: object, why: str) -> str:
    """What was found, and what is expected instead."""
    if why.startswith("expected"):
        return f"found {shown(value)}, {why}"
    return why if why.startswith("bad ") else f"{shown(value)}: {why}"


def reader(kind: Kind | None, rows: Rows) -> Callable[[object], tuple[Read, ...]]:
    """The function that reads the value of a key.

    It raises `Wrong`.

    :param kind: whose key it is; None: of the process, or of `[defaults]`.
    """

    def read(value: object) -> tuple[Read, ...]:
        if not rows[0].repeatable:
            return (_one(kind, rows, value),)
        if value == []:
            return (Read(rows[0], "", NOTHING, ""),)
        items = value if isinstance(value, list) else [value]
        values: list[Read] = []
        problems: list[tuple[str, str]] = []
        for number, item in enumerate(items):
            where = f"[{number}]" if items is value else ""
            try:
                values.append(_one(kind, rows, item))
            except Wrong as wrong:
                problems += [(where + end, why) for end, why in wrong.problems]
        if problems:
            raise Wrong(*problems)
        return tuple(values)

    return read


def secrets_reader(
    kind: Kind | None, rows: Rows
) -> Callable[[object], tuple[Read, ...]]:
    """The function that reads the values of a key from a file of their own."""
    read = reader(kind, rows)

    def read_file(value: object) -> tuple[Read, ...]:
        if not isinstance(value, str) or not value or "\0" in value:
            raise Wrong(("", found(value, "expected the name of a file")))
        _check_text(value)
        try:
            text = read_text(value, _LONGEST_SECRETS)
        except OSError as problem:
            why = f"{value!r} can't be read: {problem.strerror}"
            raise Wrong(("", why)) from None
        except ValueError as problem:
            raise Wrong(("", f"{value!r}: {problem}")) from None
        lines = [line for line in text.splitlines() if line]
        if not lines:
            raise Wrong(("", f"{value!r} is empty: expected a value a line"))
        try:
            values = read(lines)
        except Wrong as wrong:
            # Without the value: it is secret.
            raise Wrong(
                *[
                    ("", f"{value!r}, value {end} is bad: {_expected(rows)}")
                    for end, _ in wrong.problems
                ]
            ) from None
        return tuple(attrs.evolve(each, text="***", plain=value) for each in values)

    return read_file


def _expected(rows: Rows) -> str:
    return f"expected {rows[0].type.describe()}"


def _one(kind: Kind | None, rows: Rows, value: Any) -> Read:
    """One value of a setting, or of several that share a key."""
    for text in value.values() if isinstance(value, dict) else (value,):
        if isinstance(text, str):
            _check_text(text)
    row, said = _row_of(rows, value)
    asked = _as_datagrams(kind, row, said)
    try:
        read = row.type.load(asked)
    except ValueError as problem:
        raise Wrong(("", found(value, str(problem)))) from None
    except ConfigError as problem:
        # As it was written, and without the option's name.
        why = str(problem).removeprefix(f"bad --{row.option} {said!r}: ")
        if isinstance(asked, dict):
            asked, said = asked.get(ADDRESS), value.get(ADDRESS)
        why = why.replace(f"bad address {asked!r}: ", f"bad address {said!r}: ", 1)
        raise Wrong(("", found(value, why))) from None
    if kind == "tcp" and row in (LISTEN, DEST) and is_udp(read):
        raise Wrong(
            ("", found(value, "it is for datagrams: give it to a relay of [udp]"))
        )
    if isinstance(read, FilterSpec):
        text = str(read)
    else:
        text = text_of(value) if isinstance(value, dict) else str(said)
    return Read(row, text, read, value)


class FromEnvironment(str):
    """A text in which a variable of the environment was replaced."""

    __slots__ = ()


class Unset(str):
    """A text with a `${NAME}` that the environment does not have.

    :ivar name: of the variable.
    """

    __slots__ = ("name",)
    name: str


def _check_text(value: str) -> None:
    if isinstance(value, Unset):
        raise Wrong(("", f"there is no variable {value.name!r} in the environment"))
    if len(value) > _LONGEST:
        why = f"expected at most {_LONGEST} characters, not {len(value)}"
        raise Wrong(("", found(value, why)))
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can write half of a character.
        raise Wrong(("", found(value, "expected Unicode text"))) from None


def _row_of(rows: Rows, value: object) -> tuple[Setting[Any], object]:
    """The row that a value is of, and the value without its word."""
    if not rows[0].word:
        return rows[0], value
    words = " or ".join(f'"{row.word} {row.type.placeholder}"' for row in rows)
    if isinstance(value, str):
        word, _, rest = value.partition(" ")
        for row in rows:
            if row.word == word and rest.strip():
                return row, rest.strip()
    raise Wrong(("", found(value, f"expected {words}")))


def _as_datagrams(kind: Kind | None, row: Setting[Any], value: object) -> object:
    """An address of a UDP relay, which need not say `udp:`."""
    if kind != "udp" or row not in (LISTEN, DEST):
        return value
    if isinstance(value, dict) and ADDRESS in value:
        return {**value, ADDRESS: _as_datagrams(kind, row, value[ADDRESS])}
    if not isinstance(value, str):
        return value
    return value if value.startswith("udp:") else f"udp:{value}"
