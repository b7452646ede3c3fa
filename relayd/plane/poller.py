"""One epoll for all connections of a reactor, inside the reactor's own.

The reactor watches a single descriptor, this epoll's.  When it is readable the
plane takes the events in batches and hands each to its handler, a connection, a
dial or a listener.

A turn has two rounds.  A round is one batch of events, then the connections
that asked to go on: those that had more to read than a connection may in one
round, and those that are to close, outside of whatever call asked for it.  More
than that waits for the reactor's next turn, so that timers and other people's
connections get theirs.

A descriptor that is closed while a batch is worked through may have an event in the
rest of it, and its number may be another socket's by then.  Such events are dropped:
a socket that was opened during a batch has none in it.
"""

from __future__ import annotations

import select
import socket
import weakref
from collections import deque
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.plane.pipes import Pipes

log = Logger(namespace="relayd.plane")

#: Events taken at once.
BATCH = 256

#: Batches in one turn of the reactor.
ROUNDS = 2

#: Bytes that a connection copies at once.
COPY_SIZE = 1 << 17


class Handler(Protocol):
    """What an event is handed to.  Neither method may raise."""

    def ready(self, mask: int) -> None:
        """The kernel reports `mask` (epoll_ctl(2)) for this handler's descriptor."""

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops."""


class Continuing(Protocol):
    """A connection that has more to do than it may do now."""

    def proceed(self) -> None:
        """Go on.  Must not raise."""


@implementer(IReadDescriptor)
class Plane:
    """The epoll of one reactor, and what its connections share.

    It holds a descriptor, and is the reactor's reader, only while something is
    watched.

    :ivar reactor: provides `IReactorFDSet` and `IReactorTime`.
    :ivar pipes: for splicing.
    :ivar buffer: what copying connections read into, one after the other.
    :ivar not_spliced: how often a socket could not be spliced and was copied.
    """

    _all: weakref.WeakKeyDictionary[Any, Plane] = weakref.WeakKeyDictionary()

    def __init__(self, reactor: Any) -> None:
        # Weakly, as the table of all planes is keyed by it.
        self.reactor = weakref.proxy(reactor)
        self.pipes = Pipes(self.reactor)
        self.buffer = memoryview(bytearray(COPY_SIZE))
        self.not_spliced = 0
        self._handlers: dict[int, Handler] = {}
        self._epoll: select.epoll | None = None
        self._again: deque[Continuing] = deque()
        #: Numbers that were closed since the batch was taken.
        self._stale: set[int] = set()
        self._turning = False
        self._wake: IDelayedCall | None = None

    @classmethod
    def of(cls, reactor: Any) -> Plane:
        """The plane of this reactor."""
        if reactor not in cls._all:
            cls._all[reactor] = cls(reactor)
        return cls._all[reactor]

    # -- what handlers ask for

    def watch(self, descriptor: int, handler: Handler, mask: int) -> None:
        """Report events of `descriptor` to `handler`.

        :raises OSError: the kernel can't watch another descriptor.
        """
        if self._epoll is None:
            self._epoll = select.epoll()
            self.reactor.addReader(self)
        self._epoll.register(descriptor, mask)
        self._handlers[descriptor] = handler

    def watch_also(self, descriptor: int, mask: int) -> None:
        """Change what is reported; reports at once what is so already."""
        if self._epoll is not None:
            self._epoll.modify(descriptor, mask)

    def hand_over(self, descriptor: int, handler: Handler) -> None:
        """Report events of a watched `descriptor` to another handler from now on."""
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """Report no more events of a `descriptor` that stays open."""
        if self._handlers.pop(descriptor, None) is not None and self._epoll is not None:
            self._epoll.unregister(descriptor)
            if self._turning:
                self._stale.add(descriptor)
            else:
                self._rest()

    def give_up(self, descriptor: int, sock: socket.SocketType) -> None:
        """Report no more events of `sock`, and close it."""
        self._handlers.pop(descriptor, None)
        sock.close()
        if self._turning:
            self._stale.add(descriptor)
        else:
            self._rest()

    def again(self, connection: Continuing) -> None:
        """Call its `proceed`, outside of the call that is under way."""
        self._again.append(connection)
        if not self._turning and self._wake is None:
            self._wake = self.reactor.callLater(0, self._woken)

    # -- IReadDescriptor

    def fileno(self) -> int:
        return -1 if self._epoll is None else self._epoll.fileno()

    def logPrefix(self) -> str:
        return "relayd plane"

    def doRead(self) -> None:
        """A turn."""
        epoll = self._epoll
        if epoll is None:
            return
        handlers, again, stale = self._handlers, self._again, self._stale
        self._turning = True
        try:
            for _ in range(ROUNDS):
                stale.clear()
                events = epoll.poll(0, BATCH)
                for descriptor, mask in events:
                    if descriptor not in stale:
                        # None: closed, but not yet in a child process that is
                        # being forked.
                        handler = handlers.get(descriptor)
                        if handler is not None:
                            handler.ready(mask)
                for _ in range(len(again)):
                    again.popleft().proceed()
                if not events and not again:
                    break
        finally:
            self._turning = False
        if again and self._wake is None:
            self._wake = self.reactor.callLater(0, self._woken)
        if not handlers:
            self._rest()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops: so does everything here."""
        for handler in list(self._handlers.values()):
            handler.connectionLost(reason)
        self._rest()

    # -- the rest

    def _woken(self) -> None:
        self._wake = None
        if self._epoll is not None:
            self.doRead()
            return
        for _ in range(len(self._again)):
            self._again.popleft().proceed()

    def _rest(self) -> None:
        """Hold nothing while nothing is watched."""
        if self._handlers or self._epoll is None or self._turning:
            return
        self.reactor.removeReader(self)
        self._epoll.close()
        self._epoll = None
