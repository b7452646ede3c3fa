"""Has somebody look when rules of this network namespace may have changed.

The kernel tells whoever asks of each change of nftables and of the routing rules, by
netlink(7) sockets that have joined a group.  What it tells is not read, as whoever
looks sees it.  At the first word the sockets are closed, and opened again just before
the look a little later: nothing that happens after it goes unnoticed, and a ruleset
with ten thousand changes costs one look.

To hear of nftables takes CAP_NET_ADMIN, as changing it does.  Routes are not watched:
a router may have thousands of changes a second.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.net.monotonic import monotonic

log = Logger(namespace="relayd.netfilter")

#: linux/netlink.h; absent on other systems.
_NETLINK = getattr(socket, "AF_NETLINK", None)
_ROUTE, _NETFILTER = 0, 12

#: Which protocol, and which of its groups, as bits: NFNLGRP_NFTABLES; RTNLGRP_IPV4_RULE
#: and RTNLGRP_IPV6_RULE (linux/netfilter/nfnetlink.h, linux/rtnetlink.h).
GROUPS = ((_NETFILTER, 1 << (7 - 1)), (_ROUTE, 1 << (8 - 1) | 1 << (19 - 1)))

#: Seconds from a change to the look, in which others may follow; and from one look to
#: the next, at least.
WAIT, PAUSE = 0.5, 2.0

#: Seconds without a look after one that has found something missing: twice as many each
#: time, up to the second, unless as many have gone by without.  Somebody else may not
#: want the rules.
REST, MOST = 1.0, 60.0

#: Seconds after which sockets that could not be opened are tried again.
RETRY = 30.0


def joined(protocol: int, groups: int) -> socket.socket:
    """A netlink socket of these groups of a protocol.

    :raises OSError: there is none to be had.
    """
    if _NETLINK is None:
        raise OSError(errno.EAFNOSUPPORT, "this system has no netlink")
    sock = socket.socket(_NETLINK, socket.SOCK_RAW, protocol)
    try:
        sock.setblocking(False)
        sock.bind((0, groups))
    except OSError:
        sock.close()
        raise
    return sock


@implementer(IReadDescriptor)
class _Member:
    """A socket that has joined groups."""

    def __init__(self, sock: socket.socket, told: Callable[[], None]) -> None:
        self._socket = sock
        self._told = told

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "relayd rules"

    def doRead(self) -> None:
        self._told()

    def connectionLost(self, reason: Failure) -> None:
        """Some reactors say so that more was to be told than there is place for."""
        self._told()

    def close(self) -> None:
        self._socket.close()


class RuleWatch:
    """Watches rules, from :meth:`start` to :meth:`stop`.

    :param reactor: watches the sockets.
    :param look: called when something may have changed.

    :ivar why_not: why nothing is noticed, in words; empty if it is.
    """

    def __init__(self, reactor: Any, look: Callable[[], object]) -> None:
        self._reactor = reactor
        self._clock = monotonic(reactor)
        self._look = look
        self._members: list[_Member] = []
        self._next: IDelayedCall | None = None
        #: When the next look may be.
        self._not_before = 0.0
        #: When something was missing last, and how long the rest after it is.
        self._missed_at, self._rest = -MOST, REST
        self.why_not = ""

    @property
    def is_on(self) -> bool:
        """Whether changes are noticed, or there is to be a look soon."""
        return bool(self._members) or self._next is not None

    def start(self) -> None:
        """Begin, unless it has; see `why_not`."""
        if not self.is_on:
            self._join()

    def stop(self) -> None:
        """End."""
        self._leave()
        self.why_not = ""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def missed(self) -> None:
        """The look has found something missing."""
        now = self._clock.seconds()
        again = now - self._missed_at <= MOST
        self._rest = min(2 * self._rest, MOST) if again else REST
        self._missed_at = now
        self._not_before = max(self._not_before, now + self._rest)

    def _join(self) -> bool:
        """Open the sockets; whether that could be done."""
        try:
            for protocol, groups in GROUPS:
                member = _Member(joined(protocol, groups), self._told)
                self._members.append(member)
                self._reactor.addReader(member)
        except OSError as problem:
            self._leave()
            before, self.why_not = self.why_not, problem.strerror or str(problem)
            if not before:
                log.warn(
                    "changes of netfilter rules by others are not noticed: {why}",
                    why=self.why_not,
                )
            return False
        self.why_not = ""
        return True

    def _leave(self) -> None:
        for each in self._members:
            self._reactor.removeReader(each)
            each.close()
        self._members.clear()

    def _told(self) -> None:
        """Something has changed."""
        self._leave()
        if self._next is None:
            self._look_in(max(WAIT, self._not_before - self._clock.seconds()))

    def _look_in(self, seconds: float) -> None:
        self._next = self._clock.callLater(seconds, self._look_now)

    def _look_now(self) -> None:
        self._next = None
        self._not_before = self._clock.seconds() + PAUSE
        if not self._join():
            # No descriptor is left, most likely.
            self._look_in(RETRY)
        self._look()
