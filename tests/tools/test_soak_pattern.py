"""The bytes that the soak sends: what was lost or mixed up shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soak.pattern import CHUNK, PERIOD, pattern_bytes, pattern_matches, pattern_start

positions = st.integers(min_value=0, max_value=3 * PERIOD)


starts = st.integers(min_value=0, max_value=PERIOD - 1)


counts = st.integers(min_value=1, max_value=CHUNK)


@given(start=starts, position=positions, count=counts)
def test_what_is_sent_is_what_is_expected(
    start: int, position: int, count: int
) -> None:
    data = pattern_bytes(start, position, count)
    assert len(data) == count
    assert pattern_matches(start, position, data)


@pytest.mark.parametrize("lost", [1, 512, CHUNK])
def test_lost_or_duplicated_bytes_are_detected(lost: int) -> None:
    data = pattern_bytes(17, 4096 + lost, 16)
    assert not pattern_matches(17, 4096, data)
    assert not pattern_matches(17, 4096 + 2 * lost, data)


def test_bytes_of_another_session_or_direction_are_detected() -> None:
    seen = {
        bytes(pattern_bytes(pattern_start(number, up), 0, 16))
        for number in range(1, 5000)
        for up in (False, True)
    }
    assert len(seen) == 2 * 4999


def test_a_wrong_byte_is_detected_anywhere() -> None:
    data = bytearray(pattern_bytes(0, PERIOD - 10, CHUNK))
    data[-1] ^= 1
    assert not pattern_matches(0, PERIOD - 10, bytes(data))
