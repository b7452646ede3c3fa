"""Names to addresses, without letting a slow name hold up anything else.

A look-up blocks a thread for as long as the system's resolver likes: half a
minute when name servers are down.  Twisted runs look-ups in the reactor's
thread pool, one for each caller, and waits for them when the process ends.
Here

- sessions that want the same name share one look-up;
- few look-ups run at a time, and the rest wait in a bounded line; of one owner, such as
  a client that chooses its own names, at most half of those that run, and a quarter of
  the line;
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
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import DNSLookupError
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

#: A family and a socket address, as `socket.connect` takes it.
SocketAddress = tuple[int, Any]

#: How many look-ups run at a time.
WORKERS = 8

#: How many names may wait for one of them.
LINE = 1024

#: The most of both for one owner.
OWN_WORKERS = WORKERS // 2
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


class _LookUp:
    """A name, and those who wait for its addresses."""

    def __init__(self, host: str, owner: str) -> None:
        self.host = host
        self.owner = owner
        self.waiting: list[Deferred[list[Any]]] = []
        self.running = False


class Resolver:
    """Looks names up for the sessions of one reactor; see :meth:`of`.

    :param look_up: blocks, and returns what `socket.getaddrinfo` does.

    :ivar refused: how many look-ups the full line turned away.
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
        self._running = 0
        #: Look-ups by their owners, and how many of them run.
        self._owned: Counter[str] = Counter()
        self._owners_running: Counter[str] = Counter()
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
        if found is None:
            full = len(self._names) >= WORKERS + LINE
            if full or (owner and self._owned[owner] >= OWN_WORKERS + OWN_LINE):
                self.refused += 1
                return fail(DNSLookupError(f"too many look-ups wait; {host} is not"))
            found = self._names[host] = _LookUp(host, owner)
            self._owned[owner] += 1
        look_up = found
        waiter: Deferred[list[Any]] = Deferred(lambda d: self._gone(look_up, d))
        look_up.waiting.append(waiter)
        self._start_some()
        return waiter.addCallback(_in_turn, port)

    def _gone(self, look_up: _LookUp, waiter: Deferred[list[Any]]) -> None:
        look_up.waiting.remove(waiter)
        if not look_up.waiting and not look_up.running:
            self._forget(look_up)

    def _forget(self, look_up: _LookUp) -> None:
        del self._names[look_up.host]
        _count_down(self._owned, look_up.owner)

    def _start_some(self) -> None:
        for look_up in self._names.values():
            if self._running >= WORKERS:
                return
            owner = look_up.owner
            own = self._owners_running[owner] if owner else 0
            if not look_up.running and own < OWN_WORKERS:
                self._start(look_up)

    def _start(self, look_up: _LookUp) -> None:
        if self._pool is None:
            self._pool = _DaemonPool(0, WORKERS, "relayd look-ups")
            self._pool.start()
        look_up.running = True
        self._running += 1
        self._owners_running[look_up.owner] += 1
        deferToThreadPool(
            self._reactor, self._pool, self._look_up, look_up.host
        ).addBoth(self._done, look_up)

    def _done(self, result: Any, look_up: _LookUp) -> None:
        self._running -= 1
        _count_down(self._owners_running, look_up.owner)
        self._forget(look_up)
        if isinstance(result, Failure):
            why = getattr(result.value, "strerror", None) or result.getErrorMessage()
            result = Failure(DNSLookupError(f"{look_up.host}: {why}"))
        elif not result:
            result = Failure(DNSLookupError(f"{look_up.host}: no address"))
        for waiter in list(look_up.waiting):
            # One that was told may have cancelled another.
            if not waiter.called:
                waiter.callback(result)
        self._start_some()


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
