"""Puts faults on sessions that go on, and takes them off, as their relay's settings do.

Of the filters of a relay, those that join (`IFilterFactory.joins`) are on all of its
sessions, also on those that began under earlier settings; the others only on sessions
that begin with them.  Sessions that are relayed as the settings change follow in
slices, so that the reactor goes on; one that is not relayed yet has what its factory
lists when it is.  Changes wait for each other: each session sees them in the order in
which they were made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.core.filtering import IFilterFactory

log = Logger(namespace="relayd.filters")

#: Sessions that change in one turn of the reactor.
AT_ONCE = 20


@attrs.frozen(eq=False)
class _Change:
    """What is to be done.

    :ivar sessions: each the client's leg and its bridge; the last is the next.
    """

    sessions: list[tuple[Any, Any]]
    gone: Sequence[IFilterFactory]
    new: Sequence[IFilterFactory]


class LivingFilters:
    """The changes that are under way.

    :param clock: of the turns.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._changes: deque[_Change] = deque()
        self._turn: IDelayedCall | None = None

    def change(
        self,
        factories: Iterable[Any],
        before: Sequence[IFilterFactory],
        after: Sequence[IFilterFactory],
    ) -> None:
        """A relay has other filters.

        :param factories: of its sessions of before the change.
        :param before: the filters that it had.
        :param after: those that it has.
        """
        gone = [each for each in _without(before, after) if each.joins]
        new = [each for each in _without(after, before) if each.joins]
        if not (gone or new):
            return
        sessions = []
        for factory in factories:
            factory.filter_by((*_without(factory.filters, gone), *new))
            sessions += [
                (each, each.bridge)
                for each in factory.registry.living()
                if each.bridge is not None
            ]
        self._changes.append(_Change(sessions, gone, new))
        if self._turn is None:
            self._work()

    def _work(self) -> None:
        self._turn = None
        for _ in range(AT_ONCE):
            while self._changes and not self._changes[0].sessions:
                self._changes.popleft()
            if not self._changes:
                return
            change = self._changes[0]
            _change_one(*change.sessions.pop(), change)
        self._turn = self._clock.callLater(0, self._work)

    def stop(self) -> None:
        """The process stops: no timer is left."""
        self._changes.clear()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None


def _without(
    these: Iterable[IFilterFactory], others: Iterable[IFilterFactory]
) -> list[IFilterFactory]:
    """These without others: of each that is equal, one."""
    left, found = list(others), []
    for each in these:
        if each in left:
            left.remove(each)
        else:
            found.append(each)
    return found


def _change_one(protocol: Any, bridge: Any, change: _Change) -> None:
    if (
        protocol.bridge is not bridge
        or protocol.session.ending is not None
        or bridge.closing
    ):
        # It has ended; or it was joined again, with what its factory lists.
        return
    try:
        protocol.change_filters(change.gone, change.new)
    except Exception:
        log.failure(
            "the filters of session {id} could not be changed", id=protocol.session.id
        )
