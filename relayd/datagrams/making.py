"""Makes and moves the flows of one relay, as one set of settings says.

A relay that gets other settings has another :class:`FlowMaking`, which goes on where
the one before it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relayd.core.flow_pools import FlowPool
from relayd.datagrams.cutting import FlowCutting
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.interfaces import FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.opening import FlowOpener, Ingredients
from relayd.datagrams.redialing import FlowMover
from relayd.datagrams.rescue import Rescue
from relayd.datagrams.standby import FlowStandBy
from relayd.datagrams.watching import Watcher


class FlowMaking:
    """What a relay does with its servers.

    :ivar open: see :meth:`relayd.datagrams.interfaces.FlowRelay.admit`.
    :ivar redial: see there; `send_away` likewise.
    """

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        relay: FlowRelay,
        made_of: Ingredients,
        loops: LoopGuard,
        watcher: Watcher,
    ) -> None:
        self._opener = FlowOpener(ledger, relay, made_of, loops=loops, watcher=watcher)
        self._mover = FlowMover(
            ledger,
            pool=made_of.pool,
            dialer=made_of.dialer,
            loops=loops,
            watcher=watcher,
            asked=self._opener.asked,
        )
        self.open = self._opener.open
        self.redial, self.send_away = self._mover.redial, self._mover.send_away
        self._ledger = ledger
        self._rescue = Rescue(ledger)
        self._cutting = FlowCutting(ledger, relay) if made_of.cut else None
        self._balance: FlowPool | None = None
        #: What hears of its servers.
        self._listeners: list[Callable[[Any], object]] = []
        if made_of.pool.balance is not None:
            self.hear(made_of.pool.balance)

    def hear(self, balance: FlowPool) -> None:
        """Hear of the servers of a pool with state, which chooses."""
        self._balance = balance
        both = self._cutting, self._opener.room
        self._listeners = [each.server_changed for each in both if each is not None]
        balance.listeners += self._listeners

    @property
    def standby(self) -> FlowStandBy | None:
        """Where new clients wait for a server, if they do."""
        return self._opener.standby

    def hold(self, held: bool) -> None:
        """Let new clients wait, or serve them again."""
        self._opener.hold(held)

    def check(self, now: float, *, left: bool) -> None:
        """Called once in a while, with the time, as long as there are flows.

        :param left: some of them may have a server that has left.
        """
        if left or self._balance is not None:
            self._rescue.check(now)

    def ends_changed(self) -> None:
        """A server may have an address now."""
        if self.standby is not None:
            self.standby.server_changed()

    def admit_no_more(self) -> None:
        """No new client is accepted: nobody waits any more."""
        self._opener.room.stop()

    def stop(self) -> None:
        """The relay closes."""
        self.admit_no_more()
        if self._cutting is not None:
            self._cutting.stop()

    def succeed(self, before: FlowMaking) -> None:
        """Go on where this one was, which is not used any more.

        Its clients wait here, or are refused.
        """
        self._opener.ordinals = before._opener.ordinals
        if before._opener.held:
            self.hold(True)
        if before.standby is not None:
            if self.standby is not None:
                self.standby.take_over(before.standby)
            else:
                before.standby.refuse_all()
        if self._cutting is not None and before._cutting is not None:
            self._cutting.succeed(before._cutting)
        before.leave()

    def leave(self) -> None:
        """Hear of the servers no more."""
        if self._balance is not None:
            for each in self._listeners:
                self._balance.listeners.remove(each)
        self._listeners = []
        self.stop()
