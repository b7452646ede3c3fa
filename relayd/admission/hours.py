"""The hours in which new clients are served: `Mon-Fri 08:00-18:00 Europe/Berlin`.

Several of them are read as any of them.  The times are those of the zone's clocks: on
the day when clocks are set back, an hour that comes twice is served twice, and what is
left out when they are set forward is not served.  `22:00-06:00` goes over midnight and
belongs to the day on which it begins; `24:00` is the end of a day.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import attrs

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

EXPECTED = "hours such as 'Mon-Fri 08:00-18:00 Europe/Berlin'"

#: Minutes of a day.
_DAY = 24 * 60

_TIMES = re.compile(r"([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")


@attrs.frozen
class Hours:
    """Times of some days of the week.

    :ivar days: 0 is Monday.
    :ivar begin: minutes from midnight.
    :ivar end: likewise, of the same day, or of the next if it is not later.
    :ivar zone: whose clocks they are.
    :ivar text: how they were written.
    """

    days: frozenset[int]
    begin: int
    end: int
    zone: ZoneInfo
    text: str

    def __str__(self) -> str:
        return self.text

    def include(self, moment: datetime) -> bool:
        """Whether a moment, of any zone, is within them."""
        there = moment.astimezone(self.zone)
        day, minute = there.weekday(), there.hour * 60 + there.minute
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        if minute >= self.begin:
            return day in self.days
        return minute < self.end and (day - 1) % 7 in self.days


def parse_hours(text: str) -> Hours:
    """Days, times and a zone; days or zone may be left out: every day, UTC.

    Days are `Mon`, `Mon-Fri`, `Sat-Mon`, `Mon,Wed-Fri`.  The zone is a name of the IANA
    time zone database.

    :raises ValueError: they are none, or the zone is not known.
    """
    words = text.split()
    at = next((i for i, word in enumerate(words) if ":" in word), -1)
    if at < 0 or at > 1 or len(words) > at + 2:
        raise ValueError(f"expected {EXPECTED}")
    days = _days(words[0]) if at else frozenset(range(7))
    begin, end = _times(words[at])
    name = words[at + 1] if len(words) > at + 1 else "UTC"
    return Hours(days, begin, end, _zone(name), text)


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            low = DAYS.index(first.capitalize())
            high = DAYS.index(last.capitalize()) if dash else low
        except ValueError:
            raise ValueError(
                f"{part!r} is no day: expected {', '.join(DAYS)}, or a range such as"
                " Mon-Fri"
            ) from None
        # Sat-Mon goes over the end of the week.
        found.update((low + i) % 7 for i in range((high - low) % 7 + 1))
    return frozenset(found)


def _times(text: str) -> tuple[int, int]:
    match = _TIMES.fullmatch(text)
    if match:
        hours, minutes, to_hours, to_minutes = map(int, match.groups())
        begin, end = hours * 60 + minutes, to_hours * 60 + to_minutes
        if max(minutes, to_minutes) < 60 and begin < _DAY and end <= _DAY:
            if begin == end:
                raise ValueError(
                    f"{text!r} has no time in it: for a whole day write 00:00-24:00"
                )
            return begin, end
    raise ValueError(f"{text!r} is no range of times: expected one such as 08:00-18:00")


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError):
        raise ValueError(
            f"unknown zone {name!r}: expected a name such as Europe/Berlin"
        ) from None


def utc_now() -> datetime:
    """What the machine's clock says."""
    return datetime.now(UTC)


class OpeningHours:
    """Several hours, any of which will do, and whether it is one of them now.

    This alone goes by the machine's clock: whoever sets that means to.  It is asked
    once a second at most; the second is the monotonic clock's.

    :param hours: at least one.
    :param clock: an `IReactorTime`, for monotonic seconds.
    :param now: what the machine's clock says; for tests.
    """

    def __init__(
        self,
        hours: Iterable[Hours],
        clock: Any,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.hours: Sequence[Hours] = tuple(hours)
        if not self.hours:
            raise ValueError("expected at least one range of hours")
        # Imports Twisted, without which hours are read.
        from relayd.net.monotonic import monotonic

        clock = monotonic(clock)
        self._seconds: Callable[[], float] = clock.seconds
        self._now = now
        self._asked = -math.inf
        self._is_open = False

    def __str__(self) -> str:
        return ", ".join(f"--hours {each.text}" for each in self.hours)

    def include(self, moment: datetime) -> bool:
        """Whether a moment is within any of them."""
        return self.of(moment) is not None

    def of(self, moment: datetime) -> Hours | None:
        """The first of them that a moment is within; None: it is in none."""
        return next((each for each in self.hours if each.include(moment)), None)

    def is_open(self) -> bool:
        """Whether it is one of them now; as of a second ago, at most."""
        seconds = self._seconds()
        if seconds - self._asked >= 1:
            self._asked = seconds
            self._is_open = self.include(self._now())
        return self._is_open
