"""JSON of strangers, and that of long answers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.control.json_text import DEEPEST, PIECE, load, pieces

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=6,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_what_is_written_is_read(value: dict[str, Any]) -> None:
    if any(math.isinf(each) for each in value.values() if isinstance(each, float)):
        return
    text = json.dumps(value)
    if "Infinity" not in text and deep(value) <= DEEPEST:
        assert load(text.encode()) == value
        written = b"".join(pieces(value))
        assert json.loads(written) == value
        assert written == text.encode() + b"\n"


def deep(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(deep, parts), default=0)


@given(st.binary(max_size=50))
def test_anything_else_is_refused(text: bytes) -> None:
    try:
        value = load(text)
    except ValueError as problem:
        assert str(problem).isprintable()
    else:
        assert value == json.loads(text)


@pytest.mark.parametrize("count", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 10 * PIECE + 7])
def test_a_long_list_is_written_in_pieces(count: int) -> None:
    answer = {"a": 1, "rows": [{"n": each} for each in range(count)], "matched": count}
    made = list(pieces(answer))
    assert b"".join(made) == json.dumps(answer).encode() + b"\n"
    assert max(made.count(b"{") for made in made) <= PIECE + 1
    assert len(made) >= count // PIECE


def test_what_is_no_json_is_not_written() -> None:
    for value in (math.nan, math.inf, object(), b"x"):
        with pytest.raises((ValueError, TypeError)):
            list(pieces({"x": value}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 17 + "]" * 17, "more than 16 objects or lists in each other"),
        ("[" * 30_000, "more than 16 objects or lists in each other"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e400]", "a number is too large"),
        ("1" * 5000, "a number has too many digits"),
        ('["\\ud800"]', "half of a character (a lone surrogate)"),
        ('{"\\udfff": 1}', "half of a character (a lone surrogate)"),
        ("{", "Expecting property name enclosed in double quotes (line 1, column 2)"),
    ],
)
def test_why(text: str, why: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(text.encode())
    assert str(caught.value) == why


def test_as_deep_as_may_be() -> None:
    text = "[" * DEEPEST + "1" + "]" * DEEPEST
    assert load(text.encode()) == json.loads(text)
    assert load(b'"\\ud83d\\ude00"') == "\U0001f600"
