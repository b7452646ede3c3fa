"""How many lines a second there may be of what strangers can cause at any rate."""

from __future__ import annotations

from collections.abc import Callable

#: Lines a second.
MAX_LINES = 100


class LineLimit:
    """Counts lines by the second.

    :param warn: told of each second of which lines are left out, once: with how many
        were left out before.

    :ivar left_out: how many lines were left out.
    """

    def __init__(self, warn: Callable[[int], object]) -> None:
        self._warn = warn
        # The second of the last line, and how many there were in it.
        self._second = self._written = 0
        self.left_out = 0

    def allows(self, second: int) -> bool:
        """Whether another line may be written in this second; warns once if not."""
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        if self._written <= MAX_LINES:
            return True
        if self._written == MAX_LINES + 1:
            self._warn(self.left_out)
        self.left_out += 1
        return False
