"""Pipes for splicing, shared by all connections of a plane.

`splice(2)` moves bytes between two sockets through a pipe.  A connection borrows
one while it has something in it and gives it back when it is empty, so that a
few serve many.  Their number is limited; where none can be had the bytes are
copied instead.  Empty pipes are kept while any connection splices, and
closed when none was asked for in KEEP seconds.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall

#: What a pipe holds, in bytes: the most that Linux allows without privileges
#: (fs.pipe-max-size).
PIPE_SIZE = 1 << 20

#: How many pipes may be in use at once.  Each holds what one blocked direction
#: has spliced, so this bounds the memory that sits in them.
PIPES_IN_USE = 64

#: How many empty pipes are kept.
PIPES_KEPT = 16

#: Descriptors that splicing leaves for clients and dials.
RESERVE = 64

#: Seconds after which empty pipes are closed if none was asked for.
KEEP = 5.0

#: Seconds for which none is made after one could not be made.
PAUSE = 1.0


class Pipe:
    """The two ends of a pipe of PIPE_SIZE bytes.

    :ivar held: how many bytes are in it; kept by whoever uses it.
    """

    __slots__ = ("held", "read_end", "write_end")

    def __init__(self) -> None:
        """:raises OSError: no descriptor, or the user's pipes hold too much."""
        self.held = 0
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if self.write_end >= limit - min(RESERVE, limit // 4):
                raise OSError("hardly any file descriptor is left")
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            self.close()
            raise

    def read(self) -> bytes:
        """Take out all that is in it."""
        held, self.held = self.held, 0
        parts = []
        while held:
            parts.append(os.read(self.read_end, held))
            held -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class Pipes:
    """The pipes of one plane.

    :param clock: called for an `IReactorTime`.

    :ivar users: connections that splice at present.
    :ivar in_use: pipes that were taken and not given back.
    :ivar refused: how often a pipe was asked for and could not be had.
    """

    __slots__ = (
        "_barred_until",
        "_clock",
        "_kept",
        "_tidying",
        "_wanted",
        "in_use",
        "refused",
        "users",
    )

    def __init__(self, clock: Callable[[], Any]) -> None:
        self._clock = clock
        self._kept: list[Pipe] = []
        self._barred_until = 0.0
        self._tidying: IDelayedCall | None = None
        self._wanted = False
        self.users = 0
        self.in_use = 0
        self.refused = 0

    def take(self) -> Pipe | None:
        """An empty pipe, or None: copy instead."""
        self._wanted = True
        if self._kept:
            self.in_use += 1
            return self._kept.pop()
        if self.in_use < PIPES_IN_USE:
            now = self._clock().seconds()
            if now >= self._barred_until:
                try:
                    pipe = Pipe()
                except OSError:
                    # Asking again at each read would cost more than copying.
                    self._barred_until = now + PAUSE
                else:
                    self.in_use += 1
                    return pipe
        self.refused += 1
        return None

    def give(self, pipe: Pipe, *, empty: bool = True) -> None:
        """Take a pipe back; one with something left in it is closed."""
        self.in_use -= 1
        if not empty or not self.users or len(self._kept) >= PIPES_KEPT:
            pipe.close()
            return
        self._kept.append(pipe)
        if self._tidying is None:
            self._wanted = False
            self._tidying = self._clock().callLater(KEEP, self._tidy)

    def add_user(self) -> None:
        """A connection begins to splice."""
        self.users += 1

    def remove_user(self) -> None:
        """A connection splices no more."""
        self.users -= 1
        if not self.users:
            self._close()

    def _tidy(self) -> None:
        """Close empty pipes: connections that once spliced may be idle now, or copy."""
        self._tidying = None
        if self._wanted:
            self._wanted = False
            self._tidying = self._clock().callLater(KEEP, self._tidy)
        else:
            self._close()

    def _close(self) -> None:
        while self._kept:
            self._kept.pop().close()
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
