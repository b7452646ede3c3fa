"""A capture of one session that goes on, for whoever asks for it: `relayctl capture`.

The blocks are given to a callable, which takes them or does not.  What it does not take
is missing, as with any capture that is slower than its network: the sequence numbers
have a gap, which readers show, and the Interface Statistics Block at the end has the
number of packets that were dropped.  The session itself is never slower for it.
"""

from __future__ import annotations

from collections.abc import Callable

from relayd.core.filtering import FilterFactory, Way
from relayd.filters.pcapng import beginning, statistics
from relayd.filters.session_capture import CaptureFilter, SessionCapture


class LiveCapture(FilterFactory):
    """Captures one session from now on; each has one of its own.

    :param sink: called with each block, of 64 KiB at most; returns whether it took it.
        It must take the first, which says that this is a capture.
    :param most_bytes: bytes of each direction after which it is over; None: it ends
        with the session, or when it is taken off.
    :param done: called once, when it is over, after the last block: with the session's
        ending as the log calls it, or with an empty text if the session goes on.  It
        may be called from within a filter's call: don't change filters in it.
    """

    name = "capture"
    joins = True

    def __init__(
        self,
        sink: Callable[[bytes], bool],
        most_bytes: int | None = None,
        done: Callable[[str], object] = str,
    ) -> None:
        self._sink = sink
        self._most = most_bytes
        self._done = done
        self._capture: SessionCapture | None = None

    def build_filter(self, way: Way) -> CaptureFilter | None:
        """See :meth:`relayd.core.filtering.IFilterFactory.build_filter`."""
        if self._capture is None:
            session = way.session
            about = f"session {session.id}: one TCP stream, whose headers are made up"
            self._sink(beginning(about))
            self._capture = SessionCapture(
                session, way.clock, self._sink, living=True, over=self._finish
            )
        return CaptureFilter(self._capture, way.course, self._most, goes_on=_always)

    def _finish(self, word: str) -> None:
        capture = self._capture
        if capture is not None:
            now, dropped = capture.times.now(), capture.dropped
            said = f"ending={word}" if word else "the session goes on"
            self._sink(statistics(now, capture.began, capture.packets, dropped, said))
        self._done(word)


def _always() -> bool:
    """Who has not taken a block may take the next one."""
    return True
