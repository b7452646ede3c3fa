"""A connection that is read in large pieces, several at a time, for who expects bulk.

Each piece is an object of its own, as a protocol gets it.  In a turn it is read as
others are that relay by themselves: until its share is used up (:attr:`Plane.share`),
or, as what is done with the pieces may take long, until LONGEST seconds have passed.
"""

from __future__ import annotations

from relayd.plane.splicing import SplicingConnection

#: The most that the protocol gets at once, in bytes.
LARGE_READ = 1 << 18

#: Seconds in a turn after which nothing more is read.
LONGEST = 0.002


class LargeReadsConnection(SplicingConnection):
    """The kind that reads much."""

    __slots__ = ()

    def _read(self, most: int = LARGE_READ) -> None:
        kind, clock = self.__class__, self._plane.clock
        left, until = self._plane.share, clock.seconds() + LONGEST
        while True:
            super()._read(most)
            left -= most
            if (
                left <= 0
                or not (self._readable and self._reading)
                # It is spliced, lost, or keeps a pace by now.
                or self._sink is not None
                or self.protocol is None
                or self.__class__ is not kind
                or clock.seconds() >= until
            ):
                # If there is more, this is scheduled.
                return
