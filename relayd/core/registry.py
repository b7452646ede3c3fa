"""What lives in a relay: listed, aborted, and drained.

The registry keeps no list of its own.  Its owner hands in a live collection that it
keeps anyway (the deadline wheel for sessions, the NAT table for flows), so a session
pays nothing for being registered.

Draining: the owner takes no new client while :attr:`Registry.draining` is set, and
calls :meth:`Registry.check` when a member that ended may have been the last.  The drain
is over when none is left.  Until its time limit, those that are idle are ended little
by little (:mod:`relayd.core.spreading`); what has not ended by then is aborted.
`draining` stays set afterwards, until :meth:`Registry.reopen`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relayd.core.spreading import Idleness, Spread

log = Logger(namespace="relayd.registry")

Id = TypeVar("Id", bound=Hashable)
Member = TypeVar("Member")
Living = TypeVar("Living", covariant=True)


class Members(Protocol[Living]):
    """The live collection: what is in it now."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Living]: ...


def _nothing() -> None:
    """The default of what happens when a drain is over."""


class Registry(Generic[Id, Member]):
    """The sessions or flows of one relay.

    :param members: those that live.
    :param clock: monotonic seconds; holds a timer only while a drain has a time limit.
    :param id_of: tells what identifies a member.
    :param abort: ends a member, at once or a little later.  If it raises, that is
        logged, and the others are aborted all the same.
    :param drained: called when a drain has left no member, before those who wait for
        it hear of that.
    :param idleness: how idle members are found and ended; without it all of them have
        the whole time of a drain.

    :ivar draining: take no new member.
    """

    def __init__(
        self,
        members: Members[Member],
        clock: IReactorTime,
        *,
        id_of: Callable[[Member], Id],
        abort: Callable[[Member], None],
        drained: Callable[[], None] = _nothing,
        idleness: Idleness[Member] | None = None,
    ) -> None:
        self._members = members
        self._clock = clock
        self._id_of = id_of
        self._abort = abort
        self._drained = drained
        self._idleness = idleness
        self.draining = False
        #: A drain is not over yet.
        self._under_way = False
        #: The next step of a drain, the last of which is its limit; and when that is.
        self._next: IDelayedCall | None = None
        self._ends = 0.0
        self._spread: Spread[Member] | None = None
        self._waiting: list[Deferred[None]] = []

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def by_id(self) -> dict[Id, Member]:
        """Those that live, by their ids; a new dictionary."""
        return {self._id_of(each): each for each in self._members}

    def living(self) -> list[Member]:
        """Those that live, in no particular order; a new list."""
        return list(self._members)

    def abort_all(self) -> None:
        """Abort each member that lives now."""
        for each in list(self._members):
            try:
                self._abort(each)
            except Exception:
                log.failure("{id} could not be aborted", id=self._id_of(each))
        self.check()

    def drain(self, timeout: float) -> Deferred[None]:
        """Take no new member, and wait for those that live.

        A later call does not change the time that they have, but 0 ends it.

        :param timeout: seconds; what has not ended by then is aborted.  0 or less: now.
        :return: fires with None when none is left, or at :meth:`reopen`.
        """
        begins = not self.draining
        self.draining = self._under_way = True
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        if timeout <= 0:
            self.abort_all()
        elif begins and len(self._members):
            now = self._clock.seconds()
            self._ends = now + timeout
            if self._idleness is not None:
                self._spread = Spread(self._members, self._idleness, now, timeout)
            self._wait(now)
        self.check()
        return waiting

    def _wait(self, now: float) -> None:
        """Wait for the next step, or for the limit."""
        left, spread = self._ends - now, self._spread
        if spread is None or left < 1.5 * spread.step:
            self._next = self._clock.callLater(max(left, 0.0), self.abort_all)
        else:
            self._next = self._clock.callLater(spread.step, self._step, spread)

    def _step(self, spread: Spread[Member]) -> None:
        now = self._clock.seconds()
        # First: the limit comes, whatever happens here.
        self._wait(now)
        spread.end_some(now)

    def check(self) -> None:
        """A member has ended: if it was the last of a drain, that is over."""
        if self._under_way and not len(self._members):
            self._end(self._drained)

    def reopen(self) -> None:
        """Take new members again; a drain that is under way is over."""
        self.draining = False
        self._end(_nothing)

    def _end(self, then: Callable[[], None]) -> None:
        """The drain is over, if there was one."""
        self._under_way = False
        step, self._next, self._spread = self._next, None, None
        if step is not None and step.active():
            step.cancel()
        waiting, self._waiting = self._waiting, []
        then()
        for each in waiting:
            each.callback(None)
