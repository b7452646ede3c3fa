"""The netfilter rules of a process's relays, for as long as they run.

`--manage-netfilter` has the relay itself apply the rules that its relays need
(:mod:`relayd.netfilter.rules`), as a kernel module registers its hooks, and remove them
as it stops.  It takes CAP_NET_ADMIN, which the process keeps.

They are applied once the listeners stand and the process has become another user, if it
is to: one that may not change rules can't start, and leaves none.  After each change of
the relays they follow, in a thread, one change at a time:

    a relay that is new, has been started, or has other rules     apply
    one that was stopped, or is no more, and has sessions still   no new clients: apply
                                                                  what these need
    one without sessions                                          remove

What sessions need is that answers of servers find their sockets, and that NAT goes on:
the kernel translates what belongs to a connection while there is a chain for NAT.
The flows of a UDP relay share its listener, and may share its interception: its rules
are all there until the last of them has ended.  A relay that is no longer transparent,
or has other servers, keeps what its sessions of before need, for as long.  What can't
be changed is tried again a little later, and told: a change of the relays stands all
the same.  A reload applies all of them again.  So does relayd those that somebody has
removed, as a restart of nftables.service does with all rules of a machine
(:mod:`relayd.net.rule_watch`); a chain is as it was if it has as many rules.

Only the rules of relays that this process has had are touched, and one process alone
manages those of a name (:mod:`relayd.operating.rule_claims`).  After a crash, the next
start applies the same ones again, which leaves nothing twice, and removes those that a
relay needs no more; those of a relay that is not started again stay until `relayctl
netfilter remove`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import attrs
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredLock, inlineCallbacks
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from relayd.control.steering import Json
from relayd.core.errors import CannotStart, NetfilterError
from relayd.core.names import first_of
from relayd.net.monotonic import monotonic
from relayd.net.rule_watch import RuleWatch
from relayd.netfilter import applying
from relayd.netfilter.rules import RelayRules
from relayd.observing.readings import RuleCounts
from relayd.operating.aside import aside
from relayd.operating.changing import Relays
from relayd.operating.rule_claims import RuleClaims
from relayd.operating.rule_steps import Netfilter, Step, There, carry_out, needed_by
from relayd.operating.units import Unit

log = Logger(namespace="relayd.netfilter")

#: Seconds between two looks at whether the last session of a relay has ended.
LOOK = 1.0

#: Seconds after which what has failed is tried again.
RETRY = 30.0

#: How many groups of servers of before one relay's sessions may have.
KEPT = 16


class ManagedRules(Service):
    """Has the kernel's rules be those that the relays need.

    It is started when all listeners stand, and stopped when all sessions have ended.

    :param relays: of the process.
    :param reactor: runs them; has a pool of threads.
    :param command: its name, with which errors begin.
    :param netfilter: changes the rules.
    :param watching: made with what is called when somebody has changed some.
    """

    def __init__(
        self,
        relays: Relays,
        reactor: Any,
        command: str,
        netfilter: Netfilter = applying,
        watching: Callable[[Any, Callable[[], None]], RuleWatch] = RuleWatch,
    ) -> None:
        self._relays = relays
        self._reactor = reactor
        self._clock = monotonic(reactor)
        self._command = command
        self._netfilter = netfilter
        self._user = os.geteuid()
        self._claims = RuleClaims(reactor)
        self._there: dict[str, There] = {}
        #: What each relay needs, by what it was built as.
        self._needs: dict[Unit, RelayRules | None] = {}
        #: Held by the change of rules that is under way.
        self._lock = DeferredLock()
        #: Some rules wait for the end of sessions.
        self._waiting = False
        self._look: IDelayedCall | None = None
        self._problems: list[str] = []
        #: What may keep from relays what was applied for them.
        self._cautions: list[str] = []
        #: Changes that have failed, and changes by others.
        self._failures = self._lost = 0
        self._watch = watching(reactor, self._check)

    # -- its life

    def startService(self) -> None:
        """Apply the rules of all relays that are not stopped.

        :raises CannotStart: they can't be applied, and none is left.
        """
        super().startService()
        self._find_old()
        steps = self._steps()
        carry_out(steps)
        failed = [each for each in steps if each.why_not]
        if not failed:
            self._settle(steps)
            with suppress(NetfilterError):
                self._warn(self._look_for_cautions())
            return
        self.running = False
        # What was begun; whoever may not begin need not be told of it twice.
        begun = [name for each in steps for name in each.wanted if name in self._claims]
        with suppress(NetfilterError):
            if begun:
                self._netfilter.remove(begun, self._relays.config.netfilter_mark)
        for name in begun:
            self._claims.release(name)
        why = f"{failed[0]}"
        if os.geteuid() != self._user:
            why += " (as the user that it has become)"
        raise CannotStart(f"{self._command}: --manage-netfilter: {why}")

    @inlineCallbacks
    def stopService(self) -> Any:
        """Remove them all, once the change that is under way has come to its end."""
        super().stopService()
        self._forget_look()
        self._watch.stop()
        yield self.follow()

    def close(self) -> None:
        """The same at once, of a process that can't start: its reactor never runs."""
        self.running = False
        self._forget_look()
        self._watch.stop()
        steps = self._steps()
        carry_out(steps)
        self._settle(steps)

    def _find_old(self) -> None:
        """Relays that need no rules may have some of before a crash: those go.

        Nothing is run if all need some.  If they can't be listed, those that relays
        need can't be applied either.
        """
        idle = self._relays.units.keys() - self._wanted().keys()
        with suppress(NetfilterError):
            for name in idle and idle.intersection(self._netfilter.relays_there()):
                if not self._not_ours(name):
                    nothing = RelayRules(name, "tcp", (), diverts=False, answers=())
                    self._there[name] = There(nothing, udp=False, sure=False)

    # -- following the relays

    def follow(self, anew: bool = False) -> Deferred[Sequence[str]]:
        """Have the rules that the relays need now.

        :param anew: also those that were applied before: somebody may have removed
            them.
        :return: when that is done, what has failed: a line for each; nothing is raised.
        """
        self._claims.ask_again()
        return self._lock.run(self._follow, anew)

    @inlineCallbacks
    def _follow(self, anew: bool = False) -> Any:
        if anew:
            self._doubt(self._there)
        steps = self._steps()
        if steps:
            yield aside(self._reactor, partial(carry_out, steps))
        self._settle(steps)
        if steps or anew:
            yield self._be_cautious()
        return self._problems

    @inlineCallbacks
    def _be_cautious(self) -> Any:
        # Who can't tell has failed, or fails, at something of more weight.
        with suppress(NetfilterError):
            found = yield aside(self._reactor, self._look_for_cautions)
            self._warn(found)

    def _look_for_cautions(self) -> list[str]:
        rules = [each.rules for each in self._there.values()]
        if not rules:
            return []
        return self._netfilter.cautions(rules, self._relays.config.netfilter_mark)

    def _warn(self, cautions: list[str]) -> None:
        before, self._cautions = self._cautions, cautions
        for each in cautions:
            if each not in before:
                log.warn("netfilter: {caution}", caution=each)

    def _doubt(self, names: Iterable[str]) -> None:
        """What there is of these relays is to be applied again."""
        for name in names:
            self._there[name] = attrs.evolve(self._there[name], sure=False)

    def _steps(self) -> list[Step]:
        """What is to be done; what comes is there before anything goes."""
        new: dict[str, There | None] = {}
        left: dict[str, There | None] = {}
        gone: dict[str, There | None] = {}
        steps = []
        for name, wanted in self._wanted().items():
            if wanted == self._there.get(name):
                continue
            if wanted is None:
                gone[name] = wanted
            elif not wanted.intake:
                left[name] = wanted
            elif why_not := self._not_ours(name):
                steps.append(Step(bool, "applied", {name: wanted}, why_not))
            else:
                new[name] = wanted
        rules, rest = (
            [each.rules for each in of.values() if each is not None]
            for of in (new, left)
        )
        netfilter, mark = self._netfilter, self._relays.config.netfilter_mark
        steps += [
            Step(partial(netfilter.apply, rules, mark), "applied", new),
            Step(partial(netfilter.apply, rest, mark), "closed to new clients", left),
            Step(partial(netfilter.remove, [*gone], mark), "removed", gone),
        ]
        return [each for each in steps if each.wanted]

    def _not_ours(self, name: str) -> str:
        """Why another process has the rules of this name; nothing: we have."""
        try:
            self._claims.take(name)
        except NetfilterError as problem:
            return str(problem)
        return ""

    def _wanted(self) -> dict[str, There | None]:
        """What the kernel is to have of each relay; None: nothing, and it has some."""
        units = self._relays.units if self.running else {}
        self._needs = {
            unit: self._needs[unit] if unit in self._needs else needed_by(unit)
            for unit in units.values()
        }
        self._waiting = False
        found: dict[str, There | None] = {}
        for name, unit in units.items():
            rules = self._needs[unit]
            if rules is not None and unit.settings.enabled:
                found[name] = There(self._kept(rules, unit), unit.kind == "udp")
        for name, there in self._there.items():
            if name not in found:
                found[name] = self._left(name, there)
        return found

    def _kept(self, rules: RelayRules, unit: Unit) -> RelayRules:
        """The rules of a relay, with what its sessions of before need."""
        there = self._there.get(unit.name)
        if there is None or not self._has_before(unit.name):
            return rules
        kept = rules.keeping(there.rules)
        self._waiting |= kept != rules
        return attrs.evolve(kept, answers=kept.answers[: len(rules.answers) + KEPT])

    def _left(self, name: str, there: There) -> There | None:
        """What is left of a relay that needs nothing for new clients."""
        if not self.running or not self._has_before(name):
            return None
        unit = self._relays.units.get(name)
        serves = unit is not None and unit.settings.enabled
        if there.udp and not serves:
            self._waiting = True
            return attrs.evolve(there, sure=True)
        closed = there.rules.closed()
        if closed is None:
            return None
        self._waiting = True
        return There(closed, there.udp, intake=False)

    def _has_before(self, name: str) -> bool:
        """Whether a relay has sessions or flows that may need the rules of before.

        The flows of a UDP relay are all its own, whatever has changed.
        """
        service = self._relays.service
        unit = self._relays.units.get(name)
        if unit is not None and unit.settings.enabled and unit.kind != "udp":
            return any(each.name == name for each in service.former)
        return any(each.name == name and len(each.registry) for each in service.served)

    def _settle(self, steps: Iterable[Step]) -> None:
        """Know what the kernel has now, and tell of it."""
        before, self._problems = self._problems, []
        for step in steps:
            if step.why_not:
                self._failures += 1
                self._problems.append(str(step))
            else:
                log.info("{done}", done=str(step))
            for name, there in step.wanted.items():
                self._note(name, there, sure=not step.why_not)
        for each in self._problems:
            if each not in before:
                log.error("{problem}", problem=each)
        self._look_later()
        self._watch_others()

    def _note(self, name: str, there: There | None, *, sure: bool) -> None:
        """Know what the kernel has of a relay.

        :param there: what was wanted.
        :param sure: it has it.
        """
        if name not in self._claims:
            # It is another process's.
            return
        if sure and there is None:
            del self._there[name]
            self._claims.release(name)
        else:
            known = there or self._there[name]
            self._there[name] = attrs.evolve(known, sure=sure)

    # -- looking again

    def _look_later(self) -> None:
        self._forget_look()
        if self.running and (self._problems or self._waiting):
            # What has failed fails again, most likely.
            wait = RETRY if self._problems else LOOK
            self._look = self._clock.callLater(wait, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        looking = self._lock.run(self._follow)
        looking.addErrback(partial(log.failure, "netfilter rules could not follow"))

    def _forget_look(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    # -- when others have changed them

    def _watch_others(self) -> None:
        if self.running and self._there:
            self._watch.start()
        else:
            self._watch.stop()

    def _check(self) -> None:
        """Apply those again that are not there any more."""
        checking = self._lock.run(self._restore)
        checking.addErrback(partial(log.failure, "netfilter rules can't be checked"))

    @inlineCallbacks
    def _restore(self) -> Any:
        sure = [each.rules for each in self._there.values() if each.sure]
        if not self.running or not sure:
            return
        mark = self._relays.config.netfilter_mark
        try:
            look = partial(self._netfilter.lost, sure, mark)
            lost = yield aside(self._reactor, look)
        except NetfilterError as problem:
            log.warn("netfilter rules can't be checked: {why}", why=str(problem))
            # To apply them again does no harm.
            lost = [each.name for each in sure]
        else:
            if lost:
                self._lost += 1
                self._watch.missed()
                whose = first_of(lost)
                log.warn(
                    "netfilter rules of {whose} were changed by others", whose=whose
                )
        if lost and self.running:
            self._doubt(lost)
            yield self._follow()
        elif self.running:
            yield self._be_cautious()

    # -- telling

    def counts(self) -> RuleCounts:
        """What has happened to the rules so far."""
        return RuleCounts(self._failures, self._lost)

    def shown(self) -> Json:
        """How it stands, for the status."""
        why = self._watch.why_not
        unnoticed = [f"changes by others are not noticed: {why}"] if why else []
        return {
            "relays": sorted(self._there),
            "failures": self._failures,
            "lost": self._lost,
            "problems": [*self._problems, *self._cautions, *unnoticed],
        }
