"""Builds the gate of a relay from its settings, and what ends its sessions.

A relay without such settings has neither.  Gates that count nobody are asked first:
they refuse most, and cost nothing.
"""

from __future__ import annotations

from typing import Any

import attrs

from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates, HoursGate, RulesGate
from relayd.admission.hours import OpeningHours
from relayd.admission.lifetimes import Lifetime
from relayd.admission.session_limits import SessionLimits
from relayd.configuring.config import Admission, FlowAdmission


@attrs.frozen(eq=False)
class Admitting:
    """What the listeners of one relay share.

    :ivar gate: an :class:`relayd.core.interfaces.IGate`; None: all are admitted.
    :ivar lifetime: None: sessions may last for ever.
    """

    gate: Any
    lifetime: Lifetime | None

    @classmethod
    def of(cls, settings: FlowAdmission, reactor: Any) -> Admitting:
        """What the settings say."""
        gates: list[Any] = []
        hours = OpeningHours(settings.hours, reactor) if settings.hours else None
        prefix = settings.client_prefix
        if settings.clients:
            gates.append(RulesGate(settings.clients))
        if hours is not None:
            gates.append(HoursGate(hours))
        if settings.max_connects_per_client is not None:
            rate = settings.max_connects_per_client
            gates.append(ConnectRates(rate, reactor, prefix))
        max_age = 0.0
        if isinstance(settings, Admission):
            max_age = settings.max_age
            limits = settings.max_sessions, settings.max_sessions_per_client
            if limits != (None, None):
                gates.append(
                    SessionLimits(
                        *limits,
                        prefix=prefix,
                        queue=settings.queue,
                        queue_timeout=settings.queue_timeout,
                        clock=reactor,
                    )
                )
        ends = hours if settings.hours_end else None
        lifetime = Lifetime(max_age, ends) if max_age or ends else None
        if len(gates) < 2:
            return cls(gates[0] if gates else None, lifetime)
        return cls(Gates(gates), lifetime)
