"""The time in front of a log line: RFC 3339, in UTC, with microseconds."""

from __future__ import annotations

import time


class LogTimes:
    """Writes times; the text up to the second is kept while the second lasts."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def now(self) -> str:
        """The time now, by the machine's clock."""
        return self(time.time())

    def __call__(self, when: float | None) -> str:
        """`when`, in seconds since the epoch, as text; `-` if it is None."""
        if when is None:
            return "-"
        second = int(when)
        if second != self._second:
            moment = time.gmtime(second)
            self._second, self._text = (
                second,
                time.strftime("%Y-%m-%dT%H:%M:%S", moment),
            )
        return f"{self._text}.{int((when - second) * 1e6):06d}Z"
