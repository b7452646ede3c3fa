"""How fast a direction of a session is read: what a leg, or its transport, asks.

A direction whose bandwidth is limited has a `pace`
(:class:`relayd.core.session.PacedDirection`).  Whoever reads its source asks it how
many bytes may be read now, and tells it how many were read; a source that may not be
read waits, paused, until the pace resumes it.  Nothing is dropped, and nothing kept:
what waits, waits in the kernel.
"""

from __future__ import annotations

from typing import Protocol


class Paused(Protocol):
    """What a pace pauses and resumes: a leg (:class:`relayd.stream.legs.Leg`)."""

    def pause(self, reason: int) -> None:
        """Stop reading."""

    def resume(self, reason: int) -> None:
        """This reason holds no longer."""


class Pace(Protocol):
    """How fast one direction of one session may be read."""

    @property
    def quantum(self) -> float:
        """About how many bytes may be read at once."""

    def follow(self, leg: Paused) -> None:
        """This is what is read, and what is paused."""

    def grant(self, most: int) -> int:
        """How many bytes may be read now, `most` at most; 0: it is to wait."""

    def spend(self, count: int) -> None:
        """So many bytes were read; more than were granted are made up for later."""

    def rest(self) -> None:
        """There is nothing more to read now; others may have what is left."""

    def wait(self) -> None:
        """Nothing was granted: pause, until something is."""

    def lift(self) -> None:
        """There is no limit any more: what is left is read as fast as it can be."""
