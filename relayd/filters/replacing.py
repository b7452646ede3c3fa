r"""Bytes that are replaced, and bytes that end their session.

    replace:old=http://,new=https://,direction=down
    replace:old=re:(?i)server: [^\r\n]{1\,200},new=Server: relay
    deny:pattern=/admin,direction=up

`replace` passes on other bytes for each match.  `deny` passes on what comes before one,
nothing of it, and resets both connections.

What may be the beginning of a match is kept until it is decided, but no longer than
`wait`: whoever waits for an answer to just that must not hang.  Then `replace` passes
it on, as if the data ended there; `deny` passes it on and remembers it, so that the
last byte of a match never passes, however slowly it comes.  With a `wait` of 0 it is
kept for as long as it takes, and nothing of a match ever passes.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import attrs
from twisted.internet.interfaces import IDelayedCall

from relayd.core.filtering import EndSession, Filter, FilterFactory, Way
from relayd.filters.matching import Needle, needle_of
from relayd.filters.option_types import Bytes, Milliseconds, Pattern

#: Which way, as an option.
Direction = Literal["up", "down", "both"]

#: How long the beginning of a match is kept, in milliseconds.
WAIT = 200.0

#: How much of a pattern the log quotes, in characters.
_QUOTED = 80


class _Searching(Filter):
    """Keeps what is undecided, for a while.

    :ivar _kept: what is.
    """

    def __init__(self, way: Way, needle: Needle, wait: float) -> None:
        """
        :param wait: in milliseconds.
        """
        # More than half of it held would stop the source, and so the match.
        self.most_held = 2 * needle.width
        self.most_at_once = needle.at_once
        self._way = way
        self._needle = needle
        self._wait = wait / 1000
        self._kept = b""
        self._timer: IDelayedCall | None = None

    def _keep(self, kept: bytes, held: int, came: int) -> None:
        """Keep this much.

        :param held: how much of it was not passed on.
        :param came: how much has come just now.
        """
        self._kept = kept
        older = self.held and held > came
        self.held = held
        if not self._wait or older:
            return
        if not held:
            self._stop()
        elif self._timer is None:
            self._timer = self._way.clock.callLater(self._wait, self._waited)
        else:
            self._timer.reset(self._wait)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self) -> None:
        self._timer = None
        self._give_up()

    def _give_up(self) -> None:
        """What is held was held for long enough."""
        raise NotImplementedError

    def close(self) -> None:
        """See :meth:`relayd.core.filtering.IFilter.close`."""
        self._stop()
        self._kept = b""
        self.held = 0


class Replacing(_Searching):
    """Replaces matches."""

    def __init__(
        self, way: Way, needle: Needle, wait: float, new: bytes, growth: int
    ) -> None:
        super().__init__(way, needle, wait)
        self._new = new
        self.growth = growth

    def data(self, data: bytes) -> bytes:
        """See :meth:`relayd.core.filtering.IFilter.data`."""
        whole = self._kept + data if self._kept else data
        cut = self._needle.cut(whole)
        if cut is None:
            if self._kept:
                self._keep(b"", 0, len(data))
            return whole
        pieces, kept = cut
        if kept or self._kept:
            self._keep(kept, len(kept), len(data))
        return self._new.join(pieces)

    def end(self) -> bytes:
        """See :meth:`relayd.core.filtering.IFilter.end`."""
        kept = self._kept
        self._stop()
        self._keep(b"", 0, 0)
        cut = self._needle.cut(kept, final=True)
        return kept if cut is None else self._new.join(cut[0])

    def _give_up(self) -> None:
        self._way.pass_on(self.end())


class Denying(_Searching):
    """Ends the session at the first match."""

    def __init__(self, way: Way, needle: Needle, wait: float, why: str) -> None:
        super().__init__(way, needle, wait)
        self._why = why

    def data(self, data: bytes) -> bytes:
        """See :meth:`relayd.core.filtering.IFilter.data`."""
        passed = len(self._kept) - self.held
        whole = self._kept + data if self._kept else data
        cut = self._needle.find(whole)
        if cut is None:
            if self._kept:
                self._keep(b"", 0, len(data))
            return whole[passed:]
        pieces, kept = cut
        before = pieces[0]
        if len(pieces) > 1:
            raise EndSession(self._why, before[passed:])
        self._keep(kept, min(len(kept), len(whole) - passed), len(data))
        return before[passed:]

    def end(self) -> bytes:
        """See :meth:`relayd.core.filtering.IFilter.end`."""
        passed = len(self._kept) - self.held
        cut = self._needle.find(self._kept, final=True)
        if cut is not None:
            raise EndSession(self._why, cut[0][0][passed:])
        return self.remove()

    def remove(self) -> bytes:
        """See :meth:`relayd.core.filtering.IFilter.remove`."""
        left = self._kept[len(self._kept) - self.held :]
        self.close()
        return left

    def _give_up(self) -> None:
        kept, held = self._kept, self.held
        cut = self._needle.find(kept, final=True)
        if cut is None:
            self.held = 0
            self._way.pass_on(kept[len(kept) - held :])
            return
        before = cut[0][0][len(kept) - held :]
        self.close()
        if before:
            self._way.pass_on(before)
        self._way.end_session(self._why)


@attrs.frozen
class Replace(FilterFactory):
    """Replaces each match by other bytes.

    :ivar old: what is looked for: bytes, or a compiled expression of bytes.
    :ivar new: what is passed on instead, as it is: no groups.
    :ivar direction: which way.
    :ivar wait: how long the beginning of a match is kept, in milliseconds; 0: for as
        long as it takes.
    :raises ValueError: `old` may not be looked for.
    """

    name = "replace"

    old: Annotated[bytes | re.Pattern[bytes], Pattern()]
    new: Annotated[bytes, Bytes()]
    direction: Direction = "both"
    wait: Annotated[float, Milliseconds()] = WAIT
    _needle: Needle = attrs.field(init=False, eq=False, repr=False)

    @_needle.default
    def _build_needle(self) -> Needle:
        return needle_of(self.old)

    @property
    def growth(self) -> int:  # type: ignore[override]
        """How many bytes come out for one, at most."""
        return max(1, -(-len(self.new) // self._needle.least))

    def build_filter(self, way: Way) -> Replacing | None:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_filter`."""
        if self.direction not in ("both", way.course):
            return None
        return Replacing(way, self._needle, self.wait, self.new, self.growth)


@attrs.frozen
class Deny(FilterFactory):
    """Ends a session at the first match, with a reset.

    :ivar pattern: what is looked for: bytes, or a compiled expression of bytes.
    :ivar direction: which way.
    :ivar wait: how long the beginning of a match is kept, in milliseconds; 0: for as
        long as it takes.
    :raises ValueError: the pattern may not be looked for.
    """

    name = "deny"

    pattern: Annotated[bytes | re.Pattern[bytes], Pattern()]
    direction: Direction = "both"
    wait: Annotated[float, Milliseconds()] = WAIT
    _needle: Needle = attrs.field(init=False, eq=False, repr=False)

    @_needle.default
    def _build_needle(self) -> Needle:
        return needle_of(self.pattern)

    @property
    def why(self) -> str:
        """What the log says of a session that it has ended."""
        text = Pattern().show(self.pattern)
        return f"{text if len(text) <= _QUOTED else f'{text[:_QUOTED]}…'} matched"

    def build_filter(self, way: Way) -> Denying | None:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_filter`."""
        if self.direction not in ("both", way.course):
            return None
        return Denying(way, self._needle, self.wait, self.why)
