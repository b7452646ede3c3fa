"""What one check has found, and what follows from several: rise and fall.

No timer and no I/O: :mod:`relayd.upstreams.checks` asks, this judges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred

from relayd.core import pool_settings
from relayd.core.errors import RelayError


class CannotCheck(RelayError):
    """It is not the server's fault: this process has no descriptor or port left."""


class Checked(Protocol):
    """A server, as far as its checks go."""

    def checked(self, up: bool, why: str, weight: int | None = None) -> None:
        """It is up, or down, or has another weight than before."""


@attrs.frozen
class Verdict:
    """What one check has found.

    :ivar why: in words.
    :ivar weight: None: the server's own.
    """

    up: bool
    why: str
    weight: int | None = None


@attrs.frozen(kw_only=True)
class Schedule:
    """When a server is checked, and what follows.

    :ivar every: seconds from one check to the next, more than 0.
    :ivar timeout: seconds that a check may take, more than 0.
    :ivar rise: successes in a row after which a server is up.
    :ivar fall: failures in a row after which it is down.
    """

    every: float = pool_settings.CHECK_EVERY.default
    timeout: float = pool_settings.CHECK_TIMEOUT.default
    rise: int = pool_settings.RISE.default
    fall: int = pool_settings.FALL.default

    def __attrs_post_init__(self) -> None:
        if not (self.every > 0 and self.timeout > 0):
            raise ValueError("the times of a check are more than 0")
        if self.rise < 1 or self.fall < 1:
            raise ValueError("rise and fall are at least 1")


@attrs.define(eq=False)
class Watched:
    """One server.

    :ivar at: when it is due; while its check is under way, when that must have ended.
    :ivar run: the check that is under way.
    :ivar stuck: it was cancelled, and has not ended.
    :ivar note: is told of each check, if the server wants to know of those that change
        nothing.
    :ivar in_row: how many checks in a row have had the outcome of the last one.
    """

    server: Checked
    check: Callable[[], Any]
    schedule: Schedule
    own_weight: int
    at: float = 0.0
    due: float = 0.0
    is_waiting: bool = False
    run: Deferred[Any] | None = None
    stuck: bool = False
    #: What the server was told.
    up: bool = True
    weight: int | None = None
    last: bool | None = None
    in_row: int = 0
    note: Callable[[float, bool, str], object] | None = attrs.field(init=False)

    @note.default
    def _find_note(self) -> Callable[[float, bool, str], object] | None:
        noted: Callable[[float, bool, str], object] | None
        noted = getattr(self.server, "noted", None)
        return noted

    def judge(self, verdict: Verdict) -> None:
        """Tell the server, if that changes something."""
        server: Any = self.server
        # It may have taken the place of one that was judged.
        first = self.last is None and not getattr(server, "was_judged", False)
        self.up = getattr(server, "checked_up", self.up)
        self.in_row = self.in_row + 1 if verdict.up is self.last else 1
        self.last = verdict.up
        changed = False
        if verdict.up is not self.up:
            needed = self.schedule.rise if verdict.up else self.schedule.fall
            changed = first or self.in_row >= needed
        elif verdict.up:
            changed = verdict.weight != self.weight
        if changed:
            self.up = verdict.up
            weight = None
            if verdict.up and verdict.weight != self.weight:
                self.weight = verdict.weight
                weight = self.own_weight if self.weight is None else self.weight
            self.server.checked(self.up, verdict.why, weight)
