"""Who manages the netfilter rules of a relay: one process of a network namespace.

The kernel knows rules by the name of their relay.  Two processes with relays of the
same name, as those that nobody has named, would take each other's rules away.  So a
process claims a name before it applies rules, by a socket of an abstract address
(unix(7)): like rules, these are of a network namespace, and the kernel forgets a claim
with its process, however that ends.

Anybody may open such a socket.  Only the claims of root count, and those of the user
that asks: others may hardly change rules.  To ask is to connect: the kernel says whose
the socket is, and who has it closes what has come.  If so many ask that nobody else
can, the name is taken to be claimed.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.errors import NetfilterError

#: What the addresses begin with.
PREFIX = "\0relayd-netfilter-"

#: Connections that may wait at the socket of a claim, and are closed in a turn.
_BACKLOG = 128

#: What SO_PEERCRED gives: pid, uid and gid; unix(7).
_CREDENTIALS = struct.Struct("3i")


@implementer(IReadDescriptor)
class _Claim:
    """The socket of a name."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "relayd rules"

    def doRead(self) -> None:
        """Let go of those who have asked: they know by now."""
        try:
            for _ in range(_BACKLOG):
                self._socket.accept()[0].close()
        except OSError:
            # Nobody else; or no descriptor is left.
            return

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops: the claim stays, until it is released."""

    def close(self) -> None:
        self._socket.close()


class RuleClaims:
    """The names that this process has claimed.

    :param reactor: watches their sockets.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._claimed: dict[str, _Claim] = {}
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
        sock.setblocking(False)
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
            self._claimed[name] = _Claim(sock)
            return
        claim = self._claimed[name] = _Claim(sock)
        self._reactor.addReader(claim)

    def ask_again(self) -> None:
        """What others had may be free by now."""
        self._theirs.clear()

    def release(self, name: str) -> None:
        """Leave a name to others."""
        claim = self._claimed.pop(name, None)
        if claim is not None:
            self._reactor.removeReader(claim)
            claim.close()


def _counts(name: str) -> bool:
    """Whether somebody who may change rules has claimed a name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(PREFIX + name)
            found = sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
            )
        except BlockingIOError:
            return True
        except OSError:
            # It is bound, and nobody listens; or it has gone meanwhile.
            return False
    _, uid, _ = _CREDENTIALS.unpack(found)
    return uid in (0, os.geteuid())
