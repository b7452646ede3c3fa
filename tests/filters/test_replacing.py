"""Bytes that are replaced, and bytes that end their session."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core.filtering import MOST_HELD, EndSession
from relayd.filters.replacing import Deny, Denying, Replace, Replacing
from tests.support.expressions import expressions
from tests.support.filtering import FakeWay, run_filter, splits

TEXTS = st.text("abcABC\n", max_size=40).map(str.encode)
PATTERNS = st.text("ab", min_size=1, max_size=6).map(str.encode) | expressions().map(
    lambda source: re.compile(source.encode())
)

SECRET = Deny(b"secret")
NAMES = Replace(b"secret", b"***")
NUMBERS = Replace(re.compile(b"x[0-9]{1,5}"), b"<number>")


def replacing(factory: Replace, way: FakeWay) -> Replacing:
    made = factory.build_filter(way)
    assert made is not None
    return made


def denying(factory: Deny, way: FakeWay) -> Denying:
    made = factory.build_filter(way)
    assert made is not None
    return made


@given(PATTERNS, st.binary(max_size=3), TEXTS, st.data())
def test_any_split_is_replaced_as_the_whole(
    old: bytes | re.Pattern[bytes], new: bytes, text: bytes, data: st.DataObject
) -> None:
    expected = (
        text.replace(old, new)
        if isinstance(old, bytes)
        else old.sub(new.replace(b"\\", b"\\\\"), text)
    )
    outcome = run_filter(Replace(old, new), data.draw(splits(text)))
    assert outcome.output == expected
    assert outcome.ended is None


@given(PATTERNS, TEXTS, st.data())
def test_any_split_is_denied_as_the_whole(
    pattern: bytes | re.Pattern[bytes], text: bytes, data: st.DataObject
) -> None:
    """What comes before a match is passed on, and nothing of it."""
    source = re.escape(pattern) if isinstance(pattern, bytes) else pattern
    match = re.search(source, text)
    factory = Deny(pattern)
    outcome = run_filter(factory, data.draw(splits(text)))
    assert outcome.output == (text if match is None else text[: match.start()])
    assert outcome.ended == (None if match is None else factory.why)


@given(PATTERNS, TEXTS, st.data())
def test_less_is_held_than_a_match_is_wide(
    pattern: bytes | re.Pattern[bytes], text: bytes, data: st.DataObject
) -> None:
    pieces = data.draw(splits(text))
    for factory in (Replace(pattern, b""), Deny(pattern)):
        outcome = run_filter(factory, pieces)
        made: Any = factory.build_filter(FakeWay())
        assert outcome.most_held <= factory._needle.width - 1
        # And so never more than half, from where on the source is not read.
        assert 2 * outcome.most_held < made.most_held <= MOST_HELD


@given(PATTERNS, st.binary(max_size=9), TEXTS, st.data())
def test_no_more_comes_out_than_is_declared(
    old: bytes | re.Pattern[bytes], new: bytes, text: bytes, data: st.DataObject
) -> None:
    made = replacing(Replace(old, new, wait=0), FakeWay())
    for piece in filter(None, data.draw(splits(text))):
        came = made.held + len(piece)
        assert len(made.data(piece)) + made.held <= came * made.growth
    held = made.held
    assert len(made.end()) <= held * made.growth


def test_growth() -> None:
    def growth(old: Any, new: bytes) -> int:
        return replacing(Replace(old, new), FakeWay()).growth

    assert growth(b"ab", b"") == 1
    assert growth(b"ab", b"12") == 1
    assert growth(b"ab", b"123") == 2
    assert growth(re.compile(b"ab{0,9}"), b"1234") == 4


def test_what_has_no_match_is_passed_on_as_it_is() -> None:
    data = b"nothing to see here"
    for factory in (NAMES, NUMBERS, SECRET):
        made: Any = factory.build_filter(FakeWay())
        assert made.data(data) is data


def test_what_is_put_in_is_not_looked_at_again() -> None:
    assert run_filter(Replace(b"a", b"aa"), [b"aba"]).output == b"aabaa"
    assert run_filter(Replace(b"a", rb"\1\g<0>"), [b"a"]).output == rb"\1\g<0>"


@pytest.mark.parametrize("factory", [NAMES, NUMBERS, SECRET, Replace(b"a", b"b")])
def test_only_its_direction(factory: Any) -> None:
    made = type(factory)
    options = {
        name: getattr(factory, name)
        for name in ("old", "new", "pattern")
        if hasattr(factory, name)
    }
    for course in ("up", "down"):
        assert made(**options).build_filter(FakeWay(course)) is not None
        assert made(**options, direction=course).build_filter(FakeWay(course))
        other = "down" if course == "up" else "up"
        assert made(**options, direction=other).build_filter(FakeWay(course)) is None


def test_equal_options_are_equal() -> None:
    pattern = re.compile(b"a{1,3}")
    assert Replace(pattern, b"") == Replace(re.compile(b"a{1,3}"), b"")
    assert Replace(pattern, b"") != Replace(pattern, b"x")
    assert Deny(b"a") == Deny(b"a") != Deny(b"a", wait=0)
    assert len({Deny(b"a"), Deny(b"a"), Deny(pattern)}) == 2


@pytest.mark.parametrize("pattern", [b"", re.compile(b"a*"), re.compile("a"), "a"])
def test_what_may_not_be_looked_for(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"it has|is no bytes"):
        Replace(pattern, b"")
    with pytest.raises(ValueError, match=r"it has|is no bytes"):
        Deny(pattern)


# -- what may become a match


def test_the_beginning_of_a_match_waits_for_so_long() -> None:
    clock = Clock()
    way = FakeWay(clock=clock)
    made = replacing(NAMES, way)
    assert made.data(b"my secr") == b"my "
    assert made.held == 4
    clock.advance(0.199)
    assert way.passed == b""
    clock.advance(0.001)
    assert (way.passed, made.held) == (b"secr", 0)
    # What follows is new.
    assert made.data(b"et, secret") == b"et, ***"
    assert made.held == 0
    made.close()
    assert not clock.getDelayedCalls()


def test_it_waits_for_what_it_has_held_longest() -> None:
    clock = Clock()
    way = FakeWay(clock=clock)
    made = replacing(NAMES, way)
    made.data(b"s")
    clock.advance(0.15)
    assert made.data(b"ec") == b""
    clock.advance(0.05)
    assert way.passed == b"sec"
    # And no longer than for that: another beginning has its own time.
    made.data(b"s")
    clock.advance(0.15)
    assert made.data(b"top s") == b"stop "
    clock.advance(0.15)
    assert made.held == 1
    clock.advance(0.05)
    assert made.held == 0
    made.close()


@pytest.mark.parametrize("factory", [NAMES, SECRET])
def test_nothing_waits_once_it_is_decided(factory: Any) -> None:
    clock = Clock()
    made = factory.build_filter(FakeWay(clock=clock))
    assert made.data(b"s") == b""
    assert len(clock.getDelayedCalls()) == 1
    assert made.data(b"ay") == b"say"
    assert not clock.getDelayedCalls()
    made.data(b"s")
    assert made.end() == b"s"
    assert made.held == 0
    assert not clock.getDelayedCalls()
    made.close()


@pytest.mark.parametrize("factory", [NAMES, SECRET])
def test_a_session_that_ends_leaves_no_timer(factory: Any) -> None:
    clock = Clock()
    way = FakeWay(clock=clock)
    made = factory.build_filter(way)
    made.data(b"secre")
    made.close()
    assert not clock.getDelayedCalls()
    assert way.passed == b""


@pytest.mark.parametrize("made_of", [Replace, Deny])
def test_a_wait_of_none_is_for_as_long_as_it_takes(made_of: Any) -> None:
    clock = Clock()
    way = FakeWay(clock=clock)
    made = made_of(b"secret", *([b""] if made_of is Replace else []), wait=0)
    made = made.build_filter(way)
    assert made.data(b"secre") == b""
    clock.advance(1e6)
    assert (way.passed, made.held) == (b"", 5)
    assert made.data(b"x") == b"secrex"
    made.close()


def test_what_has_waited_may_be_a_match_already() -> None:
    clock = Clock()
    way = FakeWay(clock=clock)
    made = replacing(NUMBERS, way)
    assert made.data(b"x12") == b""
    clock.advance(0.2)
    assert way.passed == b"<number>"
    assert made.data(b"3x1") == b"3"
    assert made.end() == b"<number>"
    made.close()


# -- deny


def test_what_is_denied_ends_the_session() -> None:
    way = FakeWay()
    made = denying(SECRET, way)
    assert made.data(b"my se") == b"my "
    with pytest.raises(EndSession, match=r"^secret matched$") as caught:
        made.data(b"cret is out")
    assert caught.value.last == b""
    assert caught.value.reset
    made.close()


def test_a_match_that_is_sent_slowly_is_denied_all_the_same() -> None:
    """Each part is passed on when it has waited; the last byte never is."""
    clock = Clock()
    way = FakeWay(clock=clock)
    made = denying(SECRET, way)
    passed = b""
    for piece in (b"a ", b"s", b"ec", b"re"):
        passed += made.data(piece)
        assert made.held < len(piece) + 1
        clock.advance(0.2)
        passed, way.passed = passed + way.passed, b""
    assert (passed, made.held) == (b"a secre", 0)
    with pytest.raises(EndSession) as caught:
        made.data(b"t!")
    assert caught.value.last == b""
    made.close()


@given(PATTERNS, TEXTS, st.data())
def test_a_match_never_passes_as_a_whole(
    pattern: bytes | re.Pattern[bytes], text: bytes, data: st.DataObject
) -> None:
    """Whatever the pieces, and however long the pauses between them."""
    clock = Clock()
    way = FakeWay(clock=clock)
    made = denying(Deny(pattern), way)
    source = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
    passed = b""
    try:
        for piece in filter(None, data.draw(splits(text))):
            passed += made.data(piece)
            clock.advance(data.draw(st.sampled_from([0, 0.1, 0.2])))
            passed, way.passed = passed + way.passed, b""
            assert len(made._kept) < factory_width(made)
            if way.ended is not None:
                raise EndSession(way.ended)
        passed += made.end()
        assert (passed, source.search(text)) == (text, None)
    except EndSession as done:
        passed += done.last
        assert source.search(text)
        assert text.startswith(passed)
    assert not source.search(passed)
    made.close()
    assert not clock.getDelayedCalls()


def factory_width(made: Denying) -> int:
    return made._needle.width


def test_one_that_waits_behind_another_is_denied_when_it_has_waited() -> None:
    clock = Clock()
    way = FakeWay(clock=clock)
    made = denying(Deny(re.compile(b"abcabcd|ca")), way)
    assert made.data(b"xabca") == b"x"
    clock.advance(0.2)
    assert (way.passed, way.ended, way.reset) == (b"ab", "re:abcabcd|ca matched", True)
    made.close()


def test_a_match_at_the_end_is_denied() -> None:
    made = denying(Deny(re.compile(b"abcabcd|ca"), wait=0), FakeWay())
    assert made.data(b"xabca") == b"x"
    with pytest.raises(EndSession) as caught:
        made.end()
    assert caught.value.last == b"ab"
    made.close()


def test_one_that_is_taken_off_passes_on_what_it_holds() -> None:
    for factory in (NAMES, SECRET):
        clock = Clock()
        made: Any = factory.build_filter(FakeWay(clock=clock))
        made.data(b"a secr")
        assert made.remove() == b"secr"
        assert not clock.getDelayedCalls()
        made.close()


def test_the_log_quotes_a_pattern_in_part() -> None:
    assert Deny(b"a\n\xff").why == r"a\n\xff matched"
    assert Deny(b"a" * 500).why == "a" * 80 + "… matched"
