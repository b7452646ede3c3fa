"""Takes the flows of a server that goes down to another one, at once.

Without this they stay until it refuses them or does not answer
(:mod:`relayd.datagrams.moving`, :mod:`relayd.datagrams.rescue`): a server that does not
pass its check may well answer those that it knows.

A client keeps its port, and what its old server has not answered is sent again.  A flow
that has nowhere to go ends: its client's next datagram begins another, with whichever
server there is by then.  Many flows are moved in several turns, so that datagrams of
others are relayed in between.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from relayd.core.flow_pools import CountedServer
from relayd.datagrams.interfaces import FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.moving import MovingFlow

#: Flows that are moved in one turn of the reactor.
AT_ONCE = 256

#: How such a flow has ended.
UPSTREAM_DOWN = "upstream_down"


class FlowCutting:
    """Hears of the servers of one relay's pool."""

    def __init__(self, ledger: Ledger[Any], relay: FlowRelay) -> None:
        self._ledger = ledger
        self._relay = relay
        #: Those whose flows were moved, and that are not up again.
        self._down: set[CountedServer] = set()
        #: Flows that are to leave these.
        self._leaving: deque[tuple[MovingFlow, CountedServer]] = deque()
        self._timer: IDelayedCall | None = None

    def server_changed(self, state: CountedServer) -> None:
        """Its checks or its operator have changed their mind, or something else has."""
        if state.draining or not state.is_down:
            self._down.discard(state)
        elif state not in self._down:
            self._down.add(state)
            table = self._ledger.table
            self._leaving += [
                (flow, state) for flow in table if flow.server.state is state
            ]
            if self._timer is None:
                # Now, before what arrives next is sent there.
                self._move_some()

    def succeed(self, before: FlowCutting) -> None:
        """Go on where the one before is, whose pool may have stayed."""
        self._leaving += before._leaving
        if self._leaving and self._timer is None:
            self._timer = self._ledger.clock.callLater(0, self._move_some)

    def stop(self) -> None:
        """The relay closes, and so its flows end."""
        self._leaving.clear()
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _move_some(self) -> None:
        self._timer = None
        for _ in range(min(AT_ONCE, len(self._leaving))):
            flow, state = self._leaving.popleft()
            try:
                self._move(flow, state)
            except Exception:
                # Of a selector that somebody else has made.
                self._relay.fail(flow)
        if self._leaving:
            self._timer = self._ledger.clock.callLater(0, self._move_some)

    def _move(self, flow: MovingFlow, state: CountedServer) -> None:
        if self._ledger.table.flows.get(flow.key) is not flow:
            return
        if flow.server.state is not state or not state.is_down:
            # It has gone by itself, or need not go any more.
            return
        down = OSError(errno.ECANCELED, f"{flow.server.name} is down: {state.reason}")
        if self._relay.send_away(flow, down):
            flow.send_again()
        else:
            self._relay.end(flow, UPSTREAM_DOWN)
