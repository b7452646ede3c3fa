"""Which regular expressions may be looked for in a stream, and what is refused."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.filters.expressions import (
    MAX_STEPS,
    MAX_WAYS,
    MAX_WIDTH,
    Bounds,
    compile_expression,
    read_expression,
)
from relayd.filters.option_types import Pattern
from tests.support.expressions import Steps, expressions


def bounds_of(source: str) -> Bounds:
    return read_expression(re.compile(source.encode())).bounds


@pytest.mark.parametrize(
    ("source", "least", "width", "ways"),
    [
        ("abc", 3, 3, 1),
        ("a|bcd", 1, 3, 2),
        ("a{2,5}b", 3, 6, 4),
        ("a?b", 1, 2, 2),
        ("(a|b){3}c", 4, 4, 1),  # the parser makes a set of them
        ("(?:ab|cd){3}c", 7, 7, 8),
        ("(?:ab|cd){0,2}c", 1, 5, 7),
        ("(?:a{1,2}b{1,3}){1,2}c", 3, 11, 6 + 36),
        (r"(?i)user: [^\r\n]{1,4096}", 7, 4102, 1),
        ("[^a]{1,9}?", 1, 9, 1),
        ("x(?:[^a]{1,9}|b)", 2, 10, 10),
        (r"\d\s\w[a-c\D]", 4, 4, 1),
        ("(?s:.).", 2, 2, 1),
    ],
)
def test_what_is_known_of_one(source: str, least: int, width: int, ways: int) -> None:
    found = bounds_of(source)
    assert (found.least, found.width, found.ways) == (least, width, ways)


NO_BOUND = "it has a repeat without a bound (*, + or {n,}): write {0,N}, {1,N} or {n,N}"
ANCHOR = r"it has an anchor (^, $, \A, \Z, \b)"
LOOKS = "it has look-around"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a*", NO_BOUND),
        ("ab+c", NO_BOUND),
        ("(a{3,})b", NO_BOUND),
        (".*?b", NO_BOUND),
        ("(?:a|b*)c", NO_BOUND),
        ("^a", ANCHOR),
        ("a$", ANCHOR),
        (r"\ba", ANCHOR),
        (r"a\Z", ANCHOR),
        ("a(?=b)", LOOKS),
        ("a(?!b)", LOOKS),
        ("(?<=a)b", LOOKS),
        ("(?<!a)b", LOOKS),
        ("a(?!)", LOOKS),
        (r"(a)\1", "it has a back-reference: write what it stands for"),
        ("(a)?(?(1)b|c)", "it has a condition"),
        ("(?>a)b", "it has an atomic group"),
        ("a{1,3}+b", "it has a possessive repeat"),
        ("(?L)a", "it depends on a locale"),
        ("a{0,1000}b", f"there are more than {MAX_WAYS} ways to match it"),
        ("a{0,31}b{0,31}c", f"there are more than {MAX_WAYS} ways to match it"),
        ("(?:a?){40}b", f"there are more than {MAX_WAYS} ways to match it"),
        ("(?:(?:ab|cd){9}|ef){9}", f"there are more than {MAX_WAYS} ways to match it"),
        ("((((a?){99}){99}){99}){99}", f"there are more than {MAX_WAYS} ways"),
        ("a{2000}[bc]{100}", f"may take more than {MAX_STEPS} steps"),
        ("a{0,900}[^x]{3}", f"may take more than {MAX_STEPS} steps"),
        ("[^x]{2049,3000}", f"may take more than {MAX_STEPS} steps"),
        ("[^x]{1,16385}", f"its matches may have more than {MAX_WIDTH} bytes"),
        ("(?:(?:abc){99}){99}", f"may have more than {MAX_WIDTH} bytes"),
        ("", "it matches nothing, too: it must need one byte at least"),
        ("a?", "it matches nothing, too"),
        ("a|", "it matches nothing, too"),
        ("a{0}", "it matches nothing, too"),
        ("(", "it does not compile: missing ), unterminated subpattern at position 0"),
        ("[z-a]", "it does not compile: bad character range z-a"),
        ("a{3,1}", "it does not compile: min repeat greater than max repeat"),
        ("[[a]", "it does not compile: Possible nested set"),
        ("(?u)a", "it does not compile: "),
        ("a{99999999999}", "it does not compile: the repetition number is too large"),
        ("(?:" * 5000 + "a" + ")" * 5000, "it does not compile: maximum recursion"),
    ],
)
def test_what_is_refused(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        Pattern().parse(f"re:{source}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_python_that_does_not_say_what_an_expression_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(name: str) -> Any:
        raise ImportError(name)

    for instead in (gone, lambda name: re.escape):
        monkeypatch.setattr(importlib, "import_module", instead)
        with pytest.raises(
            ValueError, match=r"it has no re\._parser\): look for plain"
        ):
            Pattern().parse("re:a")
    assert Pattern().parse("a") == b"a"


def test_nested_too_deeply_to_read() -> None:
    """Python's parser has come through, and we would not."""
    found: ValueError | None = None
    for depth in range(50, 1000, 10):
        source = "(" * depth + "a" + ")" * depth
        try:
            read_expression(compile_expression(source.encode()))
        except ValueError as problem:
            found = problem
            break
    assert found is not None
    assert re.search("nested too deeply|maximum recursion", str(found))


@given(expressions(), st.text("abcABC\n", max_size=20))
def test_what_it_is_written_as_matches_the_same(source: str, text: str) -> None:
    compiled = re.compile(source.encode())
    written = re.compile(read_expression(compiled).source)
    spans = [match.span() for match in compiled.finditer(text.encode())]
    assert spans == [match.span() for match in written.finditer(text.encode())]


@given(expressions(), st.text("abcABC\n", max_size=20), st.data())
def test_its_beginnings_are_those_of_all_it_matches(
    source: str, text: str, data: st.DataObject
) -> None:
    """No beginning of a match is missed, at whatever byte the data ends."""
    compiled = re.compile(source.encode())
    read = read_expression(compiled)
    beginning = re.compile(read.beginning)
    for match in compiled.finditer(text.encode()):
        end = data.draw(st.integers(match.start(), match.end() - 1))
        assert beginning.match(text.encode()[:end], match.start())
        assert re.match(read.first, text.encode()[match.start() :])
    # And nothing that is as wide as a match can be is the beginning of a longer one.
    for match in beginning.finditer(text.encode()):
        assert len(match[0]) < read.bounds.width


@given(expressions(), st.text("abcABC\n", max_size=30))
def test_no_text_takes_more_steps_than_are_counted(source: str, text: str) -> None:
    """A matcher that goes back as Python's does, one byte at a time."""
    compiled = re.compile(source.encode())
    bounds = read_expression(compiled).bounds
    for place in range(len(text)):
        counted = Steps(compiled, text.encode())
        found = compiled.match(text.encode(), place)
        assert counted.match(place) == (found and found.end())
        # What a match has used is passed; a repeat at the very end is not tried again.
        spent = bounds.steps + (found.end() - place + 1 if found else 0)
        assert counted.steps <= spent


@given(expressions(), st.text("abcABC\n", max_size=30))
def test_nor_does_a_look_at_what_may_begin(source: str, text: str) -> None:
    """It goes by halves: a few times as many, with those of a repeat at the end."""
    read = read_expression(re.compile(source.encode()))
    beginning = re.compile(read.beginning)
    most = (read.bounds.steps + read.bounds.width) * (
        2 + read.bounds.width.bit_length()
    )
    for place in range(len(text)):
        counted = Steps(beginning, text.encode())
        found = beginning.match(text.encode(), place)
        assert counted.match(place) == (found and found.end())
        assert counted.steps <= most
