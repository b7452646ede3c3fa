"""Answers that go on for as long as what they are about: bytes, in blocks.

Nobody knows how long such an answer is, so it has no time in which it must be taken;
but its client must take something.  What waits for a slow one is at most
:data:`MOST_WAITING` bytes, beside what its connection holds; what comes then is
refused, and whoever makes it goes on without.  There are :data:`MOST_STREAMS`; of a
client that has ended its side of the connection, the end is still told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from relayd.control.steering import Refusal, Stream

log = Logger(namespace="relayd.control")

#: Answers of this kind at once; one more is refused.
MOST_STREAMS = 8

#: Bytes that wait for one client.
MOST_WAITING = 1 << 20

#: Seconds for which a client may take nothing while something waits for it.
PATIENCE = 60.0


class TooMany(Refusal):
    """There are too many already."""

    status = 503


class Streams:
    """Those that go on.

    :param clock: of :data:`PATIENCE`.

    :ivar under_way: those that are not over.
    :ivar refused: how many were too many.
    :ivar slow: how many clients took nothing for too long.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self.clock = clock
        self.under_way: dict[Any, _Outlet] = {}
        self.refused = 0
        self.slow = 0

    def check_place(self) -> None:
        """:raises Refusal: there is no place for one more."""
        if len(self.under_way) >= MOST_STREAMS:
            self.refused += 1
            raise TooMany(
                f"there are {MOST_STREAMS} captures already: end one, or try again"
                " later"
            )

    def begin(
        self, request: Any, stream: Stream, tell: Callable[[str], object]
    ) -> None:
        """Answer a request, whose head is set.

        :param tell: called as it begins, and once it is over: with how, in a few words.
        :raises Refusal: the stream can't begin; nothing was sent.
        """
        outlet = _Outlet(self, request, stream, tell)
        stream.begin(outlet)
        tell("begun")
        self.under_way[request.channel] = outlet
        outlet.start()

    def end_for(self, channel: Any) -> bool:
        """The client of a connection wants no more, and reads what is left.

        :return: whether there is something to end.
        """
        outlet = self.under_way.get(channel)
        if outlet is not None:
            outlet.stop("its client has ended it")
        return outlet is not None

    def close(self) -> None:
        """End them all: what waits for their clients is given to the connections."""
        for each in list(self.under_way.values()):
            each.stop("relayd stops", at_once=True)


@implementer(IPushProducer)
class _Outlet:
    """One answer: a :class:`relayd.control.steering.Sink`.

    :ivar refused: the blocks that its client was too slow for.
    """

    def __init__(
        self,
        streams: Streams,
        request: Any,
        stream: Stream,
        tell: Callable[[str], object],
    ) -> None:
        self._streams = streams
        self._request = request
        self._channel = request.channel
        self._stream = stream
        self._tell = tell
        self._queue: deque[bytes] = deque()
        self._waiting = 0
        #: Until it is started; then, while its connection takes no more.
        self._paused = True
        self._limit: IDelayedCall | None = None
        #: Why there is no more, if that is so; and whether all is done.
        self._why: str | None = None
        self._over = False
        self._sent = 0
        self.refused = 0

    def start(self) -> None:
        """Send the head, and what there is."""
        request = self._request
        request.notifyFinish().addBoth(lambda _: self._left("its client has left"))
        request.registerProducer(self, True)
        request.write(b"")
        if self._channel.full:
            # Of an answer before this one.
            self.pauseProducing()
        else:
            self.resumeProducing()

    # -- Sink

    def give(self, block: bytes) -> bool:
        """See :meth:`relayd.control.steering.Sink.give`."""
        if self._over or self._why is not None:
            return False
        if self._waiting + len(block) > MOST_WAITING:
            self.refused += 1
            return False
        self._queue.append(block)
        self._waiting += len(block)
        self._send()
        return True

    def end(self, why: str, last: bytes = b"") -> None:
        """See :meth:`relayd.control.steering.Sink.end`."""
        if self._over or self._why is not None:
            return
        self._why = why
        if last:
            self._queue.append(last)
            self._waiting += len(last)
        self._send()

    # -- what is sent

    def _send(self, *, at_once: bool = False) -> None:
        while self._queue and (at_once or not self._paused):
            block = self._queue.popleft()
            self._waiting -= len(block)
            self._sent += len(block)
            self._request.write(block)
        if self._why is not None and not self._queue and self._is_begun:
            why, request = self._why, self._request
            self._close(why)
            request.unregisterProducer()
            request.finish()

    @property
    def _is_begun(self) -> bool:
        return self._streams.under_way.get(self._channel) is self

    def stop(self, why: str, *, at_once: bool = False) -> None:
        """Have the stream end.

        :param at_once: wait for no client.
        """
        self._stop_stream(why)
        if not self._over:
            self._why = self._why or why
            self._send(at_once=at_once)

    def _stop_stream(self, why: str) -> None:
        if self._why is not None:
            # It has ended by itself.
            return
        try:
            self._stream.stop(why)
        except Exception:
            log.failure("an answer that goes on could not be ended")

    def _left(self, why: str) -> None:
        """Nobody reads it any more."""
        if not self._over:
            self._close(why)
            self._stop_stream(why)

    def _close(self, how: str) -> None:
        self._over = True
        self._streams.under_way.pop(self._channel, None)
        self._queue.clear()
        self._wait_no_more()
        refused = f", {self.refused} blocks refused" if self.refused else ""
        self._tell(f"ended: {how}, {self._sent} bytes{refused}")

    # -- a client that takes nothing

    def _wait_no_more(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _too_slow(self) -> None:
        self._limit = None
        self._streams.slow += 1
        self._left(f"its client has taken nothing for {PATIENCE:g} s")
        self._channel.transport.abortConnection()

    # -- IPushProducer

    def pauseProducing(self) -> None:
        self._paused = True
        if self._limit is None and not self._over:
            self._limit = self._streams.clock.callLater(PATIENCE, self._too_slow)

    def resumeProducing(self) -> None:
        self._paused = False
        self._wait_no_more()
        self._send()

    def stopProducing(self) -> None:
        self._left("its client has left")
