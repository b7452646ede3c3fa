"""Gates: which clients may connect.

A gate is asked once for each accepted connection, before anything is dialled for it,
and hands out a lease that the session gives back when it has ended
(:class:`relayd.core.interfaces.IGate`).  A relay without one admits all.

Here are those that count nobody, and :class:`Gates`, which are several as one.  Those
that count are :mod:`relayd.admission.session_limits` and
:mod:`relayd.admission.connect_rates`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
from zope.interface import implementer

from relayd.admission.client_keys import KEPT, hosts
from relayd.admission.client_rules import ClientRule, ClientRules
from relayd.admission.hours import OpeningHours
from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease
from relayd.core.leases import FREE, LATER, Leases, checked, give_back, lease_of

_NO_ADDRESS = "it has no address"


@attrs.frozen
class Decision:
    """What rules say about a client.

    :ivar rule: the one that decides; None: none is about this client.
    :ivar why: it is refused; empty if it is not.
    """

    rule: ClientRule | None
    why: str


@implementer(IGate)
class RulesGate:
    """Admits clients by rules.

    An IPv4 client of an IPv6 socket counts as IPv4.  A client that has neither an
    address nor a UNIX socket can't be identified, and is refused.

    :param rules: in their order.
    """

    def __init__(self, rules: Iterable[ClientRule]) -> None:
        self.rules = ClientRules(rules)
        self._decision = functools.lru_cache(maxsize=KEPT)(self._find)

    def decide(self, client: str) -> Decision:
        """What the rules say about a client.

        :param client: its name, as :func:`relayd.core.addresses.address_name` has it.
        """
        host = hosts.of(client)
        if host or client.startswith("unix:"):
            return self._decision(host)
        return _NOBODY

    def enter(self, session: Any) -> ILease:
        """See :meth:`IGate.enter`."""
        why = self.decide(session.client).why
        if why:
            raise Refused(why, "client")
        return FREE

    def _find(self, host: str) -> Decision:
        rules = self.rules
        try:
            number = rules.decides(host)
        except ValueError:
            return _NOBODY
        if number < 0:
            admitted = rules.otherwise
            return Decision(
                None, "" if admitted else "no --allow-client names this client"
            )
        rule = rules.rules[number]
        return Decision(rule, "" if rule.allow else f"--deny-client {rule.text}")


#: Of a client that can't be identified.
_NOBODY = Decision(None, _NO_ADDRESS)


@implementer(IGate)
class HoursGate:
    """Admits clients within some hours.

    :param hours: which.

    :ivar is_lifted: there are none any more: all are admitted.
    """

    #: They may be over once a client has waited for another gate.
    changes = True

    def __init__(self, hours: OpeningHours) -> None:
        self.hours = hours
        #: What is asked in place of this, if something is.
        self._heir: HoursGate | None = None
        self.is_lifted = False

    def enter(self, session: Any) -> ILease:
        """See :meth:`IGate.enter`."""
        gate: HoursGate = self
        while gate._heir is not None:
            gate = gate._heir
        if gate.is_lifted or gate.hours.is_open():
            return FREE
        raise Refused(f"outside {gate.hours}", "hours")

    def succeed(self, other: HoursGate) -> None:
        """Stand in place of another one, also for those who have waited there."""
        other._heir = self

    def lift(self) -> None:
        """There are no hours any more: who has waited is not refused for them."""
        self.is_lifted = True


def parts_of(gate: Any) -> Iterator[Any]:
    """The gates that one is made of, in order; itself, if it is not several.

    :param gate: None: there is none.
    """
    if isinstance(gate, Gates):
        for each in gate.gates:
            yield from parts_of(each)
    elif gate is not None:
        yield gate


def _as_one(leases: list[ILease]) -> ILease:
    if not leases:
        return FREE
    return leases[0] if len(leases) == 1 else Leases(leases)


@implementer(IGate)
class Gates:
    """Several gates as one: a client is admitted that all of them admit, in order.

    If one of them refuses, what those before it have given is given back: their leases,
    and what one counts that gives no lease (`take_back`).  A client that had to wait is
    asked about once more, by those before whose answer changes with time (`changes`).

    :param gates: those that answer at once, and those that refuse most, go first.
    """

    def __init__(self, gates: Iterable[Any]) -> None:
        self.gates = tuple(gates)

    def _take_back(self, session: Any, number: int) -> None:
        """One of the gates has refused a client that those before it have admitted."""
        for gate in self.gates[:number]:
            take_back = getattr(gate, "take_back", None)
            if take_back is not None:
                take_back(session)

    @property
    def patience(self) -> float:
        """See :attr:`relayd.admission.session_limits.SessionLimits.patience`."""
        return sum(getattr(each, "patience", 0.0) for each in self.gates)

    def enter(self, session: Any) -> Any:
        """See :meth:`IGate.enter`."""
        held: list[ILease] = []
        number = 0
        try:
            for number, gate in enumerate(self.gates):
                lease = gate.enter(session)
                if lease is FREE:
                    continue
                if isinstance(lease, LATER):
                    return self._enter_later(session, number, held, lease)
                held.append(checked(lease))
        except BaseException as problem:
            Leases(held).release()
            if number and isinstance(problem, Refused):
                self._take_back(session, number)
            raise
        return _as_one(held)

    def _ask_again(self, session: Any, number: int) -> None:
        """The gate of this number has had a client wait: ask those before it.

        :raises Refused: one of them would not admit it any more.
        """
        for gate in self.gates[:number]:
            if getattr(gate, "changes", False):
                give_back(gate.enter(session))

    async def _enter_later(
        self, session: Any, number: int, held: list[ILease], answer: Any
    ) -> ILease:
        """Wait for the answer of one gate, and go on with those after it."""
        try:
            while True:
                if isinstance(answer, LATER):
                    held.append(checked(await lease_of(answer)))
                    self._ask_again(session, number)
                else:
                    held.append(checked(answer))
                number += 1
                if number == len(self.gates):
                    return _as_one(held)
                answer = self.gates[number].enter(session)
        except BaseException as problem:
            # Cancelled, too: but who has left of itself has come.
            Leases(held).release()
            if isinstance(problem, Refused):
                self._take_back(session, number)
            raise
