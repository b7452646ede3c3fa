"""How fast a direction of a session is read: what a leg, or its transport, asks.

A direction whose bandwidth is limited has a `pace`
(:class:`relayd.core.session.PacedDirection`).  Whoever reads its source asks it how
many bytes may be read now, and tells it how many were read; a source that may not be
read waits, paused, until the pace resumes it.  Nothing is dropped, and nothing kept:
what waits, waits in the kernel.

Datagrams don't wait: they pass, or are dropped.
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

    @property
    def shared(self) -> float:
        """The same of what it has together with others."""

    def follow(self, leg: Paused) -> None:
        """This is what is read, and what is paused."""

    def grant(self, most: int) -> int:
        """How many bytes may be read now, `most` at most; 0: it is to wait."""

    def take(self, most: int) -> int:
        """The same, and nobody else may have them; for half a second at most.

        Of what it has together with others, half a quantum at most.

        For who does not read at once.
        """

    def spend(self, count: int) -> None:
        """So many bytes were read; more than were granted are made up for later."""

    def rest(self) -> None:
        """There is nothing more to read now; others may have what is left."""

    def wait(self) -> None:
        """Nothing was granted: pause, until something is."""

    def lift(self) -> None:
        """There is no limit any more: what is left is read as fast as it can be."""


class DatagramLimits(Protocol):
    """What limits the bytes of one flow."""

    def passes_up(self, count: int, *, whole: bool = False) -> bool:
        """Whether bytes for the server may pass now; they are counted if they may.

        :param whole: only if there are so many left; or else if there is anything, and
            what is too much is made up for later.
        """

    def passes_down(self, count: int, *, whole: bool = False) -> bool:
        """The same for its client."""

    def release(self) -> None:
        """The flow is over."""


class FlowBandwidth(Protocol):
    """How many bytes of flows may pass in a second."""

    def limits_of(self, name: str) -> DatagramLimits:
        """What limits a new flow; to be released when it is over.

        :param name: its client, as :func:`relayd.core.addresses.socket_name` has it.
        """
