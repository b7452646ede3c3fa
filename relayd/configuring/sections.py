"""The tables of a configuration file, read by the table of settings.

For each table that a file may have there is a class with a field for each key, made
from the rows.  cattrs fills them (its converter gathers all errors, with the path of
each); what it says is turned into lines for people here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

import attrs
from cattrs import (
    AttributeValidationNote,
    BaseValidationError,
    Converter,
    ForbiddenExtraKeysError,
)
from cattrs.gen import make_dict_structure_fn, override

from relayd.configuring.address_settings import ALL, DEST, INSTEAD, LISTEN
from relayd.configuring.dial_settings import INTERCEPT
from relayd.configuring.file_values import (
    FROM_FILE,
    FromEnvironment,
    Keys,
    Read,
    Rows,
    Unset,
    Wrong,
    found,
    reader,
    secrets_reader,
)
from relayd.configuring.given import Given, Place, RelaySection
from relayd.configuring.nearest import nearest
from relayd.core.relay_names import EXPECTED, check_name
from relayd.core.setting_types import Kind, Setting

KINDS: tuple[Kind, ...] = get_args(Kind)

#: What says that `${NAME}` stands for a variable of the environment.
ENV = "env"

#: The table of what every relay gets, and of the log's settings.
DEFAULTS, LOG = "defaults", "log"

#: The longest key that an error quotes whole.
_QUOTED = 64

#: The unknown keys that are told of one table; and the problems of a file from which on
#: the nearest keys are not searched for, which takes its time.
_UNKNOWN, _MANY = 20, 100

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_VARIABLE = re.compile(r"\$(\$|\{([A-Za-z_][A-Za-z0-9_]*)\})")


@attrs.frozen(eq=False)
class Document:
    """What one file gives.

    :ivar process: settings of the whole process.
    :ivar defaults: what each relay gets, if its kind has it.
    :ivar faulty: the keys of that whose values could not be read.
    :ivar relays: with what their own tables say.
    :ivar problems: what is wrong, a line each.
    """

    process: Sequence[Given]
    defaults: Sequence[Given]
    faulty: Collection[str]
    relays: Sequence[RelaySection]
    problems: Sequence[str]


def keys_of(rows: Rows) -> dict[str, list[Setting[Any]]]:
    """The rows of each key that a file may have."""
    keys: dict[str, list[Setting[Any]]] = {}
    for row in rows:
        if row.key:
            keys.setdefault(row.key, []).append(row)
    return keys


#: The keys at the top of a file, those of each kind of relay, and of `[defaults]`.
PROCESS_KEYS = keys_of([row for row in ALL if row.process])
RELAY_KEYS: Mapping[Kind, Mapping[str, list[Setting[Any]]]] = {
    kind: keys_of([row for row in ALL if not row.process and kind in row.kinds])
    for kind in KINDS
}
#: What one relay has, no other can have as well.
_OF_ONE = (LISTEN.key, DEST.key, INTERCEPT.key)
DEFAULTS_KEYS = keys_of(
    [row for row in ALL if not row.process and row.key not in _OF_ONE]
)
#: `log.format` is `log_format`, and so on.
LOG_KEYS = {
    key.removeprefix("log_"): rows
    for key, rows in PROCESS_KEYS.items()
    if key.startswith("log_")
}


def _hook(
    read: Callable[[object], tuple[Read, ...]],
) -> Callable[[object, object], tuple[Read, ...]]:
    """As cattrs calls it, with the type of the field."""

    def hook(value: object, _: object) -> tuple[Read, ...]:
        return read(value)

    return hook


def _class_of(name: str, keys: Keys, kind: Kind | None) -> type[Any]:
    """The class of a table: a field for each key.  `_CONVERTER` can fill it."""
    readers = {}
    for key, rows in keys.items():
        readers[key] = reader(kind, rows)
        if rows[0].secret:
            readers[key + FROM_FILE] = secrets_reader(kind, rows)
    fields = {key: attrs.field(default=()) for key in readers}
    made = attrs.make_class(name, fields, eq=False)
    hooks: dict[str, Any] = {
        key: override(struct_hook=_hook(read)) for key, read in readers.items()
    }
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


@attrs.frozen(eq=False)
class _Table:
    """What a table gives.

    :ivar faulty: the keys whose values could not be read.
    """

    given: Sequence[Given] = ()
    faulty: Collection[str] = ()


def _read_table(
    kind: type[Any], table: Mapping[str, Any], place: Place, problems: list[str]
) -> _Table:
    """Read the keys of a table that are right, and tell what is wrong with others."""
    keys = [field.name for field in attrs.fields(kind)]
    faulty: set[str] = set()
    try:
        read = _CONVERTER.structure(table, kind)
    except BaseValidationError as wrong:
        faulty = _tell(wrong, place, keys, problems)
        sound = {key: table[key] for key in keys if key in table and key not in faulty}
        read = _CONVERTER.structure(sound, kind)
    for key in keys:
        other = key.removesuffix(FROM_FILE)
        if other != key and {key, other} <= table.keys():
            problems.append(f"{place.below(key)}: {other} is given, too: give one")
    given = [
        Given(each.setting, each.text, each.value, place.below(key), each.plain)
        for key in keys
        for each in getattr(read, key)
    ]
    return _Table(given, {key.removesuffix(FROM_FILE) for key in faulty})


def _tell(
    wrong: BaseValidationError, place: Place, keys: Sequence[str], problems: list[str]
) -> set[str]:
    """Tell each thing that cattrs found wrong with a table.

    :return: the keys whose values are wrong.
    """
    faulty = set()
    for each in wrong.exceptions:
        if isinstance(each, ForbiddenExtraKeysError):
            unknown = sorted(each.extra_fields)
            for key in unknown[:_UNKNOWN]:
                advice = _advice(key, place, keys, near=len(problems) < _MANY)
                problems.append(f"{place.below(_part(key))}: no such key; {advice}")
            if more := len(unknown[_UNKNOWN:]):
                where = place if place.path else f"{place}: the top"
                problems.append(f"{where}: {more} more keys that there are not")
        elif isinstance(each, Wrong):
            [key] = [
                note.name
                for note in getattr(each, "__notes__", ())
                if isinstance(note, AttributeValidationNote)
            ]
            faulty.add(key)
            problems += [
                f"{place.below(key)}{end}: {why}" for end, why in each.problems
            ]
        else:
            raise each
    return faulty


def _advice(key: str, place: Place, keys: Sequence[str], *, near: bool) -> str:
    """What to do about a key that its table does not have.

    :param near: find the nearest one, if it is no key of another table.
    """
    if key in INSTEAD and INSTEAD[key].key in keys:
        return f"a UDP relay has {INSTEAD[key].key}"
    if home := _home(key):
        return home
    top = () if place.path else _TABLES
    everywhere = [*keys, *top, *_HOMES] if near else []
    word = key.lower().replace("-", "_")
    found = nearest(word, everywhere)
    if found is None:
        return "see `relayd.toml(5)`"
    where = "" if found in keys or found in top else f" {_home(found)}"
    return f"did you mean {found}?{where}"


def _homes() -> dict[str, str]:
    """Where each key belongs, for those who gave it elsewhere."""
    homes: dict[str, str] = {}
    for kind in KINDS:
        for key in RELAY_KEYS[kind]:
            tables = homes.get(key, "")
            homes[key] = f"{tables}, [{kind}.NAME]" if tables else f"[{kind}.NAME]"
    for key in DEFAULTS_KEYS:
        homes[key] += " or [defaults]"
    homes |= dict.fromkeys(PROCESS_KEYS, "the top, before all tables")
    options = [row.name.replace("-", "_") for row in ALL if not row.key]
    return homes | dict.fromkeys(options, "the command line")


_HOMES = _homes()


def _home(key: str) -> str:
    if key not in _HOMES:
        return ""
    return f"it belongs to {_HOMES[key]}"


def _part(key: str) -> str:
    """A key as a part of a path."""
    if len(key) > _QUOTED:
        return json.dumps(key[:_QUOTED])[:-1] + '..."'
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
        problems.append(f"{top.below(ENV)}: {found(env, 'expected true or false')}")
    elif env:
        tables = _with_variables(tables, environ)

    def read(kind: type[Any], name: str) -> _Table:
        table = tables.get(name, {})
        if isinstance(table, dict):
            return _read_table(kind, table, top.below(name), problems)
        problems.append(f"{top.below(name)}: {found(table, 'expected a table')}")
        return _Table()

    own = {key: value for key, value in tables.items() if key not in _TABLES}
    process = _read_table(_PROCESS, own, top, problems).given
    log = []
    for one in read(_LOG, LOG).given:
        same = next((each for each in process if each.setting is one.setting), None)
        if same is None:
            log.append(one)
        else:
            problems.append(f"{one.place}: the same as {same.place.path}: give one")
    defaults = read(_DEFAULTS, DEFAULTS)
    relays = [
        relay
        for kind in KINDS
        for relay in _read_relays(kind, tables.get(kind, {}), top.below(kind), problems)
    ]
    return Document([*process, *log], defaults.given, defaults.faulty, relays, problems)


def _read_relays(
    kind: Kind, relays: object, place: Place, problems: list[str]
) -> Iterator[RelaySection]:
    """The relays of one kind."""
    why = f"expected a table for each relay, such as [{kind}.web]"
    if not isinstance(relays, dict):
        problems.append(f"{place}: {found(relays, why)}")
        return
    for name, table in relays.items():
        where = place.below(_part(name))
        if not isinstance(table, dict):
            problems.append(f"{where}: {found(table, why)}")
            continue
        try:
            check_name(name)
        except ValueError:
            problems.append(f"{where}: bad name {_part(name)}: expected {EXPECTED}")
        read = _read_table(_RELAYS[kind], table, where, problems)
        yield RelaySection(kind, name, read.given, where, read.faulty)


def read_settings(
    kind: Kind, table: Mapping[str, Any], place: Place
) -> tuple[Sequence[Given], list[str]]:
    """Read settings of one relay, as its table in a file has them.

    :param table: None as a value is nothing; its key must be one all the same.
    :return: what is given, and what is wrong, a line each.
    """
    problems: list[str] = []
    known = {field.name for field in attrs.fields(_RELAYS[kind])}
    said = {
        key: value
        for key, value in table.items()
        if value is not None or key not in known
    }
    read = _read_table(_RELAYS[kind], said, place, problems)
    return read.given, problems


def key_in(kind: Kind, key: str) -> str:
    """Which setting a key of a table gives, by its own key: `userid_file` is one."""
    return key if key in RELAY_KEYS[kind] else key.removesuffix(FROM_FILE)


def _with_variables(value: Any, environ: Mapping[str, str], depth: int = 5) -> Any:
    """A value in whose strings `${NAME}` is replaced, and `$$` is a dollar.

    :param depth: of the tables and lists in it; what is deeper is no setting.
    :return: with a :class:`FromEnvironment` for a text with a variable, and an
        :class:`Unset` for one with a variable that there is not: who reads it tells.
    """
    if isinstance(value, str):
        return _replaced(value, environ)
    if depth and isinstance(value, dict):
        return {
            key: _with_variables(one, environ, depth - 1) for key, one in value.items()
        }
    if depth and isinstance(value, list):
        return [_with_variables(one, environ, depth - 1) for one in value]
    return value


def _replaced(text: str, environ: Mapping[str, str]) -> str:
    names = [match[2] for match in _VARIABLE.finditer(text) if match[2] is not None]
    for name in names:
        if name not in environ:
            unset = Unset(text)
            unset.name = name
            return unset
    said = _VARIABLE.sub(
        lambda match: "$" if match[2] is None else environ[match[2]], text
    )
    return FromEnvironment(said) if names else said
