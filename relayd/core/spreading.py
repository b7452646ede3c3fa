"""Ends idle sessions little by little, over the time that a drain has.

Sessions that are idle will not finish by themselves.  If all of them were ended when
the drain's time is over, their clients would come back at the same moment, all to the
relays that are left.  So in each of some hundred steps a share is ended, such that as
many are left to each later step.  Those that have been idle for longest go first; those
in use keep the whole time.

Of some it can't be told whether they are idle.  They are left alone in the first half
of the time, and count as idle in the second: at its end they would be ended anyway, all
at once.

A step ends no more than its share, and looks at no more than LOOKS beyond those that it
ends.  All members are gone through now and then only, which is cheap: that finds those
which have been quiet.  Whether one of them really is idle is asked when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Generic, TypeVar

import attrs
from twisted.logger import Logger

log = Logger(namespace="relayd.registry")

Member = TypeVar("Member")

#: Into how many steps a drain is divided, and seconds that a step has.
STEPS, SHORTEST, LONGEST = 100, 0.02, 1.0

#: Seconds after which what is quiet is idle; a quarter of a drain that is shorter.
IDLE_AFTER = 5.0

#: Seconds, at least, from one time that all members are gone through to the next.
SEARCH_EVERY = 1.0

#: How many that turn out to be in use are looked at in a step.
LOOKS = 256


@attrs.frozen
class Idleness(Generic[Member]):
    """How idle members are found and ended.

    :ivar since: when something has moved last, as far as is known without asking
        anybody, in seconds on the registry's clock; None: the member is in use.
    :ivar end: ends a member if nothing has moved for so many seconds; whether it did.
        If it can't be told, the last argument says whether the member counts as idle.
    """

    since: Callable[[Member], float | None]
    end: Callable[[Member, float, bool], bool]


class Spread(Generic[Member]):
    """The idle members of one drain.

    :param members: those that live; gone through again and again.
    :param idleness: of a member.
    :param begins: when the drain began, in seconds.
    :param limit: the seconds that it has.

    :ivar step: seconds from one :meth:`end_some` to the next.
    """

    def __init__(
        self,
        members: Iterable[Member],
        idleness: Idleness[Member],
        begins: float,
        limit: float,
    ) -> None:
        self._members = members
        self._idleness = idleness
        self._ends = begins + limit
        self._idle_after = min(IDLE_AFTER, limit / 4)
        #: From when on those count as idle of whom it can't be told; and whether it is.
        self._half = begins + limit / 2
        self._in_doubt = False
        self.step = min(max(limit / STEPS, SHORTEST), LONGEST)
        self._search_every = max(SEARCH_EVERY, self.step)
        self._search_at = begins
        #: Those that may be idle, and since when: the longest last.
        self._quiet: list[tuple[float, Member]] = []
        #: Those that were quiet since then, and in use all the same.
        self._in_use: dict[Member, float] = {}
        #: Those that failed to end.
        self._broken: set[Member] = set()
        #: How many should have been ended by now, less those that were.
        self._due = 0.0

    def end_some(self, now: float) -> None:
        """End this step's share."""
        if now >= self._half and not self._in_doubt:
            self._in_doubt = True
            self._in_use.clear()
            self._search_at = now
        if now >= self._search_at:
            self._search(now)
        # This one, and those that follow.
        steps = max(round((self._ends - now) / self.step), 1)
        self._due += (len(self._quiet) - self._due) / steps
        looks = LOOKS
        # Each in the middle of its own part of the time.
        while self._quiet and self._due >= 0.5 and looks > 0:
            since, member = self._quiet.pop()
            if self._end(member):
                self._due -= 1.0
            else:
                self._in_use[member] = since
                looks -= 1

    def _end(self, member: Member) -> bool:
        try:
            return self._idleness.end(member, self._idle_after, self._in_doubt)
        except Exception:
            log.failure("an idle member could not be ended")
            self._broken.add(member)
            return False

    def _search(self, now: float) -> None:
        """Go through all members."""
        self._search_at = now + self._search_every
        since_of, before = self._idleness.since, now - self._idle_after
        used, self._in_use = self._in_use, {}
        quiet = []
        for member in self._members:
            since = since_of(member)
            if since is None or since > before or member in self._broken:
                continue
            if used and used.get(member) == since:
                # Nothing has moved since then.
                self._in_use[member] = since
            else:
                quiet.append((since, member))
        quiet.sort(key=itemgetter(0), reverse=True)
        self._quiet = quiet
