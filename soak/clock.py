"""A relay whose wall clock is set now and then, by hours, forward and back.

    python -m soak.clock SEED EVERY HOURS ARGUMENTS-OF-TWISTD...

`time.time` is replaced in this process, before Twisted is imported, which keeps the
function that it finds.  The machine's clock stays as it is, and so does the monotonic
one, on which a relay's deadlines should be.

The relay also ends with its parent process, so that a relay that is stopped (SIGSTOP)
when the soak is killed does not stay behind.
"""

from __future__ import annotations

import ctypes
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence

#: prctl(2), Linux: the signal that this process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


class SteppingClock:
    """A wall clock that is set about every so many seconds.

    It is correct until it is first set.

    :param seed: of the steps.
    :param every: seconds between two of them, plus or minus a half.
    :param most: the largest error in seconds, either way; 0: it is never set.
    :param real: the true time, as `time.time` has it.
    :param elapsed: seconds, never set.
    """

    def __init__(
        self,
        seed: int,
        every: float,
        most: float,
        real: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dice = random.Random(seed)  # noqa: S311 - to be repeated
        self._every = every
        self._most = most
        self._real = real
        self._elapsed = elapsed
        self._error = 0.0
        self._next = elapsed() + self._draw_pause()

    def _draw_pause(self) -> float:
        return self._every * self._dice.uniform(0.5, 1.5)

    def seconds(self) -> float:
        """As `time.time`."""
        now = self._elapsed()
        if now >= self._next:
            self._next = now + self._draw_pause()
            self._error = self._dice.uniform(-self._most, self._most)
        return self._real() + self._error

    def nanoseconds(self) -> int:
        """As `time.time_ns`."""
        return int(self.seconds() * 1e9)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends; Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    """Run `twistd` with such a clock."""
    seed, every, hours, *rest = arguments
    clock = SteppingClock(int(seed), float(every), float(hours) * 3600)
    end_with_parent()
    time.time, time.time_ns = clock.seconds, clock.nanoseconds
    # Only now: Twisted's modules keep what `time.time` is as they are imported.
    from twisted.scripts.twistd import run

    sys.argv = ["twistd", *rest]
    run()


if __name__ == "__main__":
    main(sys.argv[1:])
