"""Builds the gate of a relay from its settings, and what ends and limits its sessions.

A relay without such settings has none of them.  Gates that count nobody are asked
first: they refuse most, and cost nothing.
"""

from __future__ import annotations

from typing import Any

import attrs

from relayd.admission.bandwidth import Bandwidth
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
    :ivar bandwidth: None: nothing is limited.
    """

    gate: Any
    lifetime: Lifetime | None
    bandwidth: Bandwidth | None = None
    #: What it was made of.
    settings: FlowAdmission | None = None

    @classmethod
    def of(
        cls, settings: FlowAdmission, reactor: Any, before: Admitting | None = None
    ) -> Admitting:
        """What the settings say.

        :param before: of the same relay; it is this one, if nothing else is said.
        """
        if before is not None and before.settings == settings:
            return before
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
        gate = gates[0] if len(gates) == 1 else Gates(gates) if gates else None
        return cls(gate, lifetime, _bandwidth(settings, reactor), settings)


def _bandwidth(settings: FlowAdmission, reactor: Any) -> Bandwidth | None:
    limits = (
        settings.bandwidth,
        settings.bandwidth_per_client,
        settings.bandwidth_per_session,
    )
    if limits == (None, None, None):
        return None
    return Bandwidth(*limits, clock=reactor, prefix=settings.client_prefix)
