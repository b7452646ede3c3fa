"""Reading a leg at the pace of its direction, where its transport hands it the bytes.

Twisted's transports read `bufferSize` bytes at once (FileDescriptor's attribute), so
that is set to what is granted before each read.  TLS reads whole records, and other
transports what they like: more than was granted is made up for by a longer pause.  The
plane's ask the pace themselves (:meth:`relayd.core.interfaces.ISpliceable.keep_pace`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relayd.core.interfaces import ISpliceable
from relayd.core.pacing import Pace

#: The most that is read at once, in bytes; as Twisted's transports.
READ_SIZE = 65536

#: The first read of many: this of a quantum that is shared; and the least, in bytes.
_FIRST, SHORTEST = 1 / 32, 512

#: The most protocols that are looked through, such as TLS, for what reads.
_DEPTH = 8


class PacedReads:
    """Writes what a leg reads, and paces it.

    :param leg: what is paused.
    :param pace: of its direction.
    :param write: takes what was read.
    """

    __slots__ = ("_asked", "_leg", "_pace", "_reader", "_write")

    def __init__(self, leg: Any, pace: Pace, write: Callable[[bytes], object]) -> None:
        self._leg, self._pace, self._write = leg, pace, write
        self._reader: Any = None
        #: How much the next read may bring; 0: that is not known.
        self._asked = 0
        if leg.spliced:
            return
        if ISpliceable.providedBy(leg.transport):
            leg.transport.keep_pace(leg.direction)
        else:
            self._reader = _reader_below(leg.transport)
        pace.follow(self)
        self._ask(first=True)

    def __call__(self, data: bytes) -> None:
        self._write(data)
        # It was asked a while ago, maybe: what has come since then is counted first.
        self._pace.grant(1)
        self._pace.spend(len(data))
        is_last = len(data) < self._asked
        if is_last:
            self._pace.rest()
        if not self._leg.spliced:
            self._ask(first=is_last)

    def pause(self, reason: int) -> None:
        """See :meth:`relayd.core.pacing.Paused.pause`."""
        self._leg.pause(reason)

    def resume(self, reason: int) -> None:
        """See :meth:`relayd.core.pacing.Paused.resume`."""
        if self._ask():
            self._leg.resume(reason)

    def _ask(self, *, first: bool = False) -> bool:
        """Find out how much may be read, or wait.

        :param first: it is not known that there is something.
        """
        pace, reader = self._pace, self._reader
        if first and reader is not None:
            granted = pace.grant(int(min(READ_SIZE, self._shortest())))
        elif reader is not None:
            granted = pace.take(READ_SIZE)
        else:
            granted = pace.grant(READ_SIZE)
        if not granted:
            pace.wait()
        elif reader is not None:
            reader.bufferSize = self._asked = granted
        return granted > 0

    def _shortest(self) -> float:
        """What a first read brings."""
        return max(SHORTEST, self._pace.shared * _FIRST)


def _reader_below(transport: Any) -> Any:
    """What reads for a transport, if it is one of Twisted's, and reads `bufferSize`."""
    for _ in range(_DEPTH):
        below = getattr(transport, "transport", None)
        if below is None:
            break
        transport = below
    is_known = isinstance(getattr(transport, "bufferSize", None), int)
    return transport if is_known else None
