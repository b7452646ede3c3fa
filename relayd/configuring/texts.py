"""Reads the text of a file: bounded, UTF-8, and never waiting for anybody."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from relayd.net.regular_files import open_regular


def read_text(path: str | Path, longest: int) -> str:
    """The text of a file.

    :param longest: the most bytes that it may have.
    :raises OSError: it can't be read.
    :raises ValueError: it is no file, too long, or not UTF-8; the message says what is
        expected.
    """
    with open_regular(path) as stream:
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
