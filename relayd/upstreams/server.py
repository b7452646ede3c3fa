"""A server of a pool: its settings, how it is, and how many sessions it has.

A plain :class:`relayd.net.upstream.Upstream` says how to dial, and has no state.  A
:class:`Server` counts its sessions, and may be taken out: by its operator, by checks
(:mod:`relayd.upstreams.checks`), by dials that fail (:mod:`relayd.upstreams.passive`).
Whoever changes what it says calls :meth:`Server.changed`, so that its pool knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import attrs
from twisted.logger import Logger
from zope.interface import implementer

from relayd.core.interfaces import ICounted
from relayd.net.upstream import Upstream

log = Logger(namespace="relayd.upstreams")

#: The largest weight.
MAX_WEIGHT = 256


class Passive(Protocol):
    """What judges a server by its dials (:mod:`relayd.upstreams.passive`)."""

    def connected(self, server: Server) -> None:
        """One has succeeded."""

    def failed(self, server: Server, why: str) -> None:
        """One has failed."""

    def cancelled(self, server: Server) -> None:
        """One was given up."""

    def came_up(self, server: Server) -> None:
        """It was down, and its checks succeed again."""


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
    :ivar weight: its share of the sessions, next to the others'; 0: none.
    :ivar max_sessions: how many it may have at once; None: any number.
    :ivar tier: 0; a backup, 1 or more, is chosen while no server of a lower one is
        usable.
    :ivar disabled: its operator has taken it out.
    :ivar draining: it is to go: its sessions stay, new ones go elsewhere.
    :ivar checked_up: no active check says that it is down.
    :ivar ejected: its dials have failed too often.
    :ivar on_trial: it is ejected, and one session may try it, which none does yet.
    :ivar share: of its weight, from 0 to 1: less than 1 after it has come up, for as
        long as the slow start.
    :ivar sessions: that are under way, those that are dialled included.
    :ivar why: why it is as it is, in words; empty if nothing has happened.
    :ivar relay: the name of the relay that it belongs to.
    :ivar passive: judges it by its dials, if anything does.
    :ivar on_change: called when it is another whether it may be chosen, or its weight.
    :ivar on_load: called when `sessions` has changed, if a selector wants to know.
    """

    counted: ClassVar[bool] = True

    label: str = attrs.field(default="", kw_only=True)
    weight: int = attrs.field(default=1, kw_only=True, validator=_weight)
    max_sessions: int | None = attrs.field(default=None, kw_only=True, validator=_limit)
    tier: int = attrs.field(default=0, kw_only=True)  # type: ignore[misc]
    disabled: bool = attrs.field(default=False, kw_only=True)
    draining: bool = attrs.field(default=False, init=False)
    checked_up: bool = attrs.field(default=True, init=False)
    ejected: bool = attrs.field(default=False, init=False)
    on_trial: bool = attrs.field(default=False, init=False)
    share: float = attrs.field(default=1.0, init=False)
    sessions: int = attrs.field(default=0, init=False)
    why: str = attrs.field(default="", init=False)
    relay: str = attrs.field(default="", init=False)
    passive: Passive | None = attrs.field(default=None, init=False)
    on_change: Callable[[Any], object] = attrs.field(default=_nothing, init=False)
    on_load: Callable[[Any], object] | None = attrs.field(default=None, init=False)

    @property
    def up(self) -> bool:
        """Whether nothing is known against it."""
        return self.checked_up and not self.ejected

    @property
    def usable(self) -> bool:  # type: ignore[override]
        """Whether it may be chosen for a new session."""
        return (
            self.takes_sessions
            and self.checked_up
            and (not self.ejected or self.on_trial)
        )

    @property
    def takes_sessions(self) -> bool:
        """The same, whether it is up or down."""
        return (
            self.weight > 0
            and not (self.disabled or self.draining)
            and (self.max_sessions is None or self.sessions < self.max_sessions)
        )

    @property
    def load(self) -> float:
        """Sessions, in proportion to its weight; less is better."""
        return (self.sessions + 1) / (self.weight * self.share)

    def changed(self) -> None:
        """Whether it may be chosen, or its weight, has changed."""
        self.on_change(self)

    def leave_pool(self) -> None:
        """Nobody hears of its changes any more."""
        self.on_change, self.on_load = _nothing, None

    def checked(self, up: bool, why: str, weight: int | None = None) -> None:
        """What its active checks have found.

        :param up: whether they succeed.
        :param why: of the last one, in words.
        :param weight: its new weight, if the check says one.
        """
        if weight is not None:
            self.weight = min(max(weight, 0), MAX_WEIGHT)
        was_up, self.checked_up, self.why = self.checked_up, up, why
        if up != was_up:
            tell = log.info if up else log.warn
            tell(
                "{relay}: {server} is {how}: {why}",
                relay=self.relay,
                server=self.name,
                how="up" if up else "down",
                why=why,
            )
            if up and self.passive is not None:
                self.passive.came_up(self)
        self.changed()

    # -- ICounted

    def began(self) -> None:
        """See :meth:`ICounted.began`."""
        self.sessions += 1
        if self.on_load is not None:
            self.on_load(self)
        if self.on_trial:
            # This one tries it.
            self.on_trial = False
            self.changed()
        elif self.sessions == self.max_sessions:
            self.changed()

    def connected(self) -> None:
        """See :meth:`ICounted.connected`."""
        if self.passive is not None:
            self.passive.connected(self)

    def failed(self, ending: Any, detail: str) -> None:
        """See :meth:`ICounted.failed`."""
        self.closed()
        if self.passive is None:
            return
        if ending is None:
            self.passive.cancelled(self)
        else:
            self.passive.failed(self, detail or ending.word)

    def cancelled(self) -> None:
        """See :meth:`ICounted.cancelled`."""
        self.closed()
        if self.passive is not None:
            self.passive.cancelled(self)

    def closed(self) -> None:
        """See :meth:`ICounted.closed`."""
        self.sessions -= 1
        if self.on_load is not None:
            self.on_load(self)
        if self.sessions + 1 == self.max_sessions:
            self.changed()
