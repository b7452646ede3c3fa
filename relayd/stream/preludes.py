"""The preludes of one client, read one after the other.

What the client sends is given to the relay's preludes (:mod:`relayd.core.prelude`) in
order, until each has understood its part.  What the last one has not read is held, and
is the first that is relayed, or read by what comes next.  Only sessions that have
preludes make a :class:`Pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.python.failure import Failure

from relayd.core.prelude import BadRequest, Prelude, Reader
from relayd.core.session import Ending


class Pipeline:
    """Reads a client's preludes.

    :param client: a :class:`relayd.stream.session.StreamProtocol`, whose `preludes`
        this is.
    :param then: called when they are complete, with what each has read.

    :ivar unread: what has arrived and was not understood yet.
    """

    #: What reads this client's prelude, if it has a state, and which prelude that is.
    _started: tuple[int, Reader] | None = None

    def __init__(
        self, client: Any, preludes: Sequence[Prelude], then: Callable[..., object]
    ) -> None:
        self._client = client
        self._preludes = preludes
        self._then = then
        self._said: list[Any] = []
        self.unread = b""

    @property
    def name(self) -> str:
        """What is expected now."""
        return self._preludes[len(self._said)].name

    def feed(self, data: bytes) -> None:
        """The client has sent this."""
        client, preludes, all_said = self._client, self._preludes, self._said
        client.session.spoke = True
        unread = self.unread + data if self.unread else data
        self.unread = b""
        while len(all_said) < len(preludes):
            try:
                read = preludes[len(all_said)].read
                if read is None:
                    read = self._reader(len(all_said))
                found = read(unread)
            except BadRequest as problem:
                client.end(Ending.BAD_REQUEST, str(problem))
                return
            except Exception:
                client.failed(Failure())
                return
            if found is None:
                self.unread = unread
                return
            said, length = found
            all_said.append(said)
            unread = unread[length:]
        # They hold each other.
        client.reader = client.preludes = None
        if unread:
            client.hold(unread)
        try:
            self._then(*all_said)
        except Exception:
            client.failed(Failure())

    def _reader(self, number: int) -> Reader:
        """What reads the prelude of this number, which has a state."""
        if self._started is None or self._started[0] != number:
            start: Any = self._preludes[number].start
            self._started = (number, start())
        return self._started[1]
