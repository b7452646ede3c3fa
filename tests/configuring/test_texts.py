"""The text of a file: bounded, and nothing that waits."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest

from relayd.configuring.texts import read_text, text_of


def test_a_text(tmp_path: Path) -> None:
    """With the longest that it may be, and without a mark of the order of bytes."""
    path = tmp_path / "x"
    path.write_text("\ufeff\u00e9")
    assert read_text(path, 5) == "\u00e9"
    with pytest.raises(ValueError, match="^longer than 0 MiB$"):
        read_text(path, 4)
    assert text_of(io.BytesIO(b"x"), 1) == "x"


def test_what_is_not_utf_8_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a\nb\n\xff")
    with pytest.raises(ValueError, match="^not UTF-8 at line 3$"):
        read_text(path, 10)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "missing"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    """A pipe has no writer here, and the device has no end."""
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    if kind in ("pipe", "device"):
        with pytest.raises(ValueError, match="^expected a file, not a pipe or a dev"):
            read_text(path, 1 << 20)
    else:
        with pytest.raises(OSError, match="Is a dir|No such"):
            read_text(path, 1 << 20)
