"""Amounts as people read them: bytes, rates, times; and text that a terminal can show.

What relayd sends is shown as it is where it is not what is expected: a table never
fails over one cell.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: What there is not.
NOTHING = "-"

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")

#: More than anything that relayd counts.
_MOST = 1e18

_FRACTION = re.compile(r"\.\d+(?=Z$)")

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def is_number(value: object) -> bool:
    """Whether it is one that can be reckoned with."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < _MOST


def text(value: Any) -> str:
    """Any value in a cell, on one line, without what a terminal would act on.

    Names of servers may come from clients (SOCKS4a).
    """
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        value = literal(value)
    return printable(value)


def printable(value: str) -> str:
    """A text whose control characters are written as escapes."""
    if value.isprintable():
        return value
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in value
    )


def literal(value: Any) -> str:
    """A value as a file would have it; a table as JSON."""
    return (
        NOTHING if value is None else printable(json.dumps(value, ensure_ascii=False))
    )


def size(value: Any) -> str:
    """Bytes: `512 B`, `12.3 MiB`."""
    if not is_number(value):
        return text(value)
    if abs(value) < 1024:
        return f"{value:.0f} B"
    power = 0
    while abs(value) >= 1023.95 and power < len(_UNITS):
        value /= 1024
        power += 1
    return f"{value:.1f} {_UNITS[power - 1]}"


def rate(value: Any) -> str:
    """Bytes a second."""
    return f"{size(value)}/s" if is_number(value) else text(value)


def span(value: Any) -> str:
    """Seconds: `0.3s`, `12s`, `4m05s`, `3h07m`, `2d04h`."""
    if not is_number(value) or value < 0:
        return text(value)
    if value < 9.95:
        return f"{value:.1f}s"
    whole = round(value)
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02}m"
    return f"{whole // _DAY}d{whole % _DAY // _HOUR:02}h"


def when(value: Any) -> str:
    """A time of RFC 3339, without fractions of a second."""
    return _FRACTION.sub("", text(value))


def listed(value: Any) -> str:
    """A list in a cell."""
    if not isinstance(value, list):
        return text(value)
    return ", ".join(map(text, value)) or NOTHING


def counted(number: Any, what: str) -> str:
    """`1 session`, `2 sessions`."""
    return f"{text(number)} {what}" if number == 1 else f"{text(number)} {what}s"
