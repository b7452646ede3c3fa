"""Watching datagram sockets for reading, by the plane's epoll or the reactor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.interfaces import IHalfCloseableDescriptor, IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

#: epoll_ctl(2): EPOLLIN, level-triggered.
READABLE = 1


class Watcher(Protocol):
    """Calls back when a socket is readable: the plane, the reactor, or a test."""

    def watch(self, descriptor: int, handler: Any, mask: int) -> None:
        """Call `handler.ready` while there is something to read.

        :raises OSError: the kernel can't watch another descriptor.
        """

    @property
    def after_batch(self) -> Callable[[Callable[[], None]], None] | None:
        """Schedules a callback for when all ready handlers have been called.

        The callback must not raise.  None where handlers are not called in batches.
        """

    def unwatch(self, descriptor: int) -> None:
        """Stop watching a descriptor, which stays open."""

    def unwatch_and_close(self, sock: Any) -> None:
        """Stop watching `sock`, and close it."""


class ReactorWatcher:
    """Any reactor that has `addReader`.

    A socket is closed at once: if the reactor still has an event for its descriptor,
    and the number is reused by then, the other socket is read in vain.
    """

    after_batch: Callable[[Callable[[], None]], None] | None = None

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._readers: dict[int, _Reader] = {}

    def watch(self, descriptor: int, handler: Any, mask: int) -> None:
        """See :meth:`Watcher.watch`."""
        reader = _Reader(self._reactor, descriptor, handler)
        self._reactor.addReader(reader)
        self._readers[descriptor] = reader

    def unwatch(self, descriptor: int) -> None:
        """See :meth:`Watcher.unwatch`."""
        reader = self._readers.pop(descriptor, None)
        if reader is not None:
            self._reactor.removeReader(reader)

    def unwatch_and_close(self, sock: Any) -> None:
        """See :meth:`Watcher.unwatch_and_close`."""
        self.unwatch(sock.fileno())
        sock.close()


@implementer(IReadDescriptor, IHalfCloseableDescriptor)
class _Reader:
    """A socket as a reader of a reactor."""

    def __init__(self, reactor: Any, descriptor: int, handler: Any) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._handler = handler

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> None:
        self._handler.ready(0)

    def readConnectionLost(self, reason: Failure) -> None:
        # Reactors that use poll take an error without data for the end of a connection,
        # and remove the socket.  Here it is a refusal of an earlier datagram (ICMP).
        self._reactor.addReader(self)
        self._handler.ready(0)

    def writeConnectionLost(self, reason: Failure) -> None:
        """Nothing is written through the reactor."""

    def connectionLost(self, reason: Failure) -> None:
        self._handler.connectionLost(reason)

    def logPrefix(self) -> str:
        return "relayd udp"
