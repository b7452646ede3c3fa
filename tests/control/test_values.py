"""The values of bodies and queries: what is taken, and what the description says."""

from __future__ import annotations

import math
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.control.steering import Refusal
from relayd.control.values import (
    LARGEST,
    MOST_ITEMS,
    MOST_SECONDS,
    Field,
    Fields,
    Flag,
    Many,
    OneOf,
    Seconds,
    Table,
    Text,
    Value,
    Whole,
)

TYPES: list[Any] = [
    *(Text(), Whole(), Whole(1, 5), Seconds(), Flag(), OneOf(["up", "down"])),
    *(Many(Whole()), Many(Text()), Table()),
]

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 8)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "up", "1", "true", "x" * 1000, "x" * 1001]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


def accepted(kind: Value, value: object) -> bool:
    try:
        kind.load(value)
    except ValueError as problem:
        assert str(problem).startswith("expected ")
        return False
    return True


@given(st.sampled_from(TYPES), ANY)
def test_what_is_taken_is_what_is_described(kind: Any, value: object) -> None:
    """In both ways."""
    if isinstance(value, float) and math.isnan(value):
        assert not accepted(kind, value)
        return
    checks = jsonschema.Draft202012Validator(kind.schema())
    assert accepted(kind, value) == checks.is_valid(value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((Whole(), LARGEST + 1), (Whole(), True), (Whole(1, 5), 0)),
        *((Seconds(), True), (Seconds(), MOST_SECONDS + 1), (Seconds(), "1")),
        *((Many(Text()), ["x"] * (MOST_ITEMS + 1)), (Many(Text()), [])),
        (Table(), {}),
    ],
)
def test_what_is_not(kind: Value, value: object) -> None:
    assert not accepted(kind, value)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *((Whole(), "7", 7), (Seconds(), "1.5", 1.5), (Flag(), "true", True)),
        *((Text(), "a b", "a b"), (OneOf(["a", "b"]), "b", "b")),
        (Many(Whole()), "1,2", [1, 2]),
    ],
)
def test_of_a_query(kind: Value, text: str, value: object) -> None:
    assert kind.parse(text) == value
    for wrong in ("", "-1x", "nan", "\u0661", "1" * 30, "yes"):
        if not isinstance(kind, Text):
            with pytest.raises(ValueError, match="expected "):
                kind.parse(wrong)
    with pytest.raises(ValueError, match="expected "):
        Table().parse("x")


FIELDS = Fields(
    fields=[
        Field(name="relay", type=Text(), help="A relay.", required=True),
        Field(name="cut", type=Flag(), help="All.", default=False),
        Field(name="within", type=Seconds(), help="So long."),
    ]
)


def test_fields_have_defaults() -> None:
    whole = {"relay": "web", "cut": False, "within": None}
    assert FIELDS.load({"relay": "web"}) == whole
    assert FIELDS.load({"relay": "web", "cut": None, "within": None}) == whole
    assert FIELDS.parse({"relay": "web", "cut": "true"}) == {**whole, "cut": True}
    assert FIELDS.is_needed
    assert not Fields().is_needed


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(Refusal) as caught:
        FIELDS.load({"relay": None, "cut": 1, "no": None})
    assert caught.value.status == 400
    assert caught.value.problems == [
        "no such key 'no': there are relay, cut, within",
        "bad relay: expected a text of 1 to 1000 characters",
        "bad cut: expected true or false",
    ]
    with pytest.raises(Refusal) as caught:
        FIELDS.parse({f"x{n}": "" for n in range(1000)})
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "relay is missing"


def test_one_of_several_must_be_given() -> None:
    fields = Fields(
        fields=[Field(name=each, type=Text(), help="X.") for each in "ab"],
        one_of=["a", "b"],
    )
    checks = jsonschema.Draft202012Validator(fields.schema())
    for given_, good in (
        ({"a": "x"}, True),
        ({"a": None, "b": "x"}, True),
        ({}, False),
        ({"a": None}, False),
    ):
        assert checks.is_valid(given_) == good
        if good:
            fields.load(given_)
        else:
            with pytest.raises(Refusal, match="nothing to do: give a or b"):
                fields.load(given_)
