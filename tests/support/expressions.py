"""Regular expressions that may be looked for, and a matcher that counts its steps."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from relayd.filters.expressions import read_expression

_BYTES = st.sampled_from(
    ["a", "b", "c", "A", ".", "[ab]", "[^a]", "[b-c]", r"\w", r"\n", r"[^\W]", "(?s:.)"]
)


def _more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def repeat(what: str, few: int, more: int, lazy: str) -> str:
        return f"(?:{what}){{{few},{few + more}}}{lazy}"

    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{}{}{}".format, inner, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("({}|{}|)".format, inner, inner),
        st.builds("(?i:{})".format, inner),
        st.builds("(?i:{}(?-i:{}))".format, inner, inner),
        st.builds(
            repeat,
            inner,
            st.integers(0, 3),
            st.integers(0, 3),
            st.sampled_from(["", "?"]),
        ),
    )


def _may_be_looked_for(source: str) -> bool:
    try:
        read_expression(re.compile(source.encode()))
    except ValueError:
        return False
    return True


def expressions() -> st.SearchStrategy[str]:
    """Regular expressions that are bounded."""
    flags = st.sampled_from(["", "", "(?i)", "(?s)"])
    source = st.recursive(_BYTES, _more, max_leaves=6)
    return st.builds("{}{}".format, flags, source).filter(_may_be_looked_for)


class Steps:
    """Matches as :mod:`re` does, and counts how often a byte is tested.

    :ivar steps: how often.
    """

    def __init__(self, compiled: re.Pattern[bytes], data: bytes) -> None:
        parser = importlib.import_module("re._parser")
        self._tree = list(parser.parse(compiled.pattern, compiled.flags))
        self._flags = compiled.flags
        self._data = data
        self.steps = 0

    def match(self, place: int) -> int | None:
        """Where a match at this place ends."""
        return next(self._sequence(self._tree, place, self._flags), None)

    def _sequence(self, items: list[Any], place: int, flags: int) -> Iterator[int]:
        if not items:
            yield place
            return
        for end in self._item(str(items[0][0]), items[0], place, flags):
            yield from self._sequence(items[1:], end, flags)

    def _item(self, op: str, item: Any, place: int, flags: int) -> Iterator[int]:
        value = item[1]
        if op == "SUBPATTERN":
            inside = (flags | value[1]) & ~value[2]
            yield from self._sequence(list(value[3]), place, inside)
        elif op == "BRANCH":
            for each in value[1]:
                yield from self._sequence(list(each), place, flags)
        elif op in ("MAX_REPEAT", "MIN_REPEAT"):
            yield from self._repeat(value, op == "MIN_REPEAT", 0, place, flags)
        elif op == "POSSESSIVE_REPEAT":
            # Of single bytes: the first end is the only one.
            yield next(self._repeat(value, False, 0, place, flags))
        elif op == "AT":
            if place == len(self._data):
                yield place
        elif op not in ("ASSERT_NOT", "FAILURE"):  # which match nothing at all
            self.steps += 1
            if place < len(self._data) and self._test(item, self._data[place], flags):
                yield place + 1

    def _repeat(
        self, value: Any, lazy: bool, count: int, place: int, flags: int
    ) -> Iterator[int]:
        fewest, most, items = value
        if lazy and count >= fewest:
            yield place
        if count < most:
            for end in self._sequence(list(items), place, flags):
                yield from self._repeat(value, lazy, count + 1, end, flags)
        if not lazy and count >= fewest:
            yield place

    def _test(self, item: Any, byte: int, flags: int) -> bool:
        op, value = str(item[0]), item[1]
        if op == "ANY":
            return bool(flags & re.DOTALL) or byte != 10
        if op == "IN":
            one = f"[{''.join(_set(value))}]"
        else:
            one = f"[{'^' if op == 'NOT_LITERAL' else ''}\\x{value:02x}]"
        return bool(re.match(one.encode(), bytes([byte]), flags & re.IGNORECASE))


def _set(items: Any) -> Iterator[str]:
    for op, value in items:
        if str(op) == "NEGATE":
            yield "^"
        elif str(op) == "RANGE":
            yield f"\\x{value[0]:02x}-\\x{value[1]:02x}"
        elif str(op) == "CATEGORY":
            yield {"CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}[str(value)]
        else:
            yield f"\\x{value:02x}"
