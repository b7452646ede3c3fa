"""Amounts as people read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.ctl import amounts


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_048_523, "1023.9 KiB")),
        *((1_048_575, "1.0 MiB"), (12_900_000, "12.3 MiB"), (2**40, "1.0 TiB")),
        *((2**59, "512.0 PiB"), (10**18, "1" + 18 * "0"), (0.4, "0 B")),
        *((None, "-"), ("x", "x"), (True, "yes"), (float("nan"), "NaN")),
    ],
)
def test_bytes(number: Any, said: str) -> None:
    assert amounts.size(number) == said
    if amounts.is_number(number):
        assert amounts.rate(number) == f"{said}/s"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0, "0.0s"), (0.34, "0.3s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s")),
        *((59.6, "1m00s"), (245, "4m05s"), (3599, "59m59s"), (3600, "1h00m")),
        *(
            (11_279, "3h07m"),
            (86_399, "23h59m"),
            (86_400, "1d00h"),
            (10**9, "11574d01h"),
        ),
        *((None, "-"), (-1, "-1"), ("x", "x"), (False, "no"), (10**30, str(10**30))),
    ],
)
def test_times(seconds: Any, said: str) -> None:
    assert amounts.span(seconds) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((None, "-"), ("", "-"), (False, "no"), (0, "0"), ("a b", "a b"), ("é", "é")),
        *(("\x1b[31m", r"\x1b[31m"), ("a\nb", r"a\nb"), ("\u202e", r"\u202e")),
        *(("\ud800", r"\ud800"), ({"a": [1, None]}, '{"a": [1, null]}')),
    ],
)
def test_cells(value: Any, said: str) -> None:
    assert amounts.text(value) == said


def test_the_rest() -> None:
    assert amounts.when("2026-12-24T03:00:00.000123Z") == "2026-12-24T03:00:00Z"
    assert amounts.when(None) == "-"
    assert amounts.listed(["a:1", None]) == "a:1, -"
    assert amounts.listed([]) == amounts.listed(None) == "-"
    assert amounts.literal(["a", "é"]) == '["a", "é"]'
    assert amounts.literal(None) == "-"
    assert amounts.counted(1, "flow") == "1 flow"
    assert amounts.counted(0, "flow") == "0 flows"


@given(st.floats(0, 1e18, exclude_max=True))
def test_they_are_short_and_near(number: float) -> None:
    shown, unit = amounts.size(number).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert float(shown) * factor == pytest.approx(number, rel=0.05, abs=0.5)
    assert len(shown) <= 6
    assert amounts.span(number)[-1] in "smh"
