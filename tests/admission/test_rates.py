"""Rates of bandwidth, as they are written."""

from __future__ import annotations

import math

import pytest

from relayd.admission.rates import EXPECTED_RATES, Rates, parse_rates
from relayd.configuring.bandwidth_settings import RatesType


@pytest.mark.parametrize(
    ("text", "up", "down"),
    [
        ("500000", 500_000, 500_000),
        ("1.5e3", 1500, 1500),
        ("10MB", 10_000_000, 10_000_000),
        ("512KiB", 524_288, 524_288),
        ("0.5GiB", 1 << 29, 1 << 29),
        ("8kbit", 1000, 1000),
        ("1Mbit", 125_000, 125_000),
        ("2.5Gbit", 312_500_000, 312_500_000),
        ("up=1kB", 1000, None),
        ("down=1kB", None, 1000),
        ("down=3,up=2MB", 2_000_000, 3),
    ],
)
def test_what_is_written(text: str, up: float | None, down: float | None) -> None:
    rates = parse_rates(text)
    assert rates == Rates(up, down)
    assert parse_rates(str(rates)) == rates
    assert RatesType().load(text) == rates


BAD = [
    *("", "0", "-1", "nan", "inf", "1e400", "MB", "1 MB", "1Mb", "1mbit", "1MBit"),
    *("1MB/s", "1_000", "up=", "=1", "up=0", "up=1,up=2", "up=1,down=-1", "left=1"),
    *("up=1,", "up=1,down=2,up=3", "1,up=2", "1,2", "\u0661", "1e-400"),
]


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected bytes per second") as refused:
        parse_rates(text)
    assert str(refused.value) == f"expected {EXPECTED_RATES}"


@pytest.mark.parametrize(
    ("value", "rates"),
    [
        (1000, Rates(1000, 1000)),
        (0.5, Rates(0.5, 0.5)),
        ({"up": "1kB"}, Rates(1000, None)),
        ({"up": 1, "down": "1kbit"}, Rates(1, 125)),
    ],
)
def test_what_a_file_may_have_besides(value: object, rates: Rates) -> None:
    assert RatesType().load(value) == rates


@pytest.mark.parametrize(
    "value",
    [
        *(True, 0, -1, math.nan, math.inf, 10**400, None, [], ["1MB"], {}),
        *({"up": 0}, {"left": 1}, {"up": 1, "left": 1}, {"up": True}, {"up": {}}),
        *({"up": "up=1"}, {1: 1}),
    ],
)
def test_what_a_file_may_not_have(value: object) -> None:
    with pytest.raises(ValueError, match="expected bytes per second"):
        RatesType().load(value)


@pytest.mark.parametrize("rates", [(None, None), (0.0, 1.0), (1.0, -1.0)])
def test_rates_are_more_than_nothing(rates: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Rates(*rates)
