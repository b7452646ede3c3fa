"""What limits one session alone: a route says it of each (`conn.limit`).

- Bytes: buckets of its own, beside those of its relay.
- Time: a lifetime of its own.
- Sessions that have a key together: so many at once.  The keys are a table of those
  whose sessions live, and no others: it is no longer than there are sessions.

Factories that follow each other as one relay have one of these together, so that a
reload forgets no session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from relayd.core.errors import Refused
from relayd.core.interfaces import ILease

if TYPE_CHECKING:
    from relayd.admission.bandwidth import Bandwidth
    from relayd.admission.lifetimes import Lifetime

#: Characters of a key that a refusal quotes.
_QUOTED = 60


@implementer(ILease)
class _Counted:
    """One session of a key; it can be given back once."""

    __slots__ = ("_counts", "_key")

    def __init__(self, counts: dict[str, int], key: str) -> None:
        self._counts: dict[str, int] | None = counts
        self._key = key
        counts[key] = counts.get(key, 0) + 1

    def release(self) -> None:
        """See :meth:`ILease.release`."""
        counts, self._counts = self._counts, None
        if counts is not None:
            counts[self._key] -= 1
            if not counts[self._key]:
                del counts[self._key]


class OwnLimits:
    """Makes the limits of the single sessions of one relay.

    :param clock: monotonic seconds, and a timer while sessions wait.

    :ivar counts: how many sessions live of each key that is limited.
    :ivar refused: how many were refused as there were as many as there may be.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._bandwidth: Bandwidth | None = None
        self.counts: dict[str, int] = {}
        self.refused = 0

    @property
    def bandwidth(self) -> Bandwidth:
        """See :attr:`relayd.stream.relay.OwnLimits.bandwidth`."""
        if self._bandwidth is None:
            # Most relays need neither this nor lifetimes.
            from relayd.admission.bandwidth import Bandwidth

            self._bandwidth = Bandwidth(clock=self._clock)
        return self._bandwidth

    def enter(self, key: str, most: int) -> ILease:
        """Count a session that has a key.

        :param most: how many there may be of that key, this one included.
        :return: to be released when it is over.
        :raises Refused: there are so many.
        :raises ValueError: `most` is less than 1.
        """
        if most < 1:
            raise ValueError(f"a limit of sessions is at least 1: {most!r}")
        if self.counts.get(key, 0) >= most:
            self.refused += 1
            shown = key if len(key) <= _QUOTED else key[:_QUOTED] + "..."
            raise Refused(f"the limit of sessions of {shown!r} is reached: {most}")
        return _Counted(self.counts, key)

    def lifetime(self, max_age: float) -> Lifetime:
        """How long a session may last.

        :param max_age: seconds; as of :class:`relayd.admission.lifetimes.Lifetime`.
        :raises ValueError: it is negative.
        """
        from relayd.admission.lifetimes import Lifetime

        return Lifetime(max_age, said="the route's max_age")
