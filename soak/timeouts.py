"""The relay's timeouts in a soak, and how early or late it may act on one."""

from __future__ import annotations

#: The timeouts that the relay is started with, in seconds: short, so that the
#: soak meets each of them thousands of times.
CONNECT, STALL, IDLE, HALF_CLOSE = 5.0, 3.0, 20.0, 5.0

#: Seconds by which the relay may check a session late by design: its tick is an eighth
#: of its shortest timeout, and a deadline may begin just after a check.
TICK = STALL / 8

#: Seconds that anything may take in addition on a busy machine.
SLACK = 5.0

#: Seconds after which an end that is not over counts as hung.
LIMIT = 90.0


class Violation(Exception):
    """The relay broke a rule."""


class WrongTime(Violation):
    """It did something too early, or too late."""


def check_time(what: str, waited: float, earliest: float, latest: float) -> None:
    """Check that the relay has kept a deadline; all in seconds.

    :raises WrongTime: it has not.
    """
    if not earliest <= waited <= latest:
        raise WrongTime(
            f"{what} after {waited:.1f} s, expected {earliest:.1f} to {latest:.1f} s"
        )
