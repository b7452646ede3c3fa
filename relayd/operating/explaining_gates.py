"""Which gates a client meets, and what each of them says; nobody is counted."""

from __future__ import annotations

from typing import Any

from relayd.admission.client_rules import ClientRule
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import HoursGate, RulesGate, parts_of
from relayd.admission.session_limits import SessionLimits
from relayd.configuring.config import Admission, AnyRelay, FlowAdmission, UdpRelay
from relayd.core.errors import Refused
from relayd.operating.explanation import OK, REFUSED, UNKNOWN, Moment, Step, meet
from relayd.operating.units import takes_ports


def meet_gates(
    steps: list[Step], relay: AnyRelay, gate: Any, client: str, moment: Moment
) -> None:
    by_kind = {type(each): each for each in parts_of(gate)}
    _rules(steps, by_kind.pop(RulesGate, None), client)
    _hours(steps, by_kind.pop(HoursGate, None), moment)
    _rates(steps, by_kind.pop(ConnectRates, None), client)
    limits = by_kind.pop(SessionLimits, None)
    if isinstance(relay, UdpRelay):
        _flow_limits(steps, relay)
    else:
        _limits(steps, limits, client)
    for each in by_kind.values():
        why = f"{type(each).__name__}: a gate that is not relayd's own is not asked"
        meet(steps, "gate", UNKNOWN, why)


def _rules(steps: list[Step], gate: RulesGate | None, client: str) -> None:
    if gate is None:
        meet(steps, "rules", OK, "no rule: all are served")
        return
    decision = gate.decide(client)
    if decision.why:
        meet(steps, "rules", REFUSED, decision.why)
    elif decision.rule is None:
        meet(steps, "rules", OK, "no rule is about this client, and none allows others")
    else:
        meet(steps, "rules", OK, _rule(decision.rule))


def _rule(rule: ClientRule) -> str:
    return f"--{'allow' if rule.allow else 'deny'}-client {rule.text}"


def _hours(steps: list[Step], gate: HoursGate | None, moment: Moment) -> None:
    if gate is None:
        meet(steps, "hours", OK, "no hours: always")
        return
    within = gate.hours.of(moment)
    there = moment.astimezone((within or gate.hours.hours[0]).zone)
    when = f"{there:%a %Y-%m-%d %H:%M} {there.tzinfo}"
    if within is None:
        meet(steps, "hours", REFUSED, f"{when} is outside {gate.hours}")
    else:
        meet(steps, "hours", OK, f"{when} is within --hours {within.text}")


def _rates(steps: list[Step], gate: ConnectRates | None, client: str) -> None:
    if gate is None:
        meet(steps, "rates", OK, "no --max-connects-per-client")
        return
    try:
        gate.foresee(client)
    except Refused as refusal:
        meet(steps, "rates", REFUSED, refusal.why)
        return
    left = gate.left(client)
    counted = "not counted" if left is None else f"{left} left at once"
    meet(steps, "rates", OK, f"--max-connects-per-client {gate.rate}: {counted}")


def _limits(steps: list[Step], gate: SessionLimits | None, client: str) -> None:
    if gate is None:
        meet(steps, "limits", OK, "no --max-sessions, no --max-sessions-per-client")
        meet(steps, "queue", OK, "no queue")
        return
    refusal: Refused | None = None
    waits = False
    try:
        waits = gate.foresee(client)
    except Refused as problem:
        refusal = problem
    if refusal is not None and refusal.reason != "queue":
        meet(steps, "limits", REFUSED, refusal.why)
    own = gate.sessions_of(client)
    most, each = gate.max_sessions, gate.max_sessions_per_client
    said = []
    if most is not None:
        said.append(f"--max-sessions {most}: {gate.sessions} now")
    if each is not None:
        now = "not counted" if own is None else f"{own} now"
        said.append(f"--max-sessions-per-client {each}: {now}")
    full = "full" if waits or refusal is not None else OK
    meet(steps, "limits", full, "; ".join(said))
    if refusal is not None:
        meet(steps, "queue", REFUSED, refusal.why)
    elif waits:
        limit = f"--queue-timeout {gate.patience:g}"
        meet(steps, "queue", "waits", f"behind {gate.waiting} others, {limit}")
    else:
        meet(steps, "queue", OK, "nobody waits: it need not")


def _flow_limits(steps: list[Step], relay: UdpRelay) -> None:
    limit = relay.udp.max_flows
    bounds = "descriptors and ports" if takes_ports(relay) else "descriptors"
    most = f"as many as {bounds} allow" if limit is None else str(limit)
    each = relay.udp.max_flows_per_client
    own = "" if each is None else f", --max-flows-per-client {each}"
    why = f"--max-flows {most}{own}: a new flow takes the place of one not in use"
    meet(steps, "limits", OK, why)


def meet_bandwidth(steps: list[Step], admission: FlowAdmission) -> None:
    said = [
        f"--{name.replace('_', '-')} {rates}"
        for name in ("bandwidth", "bandwidth_per_client", "bandwidth_per_session")
        if (rates := getattr(admission, name)) is not None
    ]
    if isinstance(admission, Admission) and admission.max_age:
        meet(steps, "age", "limited", f"--max-age {admission.max_age:g}")
    if said:
        meet(steps, "bandwidth", "limited", ", ".join(said))
    else:
        meet(steps, "bandwidth", OK, "not limited")
