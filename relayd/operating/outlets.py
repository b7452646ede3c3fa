"""Outlets: files, pipes, sockets and terminals that bytes are written to, not waiting.

Whatever reads a log may stop: a pipe's reader, a terminal (Ctrl-S), a container's log
driver.  A plain write(2) would stop this process with it.  O_NONBLOCK can't be set on a
descriptor that was inherited: it belongs to the open file, which others write to, too.
So how it is written depends on what it is:

======== ===========================================================================
file     As it is: write(2) to a regular file does not wait for a reader.
socket   With MSG_DONTWAIT.  That is standard output under systemd.
pipe     With RWF_NOWAIT (pwritev2(2), for pipes since Linux 6.4).
others   Opened once more by /proc/self/fd, with O_NONBLOCK, which belongs to that
         opening alone; a terminal, a pipe of an older kernel, and one that has a name
         or was opened by /proc (`> /proc/1/fd/1`), for which no kernel has RWF_NOWAIT.
the rest By a thread, which may wait: where /proc is missing, or the descriptor is
         another user's, as in some containers.
======== ===========================================================================

A file that is given by its name is opened here, and with O_NONBLOCK.  A FIFO is opened
for reading as well, so that it is open without a reader, and loses nothing while its
reader restarts.  What it holds is lost when the process ends without one.
"""

from __future__ import annotations

import errno
import functools
import os
import queue
import select
import socket
import stat
import threading
from contextlib import suppress

#: pwritev2(2): the position of the open file.
_HERE = -1

_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)

#: An open file, to be opened once more.
_PROC = "/proc/self/fd/{}"

#: Seconds after which a thread tries again to write what was refused.
_AGAIN = 0.1


class Outlet:
    """A descriptor that write(2) does not wait for.

    :param descriptor: owned by this object from here on.

    :ivar first: bytes to write in the first call, which shows whether any are taken.
    """

    first = 1 << 12

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def is_same_file(self, other: Outlet) -> bool:
        """Whether both write the same file."""
        try:
            return os.path.sameopenfile(self._descriptor, other._descriptor)
        except OSError:
            # One is not open.
            return False

    def write(self, data: bytes | memoryview) -> int:
        """Write, without waiting; how many bytes were taken.

        :raises BlockingIOError: none can be taken now.
        :raises OSError: none can be taken.
        """
        return os.write(self._descriptor, data)

    @property
    def unwritten(self) -> bytes:
        """What was taken and is not written yet."""
        return b""

    def abandon(self) -> bytes:
        """The process ends: what was taken and nobody will get."""
        return self.unwritten

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class ClosedOutlet(Outlet):
    """In the place of a descriptor that is not open; it takes nothing."""

    def __init__(self) -> None:
        super().__init__(-1)

    def close(self) -> None:
        """There is nothing to close."""


class _PipeOutlet(Outlet):
    """A pipe of a kernel that can be told for each write not to wait.

    A FIFO can't, and only a write shows it.
    """

    _other: Outlet | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self._other is None:
            try:
                return os.pwritev(self._descriptor, (data,), _HERE, _NOWAIT)
            except OSError as problem:
                if problem.errno != errno.EOPNOTSUPP:
                    raise
            self._other = _opened_again(self._descriptor)
            self.first = self._other.first
        return self._other.write(data)

    @property
    def unwritten(self) -> bytes:
        return b"" if self._other is None else self._other.unwritten

    def close(self) -> None:
        super().close()
        if self._other is not None:
            self._other.close()


class _SocketOutlet(Outlet):
    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._socket = socket.socket(fileno=descriptor)

    def write(self, data: bytes | memoryview) -> int:
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._socket.close()


class FifoOutlet(Outlet):
    """A FIFO that was opened for reading as well (:func:`open_to_append`)."""

    def abandon(self) -> bytes:
        """Without a reader, what it holds; then it takes no more."""
        flags, left = os.O_NONBLOCK | os.O_CLOEXEC, b""
        with suppress(OSError):  # As another user, say: nobody knows.
            writing = os.open(_PROC.format(self._descriptor), os.O_WRONLY | flags)
            os.close(self._descriptor)
            self._descriptor = writing
            poll = select.poll()
            poll.register(writing, 0)
            if poll.poll(0):  # POLLERR: there is no reader.
                reading = os.open(_PROC.format(writing), os.O_RDONLY | flags)
                with suppress(BlockingIOError):
                    while part := os.read(reading, 1 << 16):
                        left += part
                os.close(reading)
        return left


class ThreadOutlet(Outlet):
    """A descriptor that is written by a thread, which may wait.

    It takes no more until all that it has taken is written.  A write that fails is
    tried again.  It writes what a pipe takes as a whole or not at all, so that what is
    unwritten is known.
    """

    first = 1 << 16

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._left = b""
        self._closed = threading.Event()
        self._process = 0
        self._queue: queue.SimpleQueue[bytes]

    def write(self, data: bytes | memoryview) -> int:
        if self._process != os.getpid():
            # A daemon is another process, without the thread.
            work: queue.SimpleQueue[bytes] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._run, args=(work,), daemon=True, name="relayd log"
            )
            try:
                thread.start()
            except RuntimeError as problem:
                # There may be no more of them; or the interpreter ends (3.12).
                raise BlockingIOError(errno.EAGAIN, str(problem)) from problem
            self._process, self._queue = os.getpid(), work
        elif self._left:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._left = bytes(data)
        self._queue.put(self._left)
        return len(data)

    @property
    def unwritten(self) -> bytes:
        return self._left

    def close(self) -> None:
        """Close it, when the thread is done with it."""
        self._closed.set()
        if self._process != os.getpid():
            super().close()
        else:
            self._queue.put(b"")

    def _run(self, work: queue.SimpleQueue[bytes]) -> None:
        while left := work.get():
            while left and not self._closed.is_set():
                try:
                    written = os.write(self._descriptor, left[: select.PIPE_BUF])
                except OSError:
                    self._closed.wait(_AGAIN)
                else:
                    self._left = left = left[written:]
        super().close()


def outlet_of(descriptor: int) -> Outlet:
    """The outlet for an inherited descriptor, which stays the caller's.

    :raises OSError: it is not open.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return Outlet(os.dup(descriptor))
    if stat.S_ISSOCK(mode):
        return _SocketOutlet(os.dup(descriptor))
    if stat.S_ISFIFO(mode) and _pipes_need_not_wait():
        return _PipeOutlet(os.dup(descriptor))
    return _opened_again(descriptor)


def _opened_again(descriptor: int) -> Outlet:
    """The outlet for one that only another opening of it, or a thread, can write."""
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return Outlet(os.open(_PROC.format(descriptor), flags))
    return ThreadOutlet(os.dup(descriptor))


@functools.cache
def _pipes_need_not_wait() -> bool:
    """Whether this kernel can be told so for each write to a pipe."""
    ends = os.pipe()
    try:
        return os.pwritev(ends[1], (b"?",), _HERE, _NOWAIT) == 1 and _NOWAIT != 0
    except OSError:
        return False
    finally:
        for each in ends:
            os.close(each)


def open_to_append(path: str) -> int:
    """Open a file by its name; it is made if there is none.

    :return: its descriptor.
    :raises OSError: it can't be opened.
    """
    flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    return os.open(path, flags | (os.O_RDWR if _is_fifo(path) else os.O_WRONLY), 0o666)


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        # Opening it says what is wrong.
        return False
