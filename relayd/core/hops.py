"""Connections of this process to itself, noted to find loops.

A relay may lead to another one of its process, such as a TCP relay to a SOCKS4 proxy.
One that leads back to itself would make a connection for each connection until nothing
is left, so each *hop* that leads to a port on which this process listens is noted: by
its two ends, from which relay it starts, and who its client is.  The relay that accepts
it finds where it comes from, and whether itself is among them.

A hop is noted as soon as connect(2) has been called, before anybody can accept it, and
is kept for a while when its session is over: its other end may not have been accepted
yet, and would go on without an end.  A foreign endpoint says no more than that it has
connected, which may be after the accept.  So a relay checks twice: when a client comes,
and again when it has reached its client's server.  A loop that the first check misses
is found by the second, one hop later; from then on that relay waits a moment before it
dials for clients of this machine, and checks again
(:mod:`relayd.stream.server_attempt`).

A client's UNIX socket has no name, unless it is bound to one.  One of this process that
leads to a UNIX socket on which this process listens is bound to a name that lasts as
long as the socket, and leaves no file: only Linux has such names, and only there
a loop through a UNIX socket is found.

A relay that dials from its clients' addresses may have a connection with the same two
ends as one of a client's.  Its hops have the timestamp of their SYN as well, and are
recognized by both (:mod:`relayd.net.syn`).

Relays of other processes can't be told apart from servers.  A loop through one of them
is bounded by descriptors, and by the timeouts.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

#: How many hops are kept after their sessions are over.
MAX_PAST = 1024


#: Instead of a timestamp: a SYN is none of the relay's own, as it is not marked, or has
#: none where one of this machine would have.
NO_STAMP = -1

#: How much earlier and later, in milliseconds, the timestamp of a SYN may be than the
#: one that is known, which is asked for a moment after it was sent: of a busy machine's
#: one in 600 was earlier by more than one, some by a time slice of the scheduler's.
#: With more, more connections of another relayd, in a container of this machine, are
#: taken for this one's.  A SYN that was lost and sent again, or is earlier, is not
#: recognized: the next round's is.
EARLIER, LATER = 20, 1


class Hop(NamedTuple):
    """A connection from a relay of this process to a port of this process.

    :ivar relay: whose it is; compared by identity.
    :ivar before: the hop by which its client came, as :func:`between` calls it.
    :ivar stamp: the timestamp of its SYN; None: its two ends suffice.
    :ivar before_stamp: that of the SYN by which its client came; None: nobody knows.
    """

    relay: object
    before: str
    stamp: int | None = None
    before_stamp: int | None = None

    def began_with(self, stamp: int | None) -> bool:
        """Whether a connection with the same ends may be this one.

        :param stamp: the timestamp of its SYN, or :data:`NO_STAMP`; None: unknown.
        """
        if self.stamp is None or stamp is None:
            return True
        # TCP_TIMESTAMP, net/ipv4/tcp.c: an odd one is in microseconds.
        scale = 1000 if self.stamp & 1 else 1
        # They wrap around.
        since = (stamp - self.stamp + EARLIER * scale) & 0xFFFF_FFFF
        return stamp != NO_STAMP and since <= (EARLIER + LATER) * scale


def between(here: str, there: str) -> str:
    """The name of a connection, or flow: its two ends, as text.

    Both: the kernel gives one port to several connections, if they lead to different
    places.
    """
    return f"{here}>{there}"


def file_of(path: str | bytes) -> tuple[int, int] | None:
    """The device and the inode of a file; None if it can't be asked."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


class Hops:
    """The hops of one protocol, TCP or UDP.

    :ivar ports: those on which this process listens, and how many listeners each has.
    :ivar files: the same for UNIX sockets, by device and inode: a path has many
        spellings, and not the same within a jail.
    :ivar hops: those that are under way, by their ends.  As many as there are sessions
        that lead here, at most.
    :ivar past: the last :data:`MAX_PAST` of those that are over, likewise.
    """

    def __init__(self) -> None:
        self.ports: Counter[int] = Counter()
        self.files: Counter[tuple[int, int]] = Counter()
        self.hops: dict[str, Hop] = {}
        self.past: dict[str, Hop] = {}

    def listens(self, port: int) -> None:
        """A listener opens.

        :param port: 0 for one that has none, which is not noted.
        """
        if port:
            self.ports[port] += 1

    def closes(self, port: int) -> None:
        """It closes."""
        self.ports[port] -= 1
        if self.ports[port] <= 0:
            del self.ports[port]

    def listens_at(self, path: str | bytes) -> bool:
        """Whether a listener of this process has the UNIX socket at a path."""
        return bool(self.files) and file_of(path) in self.files

    def opens_file(self, file: tuple[int, int] | None) -> None:
        """A listener opens on a UNIX socket; None for one without a file."""
        if file is not None:
            self.files[file] += 1

    def closes_file(self, file: tuple[int, int] | None) -> None:
        """It closes."""
        if file is not None:
            self.files[file] -= 1
            if self.files[file] <= 0:
                del self.files[file]

    def add(
        self,
        name: str,
        relay: object,
        before: str,
        stamp: int | None = None,
        before_stamp: int | None = None,
    ) -> Hop:
        """Note a hop; see :class:`Hop`."""
        self.past.pop(name, None)
        hop = self.hops[name] = Hop(relay, before, stamp, before_stamp)
        return hop

    def remove(self, name: str) -> None:
        """Forget a hop, if there is one of this name: nothing will be accepted from
        it."""
        self.hops.pop(name, None)

    def is_over(self, name: str, hop: Hop) -> None:
        """Its session is over, but its other end may be accepted later.

        :param hop: as `add` returned it: another hop may have the name by now.
        """
        if self.hops.get(name) is not hop:
            return
        self.past[name] = self.hops.pop(name)
        if len(self.past) > MAX_PAST:
            del self.past[next(iter(self.past))]

    def is_loop(self, name: str, relay: object, stamp: int | None = None) -> bool:
        """Whether the hops that end with this one have led through `relay` before.

        :param stamp: the timestamp of its SYN; see :class:`Hop`.
        """
        for _ in range(len(self.hops) + len(self.past)):
            hop = self.hops.get(name)
            if hop is None:
                hop = self.past.get(name)
                if hop is None or (stamp is None and hop.stamp is not None):
                    # Of those that are over, one in thirty of a busy client's may have
                    # the ends of its next: of 28,000 ports.
                    return False
            if not hop.began_with(stamp):
                return False
            if hop.relay is relay:
                return True
            name, stamp = hop.before, hop.before_stamp
        return False


#: Of TCP connections, and of UDP flows.
streams, datagrams = Hops(), Hops()
