"""The first bytes of each direction, for the access log."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.escapes import read_escapes
from relayd.core.filtering import SPLICE
from relayd.filters.first import MAX_FIRST, First
from tests.support.filtering import FakeWay, run_filter, splits


@given(st.binary(max_size=60), st.integers(1, 40), st.data())
def test_any_split_is_noted_as_the_whole(
    text: bytes, size: int, data: st.DataObject
) -> None:
    way = FakeWay()
    outcome = run_filter(First(size), data.draw(splits(text)), way)
    assert outcome.output == text
    assert outcome.most_held == 0
    assert outcome.spliced == (len(text) >= size)
    noted = way.notes.get("first_up", "")
    assert read_escapes(noted) == text[:size]


def test_each_direction_has_its_note() -> None:
    for course in ("up", "down"):
        way = FakeWay(course)  # type: ignore[arg-type]
        run_filter(First(4), [b"hello"], way)
        assert way.notes == {f"first_{course}": "hell"}


def test_it_is_noted_as_it_comes() -> None:
    way = FakeWay()
    made = First(4).build_filter(way)
    assert made.data(b"ab") == b"ab"
    assert way.notes == {"first_up": "ab"}
    assert made.data(b"cdef") is SPLICE
    assert way.notes == {"first_up": "abcd"}
    assert made.end() == b""


@pytest.mark.parametrize(
    ("sent", "noted"),
    [
        (b"GET / HTTP/1.1\r\n", r"GET\x20/\x20HTTP/1.1\r\n"),
        (b"a\nending=closed", r"a\nending=closed"),
        (b"\"' x=1", r"\x22\x27\x20x=1"),
        (b"\0\x1b[2J\x7f", r"\x00\x1b[2J\x7f"),
        (b"\xff\xc3\xa9\xe2\x80\xa8", r"\xff\xc3\xa9\xe2\x80\xa8"),
        (rb"\n\\", r"\\n\\\\"),
    ],
)
def test_what_strangers_send_is_one_word(sent: bytes, noted: str) -> None:
    way = FakeWay()
    run_filter(First(MAX_FIRST), [sent], way)
    assert way.notes == {"first_up": noted}


@given(st.binary(min_size=1, max_size=50))
def test_any_bytes_are_one_word(sent: bytes) -> None:
    way = FakeWay()
    run_filter(First(50), [sent], way)
    noted = way.notes["first_up"]
    assert noted.isascii()
    assert noted.isprintable()
    assert not set(noted) & set(" \"'")


@pytest.mark.parametrize("size", [0, -1, MAX_FIRST + 1])
def test_how_many(size: Any) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 1024 bytes, not {size}"):
        First(size)
