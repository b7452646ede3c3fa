"""Two calls of the C library that Python's sockets can't make.

Both are the plain way to something for which there is a better one, in case that is
refused: by a sandbox with few system calls (gVisor, seccomp, SystemCallFilter) or by a
security module.  They are made through ctypes, and seldom.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

#: `struct sockaddr` of the family AF_UNSPEC.
_NOWHERE = bytes(16)


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _checked(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer


def accept(descriptor: int) -> int:
    """accept(2), where Python calls accept4(2); of the latter it only takes ENOSYS.

    :return: the connection's descriptor, which is not inheritable.  It blocks.
    :raises OSError: as accept(2) says.
    """
    accepted = _checked(_library().accept(descriptor, None, None))
    os.set_inheritable(accepted, False)
    return accepted


def disconnect(descriptor: int) -> None:
    """Reset a TCP connection: connect(2) to nowhere, in Linux.

    :raises OSError: it is none, or is not connected.
    """
    _checked(_library().connect(descriptor, _NOWHERE, len(_NOWHERE)))
