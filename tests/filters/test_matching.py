"""Matches in a stream are those in the whole, whatever the pieces; what they cost."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.filters.expressions import MAX_WIDTH
from relayd.filters.matching import Literal, Needle, Regex, needle_of
from tests.support.expressions import expressions
from tests.support.filtering import splits

TEXTS = st.text("abcABC\n", max_size=40).map(str.encode)
WORDS = st.text("ab", min_size=1, max_size=6).map(str.encode)

REGEXES = [
    rb"abc",
    rb"a{2,5}",
    rb"a{2,5}?b",
    rb"ab|abab|b{3}",
    rb"(?i)a[bc]{0,4}c",
    rb"a(?:bc|b|)a",
    rb"a[^\n]{0,9}c",
    rb".",
]


def cut_all(needle: Needle, pieces: Any) -> list[bytes]:
    """The bytes between the matches, of all pieces together."""
    between, kept = [b""], b""
    for piece in pieces:
        cut = needle.cut(kept + piece)
        parts, kept = ([kept + piece], b"") if cut is None else cut
        assert len(kept) < needle.width
        between[-1] += parts[0]
        between += parts[1:]
    cut = needle.cut(kept, final=True)
    parts, kept = ([kept], b"") if cut is None else cut
    assert not kept
    between[-1] += parts[0]
    return between + parts[1:]


def found_first(needle: Needle, pieces: Any) -> bytes | None:
    """What is before the first match; None: there is none."""
    before, kept = b"", b""
    for final, piece in [*[(False, each) for each in pieces], (True, b"")]:
        cut = needle.find(kept + piece, final=final)
        parts, kept = ([kept + piece], b"") if cut is None else cut
        before += parts[0]
        if len(parts) == 2:
            return before
    return None


@given(WORDS, st.text("ab", max_size=40).map(str.encode), st.data())
def test_bytes_in_any_pieces(wanted: bytes, text: bytes, data: st.DataObject) -> None:
    pieces = data.draw(splits(text))
    between = text.split(wanted)
    assert cut_all(Literal(wanted), pieces) == between
    first = between[0] if len(between) > 1 else None
    assert found_first(Literal(wanted), pieces) == first


@given(
    expressions() | st.sampled_from([each.decode() for each in REGEXES]),
    TEXTS,
    st.data(),
)
def test_expressions_in_any_pieces(
    source: str, text: bytes, data: st.DataObject
) -> None:
    pieces = data.draw(splits(text))
    compiled = re.compile(source.encode())
    spans = [match.span() for match in compiled.finditer(text)]
    ends = [0, *[end for _, end in spans]]
    starts = [*[start for start, _ in spans], len(text)]
    between = [text[a:b] for a, b in zip(ends, starts, strict=True)]
    assert cut_all(Regex(compiled), pieces) == between
    first = between[0] if spans else None
    assert found_first(Regex(compiled), pieces) == first


@pytest.mark.parametrize("source", REGEXES)
def test_long_pieces_as_well(source: bytes) -> None:
    """Of which most places are decided at once."""
    text = b"xabcaaaaabbbABBCabaacab\nabcx" * 50
    wanted = re.compile(source)
    for size in (len(text), 97, 40):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = b"-".join(cut_all(Regex(wanted), pieces))
        assert found == wanted.sub(b"-", text)
        match = wanted.search(text)
        before = text[: match.start()] if match else None
        assert found_first(Regex(wanted), pieces) == before


@pytest.mark.parametrize("needle", [Literal(b"abc"), Regex(re.compile(b"a[bc]{1,9}d"))])
def test_what_can_begin_nothing_is_not_kept(needle: Needle) -> None:
    assert needle.cut(b"xxxx") is None
    assert needle.cut(b"aax") is None
    assert needle.cut(b"xxab") == ([b"xx"], b"ab")
    assert needle.cut(b"ab", final=True) is None
    assert needle.cut(b"") is None
    assert needle.find(b"aax") is None
    assert needle.find(b"xxab") == ([b"xx"], b"ab")


def test_one_that_ends_itself_is_decided_at_once() -> None:
    needle = Regex(re.compile(b"a[bc]{1,9}"))
    assert needle.cut(b"xabcx") == ([b"x", b"x"], b"")
    assert needle.cut(b"xabc") == ([b"x"], b"abc")
    # How far it goes is no matter if it is enough that there is one.
    assert needle.find(b"xabc") == ([b"x", b""], b"")


@pytest.mark.parametrize(
    "pattern", [b"", b"a" * (MAX_WIDTH + 1), "a", re.compile("a"), None, 5]
)
def test_what_is_no_needle(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"it has 1 to|is no bytes, and no regular"):
        needle_of(pattern)


class Counting:
    """In place of a compiled expression: counts the places that it looks at."""

    def __init__(self, compiled: re.Pattern[bytes], places: list[int]) -> None:
        self._compiled = compiled
        self._places = places

    def search(self, data: bytes, place: int = 0) -> re.Match[bytes] | None:
        found = self._compiled.search(data, place)
        self._places[0] += (found.start() if found else len(data)) - place + 1
        return found

    def finditer(self, data: bytes) -> Any:
        place = 0
        for found in self._compiled.finditer(data):
            self._places[0] += found.start() - place + 1
            place = found.end()
            yield found
        self._places[0] += len(data) - place + 1


@pytest.mark.cost
@pytest.mark.parametrize("source", [b"a{500}b", b"a{1,500}b", b"[^b]{40}[^c]{2,40}z"])
@pytest.mark.parametrize("text", [b"a" * 6000, (b"a" * 499 + b"x") * 12, b"ab" * 3000])
@pytest.mark.parametrize("size", [1, 7, 501, 2000, 6000])
@pytest.mark.parametrize("method", ["cut", "find"])
def test_no_place_is_looked_at_again_and_again(
    source: bytes, text: bytes, size: int, method: str
) -> None:
    """Twice at most, and once in each piece, whatever comes in whatever pieces."""
    needle = Regex(re.compile(source))
    places = [0]
    for name in ("_wanted", "_next", "_first"):
        setattr(needle, name, Counting(getattr(needle, name), places))
    kept, pieces, matches = b"", 0, 0
    for at in range(0, len(text), size):
        cut = getattr(needle, method)(kept + text[at : at + size])
        pieces += 1
        kept = cut[1] if cut else b""
        matches += len(cut[0]) - 1 if cut else 0
    assert places[0] <= 2 * len(text) + 3 * pieces + 2 * matches


@pytest.mark.cost
@pytest.mark.parametrize("wanted", [b"secret", re.compile(b"secret[0-9]{1,9}")])
def test_what_has_nothing_to_find_is_not_copied(wanted: Any) -> None:
    data = b"x" * 65536
    assert needle_of(wanted).cut(data) is None
    assert needle_of(wanted).find(data) is None
