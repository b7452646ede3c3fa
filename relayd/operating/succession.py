"""What outlives a change of settings: totals, limits, and who counts towards them.

A change makes new factories, which get the clients from then on; those from before keep
their sessions.  Both are one relay to whoever reads its totals, and to its limits: a
relay that may have 100 sessions has no more because its timeouts have changed.  So
both have one gate, too: clients that those from before have still to ask about, as
their PROXY header comes later, are admitted by the limits that there are then.

:func:`succeed` is called once for each change, before the new factories serve anybody:
in the turn of the reactor in which they are given their listeners.  A UDP relay is
changed in place, and keeps its totals by that; :func:`take_over` is for its gate and
its bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from relayd.admission.gates import parts_of
from relayd.admission.session_limits import SessionLimits
from relayd.operating.standing import Listening, Served


def succeed(
    listenings: Iterable[Listening],
    before: Sequence[Listening],
    former: Iterable[Served] = (),
) -> None:
    """Have new factories go on where those of before are.

    :param listenings: that are open from now on.
    :param before: those that were until now, whose factories may be among the new ones.
    :param former: others that have sessions still, as of a relay that was removed.
    """
    listed: Sequence[Any] = [each.factory for each in before]
    known = [each for each in dict.fromkeys([*listed, *former]) if _counts(each)]
    were = set(known)
    by_name: dict[str, list[Any]] = {}
    for each in known:
        by_name.setdefault(each.name, []).append(each)
    by_key = {(each.factory.name, each.key): each.factory for each in before}
    new: dict[Any, list[Any]] = {}
    for listening in listenings:
        factory: Any = listening.factory
        if factory not in were and _counts(factory):
            same = by_key.get((factory.name, listening.key))
            new.setdefault(factory, []).extend([same] if _counts(same) else [])
    for factory, predecessors in new.items():
        if predecessors:
            factory.succeed(predecessors[0])
        elif factory.name in by_name:
            # Another port: its sequence is its own.
            factory.share_totals(by_name[factory.name][0])
        if factory.name in by_name:
            _hand_on(by_name[factory.name], factory)


def _hand_on(before: Sequence[Any], factory: Any) -> None:
    """Have the sessions of before, and the clients to come, limited as of one relay.

    :param before: those of the same name, which have one gate and one bandwidth.
    """
    gate, bandwidth = before[0].gate, before[0].bandwidth
    if gate is factory.gate and bandwidth is factory.bandwidth:
        # Another one of the same relay has done so, or nothing has changed.
        return
    for each in before:
        # For clients that are admitted there from now on.
        each.gate, each.bandwidth = factory.gate, factory.bandwidth
    take_over(factory.bandwidth, bandwidth)
    # Last: who has waited may be served at once.
    take_over(factory.gate, gate)
    for limits in _new_limits(factory.gate, gate):
        _adopt(limits, before)


def _new_limits(new: Any, old: Any) -> set[SessionLimits]:
    """Limits of sessions where there were none."""
    if any(isinstance(each, SessionLimits) for each in parts_of(old)):
        return set()
    return {each for each in parts_of(new) if isinstance(each, SessionLimits)}


def _adopt(limits: SessionLimits, factories: Iterable[Any]) -> None:
    """Count the sessions that there are."""
    for factory in factories:
        for protocol in factory.registry.living():
            session = protocol.session
            if session.ordinal >= 0 and session.ended_at is None:
                protocol.count_for(limits.adopt(session))


def take_over(new: Any, old: Any) -> None:
    """Have a gate, or a bandwidth, count what another one in its place has counted.

    Nothing, if it is of another kind, or somebody else's.  What has no successor holds
    no more: who waits for it is admitted.
    """
    if new is old:
        return
    successors = {type(each): each for each in parts_of(new)}
    for each in parts_of(old):
        successor = successors.get(type(each))
        if successor is None:
            if hasattr(each, "lift"):
                each.lift()
        elif hasattr(successor, "succeed"):
            successor.succeed(each)


def _counts(served: Any) -> bool:
    """Whether it is a factory of streams."""
    return hasattr(served, "share_totals")
