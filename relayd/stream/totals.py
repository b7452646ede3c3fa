"""What is counted of the sessions of one relay, whichever factories serve them.

A relay may have several factories: one for each port of a range, and, when its settings
have changed while it runs, those from before beside those from after.  All of them
count in one :class:`Totals`, so that no total goes back when a factory is replaced.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from relayd.core.counts import Tally


class Totals:
    """The totals of a relay since it was first made.

    :ivar endings: see :class:`relayd.stream.relay.StreamRelay`; `refusals` and `silent`
        likewise.
    :ivar retried: dials that failed and were followed by another.
    :ivar waited: how often sessions had to wait for their bandwidth; None: it never was
        limited, or not by ours.
    """

    __slots__ = ("endings", "refusals", "retried", "silent", "waited")

    def __init__(self, waited: Tally | None = None) -> None:
        self.endings: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.silent = 0
        self.retried = Tally()
        self.waited = waited

    def count_waits(self, bandwidth: Any) -> None:
        """Count those of another bandwidth, too."""
        if self.waited is None:
            self.waited = getattr(bandwidth, "tally", None)
        else:
            bandwidth.tally = self.waited

    @property
    def waits(self) -> int:
        """What has `waited`, as a :class:`relayd.stream.relay.Bandwidth` says it."""
        return 0 if self.waited is None else self.waited.count
