"""Answers of an HTTP server that are made in parts, as fast as they are read.

A long answer may not keep the reactor from the relays: it is made a :data:`SLICE` at a
time, one slice of one answer in each turn.  Its reader may be slow, or read nothing: it
is given no more while some waits for it, and so much time in all to take what waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

#: Seconds of work on an answer in one turn of the reactor.
SLICE = 0.002

#: Bytes from which on a slice ends.
ENOUGH = 1 << 16


class Answers:
    """Those that are being made.

    :param clock: of slices and timeouts.
    :param timeout: seconds for which one waits for its reader, in all.
    :param log: told of one that fails; `what` is what it is called there.

    :ivar under_way: the answers that are not over.
    :ivar slow: how many readers took too long.
    """

    def __init__(
        self, clock: IReactorTime, timeout: float, log: Logger, what: str
    ) -> None:
        self.clock = clock
        self.timeout = timeout
        self._log = log
        self._what = what
        self.under_way: set[_Answer] = set()
        self.slow = 0
        #: Those that can go on, the next first.
        self._queue: deque[_Answer] = deque()
        self._turn: IDelayedCall | None = None

    def begin(self, request: Any, pieces: Iterator[bytes]) -> None:
        """Answer a request.

        :param pieces: the body; some may be empty, where making it takes its time.  The
            head is sent with the first that is not, so its making may still say what is
            in it.  Closed, if it is a generator, when its reader leaves.
        """
        answer = _Answer(self, request, pieces)
        self.under_way.add(answer)
        request.notifyFinish().addBoth(lambda _: self.ended(answer))
        request.registerProducer(answer, True)
        if request.channel.full:
            # Of an answer before this one.
            answer.pauseProducing()
        self.go_on(answer)

    def go_on(self, answer: _Answer) -> None:
        """An answer can go on."""
        if answer in self.under_way and answer not in self._queue:
            self._queue.append(answer)
            if self._turn is None:
                self._turn = self.clock.callLater(0, self._work)

    def _work(self) -> None:
        self._turn = None
        answer = self._queue.popleft()
        try:
            if not answer.paused:
                answer.work()
        except Exception:
            self._log.failure("{what} failed", what=f"a {self._what}")
            answer.abort()
        if not answer.paused:
            self.go_on(answer)
        if self._queue and self._turn is None:
            self._turn = self.clock.callLater(0, self._work)

    def ended(self, answer: _Answer) -> None:
        """An answer is over, or its reader has left."""
        self.under_way.discard(answer)
        answer.forget()
        if answer in self._queue:
            self._queue.remove(answer)
        if not self._queue and self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def close(self) -> None:
        """End those that are under way."""
        for each in list(self.under_way):
            each.abort()


@implementer(IPushProducer)
class _Answer:
    """One answer.

    :ivar channel: its connection.
    :ivar paused: its reader does not take more now.
    """

    def __init__(self, answers: Answers, request: Any, pieces: Iterator[bytes]) -> None:
        self._answers = answers
        self._request = request
        self._pieces = pieces
        self._now = answers.clock.seconds
        self.channel = request.channel
        self.paused = False
        #: Seconds that are left to its reader, and since when it is waited for.
        self._left = answers.timeout
        self._since = 0.0
        self._limit: IDelayedCall | None = None

    def work(self) -> None:
        """Make some of it."""
        until = self._now() + SLICE
        made, size = [], 0
        for piece in self._pieces:
            made.append(piece)
            size += len(piece)
            if size >= ENOUGH or self._now() >= until:
                if size:
                    self._request.write(b"".join(made))
                return
        self._request.write(b"".join(made))
        self._request.unregisterProducer()
        self._request.finish()

    def forget(self) -> None:
        """It is over."""
        self.paused = True
        self._wait_no_more()
        if isinstance(self._pieces, Generator):
            self._pieces.close()

    def _wait_no_more(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
            self._left -= self._now() - self._since

    def _too_slow(self) -> None:
        self._limit = None
        self._answers.slow += 1
        self.abort()

    def abort(self) -> None:
        """Reset its connection: what it has had is not all."""
        self._answers.ended(self)
        transport = self.channel.transport
        if transport is not None:
            transport.abortConnection()

    # -- IPushProducer

    def pauseProducing(self) -> None:
        self.paused = True
        if self._limit is None:
            self._since = self._now()
            self._limit = self._answers.clock.callLater(
                max(self._left, 0.0), self._too_slow
            )

    def resumeProducing(self) -> None:
        self.paused = False
        self._wait_no_more()
        self._answers.go_on(self)

    def stopProducing(self) -> None:
        self._answers.ended(self)
