"""A `twistd` on a machine whose clock a test sets.

Python's `time.time` is moved by the seconds that stand in a file, a double, before
Twisted is imported: it keeps that function for its reactors.  CLOCK_MONOTONIC is as it
is, as on a machine whose clock is set::

    python -m tests.support.stepped FILE -n relayd ...
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from pathlib import Path

_OFFSET = struct.Struct("d")


class MachinesClock:
    """What a test steps.

    :param path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0.0
        path.write_bytes(_OFFSET.pack(0))

    def step(self, seconds: float) -> None:
        """Set it forward, or back, by so much."""
        self._offset += seconds
        with self.path.open("r+b") as file:
            file.write(_OFFSET.pack(self._offset))


def main() -> None:
    assert "twisted" not in sys.modules
    with open(sys.argv.pop(1), "rb") as file:
        shared = mmap.mmap(file.fileno(), _OFFSET.size, access=mmap.ACCESS_READ)
    real = time.time
    time.time = lambda: real() + _OFFSET.unpack(shared)[0]
    from twisted.python.runtime import seconds
    from twisted.scripts import twistd

    assert seconds is time.time
    sys.exit(twistd.run())


if __name__ == "__main__":
    main()
