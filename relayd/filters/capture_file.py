"""Capture files: written by any number of sessions, up to a size, then begun anew.

A process has one :class:`CaptureFile` for each path, so that a reload goes on with it.
It is open while a session is captured to it.  A file that exists is appended to, with a
section of its own; if it is as this process has left it, not even that is needed.  That
is known of the last MOST_KNOWN files, whether there is a filter for them or not: that
of a route lives no longer than the sessions that have it.

Whole blocks are gathered and written once a turn of the reactor, or as soon as
MOST_GATHERED bytes wait: what a write to a file takes is all that it can block.  When
the file would be longer than it may be, it is renamed to `FILE.1`, that one before to
`FILE.2`, and so on.  Who moves or deletes it gets a new one with the next session.

An error (a disk that is full) ends the capture, with one line in the log, and no
session: the file keeps its whole blocks, and sessions that begin a minute later are
captured again, if it goes then.

A capture has secrets: a new file is its owner's alone.  Only a regular file is written
to, never through a symbolic link of its name, which somebody else may have put there,
none that is not a capture, and none of another user in a folder like /tmp.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.filters.pcapng import beginning, ends_whole, is_capture

log = Logger(namespace="relayd.capture")

#: Bytes that wait, at most, before they are written.
MOST_GATHERED = 256 << 10

#: The smallest size that a file may be limited to, and the most old ones.
LEAST_SIZE, MOST_KEPT = 1 << 20, 99

#: A file that has no more room than this when it is opened is begun anew.
LEAST_ROOM = 64 << 10

#: Seconds before a capture that has ended by an error is tried again.
RETRY = 60.0

#: Files of which it is known how they were left, when nobody writes to them.
MOST_KNOWN = 64

# A pipe is not waited for; a terminal does not become ours.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_CLOSED = -1


class CaptureFile:
    """One file, with those that it was before; see :meth:`of`.

    :ivar path: its name, absolute.
    :ivar size: bytes that it may have.
    :ivar keep: how many old ones are kept.
    """

    _all: weakref.WeakValueDictionary[str, CaptureFile] = weakref.WeakValueDictionary()

    #: Those that were written to last; of most files nobody else keeps them.
    _lately: ClassVar[OrderedDict[str, CaptureFile]] = OrderedDict()

    #: Of whoever has entered last.
    _clock: IReactorTime

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = self.keep = 0
        self._descriptor = _CLOSED
        #: How many sessions are captured to it.
        self._sessions = 0
        #: Bytes that it has, without those that wait.
        self._length = 0
        self._blocks: list[bytes] = []
        self._gathered = 0
        self._call: IDelayedCall | None = None
        #: Before this time it is not tried again.
        self._not_before: float | None = None
        #: What it was when it was closed.
        self._left: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, path: str) -> CaptureFile:
        """The one of this path, which is absolute."""
        found = cls._all.get(path)
        if found is None:
            found = cls._all[path] = cls(path)
        return found

    @property
    def is_open(self) -> bool:
        """Whether what is captured is written."""
        return self._descriptor != _CLOSED

    def enter(self, clock: IReactorTime, size: int, keep: int) -> bool:
        """A session is to be captured; pair it with :meth:`leave`, if it is.

        :param size: bytes that the file may have from now on, LEAST_SIZE or more.
        :param keep: how many old ones are kept.
        :return: whether it is captured; if not, the log says why.
        """
        self.size, self.keep, self._clock = size, keep, clock
        self._remember()
        if self.is_open and not self._is_in_place():
            self.flush()
            self._close()
        if not self.is_open:
            if self._not_before is not None and clock.seconds() < self._not_before:
                return False
            self._try(self._open)
            if not self.is_open:
                return False
            self._not_before = None
        self._sessions += 1
        return True

    def _remember(self) -> None:
        """Know how it was left, also once no filter is about it; forget the oldest."""
        lately = self._lately
        lately[self.path] = self
        lately.move_to_end(self.path)
        if len(lately) > MOST_KNOWN:
            lately.popitem(last=False)

    def leave(self) -> None:
        """A session is captured no more."""
        self._sessions -= 1
        if not self._sessions:
            self.flush()
            self._close()

    def write(self, block: bytes) -> bool:
        """Write a block.

        :return: whether the capture goes on.
        """
        if self._length + self._gathered + len(block) > self.size:
            self._begin_anew()
        if not self.is_open:
            return False
        self._blocks.append(block)
        self._gathered += len(block)
        if self._gathered >= MOST_GATHERED:
            self.flush()
        elif self._call is None:
            self._call = self._clock.callLater(0, self._flush_now)
        return self.is_open

    def flush(self) -> None:
        """Write what waits."""
        if self._call is not None:
            self._call.cancel()
        self._flush_now()

    def _flush_now(self) -> None:
        self._call = None
        blocks, self._blocks, self._gathered = self._blocks, [], 0
        if not self.is_open or not blocks:
            return
        data = memoryview(b"".join(blocks))
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as problem:
            self._keep_whole(blocks, written)
            self._fail(problem.strerror or str(problem))
        else:
            self._length += written

    def _keep_whole(self, blocks: list[bytes], written: int) -> None:
        """A write has failed: take the last block away if it is not whole."""
        for block in blocks:
            if written < len(block):
                break
            written -= len(block)
            self._length += len(block)
        with suppress(OSError):
            os.ftruncate(self._descriptor, self._length)

    def _fail(self, why: str) -> None:
        """The capture ends."""
        self._close()
        # Maybe without the beginning of its section.
        self._left = None
        self._blocks, self._gathered = [], 0
        self._not_before = self._clock.seconds() + RETRY
        log.warn(
            "the capture to {path} has ended: {why}; sessions go on, and those that"
            " begin in {seconds:.0f} s or later are captured again",
            path=self.path,
            why=why,
            seconds=RETRY,
        )

    # -- opening, and beginning anew

    def _try(self, work: Callable[[], None]) -> None:
        """Open the file or begin it anew; if that fails, the capture ends."""
        try:
            work()
        except OSError as problem:
            self._fail(problem.strerror or str(problem))
        except ValueError as problem:
            self._fail(str(problem))

    def _open(self) -> None:
        """Open the file, to go on at its end.

        :raises OSError: it can't be opened.
        :raises ValueError: it is not for captures; the message says why.
        """
        _refuse_others(self.path)
        descriptor = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        try:
            found = os.fstat(descriptor)
            _refuse_kind(found.st_mode)
            _refuse_strangers(self.path, found.st_uid)
            _lock(descriptor)
            known = (found.st_dev, found.st_ino, found.st_size) == self._left
            whole = known or _is_whole_capture(descriptor, found.st_size)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._length = descriptor, found.st_size
        if not whole:
            log.warn(
                "the capture {path} ends in the middle of a packet: it is begun anew",
                path=self.path,
            )
            self._rotate()
        elif self._length + LEAST_ROOM > self.size:
            self._rotate()
        elif not known:
            self._gather_header()

    def _is_in_place(self) -> bool:
        """Whether the file still has its name: it may have been moved, or deleted."""
        own = os.fstat(self._descriptor)
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def _gather_header(self) -> None:
        """What a section begins with."""
        header = beginning(
            "relayed sessions: a TCP stream each, whose headers are made up"
        )
        self._blocks, self._gathered = [header], len(header)

    def _begin_anew(self) -> None:
        """The file is as long as it may be: rename it, and begin another."""
        self.flush()
        # Which may have ended it.
        if self.is_open:
            self._try(self._rotate)

    def _rotate(self) -> None:
        """Rename the file, and begin another.

        Raises what :meth:`_open` raises.
        """
        self._close()
        with suppress(FileNotFoundError):
            if not self.keep:
                os.unlink(self.path)
            for number in range(self.keep - 1, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
            if self.keep:
                os.replace(self.path, f"{self.path}.1")
        flags = _FLAGS | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(self.path, flags, 0o600)
        _lock(self._descriptor)
        self._length = 0
        self._gather_header()

    def _close(self) -> None:
        if self.is_open:
            found = os.fstat(self._descriptor)
            self._left = found.st_dev, found.st_ino, found.st_size
            os.close(self._descriptor)
            self._descriptor = _CLOSED


def check_path(path: str) -> None:
    """Whether a capture may be written to a file, which need not exist.

    Nothing is changed.

    :raises ValueError: it may not; the message says why.
    """
    if "\0" in path:
        # The system calls differ in what they say of it.
        raise ValueError("expected a name without a null byte")
    try:
        # As its oldest one will be called: the longest name that is needed.
        with suppress(FileNotFoundError):
            os.lstat(f"{path}.{MOST_KEPT}")
        if os.path.lexists(path):
            _refuse_others(path)
            descriptor = os.open(path, _FLAGS)
            try:
                _is_whole_capture(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        else:
            folder = os.path.dirname(path)
            if not stat.S_ISDIR(os.stat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as problem:
        raise ValueError(problem.strerror or str(problem)) from None


def _refuse_others(path: str) -> None:
    """Refuse what is no regular file before it is opened: that may do something."""
    with suppress(FileNotFoundError):
        _refuse_kind(os.lstat(path).st_mode)


def _refuse_kind(mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise ValueError("it is a symbolic link, which a capture does not follow")
    if not stat.S_ISREG(mode):
        raise ValueError("expected a file, not a folder, a pipe or a device")


def _refuse_strangers(path: str, owner: int) -> None:
    """Refuse what somebody else has put where all may, to read what is written to it.

    As Linux does if fs.protected_regular is set; see proc_sys_fs(5).
    """
    everybodys = stat.S_ISVTX | stat.S_IWOTH
    if owner != os.geteuid():
        folder = os.stat(os.path.dirname(path)).st_mode
        if folder & everybodys == everybodys:
            raise ValueError("it belongs to another user, in a folder that is for all")


def _lock(descriptor: int) -> None:
    """Keep other processes from writing to it; some file systems can't."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("another process writes to it") from None
    except OSError:
        pass


def _is_whole_capture(descriptor: int, size: int) -> bool:
    """Whether a file ends with a whole block, or is empty.

    :raises ValueError: it has something else.
    """
    if not size:
        return True
    if not is_capture(os.pread(descriptor, 4, 0)):
        raise ValueError("it has something else than a pcapng capture")
    return ends_whole(size, lambda count, at: os.pread(descriptor, count, at))
