"""What a process has of what its system bounds: descriptors, and pipes."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Generator
from typing import Any

#: Descriptors that are counted in one part of the work.
PART = 500


def count_descriptors(
    folder: str = "/proc/self/fd",
) -> Generator[None, None, float]:
    """Count the open descriptors of this process; yields after each part of the work.

    :param folder: has an entry for each.
    :return: how many there are; NaN where the system does not say, as in a chroot that
        has no /proc.
    """
    try:
        # What Linux 6.2 and later say without listing a hundred thousand names.
        size = os.stat(folder).st_size
        if size:
            return size
        counted = 0
        with os.scandir(folder) as entries:
            for _ in entries:
                counted += 1
                if not counted % PART:
                    yield
        # Without the one that lists them.
        return counted - 1
    except OSError:
        return math.nan


def max_descriptors() -> float:
    """How many descriptors this process may have open; NaN if a sandbox keeps that."""
    try:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except OSError:
        return math.nan
    return math.inf if limit == resource.RLIM_INFINITY else limit


def pipes_in_use(reactor: Any) -> int:
    """How many pipes connections hold that are spliced."""
    if sys.platform != "linux":
        return 0
    from relayd.plane.poller import Plane

    return Plane.of(reactor).pipes.in_use
