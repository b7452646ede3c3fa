"""Who manages the netfilter rules of a relay: one process of a network namespace.

The kernel knows rules by the name of their relay.  Two processes with relays of the
same name, as those that nobody has named, would take each other's rules away.  So a
process claims a name before it applies rules, by a socket of an abstract address
(unix(7)): like rules, these are of a network namespace, and the kernel forgets a claim
with its process, however that ends.

Anybody may open such a socket.  Only the claims of root count, and those of the user
that asks: others may hardly change rules.
"""

from __future__ import annotations

import os
import socket
import struct

from relayd.core.errors import NetfilterError

#: What the addresses begin with.
PREFIX = "\0relayd-netfilter-"

#: Connections that may wait at the socket of a claim: each is one that has asked whose
#: it is, and nobody answers.
_BACKLOG = 128

#: What SO_PEERCRED gives: pid, uid and gid; unix(7).
_CREDENTIALS = struct.Struct("3i")


class RuleClaims:
    """The names that this process has claimed."""

    def __init__(self) -> None:
        self._claimed: dict[str, socket.socket] = {}
        #: Those that others had when we asked.
        self._theirs: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._claimed

    def take(self, name: str) -> None:
        """Claim a name, unless it is ours already.

        One that another process had is not asked for again before :meth:`ask_again`.

        :raises NetfilterError: it is another process's.
        """
        if name in self._claimed:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(PREFIX + name)
            sock.listen(_BACKLOG)
        except OSError:
            if name in self._theirs or _counts(name):
                sock.close()
                self._theirs.add(name)
                raise NetfilterError(
                    "another process manages the rules of a relay of this name: give"
                    " this one another name"
                ) from None
            # Whoever has it must not keep the rules from being applied.
        self._claimed[name] = sock

    def ask_again(self) -> None:
        """What others had may be free by now."""
        self._theirs.clear()

    def release(self, name: str) -> None:
        """Leave a name to others."""
        sock = self._claimed.pop(name, None)
        if sock is not None:
            sock.close()


def _counts(name: str) -> bool:
    """Whether somebody who may change rules has claimed a name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(PREFIX + name)
            found = sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
            )
        except OSError:
            # It is bound, and nobody listens; or it has gone meanwhile.
            return False
    _, uid, _ = _CREDENTIALS.unpack(found)
    return uid in (0, os.geteuid())
