"""The time in front of a log line: RFC 3339, in UTC, with microseconds."""

from __future__ import annotations

import time


class LogTimes:
    """Writes times; the text up to the second is kept while the second lasts."""

    def __init__(self) -> None:
        # In one, for any thread.
        self._kept = (-1, "")

    @staticmethod
    def since_epoch() -> float:
        """Seconds since the epoch."""
        return time.time()

    def now(self) -> str:
        """The time now, by the machine's clock."""
        return self(self.since_epoch())

    def __call__(self, when: float | None) -> str:
        """`when`, in seconds since the epoch, as text; `-` if it is None."""
        if when is None:
            return "-"
        second = int(when)
        kept, text = self._kept
        if second != kept:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._kept = second, text
        return f"{text}.{int((when - second) * 1e6):06d}Z"
