"""Reads the text of a file: bounded, UTF-8, and never waiting for anybody."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def read_text(path: str | Path, longest: int) -> str:
    """The text of a file.

    A pipe would have us wait for whoever writes to it, and a device may have no end, so
    they are refused.

    :param longest: the most bytes that it may have.
    :raises OSError: it can't be read.
    :raises ValueError: it is no file, too long, or not UTF-8; the message says what is
        expected.
    """
    with open(path, "rb", opener=_open) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("expected a file, not a pipe or a device")
        return text_of(stream, longest)


def text_of(stream: BinaryIO, longest: int) -> str:
    """The text of a stream, without the mark that some editors begin it with.

    :raises OSError: it can't be read.
    :raises ValueError: it is too long, or not UTF-8.
    """
    content = stream.read(longest + 1)
    if len(content) > longest:
        raise ValueError(f"longer than {longest >> 20} MiB")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise ValueError(f"not UTF-8 at line {line}") from None


def _open(path: str, flags: int) -> int:
    # Else the kernel waits until somebody opens the other end of a pipe.
    return os.open(path, flags | os.O_NONBLOCK)
