"""Asks a relay's gate about clients that have no flow.

Datagrams don't wait, so a gate that takes its time refuses.
"""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger

from relayd.core.errors import REASONS, Refused
from relayd.core.flows import NewFlow
from relayd.core.interfaces import IGate, ILease
from relayd.core.leases import LATER, checked, give_back, lease_of
from relayd.datagrams.ledger import Ledger
from relayd.net.log_throttle import LogThrottle

log = Logger(namespace="relayd.datagrams")


class FlowGate:
    """A gate, as flows ask it; who is refused is counted."""

    def __init__(self, gate: IGate, ledger: Ledger[Any]) -> None:
        self._gate = gate
        self._ledger = ledger
        #: One for each of the few reasons: who is always refused for one must not keep
        #: the others out of the log.
        self._throttles = {each: LogThrottle(ledger.clock) for each in REASONS}

    def enter(self, asked: NewFlow) -> ILease | None:
        """Ask about a client; None: it is refused, which is counted."""
        dropped = self._ledger.counters.dropped
        try:
            lease = self._gate.enter(asked)
            if isinstance(lease, LATER):
                # Whatever it gives later is given back.
                refused = lease_of(lease)
                refused.addCallbacks(give_back, lambda _: None)
                refused.cancel()
                raise Refused("the gate takes its time: datagrams don't wait")
            checked(lease)
        except Refused as refusal:
            dropped[refusal.reason] += 1
            if self._throttles[refusal.reason].is_due():
                log.warn(
                    "{relay}: no flow for {client}: {reason}: {why} ({count} datagrams"
                    " dropped for that reason so far)",
                    relay=self._ledger.name,
                    client=asked.client,
                    reason=refusal.reason,
                    why=refusal.why,
                    count=dropped[refusal.reason],
                )
            return None
        except Exception:
            self._ledger.log_failure("a gate failed; its client is refused")
            dropped["gate"] += 1
            return None
        found: ILease = lease
        return found
