"""The rows of the table of settings for bandwidth."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs

from relayd.admission.rates import (
    EXPECTED_RATES,
    HIGHEST,
    WAYS,
    Rates,
    parse_rates,
    rate_of,
)
from relayd.core.setting_types import ALL_KINDS, Setting
from relayd.core.settings import LIMITS
from relayd.core.units import load_number


@attrs.frozen
class RatesType:
    """Bytes per second, each way.

    A text; in a file a number, or a table with `up` and `down`, too.
    """

    maximum: ClassVar[float] = HIGHEST
    placeholder: ClassVar[str] = "RATE"

    def parse(self, text: str) -> Rates:
        return parse_rates(text)

    def load(self, value: object) -> Rates:
        if isinstance(value, str):
            return parse_rates(value)
        if isinstance(value, dict):
            if not value or set(value) - set(WAYS):
                raise ValueError(f"expected {EXPECTED_RATES}")
            return Rates(**{way: _load(rate) for way, rate in value.items()})
        rate = load_number(value)
        return Rates(rate, rate)

    def describe(self) -> str:
        return EXPECTED_RATES

    def show(self, value: Rates) -> str:
        return str(value)


def _load(value: object) -> float:
    return rate_of(value) if isinstance(value, str) else load_number(value)


BANDWIDTH = Setting[Rates | None](
    name="bandwidth",
    type=RatesType(),
    default=None,
    otherwise="none",
    help="Limit of the bytes that a relay passes on in a second, each way: bytes, or"
    " with a unit, such as 10MB, 512KiB or 1Mbit; up=RATE,down=RATE says the ways apart"
    " (up: to the server), and one left out has no limit. Streams are read more slowly;"
    " datagrams that come too fast are dropped.",
    kinds=ALL_KINDS,
    group=LIMITS,
)
BANDWIDTH_PER_CLIENT = Setting[Rates | None](
    name="bandwidth-per-client",
    type=RatesType(),
    default=None,
    otherwise="none",
    help="The same for the sessions of one client address together (see"
    " --client-prefix).",
    kinds=ALL_KINDS,
    group=LIMITS,
)
BANDWIDTH_PER_SESSION = Setting[Rates | None](
    name="bandwidth-per-session",
    type=RatesType(),
    default=None,
    otherwise="none",
    help="The same for each session, or UDP flow.",
    kinds=ALL_KINDS,
    group=LIMITS,
)

TABLE: tuple[Setting[Any], ...] = (
    BANDWIDTH,
    BANDWIDTH_PER_CLIENT,
    BANDWIDTH_PER_SESSION,
)
