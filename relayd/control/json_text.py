"""JSON as strangers send it, and as long answers are written.

RFC 8259, and stricter where it leaves room: a key stands once in its object, numbers
are numbers (no NaN, nothing too large for one), and text is whole characters.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from relayd.control.steering import Json

#: How many levels of lists and objects there may be in each other.
DEEPEST = 16

#: Items of a list that are written in one piece: a fraction of a millisecond.
PIECE = 100


def load(body: bytes) -> Any:
    """The value that a body says.

    :raises ValueError: it is not JSON, or not ours; a few words say why.
    """
    try:
        value = json.loads(
            body.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_number,
            parse_float=_float,
            parse_int=_int,
        )
        _check(value)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise ValueError(f"{problem.msg} ({where})") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return value


_TOO_DEEP = f"more than {DEEPEST} objects or lists in each other"


def _check(value: Any) -> None:
    """Check what is in a value; without recursion, as a stranger says how deep."""
    level = [value]
    for depth in range(DEEPEST + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict | list):
                if depth == DEEPEST:
                    raise ValueError(_TOO_DEEP)
                below += each
                below += each.values() if isinstance(each, dict) else ()
            elif isinstance(each, str) and not _is_whole(each):
                raise ValueError("half of a character (a lone surrogate)")
        level = below


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:64]!r} stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a number has too many digits") from None


def pieces(answer: Json) -> Iterator[bytes]:
    """The text of an answer, each piece of which is made at once.

    It is ASCII on one line, with a line feed at its end.

    :raises ValueError: it is no JSON: a defect of who made it; so is TypeError.
    """
    before = "{"
    for key, value in answer.items():
        start = f"{before}{_dumps(key)}: "
        before = ", "
        if not isinstance(value, list) or len(value) <= PIECE:
            yield f"{start}{_dumps(value)}".encode()
            continue
        for first in range(0, len(value), PIECE):
            text = _dumps(value[first : first + PIECE])[1:-1]
            yield f"{start if not first else ', '}{'' if first else '['}{text}".encode()
        yield b"]"
    yield b"}\n" if answer else b"{}\n"


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
