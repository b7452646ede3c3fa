"""Calls of the C library that Python lacks, or has in newer versions only.

accept(2) and connect(2) are fallbacks, for when a sandbox with few system calls
(gVisor, seccomp, SystemCallFilter) or a security module refuses the usual call.
Python has timerfd(2) since 3.13.  All are made through ctypes, and rarely.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from typing import Any

#: `struct sockaddr` of the family AF_UNSPEC.
_NOWHERE = bytes(16)

#: timerfd_create(2): CLOCK_MONOTONIC; TFD_NONBLOCK and TFD_CLOEXEC equal O_NONBLOCK
#: and O_CLOEXEC.
_CREATE = 1, os.O_NONBLOCK | os.O_CLOEXEC

#: timerfd_settime(2): TFD_TIMER_ABSTIME.
_ABSOLUTE = 1


@functools.cache
def _function(name: str) -> Any:
    """A function of the C library.

    :raises OSError: it has no such function.
    """
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None


def call(name: str, *args: object) -> int:
    """Call a function of the C library.

    :raises OSError: it failed, or there is no such function (ENOSYS).
    """
    answer: int = _function(name)(*args)
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer


def accept(descriptor: int) -> int:
    """accept(2).  Python calls accept4(2), and falls back only on ENOSYS.

    :return: the connection's descriptor: blocking, not inheritable.
    :raises OSError: as accept(2) says.
    """
    accepted = call("accept", descriptor, None, None)
    os.set_inheritable(accepted, False)
    return accepted


def disconnect(descriptor: int) -> None:
    """Reset a TCP connection, by connect(2) with AF_UNSPEC (Linux).

    :raises OSError: it is no TCP socket, or is not connected.
    """
    call("connect", descriptor, _NOWHERE, len(_NOWHERE))


def timerfd_create() -> int:
    """A timerfd(2) on CLOCK_MONOTONIC.

    :raises OSError: the kernel has none, or no descriptor is left.
    """
    clock, flags = _CREATE
    # Python 3.13.
    create: Callable[..., int] | None = getattr(os, "timerfd_create", None)
    if create is not None:
        return create(clock, flags=flags)
    return call("timerfd_create", clock, flags)


def timerfd_settime(descriptor: int, due: int) -> None:
    """Let a timer expire at `due`, in nanoseconds on its clock.

    :raises OSError: the kernel refuses.
    """
    change: Callable[..., object] | None = getattr(os, "timerfd_settime_ns", None)
    if change is not None:
        change(descriptor, flags=_ABSOLUTE, initial=due)
        return
    # struct itimerspec: the interval, and the first time.
    when = (ctypes.c_long * 4)(0, 0, *divmod(due, 10**9))
    call("timerfd_settime", descriptor, _ABSOLUTE, when, None)
