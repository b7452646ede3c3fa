"""Sequence numbers of sessions, which can be looked at before they are given out."""

from __future__ import annotations

from typing import Self


class Ordinals:
    """The sequence numbers of what is admitted, from 0.

    As `itertools.count()`; but that tells its next number only by a copy of it, which
    Python warns of since 3.12, and can't make since 3.14.

    :ivar following: the number that comes next.
    """

    __slots__ = ("following",)

    def __init__(self) -> None:
        self.following = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        found = self.following
        self.following = found + 1
        return found
