"""Flows whose server does not answer, and does not refuse either, go elsewhere.

Only flows of a pool with state, or whose server has left, and only while their client
sends.  One goes

- when its server is out (checks find it down, its dials or flows have failed too often)
  or has left the pool, and the client's datagrams have had no answer since that was
  first seen, a second ago or more;
- when its server has never answered it, for the timeout of flows without an answer,
  that proves something (:attr:`relayd.datagrams.moving.MovingFlow.proves`), and servers
  are judged by their flows (passive health).  The server has failed then.

Flows are looked at once a second, and a limited number of them at a time.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from typing import Any

from relayd.datagrams.ledger import Ledger
from relayd.datagrams.moving import MovingFlow

#: Seconds between two looks, and how many flows are looked at in one.
INTERVAL, MOST = 1.0, 8192


class Rescue:
    """Looks after the flows of one relay."""

    def __init__(self, ledger: Ledger[Any]) -> None:
        self._ledger = ledger
        self._due = 0.0
        self._next = 0

    def check(self, now: float) -> None:
        """Look at some flows, if it is time."""
        if now < self._due:
            return
        self._due = now + INTERVAL
        silent = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        for flow in self._some():
            if self._is_lost(flow, now):
                flow.redial_next(silent)

    def _some(self) -> Iterator[MovingFlow]:
        table = self._ledger.table
        first, self._next = self._next, self._next + MOST
        if self._next >= len(table):
            self._next = 0
        # A copy: flows may end meanwhile.
        flow: MovingFlow
        for flow in list(itertools.islice(table, first, first + MOST)):
            if table.flows.get(flow.key) is flow:
                yield flow

    def _is_lost(self, flow: MovingFlow, now: float) -> bool:
        """Whether it is to go."""
        state = flow.server.state
        if flow.stranded:
            return _asks_in_vain(flow)
        if state is None or state.passive is None:
            # Servers are not judged by their flows.
            return False
        waits = self._ledger.table.unreplied_timeout
        if not flow.awaits or now - flow.since < waits or flow.seen <= flow.since:
            return False
        return flow.proves


def _asks_in_vain(flow: MovingFlow) -> bool:
    """Whether its client has sent without an answer since this was first asked."""
    trouble = flow.trouble
    there = flow.up_datagrams, flow.down_datagrams
    before = trouble.looked
    if before is None or before[1] != there[1]:
        trouble.looked = there
        return False
    return there[0] > before[0]
