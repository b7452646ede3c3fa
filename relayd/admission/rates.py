"""How limits of bandwidth are written: bytes per second, each way.

`10MB` is 10,000,000 bytes per second, both ways each; `up=1Mbit,down=512KiB` says them
apart, and what is left out is not limited.  Up is from the client to the server.
"""

from __future__ import annotations

import math

import attrs

from relayd.core.units import SIZES, with_unit

#: The units of rates, in bytes: per second.
RATES = {**SIZES, "kbit": 125.0, "Mbit": 125e3, "Gbit": 125e6}

#: The highest rate, in bytes per second.
HIGHEST = 1e15

EXPECTED_RATES = (
    "bytes per second such as 500000, 10MB, 512KiB or 1Mbit, or up=RATE,down=RATE"
)

WAYS = ("up", "down")


@attrs.frozen
class Rates:
    """Bytes per second, each way; None is no limit.

    :ivar up: from clients to servers.
    :ivar down: from servers to clients.
    :raises ValueError: one is not more than 0, or there is none.
    """

    up: float | None = None
    down: float | None = None

    def __attrs_post_init__(self) -> None:
        given = [each for each in (self.up, self.down) if each is not None]
        if not given or not all(0 < each <= HIGHEST for each in given):
            raise ValueError(f"expected {EXPECTED_RATES}")

    def __str__(self) -> str:
        if self.up is not None and self.up == self.down:
            return _shown(self.up)
        ways = ((way, getattr(self, way)) for way in WAYS)
        return ",".join(f"{way}={_shown(rate)}" for way, rate in ways if rate)


def _shown(rate: float) -> str:
    for unit in ("GB", "MB", "kB"):
        if not rate % SIZES[unit]:
            return f"{rate / SIZES[unit]:.0f}{unit}"
    return repr(rate).removesuffix(".0")


def parse_rates(text: str) -> Rates:
    """A rate, or `up=RATE,down=RATE`.

    :raises ValueError: it is something else, or a rate is not more than 0.
    """
    if "=" not in text:
        rate = rate_of(text)
        return Rates(rate, rate)
    found: dict[str, float] = {}
    for part in text.split(","):
        way, _, rate_text = part.partition("=")
        if way not in WAYS or way in found:
            raise ValueError(f"expected {EXPECTED_RATES}")
        found[way] = rate_of(rate_text)
    return Rates(**found)


def rate_of(text: str) -> float:
    """Bytes per second; not a number for what is none."""
    # What is no number is in no range, and says so.
    rate = with_unit(text, RATES)
    return rate if rate > 0 else math.nan
