"""A server of a pool: its settings, how it is, and how many sessions it has.

A plain :class:`relayd.net.upstream.Upstream` says how to dial, and has no state.  A
:class:`Server` counts its sessions, and may be taken out: by its operator, by checks
(:mod:`relayd.upstreams.checks`), by dials that fail (:mod:`relayd.upstreams.passive`).
Whoever changes what it says calls :meth:`Server.changed`, so that its pool knows.

**The operator's word**, while the relay runs, stands over all of that:

- `up`: it is chosen whatever its checks and its dials say, and though it is `disabled`;
- `down`: it gets no new session, and is down: `--on-down` says what becomes of those
  that it has; flows of datagrams go elsewhere if it does not answer;
- `drain`: it gets no new session, and keeps those that it has, as one that is
  `disabled`;
- None: as its settings, its checks and its dials say.

So does the operator's weight, over that of the settings, of checks and of names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import attrs
from twisted.logger import Logger
from zope.interface import implementer

from relayd.core.interfaces import ICounted
from relayd.net.upstream import Upstream

log = Logger(namespace="relayd.upstreams")

#: The largest weight.
MAX_WEIGHT = 256

#: What an operator may say of a server while its relay runs.
Word = Literal["up", "down", "drain"]

_WORDS: dict[Word | None, str] = {
    "up": "its operator says that it is up",
    "down": "its operator has taken it down",
    "drain": "its operator drains it",
    None: "its operator says nothing any more",
}


class Passive(Protocol):
    """What judges a server by its dials (:mod:`relayd.upstreams.passive`)."""

    def connected(self, server: Server) -> None:
        """One has succeeded, of a server that is ejected."""

    def failed(self, server: Server, why: str) -> None:
        """One has failed."""

    def cancelled(self, server: Server) -> None:
        """One was given up."""

    def reset(self, server: Server, why: str, provoked: bool) -> None:
        """It has reset a session without a word; see :meth:`ICounted.reset`."""

    def served(self, server: Server) -> None:
        """A session of one that was `doubted` has ended in another way."""

    def came_up(self, server: Server) -> None:
        """It was down, and its checks succeed again."""


@attrs.frozen
class LastCheck:
    """What the last check of a server has found.

    :ivar at: when, in seconds on the clock of the checks (monotonic).
    :ivar up: it has succeeded.
    :ivar why: in words.
    """

    at: float
    up: bool
    why: str


def _nothing(_: Any) -> None:
    """What a server without a pool tells."""


def _weight(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if not 0 <= value <= MAX_WEIGHT:
        raise ValueError(f"{attribute.name} is 0 to {MAX_WEIGHT}, not {value}")


def _limit(_: object, attribute: attrs.Attribute[int], value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{attribute.name} is at least 1, not {value}")


@implementer(ICounted)
# Sessions are counted all the time, and a setter of attrs' is eight calls.
@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class Server(Upstream):
    """One server of a pool.

    :ivar label: what its operator calls it; the log says it before its address.
    :ivar weight: its share of the sessions, next to the others'; 0: none.  It is the
        operator's, or what checks have said last, or its own.
    :ivar own_weight: what its settings, or its name, say.
    :ivar checked_weight: what its checks have said last; None: nothing.
    :ivar operator_weight: what its operator says while the relay runs; None: nothing.
    :ivar max_sessions: how many it may have at once; None: any number.
    :ivar tier: 0; a backup, 1 or more, is chosen while no server of a lower one is
        usable.
    :ivar disabled: its settings take it out.
    :ivar operator: its operator's word, see above.
    :ivar draining: it is to go: its sessions stay, new ones go elsewhere.
    :ivar checked_up: no active check says that it is down.
    :ivar ejected: its dials have failed too often.
    :ivar doubted: it has reset sessions without a word, or is back after its trial, and
        since then none has ended in another way.
    :ivar on_trial: it is ejected, and one session may try it, which none does yet.
    :ivar share: of its weight, from 0 to 1: less than 1 after it has come up, for as
        long as the slow start.
    :ivar sessions: that are under way, those that are dialled included.
    :ivar fails: how many of its dials, or flows, have failed so far; with the sessions
        that it has reset without a word.
    :ivar filled: how often it had as many sessions as it may have.
    :ivar answers_to_clients: how many dials from clients' own addresses it has answered
        (:mod:`relayd.stream.on_behalf`).
    :ivar why: what its checks or its dials have found last, in words; empty if nothing
        has happened.
    :ivar has_checks: it is checked from time to time.
    :ivar last_check: what its last check has found, if there was one.
    :ivar was_judged: checks of a pool before this one have judged it.
    :ivar inherited: the same one of each pool before, and how many sessions, which
        count here, are left there.
    :ivar relay: the name of the relay that it belongs to.
    :ivar passive: judges it by its dials, if anything does.
    :ivar on_change: called when it is another whether it may be chosen, or its weight.
    :ivar on_room: called when it has become full, or is so no longer.
    :ivar on_over: called when a session is over, if a selector wants to know.
    """

    counted: ClassVar[bool] = True

    label: str = attrs.field(default="", kw_only=True)
    weight: int = attrs.field(default=1, kw_only=True, validator=_weight)
    max_sessions: int | None = attrs.field(default=None, kw_only=True, validator=_limit)
    tier: int = attrs.field(default=0, kw_only=True)  # type: ignore[misc]
    disabled: bool = attrs.field(default=False, kw_only=True)
    own_weight: int = attrs.field(init=False)
    checked_weight: int | None = attrs.field(default=None, init=False)
    operator_weight: int | None = attrs.field(default=None, init=False)
    operator: Word | None = attrs.field(default=None, init=False)
    draining: bool = attrs.field(default=False, init=False)
    checked_up: bool = attrs.field(default=True, init=False)
    ejected: bool = attrs.field(default=False, init=False)
    doubted: bool = attrs.field(default=False, init=False)
    on_trial: bool = attrs.field(default=False, init=False)
    share: float = attrs.field(default=1.0, init=False)
    sessions: int = attrs.field(default=0, init=False)
    fails: int = attrs.field(default=0, init=False)
    filled: int = attrs.field(default=0, init=False)
    answers_to_clients: int = attrs.field(default=0, init=False)
    why: str = attrs.field(default="", init=False)
    has_checks: bool = attrs.field(default=False, init=False)
    last_check: LastCheck | None = attrs.field(default=None, init=False)
    relay: str = attrs.field(default="", init=False)
    passive: Passive | None = attrs.field(default=None, init=False)
    on_change: Callable[[Any], object] = attrs.field(default=_nothing, init=False)
    on_room: Callable[[Any], object] = attrs.field(default=_nothing, init=False)
    on_over: Callable[[Any], object] | None = attrs.field(default=None, init=False)
    was_judged: bool = attrs.field(default=False, init=False)
    inherited: dict[Server, int] = attrs.field(factory=dict, init=False)

    @own_weight.default
    def _find_own_weight(self) -> int:
        return self.weight

    @property
    def up(self) -> bool:
        """Whether nothing is known against it; or its operator says that it is up."""
        return not self.is_down and (not self.ejected or self.operator == "up")

    @property
    def is_down(self) -> bool:
        """Whether its checks find it down, or its operator says so."""
        word = self.operator
        return word == "down" or (not self.checked_up and word != "up")

    @property
    def withdrawn(self) -> bool:
        """Whether it gets no new session, up or down: it is to go, or its operator or
        its settings have taken it out."""
        word = self.operator
        return self.draining or (self.disabled if word is None else word != "up")

    @property
    def usable(self) -> bool:  # type: ignore[override]
        """Whether it may be chosen for a new session, unless it is full."""
        return self.takes_sessions and (
            self.operator == "up"
            or (self.checked_up and (not self.ejected or self.on_trial))
        )

    @property
    def takes_sessions(self) -> bool:
        """The same, whether it is up or down."""
        return self.weight > 0 and not self.withdrawn

    @property
    def is_full(self) -> bool:  # type: ignore[override]
        """Whether it has as many sessions as it may have."""
        most = self.max_sessions
        return most is not None and self.sessions >= most

    @property
    def offered_weight(self) -> float:
        """The weight that it has now; 0 while it is withdrawn."""
        return 0 if self.withdrawn else self.weight * self.share

    @property
    def state(self) -> str:
        """How it is, in a word: `up`, `down`, `drain` (its operator's, or its checks'),
        `draining` (it has left its pool), `disabled` or `ejected`."""
        if self.draining:
            return "draining"
        if self.operator is not None:
            return self.operator
        if self.disabled:
            return "disabled"
        if not self.checked_up:
            return "down"
        return "ejected" if self.ejected else "up"

    @property
    def reason(self) -> str:
        """Why it is as it is, in words; empty if there is nothing to say."""
        if self.draining:
            return "it is none of its pool's servers any more"
        said = []
        if self.operator is not None:
            said.append(_WORDS[self.operator])
        elif self.disabled:
            said.append("disabled")
        if not self.weight:
            said.append("its weight is 0")
        if self.why:
            said.append(self.why)
        return "; ".join(said)

    def changed(self) -> None:
        """Whether it may be chosen, or its weight, has changed."""
        self.on_change(self)

    def inherit(self, before: Server) -> None:
        """See :func:`relayd.upstreams.heirs.take_place`."""
        self.fails = before.fails
        if self.has_checks and before.last_check is not None:
            self.checked_up, self.why = before.checked_up, before.why
            self.last_check, self.was_judged = before.last_check, True
        self.operator, self.operator_weight = before.operator, before.operator_weight
        self._weigh()
        self.changed()

    def leave_pool(self) -> None:
        """Nobody hears of its changes any more."""
        self.on_change = self.on_room = _nothing
        self.on_over = None

    def checked(self, up: bool, why: str, weight: int | None = None) -> None:
        """What its active checks have found.

        :param up: whether they succeed.
        :param why: of the last one, in words.
        :param weight: its new weight, if the check says one.
        """
        if weight is not None:
            self.checked_weight = min(max(weight, 0), MAX_WEIGHT)
            self._weigh()
        was_up, self.checked_up, self.why = self.checked_up, up, why
        if up != was_up:
            tell = log.info if up else log.warn
            word = self.operator
            tell(
                "{relay}: {server} is {how}: {why}{but}",
                relay=self.relay,
                server=self.name,
                how="up" if up else "down",
                why=why,
                # What its checks say changes nothing then.
                but="" if word is None else f"; but {_WORDS[word]}",
            )
            if up and self.passive is not None:
                self.passive.came_up(self)
        self.changed()

    def noted(self, at: float, up: bool, why: str) -> None:
        """A check has ended, whether or not that changes anything."""
        self.last_check = LastCheck(at, up, why)

    # -- weights, and the operator's word

    def _weigh(self) -> None:
        """Find the weight that counts."""
        weight = self.checked_weight
        if weight is None or (weight == 0 and self.operator == "up"):
            # It is up whatever its checks say.
            weight = self.own_weight
        said = self.operator_weight
        self.weight = weight if said is None else said

    def revise(self, weight: int) -> None:
        """Its settings, or its name, say another weight than before."""
        self.own_weight, self.checked_weight = weight, None
        self._weigh()
        self.changed()

    def operate(self, word: Word | None) -> None:
        """Its operator says how it is; None: nothing any more."""
        if word != self.operator:
            self.operator = word
            self._weigh()
            self._tell(_WORDS[word])
            self.changed()

    def operate_weight(self, weight: int | None) -> None:
        """Its operator gives it a weight; None: that of its settings or checks again.

        :raises ValueError: there is no such weight.
        """
        if weight is not None and not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"weight is 0 to {MAX_WEIGHT}, not {weight}")
        if weight != self.operator_weight:
            self.operator_weight = weight
            self._weigh()
            given = "" if weight is None else ", as its operator says"
            self._tell(f"its weight is {self.weight}{given}")
            self.changed()

    def _tell(self, what: str) -> None:
        log.info(
            "{relay}: {server}: {what}", relay=self.relay, server=self.name, what=what
        )

    # -- ICounted

    def began(self) -> None:
        """See :meth:`ICounted.began`."""
        self.sessions = sessions = self.sessions + 1
        most = self.max_sessions
        if self.on_trial:
            # This one tries it.
            self.on_trial = False
            self.changed()
        elif most is not None and sessions == most:
            self.filled += 1
            self.on_room(self)

    def connected(self) -> None:
        """See :meth:`ICounted.connected`."""
        if self.ejected and self.passive is not None:
            self.passive.connected(self)

    def failed(self, ending: Any, detail: str) -> None:
        """See :meth:`ICounted.failed`."""
        self._leave()
        self.fails += ending is not None
        if self.passive is None:
            return
        if ending is None:
            self.passive.cancelled(self)
        else:
            self.passive.failed(self, detail or ending.word)

    def cancelled(self) -> None:
        """See :meth:`ICounted.cancelled`."""
        self._leave()
        if self.passive is not None:
            self.passive.cancelled(self)

    def closed(self) -> None:
        """See :meth:`ICounted.closed`."""
        # As `_leave`, without a call.
        self.sessions = sessions = self.sessions - 1
        most, on_over = self.max_sessions, self.on_over
        if on_over is not None:
            on_over(self)
        if most is not None and sessions + 1 == most:
            self.on_room(self)
        if self.doubted:
            self.doubted = False
            if self.passive is not None:
                self.passive.served(self)

    def reset(self, why: str, provoked: bool) -> None:
        """See :meth:`ICounted.reset`."""
        self._leave()
        self.fails += 1
        if self.passive is not None:
            self.passive.reset(self, why, provoked)

    def _leave(self) -> None:
        """A session less."""
        self.sessions = sessions = self.sessions - 1
        most, on_over = self.max_sessions, self.on_over
        if on_over is not None:
            on_over(self)
        if most is not None and sessions + 1 == most:
            self.on_room(self)
