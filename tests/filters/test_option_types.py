"""How the options of filters are written."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.filters.option_types import (
    MAX_BYTES,
    Bytes,
    FilePath,
    Kilobytes,
    Microseconds,
    Milliseconds,
    Pattern,
    Probability,
    Size,
)

AMOUNTS = [Milliseconds(), Microseconds(), Kilobytes(), Probability()]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Milliseconds(), "100", 100.0),
        (Milliseconds(), "200ms", 200.0),
        (Milliseconds(), "1.5s", 1500.0),
        (Milliseconds(), "2m", 120_000.0),
        (Milliseconds(), "0", 0.0),
        (Microseconds(), "10", 10.0),
        (Microseconds(), "10us", 10.0),
        (Microseconds(), "3ms", 3000.0),
        (Kilobytes(), "100", 100.0),
        (Kilobytes(), "100kB", 100.0),
        (Kilobytes(), "2MB", 2000.0),
        (Kilobytes(), "1KiB", 1.024),
        (Probability(), "0.25", 0.25),
        (Probability(), "1", 1.0),
        (Size(), "0", 0),
        (FilePath(), "/var/tmp/a b", "/var/tmp/a b"),
        (Size(), "64KiB", 65536),
        (Size(), "1.5kB", 1500),
        (Bytes(), "", b""),
        (Bytes(), r"a\r\n\t\0\\\x7fé", b"a\r\n\t\0\\\x7f\xc3\xa9"),
        (Bytes(), "\udcff", b"\xff"),
        (Pattern(), r"a.\x62", b"a.b"),
        (Pattern(), r"re:a\x62", re.compile(rb"a\x62")),
    ],
)
def test_what_is_written(kind: Any, text: str, value: object) -> None:
    assert kind.parse(text) == value
    assert kind.load(text) == value
    assert kind.parse(kind.show(value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (Milliseconds(), "10us", "expected 0 to 100000000000 milliseconds"),
        (Milliseconds(), "-1", "such as 250ms or 10s"),
        (Milliseconds(), "nan", "expected"),
        (Microseconds(), "1h", "microseconds"),
        (Kilobytes(), "10kb", "kB per second, or with a unit, such as 100kB"),
        (Probability(), "1.01", "expected a number from 0 to 1"),
        (Probability(), "50%", "expected a number from 0 to 1"),
        (Size(), "1.5", "such as 64KiB"),
        (Size(), "1e3", "such as 64KiB"),
        (Size(minimum=1, maximum=9), "0", "expected 1 to 9 bytes"),
        (Size(minimum=1, maximum=9), "10", "expected 1 to 9 bytes"),
        (Size(), "9" * 5000, "expected 0 to"),
        (Bytes(minimum=1), "", "expected 1 to 16384 bytes"),
        (FilePath(), "", "expected the path of a file"),
        (Bytes(), "a" * (MAX_BYTES + 1), "this is 16385"),
        (Bytes(), r"a\q", r"\q is no escape: expected \n, \r, \t, \0, \\ or \xHH"),
        (Bytes(), r"\x4", r"\x is no escape"),
        (Bytes(), "a\\", r"\ is no escape"),
        (Pattern(), "", "expected 1 to 16384 bytes"),
        (Pattern(), "re:é", r"write other bytes as \xHH"),
        (Pattern(), "re:a(", "does not compile: missing ), unterminated"),
    ],
)
def test_what_is_not(kind: Any, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        kind.parse(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "kind", [*AMOUNTS, Size()], ids=lambda kind: type(kind).__name__
)
def test_a_file_has_numbers(kind: Any) -> None:
    assert kind.load(1) == kind.parse("1")
    assert kind.load(0) == 0
    for other in (-1, True, None, [1], 10**400):
        with pytest.raises(ValueError, match="expected"):
            kind.load(other)


@pytest.mark.parametrize("kind", AMOUNTS, ids=lambda kind: type(kind).__name__)
def test_a_file_has_fractions(kind: Any) -> None:
    assert kind.load(0.5) == kind.parse("0.5") == 0.5


@pytest.mark.parametrize("kind", [Bytes(), Pattern()])
def test_a_file_has_no_number_for_bytes(kind: Any) -> None:
    with pytest.raises(ValueError, match="as a string"):
        kind.load(5)


@given(st.binary(max_size=100))
def test_bytes_are_shown_as_they_are_written(data: bytes) -> None:
    shown = Bytes().show(data)
    assert shown.isascii()
    assert shown.isprintable()
    assert Bytes().parse(shown) == data


@given(st.text(max_size=50))
def test_any_text_is_bytes_or_refused(text: str) -> None:
    try:
        Bytes().parse(text)
    except ValueError as problem:
        assert "is no escape" in str(problem)
    else:
        assert "\\" not in text or re.search(r"\\[nrt0x\\]", text)
