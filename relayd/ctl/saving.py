"""Writes a file so that there is always a whole one: the old, or the new.

What is written goes to a new file beside it, to the disk, and takes its place in one
step (rename(2)).  It has the mode, the owner and the extended attributes of the file
that it replaces; a new one can be read by its owner alone, as it may have secrets.  If
it has, a file that others can read is left as it is: to take that right away may stop
the service from reading it, so that is left to its operator.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress

from relayd.ctl.exits import CommandFailed, Exit


def write(path: str, text: str, *, secret: bool = False) -> None:
    """Replace a file, or make one; a symbolic link stays, and leads to the new one.

    :param secret: not everybody may read it.
    :raises CommandFailed: it can't be done, and nothing has changed.
    """
    try:
        _write(os.path.realpath(path), text, secret)
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise CommandFailed(Exit.FAILED, f"{path} can't be written: {why}") from None


def _write(path: str, text: str, secret: bool) -> None:
    old = None
    with suppress(FileNotFoundError):
        old = os.stat(path)
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise ValueError("it is no file; say which file in it")
    if secret and old is not None and old.st_mode & stat.S_IROTH:
        raise ValueError(
            "others can read it, and it would have in clear what not everybody may"
            " read: chmod o-r, or write a new file"
        )
    folder = os.path.dirname(path)
    number, beside = tempfile.mkstemp(".new", f".{os.path.basename(path)}.", folder)
    try:
        with open(number, "w", encoding="utf-8") as file:
            if old is not None:
                _take_on(file.fileno(), beside, path, old)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    _sync(folder)


def _take_on(number: int, beside: str, path: str, old: os.stat_result) -> None:
    """Have the owner, the mode and the attributes of the old file."""
    new = os.fstat(number)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.fchown(number, old.st_uid, old.st_gid)
        except PermissionError:
            raise ValueError(
                f"it belongs to uid {old.st_uid}, gid {old.st_gid}, and only root may"
                " write it anew for them"
            ) from None
    shutil.copystat(path, beside)
    # Its time is that of now.
    os.utime(number)


def _sync(folder: str) -> None:
    """Have the new name on the disk, too."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
