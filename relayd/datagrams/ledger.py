"""The ledger of a UDP relay: the state that its listeners, flows and relay share.

The counters of datagrams, the table of flows, and the datagrams that were sent and not
answered.  It calls none of its users.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Generic

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from relayd.core.counts import FlowCounts
from relayd.core.flows import Counters
from relayd.datagrams.sockets import kernel_drops
from relayd.datagrams.table import AnyFlow, NatTable
from relayd.datagrams.unanswered import Unanswered
from relayd.net.log_throttle import FailureLog
from relayd.net.monotonic import monotonic

log = Logger(namespace="relayd.datagrams")

#: Flows whose drops are read from the kernel in one step.
DROP_CHECKS = 256


class Ledger(Generic[AnyFlow]):
    """The state that the parts of one relay share.

    :param name: of the relay, for the log.
    :param table: the open flows.
    :param clock: seconds.
    :param reply_cap: limit of a flow's reply bytes, as a multiple of the bytes that its
        client has sent; 0 is no limit.
    :raises ValueError: `reply_cap` is negative.

    :ivar counters: of datagrams, by outcome.
    :ivar counts: what else is counted.
    :ivar unanswered: datagrams that may have to be sent again, to another address.
    :ivar two_way: a server of a pool has answered: this is no protocol without answers.
    :ivar filtered_flows: numbers the flows that get filters, from 0.
    :ivar now: returns the time in seconds.
    """

    def __init__(
        self,
        name: str,
        table: NatTable[AnyFlow],
        clock: IReactorTime,
        *,
        reply_cap: float,
    ) -> None:
        if not reply_cap >= 0:
            raise ValueError(f"reply_cap must not be negative: {reply_cap!r}")
        self.name = name
        self.table = table
        self.clock: Any = monotonic(clock)
        self.now: Callable[[], float] = self.clock.seconds
        self.reply_cap = reply_cap
        self.counters = Counters()
        self.counts = FlowCounts()
        self.unanswered = Unanswered()
        self.two_way = False
        self.filtered_flows = itertools.count()
        #: Index of the next flow whose drops are read.
        self._next_drop_check = 0
        self._failures = FailureLog(log, self.clock)

    def log_failure(self, what: str) -> None:
        """Log the exception that is being handled, once a second at most."""
        self._failures.add(what)

    def balance(self) -> None:
        """Count as `failed` what was received and is nowhere else, after a defect."""
        self.counters.balance(self.counts.kept, self.counts.replies_kept)

    def count_some_drops(self, listeners: Iterable[Any]) -> None:
        """Count the drops of all listeners, and of some of the flows.

        Each call reads :data:`DROP_CHECKS` flows, and goes on where the last one ended.
        """
        for listener in listeners:
            self.count_drops(listener)
        first = self._next_drop_check
        for flow in itertools.islice(self.table, first, first + DROP_CHECKS):
            self.count_drops(flow)
        self._next_drop_check = (
            first + DROP_CHECKS if first + DROP_CHECKS < len(self.table) else 0
        )

    def count_drops(self, one: Any) -> None:
        """Count the datagrams that the kernel dropped at a socket since the last call.

        :param one: a listener or a flow: has `sock` and `drops`, and `hears_server`.
        """
        drops = kernel_drops(one.sock)
        if drops is None:
            return
        # The kernel counts in 32 bits.
        dropped = (drops - one.drops) & 0xFFFFFFFF
        self.counters.kernel_dropped += dropped
        if one.hears_server:
            self.counts.kernel_replies_dropped += dropped
        one.drops = drops
