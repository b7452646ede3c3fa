r"""Regular expressions that may be looked for in a stream: which are bounded, and how.

Python's own parser says what an expression is made of.  It is refused unless

- its width, the most bytes that a match has, is bounded, so that little is held;
- whether it matches at a place depends on no byte before or behind the match, so that
  the borders of what was read don't matter: no anchors, no look-around;
- a client can't make it slow.  One attempt at one place tests a byte at most
  `MAX_STEPS` times, and there are at most `MAX_WAYS` ways to match: the product of
  those of its parts, where a repeat has one for each count and a `|` one for each
  branch.  A repeat of single bytes at the very end has no part behind it that could
  fail, and counts as one way.

To find what a match may begin with at the end of what was read, an expression for its
beginnings is written: for `abc` it is `(?:\Z|a(?:\Z|b\Z))`.  It matches where all bytes
to the end are the beginning of a match that needs at least one more.

The parser is :mod:`re._parser`, which Python does not promise to keep; it is used here
and nowhere else.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import attrs

#: The most bytes that a match has.
MAX_WIDTH = 16 << 10

#: The most ways to match.
MAX_WAYS = 1000

#: The most tests of a byte in an attempt at one place: 1 to 20 microseconds.
MAX_STEPS = 2048

#: What has no place in a stream, by what the parser calls it.
_REFUSED = {
    "AT": r"an anchor (^, $, \A, \Z, \b): a stream has no lines and no end to stand at",
    "ASSERT": "look-around: what was passed on, or comes later, can't be looked at",
    "ASSERT_NOT": "look-around: what was passed on, or comes later, can't be looked at",
    "FAILURE": "look-around: what was passed on, or comes later, can't be looked at",
    "GROUPREF": "a back-reference: write what it stands for",
    "GROUPREF_EXISTS": "a condition: write both cases, with |",
    "ATOMIC_GROUP": "an atomic group: write a plain one, (?:…)",
    "POSSESSIVE_REPEAT": "a possessive repeat: write a plain one, {m,n}",
}
_BYTE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}

#: An expression that matches nothing at all.
_NEVER = "(?!)"


@attrs.frozen
class Bounds:
    """What is known of an expression, or a part of one.

    :ivar least: the fewest bytes that it matches.
    :ivar width: the most.
    :ivar ways: in how many ways it may match.
    :ivar steps: how often an attempt at one place tests a byte, at most.
    """

    least: int
    width: int
    ways: int
    steps: int


@attrs.frozen
class Expression:
    """One that may be looked for.

    :ivar bounds: of it.
    :ivar source: the same expression, without groups and without global flags.
    :ivar beginning: matches the beginning of a match at the end of the data; it may
        match no bytes at the very end, too.
    :ivar first: a set of bytes, as an expression: all that a match may begin with.
    """

    bounds: Bounds
    source: bytes
    beginning: bytes
    first: bytes


def compile_expression(source: bytes) -> re.Pattern[bytes]:
    """Compile an expression.

    :raises ValueError: it does not compile, or is not what it seems.
    """
    try:
        with warnings.catch_warnings():
            # Of nested sets: what they mean is to change.
            warnings.simplefilter("error")
            return re.compile(source)
    except (re.error, RecursionError, OverflowError, Warning) as problem:
        raise ValueError(f"it does not compile: {problem}") from None


def read_expression(compiled: re.Pattern[bytes]) -> Expression:
    """Read an expression that is to be looked for.

    :raises ValueError: it may not; the message says why, and what to write.
    """
    if compiled.flags & re.LOCALE:
        raise ValueError("it depends on a locale, by (?L): name the bytes")
    try:
        tree = _parser().parse(compiled.pattern, compiled.flags)
        bounds = _measure(tree, last=True)
        if not bounds.least:
            raise ValueError("it matches nothing, too: it must need one byte at least")
        flags = _flags(compiled.flags)
        source = f"(?{flags}:{_write(tree)})"
        beginning = f"(?{flags}:{_write_beginning(tree)})"
        first = _write_first(f"(?{flags}:{'|'.join(_find_first(tree))})")
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None
    return Expression(bounds, source.encode(), beginning.encode(), first.encode())


def _parser() -> Any:
    """Python's parser of expressions.

    :raises ValueError: there is none.
    """
    try:
        found = importlib.import_module("re._parser")
        found.parse  # noqa: B018
    except (ImportError, AttributeError):
        raise ValueError(
            "this Python does not say what a regular expression is made of (it has no"
            " re._parser): look for plain bytes, or use Python 3.11 to 3.13"
        ) from None
    return found


# -- how much it may be


def _measure(items: Any, *, last: bool = False) -> Bounds:
    """The bounds of a sequence.

    :param last: nothing follows it.
    """
    least = width = steps = 0
    ways = 1
    for place, (op, value) in enumerate(items, 1):
        part = _measure_item(str(op), value, last=last and place == len(items))
        least += part.least
        width += part.width
        steps += ways * part.steps
        ways *= part.ways
        # As soon as it is too much: the numbers could become too long to work with.
        _check(width, ways, steps)
    return Bounds(least, width, ways, steps)


def _measure_item(op: str, value: Any, *, last: bool) -> Bounds:
    if op in _BYTE:
        return Bounds(1, 1, 1, 1)
    if op == "SUBPATTERN":
        return _measure(value[-1])
    if op == "BRANCH":
        parts = [_measure(each) for each in value[1]]
        return Bounds(
            least=min(part.least for part in parts),
            width=max(part.width for part in parts),
            ways=sum(part.ways for part in parts),
            steps=sum(part.steps for part in parts),
        )
    if op in _REPEATS:
        return _measure_repeat(*value, last=last)
    raise ValueError(f"it has {_REFUSED.get(op, f'what no stream can have ({op})')}")


def _measure_repeat(fewest: int, most: int, items: Any, *, last: bool) -> Bounds:
    if str(most) == "MAXREPEAT":
        raise ValueError(
            "it has a repeat without a bound (*, + or {n,}): write {0,N}, {1,N} or"
            f" {{n,N}}; a match may have {MAX_WIDTH} bytes"
        )
    part = _measure(items)
    least, width = part.least * fewest, part.width * most
    if last and _is_byte(items):
        return Bounds(least, width, ways=1, steps=fewest)
    _check(width, 1, 0)
    if part.ways == 1:
        return Bounds(least, width, ways=most - fewest + 1, steps=part.steps * most)
    ways = steps = 0
    once = 1
    for count in range(most + 1):
        if count >= fewest:
            ways += once
        if count < most:
            steps += once * part.steps
            once *= part.ways
        _check(width, max(ways, once), steps)
    return Bounds(least, width, ways, steps)


def _check(width: int, ways: int, steps: int) -> None:
    if width > MAX_WIDTH:
        raise ValueError(f"its matches may have more than {MAX_WIDTH} bytes")
    if ways > MAX_WAYS:
        raise ValueError(
            f"there are more than {MAX_WAYS} ways to match it, which a client could"
            " make use of: allow for less in its repeats, or for fewer of them"
        )
    if steps > MAX_STEPS:
        raise ValueError(
            f"an attempt to match it may take more than {MAX_STEPS} steps, which a"
            " client could make use of: make it shorter"
        )


def _is_byte(items: Any) -> bool:
    """Whether it is one byte, whichever."""
    return len(items) == 1 and str(items[0][0]) in _BYTE


# -- as text again


def _flags(flags: int) -> str:
    """Those that say what a byte matches."""
    return "".join(
        letter
        for letter, flag in (("i", re.IGNORECASE), ("s", re.DOTALL))
        if flags & flag
    )


def _write(items: Any) -> str:
    return "".join([_write_item(str(op), value) for op, value in items])


def _write_item(op: str, value: Any) -> str:
    if op == "SUBPATTERN":
        return _group(value, _write(value[-1]))
    if op == "BRANCH":
        return f"(?:{'|'.join([_write(each) for each in value[1]])})"
    if op in _REPEATS:
        fewest, most, items = value
        lazy = "?" if op == "MIN_REPEAT" else ""
        return f"(?:{_write(items)}){{{fewest},{most}}}{lazy}"
    return _write_byte(op, value)


def _group(value: Any, inside: str) -> str:
    _, added, removed, _ = value
    less = _flags(removed)
    return f"(?{_flags(added)}{f'-{less}' if less else ''}:{inside})"


def _write_byte(op: str, value: Any) -> str:
    if op == "ANY":
        return "."
    if op == "LITERAL":
        return f"\\x{value:02x}"
    if op == "NOT_LITERAL":
        return f"[^\\x{value:02x}]"
    return f"[{''.join(_write_set(value))}]"


def _write_set(items: Any) -> Iterator[str]:
    for op, value in items:
        kind = str(op)
        if kind == "NEGATE":
            yield "^"
        elif kind == "RANGE":
            yield f"\\x{value[0]:02x}-\\x{value[1]:02x}"
        elif kind == "CATEGORY":
            yield _CATEGORIES[str(value)]
        else:
            yield f"\\x{value:02x}"


def _write_beginning(items: Any) -> str:
    """What matches all proper beginnings of a sequence that end with the data."""
    if not _width(items):
        return _NEVER
    if len(items) == 1:
        return _write_beginning_of(*items[0])
    # By halves, so that it is neither deep nor long.
    half = len(items) // 2
    before, behind = items[:half], items[half:]
    first, second = _write_beginning(before), _write_beginning(behind)
    return f"(?:{first}|{_write(before)}{second})"


def _write_beginning_of(op: Any, value: Any) -> str:
    kind = str(op)
    if kind == "SUBPATTERN":
        return _group(value, _write_beginning(value[-1]))
    if kind == "BRANCH":
        return f"(?:{'|'.join([_write_beginning(each) for each in value[1]])})"
    if kind in _REPEATS:
        _, most, items = value
        if _is_byte(items):
            # Fewer bytes than there are lead to no end of the data: no way back.
            return rf"{_write(items)}{{0,{most - 1}}}+\Z"
        return f"(?:{_write(items)}){{0,{most - 1}}}{_write_beginning(items)}"
    return r"\Z"


def _find_first(items: Any) -> Iterator[str]:
    """What matches the first bytes of a sequence, one by one."""
    for place, (op, value) in enumerate(items):
        kind = str(op)
        if kind == "SUBPATTERN":
            yield from [_group(value, each) for each in _find_first(value[-1])]
        elif kind == "BRANCH":
            for each in value[1]:
                yield from _find_first(each)
        elif kind in _REPEATS:
            if value[1]:
                yield from _find_first(value[2])
        else:
            yield _write_byte(kind, value)
        if items[place : place + 1].getwidth()[0]:
            break


def _write_first(one_of: str) -> str:
    """The set of the bytes that match."""
    matches = re.compile(one_of.encode()).match
    found = [f"\\x{byte:02x}" for byte in range(256) if matches(bytes([byte]))]
    # One that matches nothing has none, and no set is empty.
    return f"[{''.join(found)}]" if found else _NEVER


def _width(items: Any) -> int:
    return int(items.getwidth()[1])
