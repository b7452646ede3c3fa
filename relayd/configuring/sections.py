"""The tables of a configuration file, read by the table of settings.

For each table that a file may have there is a class with a field for each key, made
from the rows.  cattrs fills them (its converter gathers all errors, with the path of
each); what it says is turned into lines for people here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import attrs
from cattrs import (
    AttributeValidationNote,
    BaseValidationError,
    Converter,
    ForbiddenExtraKeysError,
)
from cattrs.gen import make_dict_structure_fn, override

from relayd.configuring.address_grammar import PortRange, UdpAddress
from relayd.configuring.address_settings import ALL, DEST, LISTEN
from relayd.configuring.given import Given, Place, RelaySection
from relayd.core.errors import ConfigError
from relayd.core.relay_names import check_name
from relayd.core.setting_types import Kind, Plain, Setting

KINDS: tuple[Kind, ...] = get_args(Kind)

#: What says that `${NAME}` stands for a variable of the environment.
ENV = "env"

#: The table of what every relay gets, and of the log's settings.
DEFAULTS, LOG = "defaults", "log"

#: The end of a key whose value is the name of a file that has the values.
FROM_FILE = "_file"

#: The longest value that an error quotes whole.
_QUOTED = 60

#: The longest file of secrets, in bytes.
_LONGEST_SECRETS = 1 << 20

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_VARIABLE = re.compile(r"\$(\$|\{([A-Za-z_][A-Za-z0-9_]*)\})")

Rows = Sequence[Setting[Any]]


@attrs.frozen(eq=False)
class Document:
    """What one file gives.

    :ivar process: settings of the whole process.
    :ivar defaults: what each relay gets, if its kind has it.
    :ivar relays: with what their own tables say.
    :ivar problems: what is wrong, a line each.
    """

    process: Sequence[Given]
    defaults: Sequence[Given]
    relays: Sequence[RelaySection]
    problems: Sequence[str]


def keys_of(rows: Rows) -> dict[str, list[Setting[Any]]]:
    """The rows of each key that a file may have."""
    found: dict[str, list[Setting[Any]]] = {}
    for row in rows:
        if row.key:
            found.setdefault(row.key, []).append(row)
    return found


#: The keys at the top of a file, those of each kind of relay, and of `[defaults]`.
PROCESS_KEYS = keys_of([row for row in ALL if row.process])
RELAY_KEYS: Mapping[Kind, Mapping[str, list[Setting[Any]]]] = {
    kind: keys_of([row for row in ALL if not row.process and kind in row.kinds])
    for kind in KINDS
}
DEFAULTS_KEYS = keys_of(
    [row for row in ALL if not row.process and row.key not in (LISTEN.key, DEST.key)]
)
#: `log.format` is `log_format`, and so on.
LOG_KEYS = {
    key.removeprefix("log_"): rows
    for key, rows in PROCESS_KEYS.items()
    if key.startswith("log_")
}


class _Wrong(Exception):
    """What is wrong with a value: the end of the path, and the reason, of each."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(problems)
        self.problems = problems


# -- one value


@attrs.frozen
class _Read:
    """A setting that was read; it does not know yet from where."""

    setting: Setting[Any]
    text: str
    value: Any
    plain: Plain


def _shown(value: object) -> str:
    """A value as an error quotes it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."


def _found(value: object, why: str) -> str:
    if why.startswith("expected"):
        return f"found {_shown(value)}, {why}"
    return why if why.startswith("bad ") else f"{_shown(value)}: {why}"


def _one(kind: Kind | None, rows: Rows, value: object) -> _Read:
    """One value of a setting, or of several that share a key."""
    row, said = _row_of(rows, value)
    try:
        found = row.type.load(_as_datagrams(kind, row, said))
    except ValueError as problem:
        raise _Wrong(("", _found(value, str(problem)))) from None
    except ConfigError as problem:
        text = f"bad --{row.option} {said!r}: "
        raise _Wrong(("", _found(value, str(problem).removeprefix(text)))) from None
    if kind == "tcp" and row in (LISTEN, DEST) and _is_udp(found):
        raise _Wrong(
            ("", _found(value, "it is for datagrams: give it to a relay of [udp]"))
        )
    plain: Any = value
    return _Read(row, str(said), found, plain)


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
    raise _Wrong(("", _found(value, f"expected {words}")))


def _as_datagrams(kind: Kind | None, row: Setting[Any], value: object) -> object:
    """An address of a UDP relay, which need not say `udp:`."""
    if kind != "udp" or row not in (LISTEN, DEST) or not isinstance(value, str):
        return value
    return value if value.startswith("udp:") else f"udp:{value}"


def _is_udp(address: object) -> bool:
    if isinstance(address, PortRange):
        address = address.first
    return isinstance(address, UdpAddress)


def _reader(
    kind: Kind | None, rows: Rows
) -> Callable[[object, object], tuple[_Read, ...]]:
    """The function that reads the value of a key."""

    def read(value: object, _: object) -> tuple[_Read, ...]:
        if not rows[0].repeatable:
            return (_one(kind, rows, value),)
        items = value if isinstance(value, list) else [value]
        found, problems = [], []
        for number, item in enumerate(items):
            where = f"[{number}]" if items is value else ""
            try:
                found.append(_one(kind, rows, item))
            except _Wrong as wrong:
                problems += [(where + end, why) for end, why in wrong.problems]
        if problems:
            raise _Wrong(*problems)
        return tuple(found)

    return read


def _file_reader(
    kind: Kind | None, rows: Rows
) -> Callable[[object, object], tuple[_Read, ...]]:
    """The function that reads the values of a key from a file of their own."""
    read = _reader(kind, rows)

    def read_file(value: object, _: object) -> tuple[_Read, ...]:
        if not isinstance(value, str) or not value or "\0" in value:
            raise _Wrong(("", _found(value, "expected the name of a file")))
        try:
            with Path(value).open("rb") as stream:
                text = stream.read(_LONGEST_SECRETS + 1).decode()
        except OSError as problem:
            why = f"{value!r} can't be read: {problem.strerror}"
            raise _Wrong(("", why)) from None
        except UnicodeDecodeError:
            raise _Wrong(("", f"{value!r} is not UTF-8")) from None
        if len(text) > _LONGEST_SECRETS:
            raise _Wrong(("", f"{value!r} is longer than 1 MiB"))
        lines = [line for line in text.splitlines() if line]
        if not lines:
            raise _Wrong(("", f"{value!r} is empty: expected a value a line"))
        try:
            found = read(lines, None)
        except _Wrong as wrong:
            # Without the value: it is secret.
            raise _Wrong(
                *[("", f"{value!r}, value {end} is bad") for end, _ in wrong.problems]
            ) from None
        return tuple(attrs.evolve(each, text="***", plain=value) for each in found)

    return read_file


# -- tables


def _class_of(name: str, keys: Mapping[str, Rows], kind: Kind | None) -> type[Any]:
    """The class of a table: a field for each key.  `_CONVERTER` can fill it."""
    hooks: dict[str, Any] = {}
    for key, rows in keys.items():
        hooks[key] = override(struct_hook=_reader(kind, rows))
        if rows[0].secret:
            hooks[key + FROM_FILE] = override(struct_hook=_file_reader(kind, rows))
    fields = {key: attrs.field(default=()) for key in hooks}
    made = attrs.make_class(name, fields, eq=False)
    fill: Any = make_dict_structure_fn(
        made,
        _CONVERTER,
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
        **hooks,
    )
    _CONVERTER.register_structure_hook(made, fill)
    return made


_CONVERTER = Converter(detailed_validation=True)
_PROCESS = _class_of("Process", PROCESS_KEYS, None)
_DEFAULTS = _class_of("Defaults", DEFAULTS_KEYS, None)
_LOG = _class_of("Log", LOG_KEYS, None)
_RELAYS = {kind: _class_of(kind, RELAY_KEYS[kind], kind) for kind in KINDS}

#: The keys at the top that are not settings.
_TABLES = (ENV, LOG, DEFAULTS, *KINDS)


def _read_table(
    kind: type[Any], table: object, place: Place, problems: list[str]
) -> list[Given] | None:
    """What a table gives; None if something in it is wrong."""
    if not isinstance(table, dict):
        problems.append(f"{place}: {_found(table, 'expected a table')}")
        return None
    keys = [field.name for field in attrs.fields(kind)]
    try:
        read = _CONVERTER.structure(table, kind)
    except BaseValidationError as wrong:
        if kind is _PROCESS:
            keys += _TABLES
        problems += _problems(wrong, place, keys)
        return None
    for key in keys:
        other = key.removesuffix(FROM_FILE)
        if other != key and {key, other} <= table.keys():
            problems.append(f"{place.below(key)}: {other} is given, too: give one")
            return None
    return [
        Given(each.setting, each.text, each.value, place.below(key), each.plain)
        for key in keys
        for each in getattr(read, key)
    ]


def _problems(
    wrong: BaseValidationError, place: Place, keys: Sequence[str]
) -> Iterator[str]:
    """A line for each thing that cattrs found wrong with a table."""
    for each in wrong.exceptions:
        if isinstance(each, ForbiddenExtraKeysError):
            for key in sorted(each.extra_fields):
                near = difflib.get_close_matches(key, keys, 1)
                advice = f"did you mean {near[0]}?" if near else "see `relayd.toml(5)`"
                yield f"{place.below(_part(key))}: no such key; {advice}"
        elif isinstance(each, _Wrong):
            [note] = [
                note
                for note in getattr(each, "__notes__", ())
                if isinstance(note, AttributeValidationNote)
            ]
            for end, why in each.problems:
                yield f"{place.below(note.name)}{end}: {why}"
        else:
            raise each


def _part(key: str) -> str:
    """A key as a part of a path."""
    return key if _BARE.fullmatch(key) else json.dumps(key)


def read_document(
    tables: Mapping[str, Any], file: str, environ: Mapping[str, str]
) -> Document:
    """Read the content of one file.

    :param tables: of TOML, or JSON.
    :param file: its name.
    :param environ: for `${NAME}`.
    """
    top = Place(file)
    problems: list[str] = []
    env = tables.get(ENV, False)
    if not isinstance(env, bool):
        problems.append(f"{top.below(ENV)}: {_found(env, 'expected true or false')}")
    elif env:
        tables = {
            key: _with_variables(value, top.below(_part(key)), environ, problems)
            for key, value in tables.items()
        }
    own = {key: value for key, value in tables.items() if key not in _TABLES}
    process = _read_table(_PROCESS, own, top, problems) or []
    log = _read_table(_LOG, tables.get(LOG, {}), top.below(LOG), problems) or []
    for one in log:
        twice = [each for each in process if each.setting is one.setting]
        if twice:
            problems.append(f"{one.place}: the same as {twice[0].place.path}: give one")
    defaults = _read_table(
        _DEFAULTS, tables.get(DEFAULTS, {}), top.below(DEFAULTS), problems
    )
    relays = []
    for kind in KINDS:
        named = tables.get(kind, {})
        if not isinstance(named, dict):
            why = f"expected a table for each relay, such as [{kind}.web]"
            problems.append(f"{top.below(kind)}: {_found(named, why)}")
            continue
        for name, table in named.items():
            place = top.below(f"{kind}.{_part(name)}")
            try:
                check_name(name)
            except ValueError as problem:
                problems.append(f"{place}: {problem}")
            given = _read_table(_RELAYS[kind], table, place, problems)
            relays.append(
                RelaySection(kind, name, given or [], place, faulty=given is None)
            )
    return Document([*process, *log], defaults or [], relays, problems)


def _with_variables(
    value: Any, place: Place, environ: Mapping[str, str], problems: list[str]
) -> Any:
    """A value in whose strings `${NAME}` is replaced, and `$$` is a dollar."""
    if isinstance(value, dict):
        return {
            key: _with_variables(one, place.below(_part(key)), environ, problems)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_with_variables(one, place, environ, problems) for one in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match[2]
        if name is None:
            return "$"
        if name not in environ:
            problems.append(
                f"{place}: there is no variable {name!r} in the environment"
            )
            return match[0]
        return environ[name]

    return _VARIABLE.sub(variable, value)
