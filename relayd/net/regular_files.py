"""Opens files that an operator names, without ever waiting for anybody."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to be read.

    A pipe would have us wait for whoever writes to it, and a device may have no end, so
    they are refused.

    :raises OSError: it can't be opened.
    :raises ValueError: it is no file; the message says what is expected.
    """
    with open(path, "rb", opener=_open) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("expected a file, not a pipe or a device")
        yield stream


def _open(path: str, flags: int) -> int:
    # Else the kernel waits until somebody opens the other end of a pipe.
    return os.open(path, flags | os.O_NONBLOCK)
