"""The JSON Schema of configuration files, made from the table of settings.

It is for editors: it completes keys, explains them and marks mistakes while one types.
It accepts every file that the reader accepts, and refuses nothing else that it can tell
without the grammars of addresses and rules; those are left to `relayctl check`.

JSON Schema 2020-12, https://json-schema.org/draft/2020-12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.bandwidth_settings import RatesType
from relayd.configuring.control_settings import User
from relayd.configuring.file_values import FROM_FILE, Rows
from relayd.configuring.filter_settings import NAME, FilterType
from relayd.configuring.readable import default_of
from relayd.configuring.route_settings import ROUTE, SNI
from relayd.configuring.sections import (
    DEFAULTS,
    DEFAULTS_KEYS,
    ENV,
    KINDS,
    LOG,
    LOG_KEYS,
    PROCESS_KEYS,
    RELAY_KEYS,
)
from relayd.configuring.server_options import ADDRESS, TYPES, SendProxy
from relayd.core.number_types import MarkBit, Percent
from relayd.core.relay_names import MAX_LENGTH
from relayd.core.setting_types import (
    Choice,
    Count,
    Flag,
    IPv4,
    Ratio,
    Seconds,
    Setting,
    Size,
    Type,
)
from relayd.ctl.texts import default_in_words, explained

DIALECT = "https://json-schema.org/draft/2020-12/schema"

#: A number as Python reads it, with blanks around it.
_NUMBER = r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*"

#: With `env = true`, what has a dollar in it may become anything.
_VARIABLE = r"\$"

#: What is said of each kind of relay.
_KINDS = {
    "tcp": "Relays of TCP and UNIX stream connections, by their names.",
    "udp": "Relays of UDP datagrams, by their names.",
    "socks4": "SOCKS4 and SOCKS4a proxies, by their names.",
}


def schema() -> dict[str, Any]:
    """The schema, as it is written in JSON."""
    kinds: dict[str, Any] = {
        kind: {
            "type": "object",
            "description": _KINDS[kind],
            "propertyNames": {"pattern": f"^[a-z0-9_-]{{1,{MAX_LENGTH}}}$"},
            "additionalProperties": {"$ref": f"#/$defs/{kind}"},
        }
        for kind in KINDS
    }
    tables = {
        ENV: {
            "type": "boolean",
            "description": "Whether ${NAME} in a value stands for a variable of the"
            " environment.",
            "default": False,
        },
        LOG: _table(LOG_KEYS, "The settings of the log: log.x is the same as log_x."),
        DEFAULTS: _table(
            DEFAULTS_KEYS, "What every relay gets, unless its own table says otherwise."
        ),
        **kinds,
    }
    whole = _table(PROCESS_KEYS, "Settings of the process, and its relays.")
    whole["properties"].update(tables)
    relays = {kind: _relay(kind) for kind in KINDS}
    return {
        "$schema": DIALECT,
        "title": "The configuration of relayd",
        **whole,
        **_has_servers(),
        "$defs": relays,
    }


def _relay(kind: Any) -> dict[str, Any]:
    made = _table(RELAY_KEYS[kind], f"One relay of [{kind}].")
    if LISTEN in RELAY_KEYS[kind][LISTEN.key]:
        made["required"] = [LISTEN.key]
    if kind == "udp":
        made["required"].append(DEST.key)
    return made


def _has_servers() -> dict[str, Any]:
    """Each relay of [tcp] has servers; what makes some up may be in [defaults]."""
    instead = [{"required": [row.key]} for row in (SNI, ROUTE)]
    some = {"anyOf": [{"required": [DEST.key]}, *instead]}
    return {
        "if": {"properties": {DEFAULTS: {"not": {"anyOf": instead}}}},
        "then": {"properties": {"tcp": {"additionalProperties": some}}},
    }


def _table(keys: Mapping[str, Rows], said: str) -> dict[str, Any]:
    """A table that has these keys and no others."""
    properties: dict[str, Any] = {}
    either = []
    for key, rows in keys.items():
        properties[key] = _property(rows)
        if rows[0].secret:
            properties[key + FROM_FILE] = {
                "description": f"A file with the values of {key}, one a line.",
                "type": "string",
                "minLength": 1,
            }
            either.append({"not": {"required": [key, key + FROM_FILE]}})
    table: dict[str, Any] = {
        "type": "object",
        "description": said,
        "properties": properties,
        "additionalProperties": False,
    }
    return {**table, "allOf": either} if either else table


def _property(rows: Rows) -> dict[str, Any]:
    """The values of a key, with what is said of it."""
    row, default = rows[0], default_of(rows[0])
    found: dict[str, Any] = {"description": explained(row)}
    if default is None or row.otherwise:
        found["description"] += f" Default: {default_in_words(row)}."
    if default is not None:
        found["default"] = default
    return {**found, **_values(rows)}


def _values(rows: Rows) -> dict[str, Any]:
    row = rows[0]
    if not row.repeatable:
        return _value(row)
    one = _value(row)
    if row.key == DEST.key:
        one = {"anyOf": [one, _SERVER]}
    if isinstance(row.type, FilterType):
        one = {"anyOf": [one, _FILTER]}
    if row.word:
        words = "|".join(each.word for each in rows)
        one = _text(rf"^({words}) [\s\S]*\S")
    many: dict[str, Any] = {"type": "array", "items": one}
    if row in (LISTEN, DEST):
        # A relay without would not be one.
        many["minItems"] = 1
    return {"anyOf": [one, many]}


def _value(row: Setting[Any]) -> dict[str, Any]:
    """One value."""
    return _typed(row.type)


def _typed(kind: Type[Any]) -> dict[str, Any]:
    """A value of a type."""
    if isinstance(kind, Flag):
        return {"type": "boolean"}
    if isinstance(kind, Seconds):
        lowest = "minimum" if kind.never else "exclusiveMinimum"
        number = {"type": "number", lowest: kind.minimum, "maximum": kind.maximum}
        return {"anyOf": [number, _text(rf"^({_NUMBER}|[0-9.]+(ms|s|m|h))$")]}
    if isinstance(kind, MarkBit):
        return {"enum": [1 << bit for bit in range(kind.maximum.bit_length())]}
    if isinstance(kind, Count):
        whole: dict[str, Any] = {
            "type": "integer",
            "minimum": kind.minimum,
            "maximum": kind.maximum,
        }
        if isinstance(kind, Percent):
            return {"anyOf": [whole, _text(r"^[0-9]{1,10}%?$")]}
        if isinstance(kind, Size):
            size = _text(r"^([0-9]+|[0-9.]+(k|M|G|Ki|Mi|Gi)B)$")
            return {"anyOf": [whole, size]}
        return whole
    if isinstance(kind, Ratio):
        return {"type": "number", "minimum": kind.minimum}
    if isinstance(kind, RatesType):
        return _rates()
    if isinstance(kind, User):
        number = {"type": "integer", "minimum": 0, "maximum": kind.maximum}
        return {"anyOf": [number, {"type": "string", "minLength": 1}]}
    if isinstance(kind, Choice):
        words = kind.placeholder.split("|")
        return {"anyOf": [{"enum": words}, {"type": "string", "pattern": _VARIABLE}]}
    if isinstance(kind, IPv4):
        return _text(r"^[0-9]+(\.[0-9]+){3}$")
    return {"type": "string", "minLength": 1}


def _server() -> dict[str, Any]:
    """A destination that is a table: its address, and options."""
    address = {"type": "string", "minLength": 1}
    return {
        "type": "object",
        "properties": {
            ADDRESS: address,
            **{name.replace("-", "_"): _typed(kind) for name, kind in TYPES.items()},
            "send_proxy": _typed(Choice[SendProxy](SendProxy)),
        },
        "required": [ADDRESS],
        "additionalProperties": False,
    }


def _rates() -> dict[str, Any]:
    one = r"[0-9.]+(k|M|G|Ki|Mi|Gi)B|[0-9.]+(k|M|G)bit"
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": RatesType.maximum}
    rate = {"anyOf": [number, _text(rf"^({_NUMBER}|{one})$")]}
    way = rf"(up|down)=({_NUMBER}|{one})"
    text = _text(rf"^({_NUMBER}|{one}|{way}(,{way})?)$")
    ways = {
        "type": "object",
        "properties": {"up": rate, "down": rate},
        "additionalProperties": False,
        "minProperties": 1,
    }
    return {"anyOf": [number, text, ways]}


def _text(pattern: str) -> dict[str, Any]:
    """A string that matches, or has a variable in it."""
    return {"type": "string", "pattern": f"{pattern}|{_VARIABLE}"}


_SERVER = _server()

#: A filter that is a table; which options each has is not known here.
_FILTER = {
    "type": "object",
    "properties": {NAME: {"type": "string", "minLength": 1}},
    "required": [NAME],
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
