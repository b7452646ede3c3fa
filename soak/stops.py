"""When the relay was stopped, or this process was late: time that deadlines allow for.

Now and then the soak stops the relay's process (SIGSTOP) for some seconds and continues
it, as a hypervisor does that moves a machine.  What arrives meanwhile waits in the
kernel, and the relay must read it before it checks deadlines.  So no session may time
out because the relay was stopped; but every deadline may be later by that time.

This process is both ends of every session, and may itself be late, on a machine with
too little CPU.  Then it sees late what the relay did in time, and does late what should
have kept a session from a timeout.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable

#: Seconds between two stops, plus or minus a half.
EVERY = 40.0

#: The longest stop, in seconds: a session with two of them is well within the time
#: after which an end counts as hung.
LONGEST = 15.0

#: How many stops are kept; one session meets a few.
REMEMBERED = 64

#: Seconds of lateness of this process from which it is kept, and how many are kept.
LEAST, LATE_REMEMBERED = 0.1, 512


def overlap(times: Iterable[tuple[float, float]], since: float, until: float) -> float:
    """Seconds between two moments that are within one of these intervals."""
    return sum(
        max(0.0, min(ended, until) - max(began, since)) for began, ended in times
    )


class Stops:
    """The stops of one relay, on the clock of `time.monotonic`, which is asyncio's.

    :ivar count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._late: deque[tuple[float, float]] = deque(maxlen=LATE_REMEMBERED)
        self._over: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """The relay is about to be stopped."""
        self.count += 1
        self._since = now

    def end(self, now: float) -> None:
        """The relay goes on."""
        if self._since is not None:
            self._over.append((self._since, now))
            self._since = None

    def within(self, since: float, until: float) -> float:
        """Seconds between two moments in which the relay was stopped."""
        stops = [*self._over]
        if self._since is not None:
            stops.append((self._since, until))
        return overlap(stops, since, until)

    def was_late(self, due: float, now: float) -> None:
        """This process has done something now that was due before."""
        if now - due >= LEAST:
            self._late.append((due, now))

    def late_within(self, since: float, until: float) -> float:
        """Seconds between two moments in which this process was late."""
        return overlap(self._late, since, until)

    def latest_within(self, since: float, until: float) -> float:
        """The most that this process was late between two moments, in seconds."""
        return max((overlap([late], since, until) for late in self._late), default=0.0)

    def delay_within(self, since: float, until: float) -> float:
        """By how much something between two moments may be late, for both reasons."""
        return self.within(since, until) + self.late_within(since, until)

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait for an event while the relay runs for so many seconds; whether it came.

        The time in which the relay is stopped, or this process is late, does not count.
        """
        since = now = time.monotonic()
        while not event.is_set():
            left = since + seconds + self.delay_within(since, now) - now
            if left <= 0:
                return False
            try:
                async with asyncio.timeout(left):
                    await event.wait()
            except TimeoutError:
                now = time.monotonic()
        return True


async def stop_now_and_then(
    stops: Stops,
    dice: random.Random,
    *,
    every: float,
    seconds: float,
    suspend: Callable[[], None],
    resume: Callable[[], None],
) -> None:
    """Stop the relay for so many seconds, again and again, until this is cancelled.

    When cancelled, it continues the relay.
    """
    while True:
        await asyncio.sleep(every * dice.uniform(0.5, 1.5))
        stops.begin(time.monotonic())
        suspend()
        try:
            await asyncio.sleep(seconds)
        finally:
            resume()
            stops.end(time.monotonic())
