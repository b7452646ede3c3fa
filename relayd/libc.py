"""Two calls of the C library that Python's sockets can't make.

Both are fallbacks, for when the better call is refused: by a sandbox with few system
calls (gVisor, seccomp, SystemCallFilter) or by a security module.  They are made
through ctypes, and rarely.
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
    """accept(2).  Python calls accept4(2), and falls back only on ENOSYS.

    :return: the connection's descriptor, which is not inheritable.  It blocks.
    :raises OSError: as accept(2) says.
    """
    accepted = _checked(_library().accept(descriptor, None, None))
    os.set_inheritable(accepted, False)
    return accepted


def disconnect(descriptor: int) -> None:
    """Reset a TCP connection, by connect(2) with AF_UNSPEC (Linux).

    :raises OSError: it is no TCP socket, or is not connected.
    """
    _checked(_library().connect(descriptor, _NOWHERE, len(_NOWHERE)))
