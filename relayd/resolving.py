"""Names to addresses, without letting a slow name hold up anything else.

A look-up blocks a thread for as long as the system's resolver likes: half a
minute when name servers are down.  Twisted runs look-ups in the reactor's
thread pool, one for each caller, and waits for them when the process ends.
Here

- sessions that want the same name share one look-up;
- few look-ups run at a time, and the rest wait in a bounded line (:class:`Turns`):
  those of the operator before all others, and then those of the *owners* that have the
  fewest running, in turn.  An owner is a client that chooses its own names, such as a
  proxy's.  When the line is full, the newest of whoever has the most in it makes room
  for who has less;
- one that nobody waits for any longer is not started;
- the process does not wait for them when it ends.

Nothing is remembered: each session asks afresh, so a name that moves is
followed at once.
"""

from __future__ import annotations

import itertools
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import DNSLookupError
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

#: A family and a socket address, as `socket.connect` takes it.
SocketAddress = tuple[int, Any]

#: How many look-ups run at a time.
WORKERS = 8

#: How many of those owners have in all: one is never theirs, but the operator's.
OWNERS_WORKERS = WORKERS - 1

#: How many one owner has.
OWN_WORKERS = WORKERS // 2

#: How many names may wait for a worker: owners', and as many again of the operator's.
LINE = 1024

#: How many one owner may have in it.
OWN_LINE = LINE // 4

#: How many addresses of a name are used.
MOST_ADDRESSES = 16


class _DaemonThread(threading.Thread):
    """One that the interpreter does not wait for."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords, daemon=True)


class _DaemonPool(ThreadPool):
    """Threads that nobody waits for when the process ends."""

    threadFactory = _DaemonThread


Item = TypeVar("Item")


class _Owner(Generic[Item]):
    """What waits for one owner, in order, and how many of it run."""

    __slots__ = ("name", "running", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: dict[Item, None] = {}
        self.running = 0


class Turns(Generic[Item]):
    """Whose turn it is; no I/O, and no turn takes longer for more owners.

    - The operator's (owner "") come before all others.
    - Of the owners, those with the fewest running; among those, in turn.
    - One worker is left to owners with none running: who has one takes no other if that
      would be the last.  So two whose names never resolve stop nobody else; more of
      them do, until the resolver gives up, and then it is the others' turn.

    What several ask for waits in the turn of each of them.
    """

    def __init__(self) -> None:
        self._owners: dict[str, _Owner[Item]] = {}
        self._operator = self._owner("")
        # Those with something that waits, by how many of theirs run.
        self._levels: list[dict[str, _Owner[Item]]] = [{} for _ in range(OWN_WORKERS)]
        self.running = 0

    def join(self, owner: str, item: Item) -> None:
        """Let it wait for its turn; it may wait already."""
        found = self._owner(owner)
        found.waiting[item] = None
        self._enlist(found)

    def leave(self, owner: str, item: Item) -> None:
        """It does not wait any longer, if it does."""
        found = self._owners.get(owner)
        if found is not None:
            found.waiting.pop(item, None)
            self._enlist(found)

    def next(self) -> tuple[str, Item] | None:
        """What is to run now, and for whom; None: nothing yet.

        It runs from here on, until :meth:`done`; whoever else waits for it is to leave.
        """
        owner = self._next_owner()
        if owner is None:
            return None
        item = next(iter(owner.waiting))
        del owner.waiting[item]
        self._count(owner, 1)
        return owner.name, item

    def done(self, owner: str) -> None:
        """One that ran for this owner has ended."""
        self._count(self._owners[owner], -1)

    def newest_of_the_most(self, owner: str) -> Iterator[Item]:
        """What waits for the owner with the most of it, the newest first.

        Nothing, if with one more this `owner` would have more than that one with one
        less.
        """
        most = max(
            (each for each in self._owners.values() if each is not self._operator),
            key=lambda each: len(each.waiting),
            default=self._operator,
        )
        found = self._owners.get(owner)
        own = len(found.waiting) if found is not None else 0
        if most is not self._operator and len(most.waiting) > own + 1:
            yield from reversed(most.waiting)

    def _next_owner(self) -> _Owner[Item] | None:
        operator = self._operator
        if self.running < WORKERS and operator.waiting:
            return operator
        owners_running = self.running - operator.running
        for running, level in enumerate(self._levels):
            if level:
                left = 1 if running else 0
                if (
                    self.running + left < WORKERS
                    and owners_running + left < OWNERS_WORKERS
                ):
                    return next(iter(level.values()))
                return None
        return None

    def _owner(self, name: str) -> _Owner[Item]:
        if name not in self._owners:
            self._owners[name] = _Owner(name)
        return self._owners[name]

    def _count(self, owner: _Owner[Item], change: int) -> None:
        if owner.running < OWN_WORKERS:
            self._levels[owner.running].pop(owner.name, None)
        owner.running += change
        self.running += change
        self._enlist(owner)

    def _enlist(self, owner: _Owner[Item]) -> None:
        """Give it its place, at the end if it has none; or forget it."""
        if owner is self._operator:
            return
        if owner.running < OWN_WORKERS:
            level = self._levels[owner.running]
            if owner.waiting:
                level[owner.name] = owner
            else:
                level.pop(owner.name, None)
        if not (owner.waiting or owner.running):
            del self._owners[owner.name]


class _LookUp:
    """A name, and those who wait for its addresses, each with its owner.

    :ivar owner: who asked first.
    :ivar waits: it stands in the line: it does not run, and was not turned away.
    """

    def __init__(self, host: str, owner: str) -> None:
        self.host = host
        self.owner = owner
        self.waiting: dict[Deferred[list[Any]], str] = {}
        self.owners: Counter[str] = Counter()
        self.waits = True


class Resolver:
    """Looks names up for the sessions of one reactor; see :meth:`of`.

    :param look_up: blocks, and returns what `socket.getaddrinfo` does.

    :ivar refused: how many look-ups the full line turned away, or had to leave it.
    """

    _all: weakref.WeakKeyDictionary[Any, Resolver] = weakref.WeakKeyDictionary()

    def __init__(
        self, reactor: Any, look_up: Callable[[str], list[Any]] | None = None
    ) -> None:
        # Weakly, as the table of all resolvers is keyed by it.
        self._reactor: Any = weakref.proxy(reactor)
        self._look_up = look_up if look_up is not None else _getaddrinfo
        self._pool: ThreadPool | None = None
        self._names: dict[str, _LookUp] = {}
        self._turns: Turns[_LookUp] = Turns()
        #: Look-ups by who asked first.
        self._owned: Counter[str] = Counter()
        self.refused = 0

    @classmethod
    def of(cls, reactor: Any) -> Resolver:
        """The one that everybody on this reactor shares."""
        if reactor not in cls._all:
            cls._all[reactor] = cls(reactor)
        return cls._all[reactor]

    def addresses(
        self, host: str, port: int, owner: str = ""
    ) -> Deferred[list[SocketAddress]]:
        """The addresses of `host`, families in turn, each with `port`.

        :param owner: whose wish it is; a client's address.  Empty: the operator's.
        :return: fires with at least one, or fails with DNSLookupError.  When it
            is cancelled the look-up goes on for others, if there are any.
        """
        found = self._names.get(host)
        displaced = None
        if found is None:
            if self._is_full_for(owner):
                displaced = self._displaced_by(owner)
                self.refused += 1
                if displaced is None:
                    return fail(_too_many(host))
            found = self._names[host] = _LookUp(host, owner)
            self._owned[owner] += 1
        look_up = found
        waiter: Deferred[list[Any]] = Deferred(lambda d: self._gone(look_up, d))
        look_up.waiting[waiter] = owner
        look_up.owners[owner] += 1
        if look_up.waits:
            self._turns.join(owner, look_up)
            self._start_some()
        if displaced is not None:
            # Last, as whoever is told may ask for anything.
            _tell(displaced, Failure(_too_many(displaced.host)))
        return waiter.addCallback(_in_turn, port)

    def _is_full_for(self, owner: str) -> bool:
        operators = self._owned[""]
        if not owner:
            return operators >= WORKERS + LINE
        return (
            len(self._names) - operators >= WORKERS + LINE
            or self._owned[owner] >= OWN_WORKERS + OWN_LINE
        )

    def _displaced_by(self, owner: str) -> _LookUp | None:
        """What leaves the full line for a look-up of this owner, who may have more."""
        if not owner or self._owned[owner] >= OWN_WORKERS + OWN_LINE:
            return None
        for look_up in self._turns.newest_of_the_most(owner):
            # What others wait for, too, is theirs as well; and the operator's, who
            # has asked first, takes no owner's room.
            if look_up.owner and len(look_up.owners) == 1:
                [its_owner] = look_up.owners
                self._turns.leave(its_owner, look_up)
                look_up.waits = False
                self._forget(look_up)
                return look_up
        return None

    def _gone(self, look_up: _LookUp, waiter: Deferred[list[Any]]) -> None:
        owner = look_up.waiting.pop(waiter)
        _count_down(look_up.owners, owner)
        if not look_up.waits:
            return
        if owner not in look_up.owners:
            self._turns.leave(owner, look_up)
        if not look_up.waiting:
            self._forget(look_up)

    def _forget(self, look_up: _LookUp) -> None:
        del self._names[look_up.host]
        _count_down(self._owned, look_up.owner)

    def _start_some(self) -> None:
        while (found := self._turns.next()) is not None:
            owner, look_up = found
            for other in look_up.owners.keys() - {owner}:
                self._turns.leave(other, look_up)
            self._start(look_up, owner)

    def _start(self, look_up: _LookUp, owner: str) -> None:
        if self._pool is None:
            self._pool = _DaemonPool(0, WORKERS, "relayd look-ups")
            self._pool.start()
        look_up.waits = False
        try:
            found = deferToThreadPool(
                self._reactor, self._pool, self._look_up, look_up.host
            )
        except Exception:
            # This process may have no more threads.  The pool keeps those that could
            # not start.
            threads = self._pool.threads
            threads[:] = [each for each in threads if each.is_alive()]
            # As late as from a thread: the next would be tried, and fail, from within.
            self._reactor.callFromThread(self._done, Failure(), look_up, owner)
        else:
            found.addBoth(self._done, look_up, owner)

    def _done(self, result: Any, look_up: _LookUp, owner: str) -> None:
        self._turns.done(owner)
        self._forget(look_up)
        if isinstance(result, Failure):
            why = getattr(result.value, "strerror", None) or result.getErrorMessage()
            result = Failure(DNSLookupError(f"{look_up.host}: {why}"))
        elif not result:
            result = Failure(DNSLookupError(f"{look_up.host}: no address"))
        _tell(look_up, result)
        self._start_some()


def _tell(look_up: _LookUp, result: Any) -> None:
    for waiter in list(look_up.waiting):
        # One that was told may have cancelled another.
        if not waiter.called:
            waiter.callback(result)


def _too_many(host: str) -> DNSLookupError:
    return DNSLookupError(f"too many look-ups wait; {host} does not")


def _count_down(counts: Counter[str], owner: str) -> None:
    """One less, and nothing left behind of those who have none."""
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]


def _getaddrinfo(host: str) -> list[Any]:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)


def _in_turn(found: list[Any], port: int) -> list[SocketAddress]:
    """IPv6 and IPv4 in turn, beginning with the system's preference (RFC 8305, 4)."""
    families: dict[int, list[SocketAddress]] = {}
    for family, _, _, _, address in found:
        there = families.setdefault(family, [])
        item = (family, (address[0], port, *address[2:]))
        if item not in there:
            there.append(item)
    turns = itertools.zip_longest(*families.values())
    items = [item for turn in turns for item in turn if item is not None]
    return items[:MOST_ADDRESSES]
