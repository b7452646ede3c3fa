"""Segments that the kernel dropped for want of memory for TCP.

All TCP sockets of a machine share what `net.ipv4.tcp_mem` allows (tcp(7)).  Beyond
that, the kernel drops segments even within the advertised window.  Their sender
retransmits after a pause that doubles each time: while the relay is stopped for ten
seconds that fails, and the next attempt may be ten seconds away when the relay goes on.
A reset that arrives after a dropped segment may be ignored (RFC 5961), and is not sent
again.
In both cases the relay sees a connection on which nothing moves, and rightly ends it by
a timeout.  Two soaks at a time, with both relays stopped, are enough for that.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

#: Received segments that were dropped, of those in the window (RFC 9293): in order, and
#: out of order.
_COUNTERS = {"TCPRcvQDrop", "TCPOFODrop"}


def read_drops(text: str | None = None) -> int:
    """How many received segments this machine has dropped for want of memory.

    :param text: what /proc/net/netstat says; None: what it says now.
    """
    if text is None:
        text = Path("/proc/net/netstat").read_text()
    lines = [line.split() for line in text.splitlines()]
    return sum(
        int(count)
        for names, counts in zip(lines[::2], lines[1::2], strict=True)
        for name, count in zip(names, counts, strict=True)
        if name in _COUNTERS
    )


class Drops:
    """When the kernel dropped segments, as far as it was checked.

    :param read: as :func:`read_drops`.
    :ivar count: segments, since this was made.
    """

    #: Fewer mean a full queue; a lack of memory drops thousands in a minute.  So many
    #: checks that have found some are kept.
    MANY, REMEMBERED = 20, 600

    def __init__(self, read: Callable[[], int] = read_drops) -> None:
        self._read = read
        self._known = read()
        self._seen: deque[tuple[float, int]] = deque(maxlen=self.REMEMBERED)
        self.count = 0

    def check(self, now: float | None = None) -> None:
        """Read the counters.  To be called every second or so.

        :param now: on the clock of `time.monotonic`, which is asyncio's.
        """
        counted = self._read()
        if counted != self._known:
            self._seen.append((now or time.monotonic(), counted - self._known))
            self.count += counted - self._known
            self._known = counted

    def since(self, moment: float) -> bool:
        """Whether many segments were dropped since a moment, or the check before it."""
        self.check()
        return sum(count for at, count in self._seen if at >= moment) >= self.MANY


def undelivered(sock: socket.socket) -> int:
    """Bytes in a TCP socket's send queue that its peer's kernel has not acknowledged.

    Also of a connection that was reset.
    """
    # SIOCOUTQ of sockios(7) is the same request.
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])
