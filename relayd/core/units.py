"""Numbers as people write them: plain ones, times, and sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

#: The units of times and sizes, as they are written behind a number.
TIMES = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
SIZES = {
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
_WITH_UNIT = re.compile(r"([0-9.]+)([A-Za-z]+)")


def number(text: str) -> float:
    """A number as people write it, or one that is in no range."""
    try:
        # Python would take 1_000 as well, and the digits of every script.
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def with_unit(text: str, units: Mapping[str, float]) -> float:
    """A number with a unit behind it or none, or one that is in no range."""
    match = _WITH_UNIT.fullmatch(text)
    if match is None or match[2] not in units:
        return number(text)
    # Divided, as 250 * 0.001 is not 0.25.
    unit = units[match[2]]
    return number(match[1]) * unit if unit >= 1 else number(match[1]) / (1 / unit)


def load_number(value: object) -> float:
    """The number that a file has, or one that is in no range."""
    # In Python, true is a number as well.
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
