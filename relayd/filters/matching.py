"""Matches in a stream, whatever the pieces that it comes in.

A needle is what is looked for: bytes, or a regular expression whose width is bounded
(:mod:`relayd.filters.expressions`).  It cuts what was read at its matches, the leftmost
first and none over another: what `bytes.replace` and `re.sub` would find in the whole.

Whether there is a match at a place, and which, depends on the bytes from there on, as
many as the needle is wide.  So a place is decided once those are there, or once no
longer match could begin there; what is from the first undecided place on is kept, less
than the width, and comes back in front of the next piece.

A place is looked at once or twice on the way, and then once in each piece for as long
as it is the first that is undecided.  Where there is nothing to be found, a piece is
searched once, and its last bytes for a beginning; nothing is copied.
"""

from __future__ import annotations

import re
from typing import Protocol

from relayd.filters.expressions import MAX_WIDTH, read_expression

#: Seconds that a step of an expression may take, and a piece that is looked through.
STEP_SECONDS, PIECE_SECONDS = 10e-9, 0.001

#: The largest piece, in bytes.
LARGEST = 65536

#: Cut pieces: those before, between and behind the matches, and what is undecided.
Cut = tuple[list[bytes], bytes]


class Needle(Protocol):
    """What is looked for.

    :ivar width: the most bytes that a match has.
    :ivar least: the fewest, at least one.
    :ivar at_once: how many bytes are looked through at once.
    """

    @property
    def width(self) -> int: ...

    @property
    def least(self) -> int: ...

    @property
    def at_once(self) -> int: ...

    def cut(self, data: bytes, *, final: bool = False) -> Cut | None:
        """Cut out the matches.

        :param data: what was undecided, and what has come.
        :param final: no more comes: nothing is undecided.
        :return: the pieces, one more than there are matches, and what is undecided;
            None: it is all of one piece.
        """

    def find(self, data: bytes, *, final: bool = False) -> Cut | None:
        """Cut at the first match only; it need not be known how far that one reaches.

        :return: as `cut`, with two pieces if there is a match: what is before, and
            nothing.
        """


def needle_of(pattern: bytes | re.Pattern[bytes]) -> Needle:
    """The needle for a pattern.

    :raises ValueError: it may not be looked for; the message says why.
    """
    if isinstance(pattern, re.Pattern):
        if isinstance(pattern.pattern, bytes):
            return Regex(pattern)
    elif isinstance(pattern, bytes):
        return Literal(pattern)
    raise ValueError(f"{pattern!r} is no bytes, and no regular expression of bytes")


class Literal:
    """Bytes, as they are."""

    def __init__(self, wanted: bytes) -> None:
        if not 1 <= len(wanted) <= MAX_WIDTH:
            raise ValueError(f"it has 1 to {MAX_WIDTH} bytes, not {len(wanted)}")
        self._wanted = wanted
        self._first = wanted[0]
        self.width = self.least = len(wanted)
        self.at_once = LARGEST

    def cut(self, data: bytes, *, final: bool = False) -> Cut | None:
        """See :meth:`Needle.cut`."""
        pieces = data.split(self._wanted)
        place = -1 if final else self._begun(pieces[-1])
        if place >= 0:
            last = pieces[-1]
            pieces[-1] = last[:place]
            return pieces, last[place:]
        return (pieces, b"") if len(pieces) > 1 else None

    def find(self, data: bytes, *, final: bool = False) -> Cut | None:
        """See :meth:`Needle.find`."""
        place = data.find(self._wanted)
        if place >= 0:
            return [data[:place], b""], b""
        place = -1 if final else self._begun(data)
        return ([data[:place]], data[place:]) if place >= 0 else None

    def _begun(self, data: bytes) -> int:
        """Where it begins at the end of what has none of it; -1: nowhere."""
        wanted = self._wanted
        place = data.find(self._first, max(0, len(data) - self.width + 1))
        while place >= 0 and not wanted.startswith(data[place:]):
            place = data.find(self._first, place + 1)
        return place


class Regex:
    """What a regular expression matches."""

    def __init__(self, wanted: re.Pattern[bytes]) -> None:
        expression = read_expression(wanted)
        self._wanted = wanted
        self.width = expression.bounds.width
        self.least = expression.bounds.least
        # Of a hostile client's bytes; a piece that is no wider than a match is searched
        # for beginnings, which is slow.
        often = int(PIECE_SECONDS / STEP_SECONDS / expression.bounds.steps)
        self.at_once = min(max(often, 4 * self.width), LARGEST)
        undecided, match = expression.beginning, b"(%b)" % expression.source
        self._next = _search(expression.first, b"%b|%b" % (undecided, match))
        self._first = _search(expression.first, b"%b|%b" % (match, undecided))

    def cut(self, data: bytes, *, final: bool = False) -> Cut | None:
        """See :meth:`Needle.cut`."""
        pieces: list[bytes] = []
        size, at, place = len(data), 0, 0
        decided = size if final else size - self.width
        # The expression itself is the fastest, and looks at all places to the end,
        # which is well spent if half of them are decided.
        if final or decided >= self.width:
            for match in self._wanted.finditer(data):
                if match.start() > decided:
                    break
                pieces.append(data[at : match.start()])
                at = match.end()
            place = max(at, decided + 1)
        while place < size:
            found = self._next.search(data, place)
            if found is None:
                break
            start = found.start()
            pieces.append(data[at:start])
            if found.lastindex is None:
                return pieces, data[start:]
            at = place = found.end(1)
        if not pieces:
            return None
        pieces.append(data[at:])
        return pieces, b""

    def find(self, data: bytes, *, final: bool = False) -> Cut | None:
        """See :meth:`Needle.find`."""
        size, place = len(data), 0
        decided = size if final else size - self.width
        if final or decided >= self.width:
            match = self._wanted.search(data)
            if match is not None and match.start() <= decided:
                return [data[: match.start()], b""], b""
            place = decided + 1
        found = self._first.search(data, place) if place < size else None
        if found is None:
            return None
        start = found.start()
        if found.lastindex is None:
            return [data[:start]], data[start:]
        return [data[:start], b""], b""


def _search(first: bytes, either: bytes) -> re.Pattern[bytes]:
    """What finds the first place that is undecided or has a match.

    It starts there; group 1 is the match, if there is one.

    :param first: a set: only these bytes are worth a try.
    """
    # Python is quick to find a byte of a set that an expression begins with, and tries
    # the rest there.  The rest begins one byte back: so it looks behind that byte.
    return re.compile(b"%b(?<=(?=%b)%b)" % (first, either, first))
