"""Flows whose bandwidth is limited: what comes too fast is dropped.

Datagrams don't wait.  One passes if all limits that it is in have something left; it
may take more than that, and the next ones pay.  What does not pass is dropped, by the
reason `bandwidth`.  A run that may not pass as a whole is sent one by one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from relayd.core.pacing import DatagramLimits
from relayd.datagrams.dialing import Connected
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.interfaces import FlowListener, FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.preamble import Preamble, PreambledFlow

#: The reason of these drops.
BANDWIDTH = "bandwidth"


class TooFast(OSError):
    """A limit has nothing left."""

    def __init__(self) -> None:
        # As where the kernel has no place: other runs may pass.
        super().__init__(errno.EAGAIN, os.strerror(errno.EAGAIN))


class _Limited(ClientFlow):
    """What both kinds of limited flows do."""

    __slots__ = ()

    limits: Any

    def __init__(self, limits: DatagramLimits, *parts: Any) -> None:
        # A slot of the classes below.
        self.limits = limits
        super().__init__(*parts)

    def use(self, connected: Connected) -> None:
        super().use(connected)
        passes, send = self.limits.passes_up, self.send

        def send_limited(data: bytes) -> int:
            if not passes(len(data)):
                raise TooFast
            sent: int = send(data)
            return sent

        self.send = send_limited

    def _send_run(self, run: Sequence[bytes], size: int) -> None:
        if not self.limits.passes_up(len(run) * size, whole=True):
            raise TooFast
        super()._send_run(run, size)

    def send_after_error(self, data: bytes, problem: OSError) -> bool:
        if isinstance(problem, TooFast):
            self.ledger.counters.dropped[BANDWIDTH] += 1
            return False
        return super().send_after_error(data, problem)

    def ready(self, mask: int) -> None:
        # Not into the batch of the listener, which knows no limits.
        try:
            self._read_some()
        except Exception:
            self.relay.fail(self)

    def _reply(self, run: Sequence[bytes]) -> None:
        passes, size = self.limits.passes_down, len(run[0])
        passed = [data for data in run if passes(size)]
        if len(passed) < len(run):
            dropped = self.ledger.counters.replies_dropped
            dropped[BANDWIDTH] += len(run) - len(passed)
        if passed:
            super()._reply(passed)


class LimitedFlow(_Limited):
    """A flow with limits."""

    __slots__ = ("limits",)


class LimitedPreambledFlow(_Limited, PreambledFlow):
    """The same, whose server is told whose datagrams these are."""

    __slots__ = ("limits",)


def flow_of(
    preamble: Preamble | None,
    told: bool,
    limits: DatagramLimits | None,
    ledger: Ledger[ClientFlow],
    relay: FlowRelay,
    listener: FlowListener,
    client: tuple[Any, Any, Any],
    connected: Connected,
) -> ClientFlow:
    """A flow with what it needs.

    :param preamble: what servers are told that have none of their own.
    :param told: one of those to which it may go is told something.
    """
    parts = ledger, relay, listener, client, connected
    if limits is None:
        return PreambledFlow(*parts, preamble) if told else ClientFlow(*parts)
    if told:
        return LimitedPreambledFlow(limits, *parts, preamble)
    return LimitedFlow(limits, *parts)
