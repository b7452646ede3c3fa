"""Name look-ups; a slow one delays nothing else.

A look-up blocks a thread until the system's resolver returns: for half a minute
when name servers are down.  Twisted runs look-ups in the reactor's thread pool,
one for each caller, and waits for them when the process ends.  Here

- sessions that need the same name wait for one look-up;
- few look-ups run at a time, and the rest wait in a queue of bounded length
  (:mod:`relayd.net.fair_queue`): the operator's before all others, and then those of
  each *owner*, a client that chooses its own names, round robin.  When the queue is
  full, the newest of the owner with the most in it is evicted for an owner with less;
- a look-up whose callers have all cancelled is not started;
- the process does not wait for them when it ends.

Nothing is cached: each session looks its name up again, so a changed address is
used at once.
"""

from __future__ import annotations

import itertools
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import DNSLookupError
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from relayd.net.fair_queue import WORKERS, WORKERS_PER_OWNER, FairQueue

#: A family and a socket address, as `socket.connect` takes it.
SocketAddress = tuple[int, Any]

#: Names that may wait for a worker: this many of all owners, and as many of the
#: operator.
MAX_QUEUE = 1024

#: How many of them one owner may have.
MAX_QUEUE_PER_OWNER = MAX_QUEUE // 4

#: How many addresses of a name are used.
MAX_ADDRESSES = 16


class _DaemonThread(threading.Thread):
    """A thread that the interpreter does not wait for when it ends."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords, daemon=True)


class _DaemonPool(ThreadPool):
    """Threads that the process does not wait for when it ends."""

    threadFactory = _DaemonThread


class _LookUp:
    """The look-up of a name, and its callers, each with its owner.

    :ivar owner: of the first caller.
    :ivar waiting: the callers' Deferreds, and their owners.
    :ivar owners: how many callers each owner has.
    :ivar queued: it neither runs nor was evicted.
    """

    def __init__(self, host: str, owner: str) -> None:
        self.host = host
        self.owner = owner
        self.waiting: dict[Deferred[list[Any]], str] = {}
        self.owners: Counter[str] = Counter()
        self.queued = True


class Resolver:
    """Looks names up for the sessions of one reactor; see :meth:`of`.

    :param look_up: blocks, and returns the list of `socket.getaddrinfo`.

    :ivar refused: how many look-ups were refused, or evicted, as the queue was full.
    """

    _all: weakref.WeakKeyDictionary[Any, Resolver] = weakref.WeakKeyDictionary()

    def __init__(
        self, reactor: Any, look_up: Callable[[str], list[Any]] | None = None
    ) -> None:
        # A weak reference: `_all` is keyed by the reactor, which must not be kept.
        self._reactor: Any = weakref.proxy(reactor)
        self._look_up = look_up if look_up is not None else _getaddrinfo
        self._pool: ThreadPool | None = None
        self._names: dict[str, _LookUp] = {}
        self._queue: FairQueue[_LookUp] = FairQueue()
        #: Look-ups by the owner of their first caller.
        self._owned: Counter[str] = Counter()
        self.refused = 0

    @property
    def pending(self) -> int:
        """How many names are being looked up, or wait for that."""
        return len(self._names)

    @classmethod
    def of(cls, reactor: Any) -> Resolver:
        """The resolver that all callers on this reactor share."""
        if reactor not in cls._all:
            cls._all[reactor] = cls(reactor)
        return cls._all[reactor]

    def addresses(
        self, host: str, port: int, owner: str = ""
    ) -> Deferred[list[SocketAddress]]:
        """The addresses of `host`, alternating between families, each with `port`.

        :param owner: the client key that it is for, or empty for the operator.
        :return: fires with at least one, or fails with DNSLookupError.  When it
            is cancelled the look-up goes on for others, if there are any.
        """
        found = self._names.get(host)
        evicted = None
        if found is None:
            if self._is_full_for(owner):
                evicted = self._evict_for(owner)
                self.refused += 1
                if evicted is None:
                    return fail(_too_many(host))
            found = self._names[host] = _LookUp(host, owner)
            self._owned[owner] += 1
        look_up = found
        waiter: Deferred[list[Any]] = Deferred(lambda d: self._cancelled(look_up, d))
        look_up.waiting[waiter] = owner
        look_up.owners[owner] += 1
        if look_up.queued:
            self._queue.add(owner, look_up)
            self._start_some()
        if evicted is not None:
            # Last: the callbacks may call this object again.
            _notify(evicted, Failure(_too_many(evicted.host)))
        return waiter.addCallback(_interleaved, port)

    def _is_full_for(self, owner: str) -> bool:
        operators = self._owned[""]
        if not owner:
            return operators >= WORKERS + MAX_QUEUE
        return (
            len(self._names) - operators >= WORKERS + MAX_QUEUE
            or self._owned[owner] >= WORKERS_PER_OWNER + MAX_QUEUE_PER_OWNER
        )

    def _evict_for(self, owner: str) -> _LookUp | None:
        """Evict a look-up from the full queue for another of `owner`, if allowed."""
        if not owner or self._owned[owner] >= WORKERS_PER_OWNER + MAX_QUEUE_PER_OWNER:
            return None
        for look_up in self._queue.evictable(owner):
            # Not one that other owners wait for, too; nor one that the operator asked
            # for first, which counts towards no owner.
            if look_up.owner and len(look_up.owners) == 1:
                [its_owner] = look_up.owners
                self._queue.remove(its_owner, look_up)
                look_up.queued = False
                self._forget(look_up)
                return look_up
        return None

    def _cancelled(self, look_up: _LookUp, waiter: Deferred[list[Any]]) -> None:
        owner = look_up.waiting.pop(waiter)
        _count_down(look_up.owners, owner)
        if not look_up.queued:
            return
        if owner not in look_up.owners:
            self._queue.remove(owner, look_up)
        if not look_up.waiting:
            self._forget(look_up)

    def _forget(self, look_up: _LookUp) -> None:
        del self._names[look_up.host]
        _count_down(self._owned, look_up.owner)

    def _start_some(self) -> None:
        while (found := self._queue.next()) is not None:
            owner, look_up = found
            for other in look_up.owners.keys() - {owner}:
                self._queue.remove(other, look_up)
            self._start(look_up, owner)

    def _start(self, look_up: _LookUp, owner: str) -> None:
        if self._pool is None:
            self._pool = _DaemonPool(0, WORKERS, "relayd look-ups")
            self._pool.start()
        look_up.queued = False
        try:
            found = deferToThreadPool(
                self._reactor, self._pool, self._look_up, look_up.host
            )
        except Exception:
            # No thread can be started.  The pool keeps those that could not start.
            threads = self._pool.threads
            threads[:] = [each for each in threads if each.is_alive()]
            # Not from here: `_done` starts the next, which would fail within this call.
            self._reactor.callFromThread(self._done, Failure(), look_up, owner)
        else:
            found.addBoth(self._done, look_up, owner)

    def _done(self, result: Any, look_up: _LookUp, owner: str) -> None:
        self._queue.done(owner)
        self._forget(look_up)
        if isinstance(result, Failure):
            why = getattr(result.value, "strerror", None) or result.getErrorMessage()
            result = Failure(DNSLookupError(f"{look_up.host}: {why}"))
        elif not result:
            result = Failure(DNSLookupError(f"{look_up.host}: no address"))
        _notify(look_up, result)
        self._start_some()


def _notify(look_up: _LookUp, result: Any) -> None:
    for waiter in list(look_up.waiting):
        # A callback may have cancelled another caller.
        if not waiter.called:
            waiter.callback(result)


def _too_many(host: str) -> DNSLookupError:
    return DNSLookupError(f"too many look-ups wait; {host} does not")


def _count_down(counts: Counter[str], owner: str) -> None:
    """Subtract one; an owner with none is removed."""
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]


def _getaddrinfo(host: str) -> list[Any]:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)


def _interleaved(found: list[Any], port: int) -> list[SocketAddress]:
    """IPv6 and IPv4 alternate, beginning with the system's preference (RFC 8305, 4)."""
    families: dict[int, list[SocketAddress]] = {}
    for family, _, _, _, address in found:
        there = families.setdefault(family, [])
        item = (family, (address[0], port, *address[2:]))
        if item not in there:
            there.append(item)
    groups = itertools.zip_longest(*families.values())
    items = [item for group in groups for item in group if item is not None]
    return items[:MAX_ADDRESSES]
