"""The last datagrams of flows that have had no answer, to send them again.

When an address of a server refuses, the flow goes on at the next one, and its last
datagrams are sent again.  So they are kept until the first answer: a few of each flow,
and a limited number of bytes in all.  What is older than :data:`RESEND_WITHIN` is not
sent again: it is not what was refused, and its sender has given up waiting.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

#: Datagrams kept for each flow, bytes kept in all, and the bytes that each datagram
#: counts in addition to its own.
MAX_KEPT, MAX_KEPT_BYTES, KEPT_OVERHEAD = 4, 1 << 20, 200

#: Seconds after which a datagram is not sent again, but for a flow's last.
RESEND_WITHIN = 2.0


class Unanswered:
    """The last datagrams of the flows that have had no answer.

    :ivar size: bytes in use, at most :data:`MAX_KEPT_BYTES`.
    :ivar evicted: how many flows' were forgotten for others.
    """

    def __init__(self) -> None:
        self._datagrams: dict[Hashable, list[tuple[float, bytes]]] = {}
        self.size = self.evicted = 0

    def __len__(self) -> int:
        return len(self._datagrams)

    def add(self, flow: Hashable, run: Sequence[Any], now: float) -> None:
        """Keep the last of these datagrams, which a flow has sent."""
        own = self._datagrams.pop(flow, [])
        for data in run[-MAX_KEPT:]:
            # A copy: the next batch overwrites the buffer.
            own.append((now, bytes(data)))
            self.size += len(data) + KEPT_OVERHEAD
        while len(own) > MAX_KEPT:
            self.size -= len(own.pop(0)[1]) + KEPT_OVERHEAD
        # In the order in which flows have sent last.
        self._datagrams[flow] = own
        while self.size > MAX_KEPT_BYTES:
            self.evicted += 1
            self.forget(next(iter(self._datagrams)))

    def of(self, flow: Hashable, now: float) -> Sequence[bytes]:
        """The datagrams of a flow to send again, in order.

        The last one regardless of its age: that a host can't be reached may be reported
        after seconds, with nothing sent since.
        """
        own = self._datagrams.get(flow, [])
        return [data for when, data in own[:-1] if now - when <= RESEND_WITHIN] + [
            data for _, data in own[-1:]
        ]

    def forget(self, flow: Hashable) -> None:
        """A flow was answered, or has ended."""
        for _, data in self._datagrams.pop(flow, ()):
            self.size -= len(data) + KEPT_OVERHEAD
