"""Values as people write them in a file: times and sizes with their units."""

from __future__ import annotations

from typing import Any

from relayd.core.number_types import Percent
from relayd.core.setting_types import Seconds, Setting, Size

#: The units that a time is shown in: the first that divides it.
_UNITS = (("h", 3600), ("m", 60), ("s", 1))


def default_of(row: Setting[Any]) -> Any:
    """A default as a file would have it; None if only words can say it."""
    default = row.default
    if isinstance(default, tuple):
        texts = [row.type.show(each) for each in default]
        return texts[0] if len(texts) == 1 else texts
    return readable(row, default)


def readable(row: Setting[Any], value: Any) -> Any:
    """A value as people write it in a file: times and sizes with their units."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(row.type, Seconds) and value:
        for unit, seconds in _UNITS:
            if not value % seconds:
                return f"{value // seconds:.0f}{unit}"
        return f"{row.type.show(value)}s"
    if isinstance(row.type, Size | Percent):
        return row.type.show(value)
    if not isinstance(value, int | float | str):
        # What has a grammar of its own.
        return row.type.show(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
