"""How long sessions may last: `--max-age`, and `--hours-end`.

A relay asks about each session that is relayed once a tick, so there is no timer here.
Sessions that began together don't end together: each has up to a tenth less than the
whole time, in an order that spreads them evenly.
"""

from __future__ import annotations

from relayd.admission.hours import OpeningHours
from relayd.core import admission_settings
from relayd.core.session import Ending, Session

#: The part of their time that sessions may lack.
JITTER = 0.1

#: The golden ratio: multiples of it, without their whole parts, are spread evenly.
_GOLDEN = 0.618033988749895


class Lifetime:
    """When sessions are ended.

    :param max_age: the seconds that a session may last; 0 is for ever.
    :param hours: sessions end when these do; None: they don't.
    :param said: what has said `max_age`, for the log.
    :raises ValueError: `max_age` is negative.
    """

    def __init__(
        self,
        max_age: float = admission_settings.MAX_AGE.default,
        hours: OpeningHours | None = None,
        said: str = "--max-age",
    ) -> None:
        if not max_age >= 0:
            raise ValueError(f"max_age must not be negative: {max_age!r}")
        self._max_age = max_age
        self._hours = hours
        self._said = said

    def over(self, session: Session, now: float) -> tuple[Ending, str] | None:
        """Whether a session is to end; how, and why.

        :param now: seconds on the relay's clock.
        """
        if self._hours is not None and not self._hours.is_open():
            return Ending.HOURS, f"outside {self._hours}"
        # The time for which it waited in a queue is not its own.
        began = session.connected_at or session.opened_at
        if self._max_age and now - began >= self.age_of(session):
            return Ending.MAX_AGE, f"{self._said} {self._max_age:g}"
        return None

    def age_of(self, session: Session) -> float:
        """The seconds that one session may last."""
        return self._max_age * (1 - JITTER * (session.id * _GOLDEN % 1))

    def flows_end(self) -> bool:
        """Whether the flows of a UDP relay are to end."""
        return self._hours is not None and not self._hours.is_open()
