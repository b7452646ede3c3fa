"""Which bridge has filters, and which is the same without.

A relay chooses when it is made, and a living session becomes the other one when it gets
its first filter, or its last one leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relayd.core.filtering import IFilterFactory
from relayd.stream.bridge import Bridge
from relayd.stream.closing_bridge import ClosingBridge
from relayd.stream.filtered_bridge import FilteredBridge
from relayd.stream.legs import Leg


class FilteredClosingBridge(FilteredBridge, ClosingBridge):
    """That of `--half-close off`: the first end closes both, once it has passed."""

    __slots__ = ()

    plain = ClosingBridge

    def eof(self, leg: Leg) -> None:
        """`leg` has read its last byte."""
        if self.session.ending is not None:
            FilteredBridge.eof(self, leg)
        elif leg.chain is not None and self.first is None:
            leg.chain.end()
        else:
            ClosingBridge.eof(self, leg)

    def _end_with(self, first: Leg) -> None:
        other: Leg = first.peer
        self._drop_chain(first)
        if other.chain is not None:
            # What it holds is for the first one, which is closed behind it.
            other.chain.flush()
            if self.session.ending is not None:
                # A filter has ended it.
                return
            other.chain = None
        for leg in self.legs:
            if leg.spliced:
                leg.transport.unsplice()
                leg.spliced = False
        super()._end_with(first)
        if other.direction.eof and other.alive and self.session.ending is None:
            # It has ended while the filters held the first end back.
            self.closing = True
            other.close()


#: What a bridge becomes with filters.
FILTERED: dict[type[Bridge], type[FilteredBridge]] = {
    each.plain: each for each in (FilteredBridge, FilteredClosingBridge)
}


def with_filters(kind: type[Bridge]) -> type[FilteredBridge]:
    """What joins two legs as this one does, with filters.

    :raises TypeError: it is one of a program's own, which has none.
    """
    plain = getattr(kind, "plain", kind)
    if plain not in FILTERED:
        raise TypeError(f"{plain.__name__} has no filters")
    return FILTERED[plain]


def change_filters(
    bridge: Bridge, gone: Sequence[IFilterFactory], new: Sequence[IFilterFactory]
) -> None:
    """Take filters off a session that is relayed, and put others on it.

    :raises TypeError: it is joined in a way of its own, which has no filters.
    """
    if gone and isinstance(bridge, FilteredBridge):
        bridge.take_off(gone)
    if not new or bridge.session.ending is not None or bridge.closing:
        return
    if bridge.first is not None:
        # It closes, and passes on nothing more.
        return
    filtered: Any = bridge
    if not isinstance(bridge, FilteredBridge):
        bridge.__class__ = with_filters(type(bridge))
        filtered.unjoin()
    filtered.put_on(new)
