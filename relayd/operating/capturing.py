"""Captures of living sessions, for those who ask the control socket.

A capture is a filter that sees all and changes nothing, put on a session for as long as
somebody reads it (:mod:`relayd.filters.live_capture`).  The session waits for no
reader; it splices again once the capture is off.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from relayd.control.steering import Conflict, Sink, Unknown
from relayd.core.errors import RelayError
from relayd.core.filtering import IFilterFactory
from relayd.core.stage import Stage
from relayd.operating.listing import Shown

#: Makes the filter, of where blocks go (which says whether they were taken), how many
#: bytes of each direction it sees, and what is told of its end.
Maker = Callable[
    [Callable[[bytes], bool], int | None, Callable[[str], object]], IFilterFactory
]

#: Why a capture ends that was not stopped, while its session goes on.
ENOUGH = "it has as many bytes as were asked for"

#: What a block of statistics begins with, in either order of bytes: the last of a
#: capture, which says what is missing.
_STATISTICS = (b"\x05\0\0\0", b"\0\0\0\x05")


def find_session(shown: list[Shown], session: int) -> Any:
    """The client's leg of a session, by its id.

    :raises Unknown: there is none.
    """
    for relay in shown:
        if relay.kind != "udp":
            for factory, _ in relay.generations:
                for each in factory.registry:
                    if each.session.id == session:
                        return each
    raise Unknown(f"there is no session {session}")


class CaptureStream:
    """One capture: a :class:`relayd.control.steering.Stream`.

    :param protocol: the client's leg of the session.
    :param most_bytes: of each direction; None: until it ends.
    :param make: its filter.
    :raises Conflict: the session is not relayed.
    """

    def __init__(self, protocol: Any, most_bytes: int | None, make: Maker) -> None:
        _check(protocol)
        self._protocol = protocol
        self._most_bytes = most_bytes
        self._make = make
        self._filter: IFilterFactory | None = None
        self._sink: Sink | None = None
        #: Why it was stopped, if it was.
        self._why = ""
        self._last = b""
        #: The filter is on the session: it has given its first block.
        self._begun = False

    def begin(self, sink: Sink) -> None:
        """See :meth:`relayd.control.steering.Stream.begin`."""
        _check(self._protocol)
        self._sink = sink
        self._filter = self._make(self._give, self._most_bytes, self._done)
        try:
            self._protocol.change_filters((), [self._filter])
        except (RelayError, TypeError) as problem:
            # TypeError: of a program whose sessions are joined in a way of its own.
            raise Conflict(str(problem)) from problem
        if not self._begun:
            # Both sides have ended, or will say nothing more.
            raise Conflict(f"session {self._protocol.session.id} is being closed")

    def stop(self, why: str) -> None:
        """See :meth:`relayd.control.steering.Stream.stop`."""
        self._why = why
        protocol, gone = self._protocol, self._filter
        if protocol.bridge is not None and gone is not None:
            # Of a session that ends, filters don't change: it sees the rest in vain.
            with suppress(RelayError):
                protocol.change_filters([gone], ())
        self._done("")

    def _give(self, block: bytes) -> bool:
        self._begun = True
        if self._sink is None:
            return False
        if block.startswith(_STATISTICS):
            # It comes last, however full the client's queue is.
            self._last = block
            return True
        return self._sink.give(block)

    def _done(self, ending: str) -> None:
        """The filter is off.

        :param ending: of the session; empty: it goes on.
        """
        how = f"the session has ended ({ending})" if ending else ENOUGH
        if self._sink is not None:
            self._sink.end(self._why or how, self._last)


def _check(protocol: Any) -> None:
    """:raises Conflict: nothing can be seen of a session now."""
    session, bridge = protocol.session, protocol.bridge
    if session.ending is not None or session.stage in (Stage.CLOSING, Stage.OVER):
        raise Conflict(f"session {session.id} is being closed")
    if bridge is None:
        raise Conflict(
            f"session {session.id} is not relayed yet: it is {session.stage.value}"
        )
    if bridge.closing:
        raise Conflict(f"session {session.id} is being closed")
