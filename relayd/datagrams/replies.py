"""Replies of several flows, sent by their listener in one call.

A flow that has one reply at a time receives it into a slot of its listener's outbox.
When all ready flows have been read, or the slots are full, the batch is sent
(:mod:`relayd.datagrams.batches`).

Where replies have a cap, each is checked after the one before it was sent: there are no
slots then, and so no batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relayd.datagrams.batches import Outbox
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.sockets import send_error


class Replies:
    """The pending replies of a listener's flows.

    :param outbox: sends them; None if the kernel can't: there are no slots then.
    :param after_batch: see :class:`relayd.datagrams.watching.Watcher`.

    :ivar slots: the buffers of the outbox; none unless they are sent in batches.
    :ivar pending: the flows whose replies are in the first slots, and their sizes.
    """

    def __init__(
        self,
        ledger: Ledger[Any],
        outbox: Outbox | None,
        after_batch: Callable[[Callable[[], None]], None] | None,
    ) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._after_batch = after_batch
        self.slots: list[memoryview] = []
        self.pending: list[tuple[Any, int]] = []
        self.send_together(not ledger.reply_cap)

    def send_together(self, together: bool) -> None:
        """Send the replies of several flows in one call; or each on its own.

        Then flows must expect no slots any more.
        """
        self.flush()
        outbox = self._outbox
        self.slots = outbox.slots if together and outbox is not None else []

    def envelope(self, key: Any) -> bytes:
        """A client's addresses, as the outbox needs them."""
        return b"" if self._outbox is None else self._outbox.envelope(key)

    def flush_soon(self) -> None:
        """Send what is pending once all ready flows have been read."""
        if self._after_batch is not None:
            self._after_batch(self.flush)

    def flush(self) -> None:
        """Send what is pending, and count it."""
        pending, ledger = self.pending, self._ledger
        if not pending or self._outbox is None:
            return
        ledger.counters.replies_received += len(pending)
        try:
            self._flush(self._outbox, ledger.now())
        except Exception:
            # The plane's whole turn would end with it.
            ledger.log_failure("a listener failed to send replies")
            ledger.balance()
        finally:
            pending.clear()

    def _flush(self, outbox: Outbox, now: float) -> None:
        pending, table = self.pending, self._ledger.table
        counters, refresh = self._ledger.counters, table.refresh_inbound
        problems = outbox.send(
            [size for _, size in pending], [flow.envelope for flow, _ in pending]
        )
        counters.replies_sent += len(pending) - len(problems)
        for flow, size in pending:
            flow.down_datagrams += 1
            flow.down_bytes += size
            # As `inbound` does, whose call costs 2 % of a round trip.
            if now >= flow.due:
                table.inbound(flow, now)
            elif refresh:
                flow.seen = now
        for number, problem in problems.items():
            flow, size = pending[number]
            flow.down_datagrams -= 1
            flow.down_bytes -= size
            counters.replies_dropped[send_error(problem)] += 1
