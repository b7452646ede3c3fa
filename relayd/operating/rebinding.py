"""What becomes of listeners that stand when others are wanted.

A listener whose address is wanted goes on, for whoever serves it now: two relays may
swap theirs.  This is worked out, and what it takes is had, before any is touched, so
that a change which can't be made leaves all as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable
from functools import partial
from typing import Any

import attrs
from twisted.python.failure import Failure

from relayd.core.errors import CannotStart
from relayd.operating.standing import Listening, Standing, retire

#: Between the parts of an address, or of an endpoint string.
_PARTS = re.compile("[:=]")


@attrs.define(eq=False)
class Rebinding:
    """A change of listeners.

    :ivar handed: those that stand and go on, each with what it is from now on.
    :ivar new: to be opened.
    :ivar spared: those that stand, and are not wanted any more.
    """

    handed: list[tuple[Standing, Listening]] = attrs.field(factory=list)
    new: list[Listening] = attrs.field(factory=list)
    spared: list[Standing] = attrs.field(factory=list)
    #: What it takes to hand them over.
    _prepared: dict[Standing, Any] = attrs.field(factory=dict)

    @classmethod
    def of(
        cls, standing: Iterable[Standing], wanted: Collection[Listening]
    ) -> Rebinding:
        """What it takes to have other listeners.

        :param standing: those that there are; of two with one address, the first one
            goes on.
        :param wanted: those that are to be open.
        """
        made = cls()
        stays = set(wanted)
        there = set()
        spare: dict[Hashable, list[Standing]] = {}
        for one in standing:
            if one.listening in stays:
                there.add(one.listening)
            else:
                spare.setdefault(one.listening.key, []).append(one)
        for each in wanted:
            if each in there:
                continue
            same = spare.get(each.key)
            if same:
                made.handed.append((same.pop(0), each))
            else:
                made.new.append(each)
        made.spared = [one for same in spare.values() for one in same]
        return made

    def in_the_way(self, *, idle: bool = True) -> list[Standing]:
        """Those not wanted, with a port that a new one of the same kind has.

        :param idle: those that may close for it; or those that can't.
        """
        ports = {
            (part, each.flows)
            for each in self.new
            for part in _PARTS.split(each.name)
            if part
        }
        return [
            one
            for one in self.spared
            if one.is_idle == idle
            and any(
                (str(getattr(each, "port", "")), one.listening.flows) in ports
                for each in one.addresses
            )
        ]

    def advised(self, problem: CannotStart) -> CannotStart:
        """The error of a listener that can't be opened, and what to do about it."""
        for one in self.in_the_way(idle=False):
            relay, name = one.listening.factory.name, one.listening.name
            return CannotStart(
                f"{problem}: relay {relay} has flows, or clients that wait for one, on"
                f" {name}: relayctl stop {relay} --cut ends them; then change it, and"
                " start it"
            )
        return problem

    def prepare(self) -> tuple[Failure, Listening] | None:
        """Have what it takes.

        :return: why it can't be had, and for which listener.
        """
        for one, each in self.handed:
            preparing = one.prepare(each)
            if preparing is not None:
                problems: list[Failure] = []
                have = partial(self._prepared.__setitem__, one)
                preparing.addCallbacks(have, problems.append)
                if problems:
                    return problems[0], each
        return None

    def give_up(self) -> None:
        """It can't be made: close copies of sockets."""
        for one, each in self._prepared.items():
            if one.listening.flows:
                retire(each)
        self._prepared.clear()

    def hand_over(self) -> list[Standing]:
        """Hand over what goes on.

        :return: what is left of those that were given away, for the flows of before.
        """
        left = []
        for one, each in self.handed:
            before = Standing(one.listening, one.port)
            one.hand_to(each, self._prepared.get(one))
            if one.port is not before.port and before.is_open:
                left.append(before)
        return left
