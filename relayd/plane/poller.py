"""One epoll for all connections of a reactor, inside the reactor's own.

The reactor watches a single descriptor, this epoll's.  When it is readable the
plane takes the events in batches and hands each to its handler, a connection, a
dial or a listener.

A turn has a few batches of events, and then the connections that asked to go on:
those that had more to read than a connection may at once, and those that are to
close, outside of whatever call asked for it.  More than that waits for the
reactor's next turn, so that timers and the reactor's other readers are served too.

A descriptor that is closed while a batch is handled may have an event in the rest
of it, and its number may be another socket's by then.  Such events are dropped:
a socket that was opened during a batch has none in it.

close(2) unregisters a descriptor, unless another process holds the socket: then its
events go on, and are told of by the number.  So once this process has forked, each is
unregistered before; until then that would be two system calls more for a session.
"""

from __future__ import annotations

import os
import select
import socket
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.net.monotonic import MonotonicClock, monotonic
from relayd.plane.pipes import Pipes

log = Logger(namespace="relayd.plane")

#: Events taken at once.
BATCH = 256

#: Batches in one turn of the reactor.
BATCHES_PER_TURN = 4

#: Bytes that a connection copies at once.
COPY_SIZE = 1 << 17

#: Bytes that all connections may relay after one batch, some milliseconds' work; each
#: gets its share of them, within these limits.
BATCH_BYTES = 16 << 20
MIN_SHARE, MAX_SHARE = 1 << 16, 1 << 21


class Handler(Protocol):
    """What an event is handed to."""

    def ready(self, mask: int) -> None:
        """The kernel reports `mask` (epoll_ctl(2)) for this handler's descriptor."""

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops, or one of the other methods has raised."""


class Continuing(Handler, Protocol):
    """A connection that has more to do than it may do now."""

    def proceed(self) -> None:
        """Go on."""


@implementer(IReadDescriptor)
class Plane:
    """The epoll of one reactor, and what its connections share.

    It holds a descriptor, and is the reactor's reader, only while something is
    watched.

    :param reactor: provides `IReactorFDSet` and `IReactorTime`.

    :ivar pipes: for splicing.
    :ivar buffer: what copying connections read into, one after the other.
    :ivar share: bytes that a connection may relay in this round.
    :ivar not_spliced: how many sockets could not be spliced and were copied.
    """

    _all: weakref.WeakKeyDictionary[Any, Plane] = weakref.WeakKeyDictionary()

    def __init__(self, reactor: Any) -> None:
        # Weakly, as the table of all planes is keyed by it.
        self._reactor = weakref.ref(reactor)
        # The clock of a test is the reactor itself.
        clock = monotonic(reactor)
        self._clock: Callable[[], Any] = weakref.ref(clock)
        if isinstance(clock, MonotonicClock):
            clock.sources.add(self)
        #: The last turn may have left events; see :class:`relayd.net.monotonic.Source`.
        self.has_more_events = False
        self.pipes = Pipes(self._clock)
        self.buffer = memoryview(bytearray(COPY_SIZE))
        self.share = MAX_SHARE
        self.not_spliced = 0
        #: By descriptor, of which the kernel hands out the lowest that is free.
        self._handlers: list[Handler | None] = []
        self._watched = 0
        self._epoll: select.epoll | None = None
        self._scheduled: deque[Continuing] = deque()
        self._after: list[Callable[[], None]] = []
        #: Descriptors that were closed since the batch was taken.
        self._stale: set[int] = set()
        self._turning = False
        self._wake: IDelayedCall | None = None

    @classmethod
    def of(cls, reactor: Any) -> Plane:
        """The plane of this reactor."""
        if reactor not in cls._all:
            cls._all[reactor] = cls(reactor)
        return cls._all[reactor]

    @property
    def reactor(self) -> Any:
        return self._reactor()

    @property
    def clock(self) -> Any:
        """The reactor's monotonic clock."""
        return self._clock()

    # -- what handlers ask for

    def watch(self, descriptor: int, handler: Handler, mask: int) -> None:
        """Report events of `descriptor` to `handler`.

        :raises OSError: the kernel can't watch another descriptor.
        """
        if self._epoll is None:
            self._open()
        try:
            self._epoll.register(descriptor, mask)  # type: ignore[union-attr]
        except OSError:
            self._close_if_idle()
            raise
        try:
            self._handlers[descriptor] = handler
        except IndexError:
            missing = descriptor - len(self._handlers)
            self._handlers.extend([*[None] * missing, handler])
        self._watched += 1

    def _open(self) -> None:
        epoll = self._epoll = select.epoll()
        try:
            self.reactor.addReader(self)
        except BaseException:
            # If it were kept, nothing that is watched later would get an event.
            epoll.close()
            self._epoll = None
            raise

    def change_mask(self, descriptor: int, mask: int) -> None:
        """Change what is reported; reports at once what is so already."""
        if self._epoll is not None:
            self._epoll.modify(descriptor, mask)

    def hand_over(self, descriptor: int, handler: Handler) -> None:
        """Report events of a watched `descriptor` to another handler from now on."""
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """Report no more events of a `descriptor` that stays open."""
        if self._epoll is not None and self._forget(descriptor):
            self._epoll.unregister(descriptor)
            self._close_if_idle()

    def unwatch_and_close(self, sock: socket.SocketType) -> None:
        """Report no more events of `sock`, and close it."""
        self._forget(sock.fileno())
        sock.close()
        if not self._watched:
            self._close_if_idle()

    def _unregister_and_close(self, sock: socket.SocketType) -> None:
        """What :meth:`unwatch_and_close` is in a process that has forked."""
        descriptor = sock.fileno()
        if self._forget(descriptor) and self._epoll is not None:
            # The child has the epoll, too, and may have done so.
            with suppress(OSError):
                self._epoll.unregister(descriptor)
        sock.close()
        if not self._watched:
            self._close_if_idle()

    def _forget(self, descriptor: int) -> bool:
        handlers = self._handlers
        try:
            handler = handlers[descriptor]
        except IndexError:
            return False
        # The descriptor of a closed socket is -1, which would index the last one.
        if handler is None or descriptor < 0:
            return False
        handlers[descriptor] = None
        self._watched -= 1
        if self._turning:
            self._stale.add(descriptor)
        return True

    def schedule(self, connection: Continuing) -> None:
        """Call its `proceed`, outside of the call that is under way."""
        self._scheduled.append(connection)
        if not self._turning and self._wake is None:
            self._wake = self._clock().callLater(0, self._woken)

    def after_batch(self, call: Callable[[], None]) -> None:
        """Make a call at the end of the batch of events that is being handled.

        One that raises is logged, and the others are made.
        """
        self._after.append(call)

    def behind_batch(self, call: Callable[[], None]) -> None:
        """The same, but at once where no batch is being handled."""
        if self._turning:
            self._after.append(call)
        else:
            call()

    # -- IReadDescriptor

    def fileno(self) -> int:
        return -1 if self._epoll is None else self._epoll.fileno()

    def logPrefix(self) -> str:
        return "relayd plane"

    def doRead(self) -> None:
        """Take a turn: a few batches of events, then what was scheduled."""
        epoll = self._epoll
        if epoll is None:
            return
        poll, handlers, scheduled = epoll.poll, self._handlers, self._scheduled
        stale, after = self._stale, self._after
        self._turning = True
        try:
            for _ in range(BATCHES_PER_TURN):
                if self._epoll is not epoll:
                    # A handler has stopped the reactor.
                    break
                stale.clear()
                events = poll(0, BATCH)
                if not events:
                    self.has_more_events = False
                    break
                self._share_among(len(events))
                for descriptor, mask in events:
                    if descriptor in stale:
                        continue
                    handler = handlers[descriptor]
                    # None: closed, but not yet in a child that is being forked.
                    if handler is not None:
                        try:
                            handler.ready(mask)
                        except BaseException:  # as reactors do
                            self._failed(handler)
                if after:
                    self._end_batch()
            else:
                self.has_more_events = len(events) == BATCH
            if scheduled:
                self._share_among(len(scheduled))
                self._proceed()
                self._end_batch()
        finally:
            self._turning = False
        if scheduled and self._wake is None:
            self._wake = self._clock().callLater(0, self._woken)
        if not self._watched:
            self._close_if_idle()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor stops: so does everything here.

        Within a turn, if what stops it is the end of the last session: the events that
        are left in the batch have no handler any more.
        """
        turning, self._turning = self._turning, True
        for descriptor in range(len(self._handlers)):
            told = None
            # A loss may end others, and that of a dial may hand over to a transport.
            while (handler := self._handlers[descriptor]) not in (None, told):
                told = handler
                try:
                    handler.connectionLost(reason)
                except Exception:
                    log.failure("{handler!r} could not be ended", handler=handler)
        self._turning = turning
        self._handlers[:] = [None] * len(self._handlers)
        self._watched = 0
        self._close()

    # -- turns and closing

    def _woken(self) -> None:
        self._wake = None
        if self._epoll is not None:
            self.doRead()
        else:
            self._proceed()

    def _share_among(self, busy: int) -> None:
        self.share = max(MIN_SHARE, min(MAX_SHARE, BATCH_BYTES // busy))

    def _proceed(self) -> None:
        """Call those that were scheduled before this."""
        scheduled = self._scheduled
        for _ in range(len(scheduled)):
            connection = scheduled.popleft()
            try:
                connection.proceed()
            except BaseException:
                self._failed(connection)

    def _end_batch(self) -> None:
        """Make the calls that waited for its end."""
        for call in self._after:
            try:
                call()
            except BaseException:  # as in `doRead`
                log.failure("{call!r} failed", call=call)
        self._after.clear()

    def _failed(self, handler: Handler) -> None:
        """A defect in one handler must not cost the others their events."""
        reason = Failure()
        log.failure("{handler!r} failed and is ended", reason, handler=handler)
        try:
            handler.connectionLost(reason)
        except Exception:
            log.failure("{handler!r} could not be ended", handler=handler)

    def _close_if_idle(self) -> None:
        """Close the epoll while nothing is watched."""
        if self._watched or self._epoll is None or self._turning:
            return
        self._handlers.clear()
        self._close()

    def _close(self) -> None:
        if self._epoll is not None:
            self.reactor.removeReader(self)
            self._epoll.close()
            self._epoll = None
            self.has_more_events = False


def _forked() -> None:
    # Another method instead of a question at each close.
    Plane.unwatch_and_close = (  # type: ignore[method-assign]
        Plane._unregister_and_close  # noqa: SLF001
    )


# Not in the child: a daemon holds its sockets alone.
os.register_at_fork(after_in_parent=_forked)
