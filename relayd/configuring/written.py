"""What was given, written as a configuration file.

The file says the same as what it was made of: a command line, another file, or several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import tomli_w

from relayd.configuring.about_clients import useless_in
from relayd.configuring.address_settings import ALL, DEST, LISTEN
from relayd.configuring.file_values import FROM_FILE, FromEnvironment
from relayd.configuring.given import Given, Layers, RelaySection
from relayd.configuring.sections import DEFAULTS
from relayd.configuring.server_options import ADDRESS
from relayd.core.errors import ConfigError


def as_tables(layers: Layers) -> dict[str, Any]:
    """The tables of a file that says the same.

    Relays without a name get the one that they would have.
    """
    tables: dict[str, Any] = dict(values(layers.of_process.effective))
    if not layers.relays:
        # Of the demo, whose relay is in no file.
        every = RelaySection("tcp", None, [*layers.defaults, *layers.every])
        defaults = dict(values(every.effective))
        if defaults:
            tables[DEFAULTS] = defaults
    for name, relay in named(layers):
        tables.setdefault(relay.kind, {})[name] = dict(values(_said(relay), relay.kind))
    return tables


def _said(relay: RelaySection) -> list[Given]:
    """What was said of all relays is written of each where it does something."""
    useless = useless_in(relay)
    return [each for each in relay.effective if each.setting.key not in useless]


def as_toml(layers: Layers) -> str:
    """The text of such a file.

    :raises ConfigError: something was given that is not Unicode.
    """
    text = tomli_w.dumps(as_tables(layers))
    if not_unicode := re.search("[\ud800-\udfff]", text):
        line = text[: not_unicode.end()].splitlines()[-1]
        raise ConfigError(f"can't be written as a file: not UTF-8 after {line[:-1]!r}")
    return text


def in_clear(layers: Layers) -> list[str]:
    """The keys of such a file with what not everybody may read.

    :return: those of secret settings, and those that have values of the environment,
        such as `tcp.web.check`.
    """
    tables: list[tuple[str, Iterable[Given]]] = [("", layers.of_process.effective)]
    for name, relay in named(layers):
        tables.append((f"{relay.kind}.{name}.", _said(relay)))
    found = [
        f"{table}{each.setting.key}"
        for table, given in tables
        for each in given
        if _has_variable(each.plain)
        or (each.setting.secret and not _is_from_file(each))
    ]
    return list(dict.fromkeys(found))


def _has_variable(plain: Any) -> bool:
    if isinstance(plain, dict):
        return any(map(_has_variable, plain.values()))
    return isinstance(plain, FromEnvironment)


def _is_from_file(given: Given) -> bool:
    return given.place.path.endswith(f"{given.setting.key}{FROM_FILE}")


def named(layers: Layers) -> Iterator[tuple[str, RelaySection]]:
    """The relays, each with the name that it has or will have."""
    sections = layers.sections
    taken = {each.name for each in sections}
    free = (name for n in range(1, 1 << 30) if (name := f"relay{n}") not in taken)
    for each in sections:
        yield each.name or next(free), each


def values(given: Iterable[Given], kind: str = "") -> Iterator[tuple[str, Any]]:
    """The keys and values of a table, in the order of the table of settings.

    The last of each key has the say.
    """
    found: dict[str, Any] = {}
    for each in given:
        key = each.setting.key
        if _is_from_file(each):
            # The name of the file, not what it says.
            found[key + FROM_FILE] = each.plain
        elif each.setting.repeatable and key:
            found.setdefault(key, []).append(_plain(each, kind))
        elif key:
            found[key] = each.plain
    for key in sorted(found, key=_order):
        value = found[key]
        yield key, value[0] if isinstance(value, list) and len(value) == 1 else value


_ORDER: dict[str, int] = {
    row.key: number for number, row in reversed(list(enumerate(ALL)))
}


def _order(key: str) -> int:
    return _ORDER[key] if key in _ORDER else _ORDER[key.removesuffix(FROM_FILE)]


def _plain(given: Given, kind: str) -> Any:
    plain = given.plain
    if kind != "udp" or given.setting not in (LISTEN, DEST):
        return plain
    if isinstance(plain, dict):
        return {**plain, ADDRESS: plain[ADDRESS].removeprefix("udp:")}
    return str(plain).removeprefix("udp:")
