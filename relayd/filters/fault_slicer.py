"""Slicer: what is read is passed on in small slices, as by a network of small packets.

A slice is cut when it is passed on, one in each turn of the reactor at most, so that a
transport writes it by itself; a slow peer may still read several at once.
"""

from __future__ import annotations

import random
from typing import Annotated

import attrs

from relayd.core.filtering import Answer, Filter, Way
from relayd.filters.faults import HoldingFilter, StreamFault, take
from relayd.filters.option_types import Microseconds, Size


@attrs.frozen
class Slicer(StreamFault):
    """Cuts data into slices, with a delay behind each.

    A length is drawn for each slice, evenly, from `average_size - size_variation` to
    `average_size + size_variation`; the last may be shorter.  Toxiproxy halves each
    chunk until its parts are so short; here a slice may have bytes of two chunks, if
    both wait.

    :ivar average_size: in bytes.
    :ivar size_variation: in bytes, less than that.
    :ivar delay: in microseconds.
    """

    average_size: Annotated[int, Size(minimum=1)]
    size_variation: Annotated[int, Size()] = 0
    delay: Annotated[float, Microseconds()] = 0.0

    name = "slicer"

    def __attrs_post_init__(self) -> None:
        if self.size_variation >= self.average_size:
            raise ValueError(
                f"size_variation must be less than average_size, {self.average_size}"
            )

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        shortest = self.average_size - self.size_variation
        longest = self.average_size + self.size_variation
        return SlicerFilter(way, shortest, longest, self.delay / 1e6, numbers)


class SlicerFilter(HoldingFilter):
    """Passes on slices.

    :param shortest: bytes of a slice, at least.
    :param longest: bytes of a slice, at most.
    :param delay: in seconds, behind each.
    """

    def __init__(
        self,
        way: Way,
        shortest: int,
        longest: int,
        delay: float,
        numbers: random.Random,
    ) -> None:
        HoldingFilter.__init__(self, way)
        self._shortest = shortest
        self._longest = longest
        self._delay = delay
        self._numbers = numbers
        self._buffer = bytearray()

    def data(self, data: bytes) -> bytes | Answer:
        self._buffer += data
        self.held = len(self._buffer)
        return b"" if self.is_waiting else self._cut()

    def _cut(self) -> bytes:
        """The next slice; the one behind it comes after the delay."""
        length = self._numbers.randint(self._shortest, self._longest)
        data = take(self._buffer, length)
        self.held = len(self._buffer)
        self.wait(self._delay)
        return data

    def pass_due(self) -> None:
        if self._buffer:
            self._way.pass_on(self._cut())

    def take_all(self) -> bytes:
        self.held = 0
        return take(self._buffer, len(self._buffer))
