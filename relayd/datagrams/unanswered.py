"""Datagrams of flows that have had no answer.

A flow whose server has several addresses goes on at the next one when an address
refuses, and what it has sent last is sent again.  So that is kept until the first
answer: a few datagrams of each flow, and a limited number of bytes in all.  What is
older than :data:`RESEND_WITHIN` is not sent again: it was not that which was refused,
and its sender has given it up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

#: Datagrams that are kept of a flow; bytes that are kept in all; and what each datagram
#: counts beside its own bytes.
MAX_KEPT, MAX_KEPT_BYTES, KEPT_OVERHEAD = 4, 1 << 20, 200

#: Seconds after which a datagram is not sent again, but for a flow's last.
RESEND_WITHIN = 2.0


class Unanswered:
    """What was sent last, of the flows that have had no answer.

    :ivar size: bytes that it takes; limited.
    """

    def __init__(self) -> None:
        self._datagrams: dict[Hashable, list[tuple[float, bytes]]] = {}
        self.size = 0

    def __len__(self) -> int:
        return len(self._datagrams)

    def add(self, flow: Hashable, run: Sequence[Any], now: float) -> None:
        """A flow has sent these; its last are kept."""
        own = self._datagrams.pop(flow, [])
        for data in run[-MAX_KEPT:]:
            # The buffer that it came in is overwritten by the next batch.
            own.append((now, bytes(data)))
            self.size += len(data) + KEPT_OVERHEAD
        while len(own) > MAX_KEPT:
            self.size -= len(own.pop(0)[1]) + KEPT_OVERHEAD
        # Behind those that have sent something before.
        self._datagrams[flow] = own
        while self.size > MAX_KEPT_BYTES:
            self.forget(next(iter(self._datagrams)))

    def of(self, flow: Hashable, now: float) -> Sequence[bytes]:
        """What a flow has sent of late, in order.

        Its very last, however old: that a host can't be found may be reported after
        seconds, and nothing was sent since.
        """
        own = self._datagrams.get(flow, [])
        return [data for when, data in own[:-1] if now - when <= RESEND_WITHIN] + [
            data for _, data in own[-1:]
        ]

    def forget(self, flow: Hashable) -> None:
        """A flow was answered, or has ended."""
        for _, data in self._datagrams.pop(flow, ()):
            self.size -= len(data) + KEPT_OVERHEAD
