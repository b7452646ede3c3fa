"""Another network namespace for this thread, which os can since Python 3.12."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

#: Where `ip netns` keeps those that have a name.
NAMED = Path("/run/netns")


def enter(namespace: int) -> None:
    """Move this thread to the namespace that a descriptor is of: setns(2).

    :raises OSError: it is of none, or takes rights that this process lacks.
    """
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))
