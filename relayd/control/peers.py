"""Who is at the other end of a UNIX socket, and what they may do.

The kernel says it: SO_PEERCRED, unix(7).  It has what a process was as it connected.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Collection
from typing import Any, Literal

import attrs

from relayd.control.steering import Asker

#: What somebody may do: change things, see them, or neither.
Right = Literal["change", "read", ""]

#: Of the kernel's struct ucred: pid, uid, gid.
_UCRED = struct.Struct("iII")

#: Whether this system says who it is.
KNOWS_PEERS = hasattr(socket, "SO_PEERCRED")


def peer_of(transport: Any) -> Asker:
    """Who has connected.

    :param transport: has a UNIX socket.
    :raises OSError: the kernel does not say.
    """
    option = socket.SO_PEERCRED
    raw = transport.socket.getsockopt(socket.SOL_SOCKET, option, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return Asker(uid, gid, pid)


@attrs.frozen
class Rights:
    """Who may do what: root, and the user that this process runs as, may do all.

    :ivar uids: they may, too.
    :ivar read_uids: they may see everything, and change nothing.
    :ivar own: returns the user of this process, which may yet become another one.
    """

    uids: Collection[int] = ()
    read_uids: Collection[int] = ()
    own: Callable[[], int] = os.geteuid

    def of(self, asker: Asker) -> Right:
        """What somebody may do."""
        if asker.uid in (0, self.own()) or asker.uid in self.uids:
            return "change"
        return "read" if asker.uid in self.read_uids else ""
