"""Faults that are about how a session ends: late, not at all, or before its time."""

from __future__ import annotations

import random
from typing import Annotated

import attrs

from relayd.core.filtering import LATER, Answer, EndSession, Filter, Way
from relayd.filters.faults import StreamFault, TimedFilter
from relayd.filters.option_types import Milliseconds, Size


@attrs.frozen
class SlowClose(StreamFault):
    """Passes on an end of data, or a reset, after `delay`.

    That of its direction alone: what the other side sends is still relayed.

    :ivar delay: in milliseconds.
    """

    delay: Annotated[float, Milliseconds()]

    name = "slow_close"

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        return SlowCloseFilter(way, self.delay / 1e3)


class SlowCloseFilter(TimedFilter):
    """Passes on the end later.

    :param delay: in seconds.
    """

    def __init__(self, way: Way, delay: float) -> None:
        TimedFilter.__init__(self, way, way.finish)
        self._delay = delay

    def end(self) -> bytes | Answer:
        if not self._delay:
            return b""
        self.wait(self._delay)
        return LATER

    def remove(self) -> bytes:
        self.close()
        return b""


def _after(seconds: float) -> str:
    """Why a session ends; its line names the filter before that."""
    return f"after {seconds * 1e3:.12g} ms" if seconds else "at once"


@attrs.frozen
class Timeout(StreamFault):
    """Drops all data, and closes the session after `timeout`.

    With 0 it is not closed: data is dropped until the fault is taken off, and what
    comes later is passed on.  (Toxiproxy closes sessions then, since what their peers
    read has a gap.)  An end of data is passed on at once, as in Toxiproxy.

    :ivar timeout: in milliseconds, from when the session is relayed or the fault put
        on.  Toxiproxy begins anew with each chunk.
    """

    timeout: Annotated[float, Milliseconds()] = 0.0

    name = "timeout"

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        return TimeoutFilter(way, self.timeout / 1e3)


class TimeoutFilter(TimedFilter):
    """Drops data.

    :param timeout: seconds until it ends the session; 0: never.
    """

    def __init__(self, way: Way, timeout: float) -> None:
        TimedFilter.__init__(self, way, self._time_out)
        self._why = _after(timeout)
        if timeout:
            self.wait(timeout)

    def _time_out(self) -> None:
        self._way.end_session(self._why, reset=False)

    def data(self, data: bytes) -> bytes | Answer:
        return b""

    def remove(self) -> bytes:
        self.close()
        return b""


@attrs.frozen
class ResetPeer(StreamFault):
    """Resets both connections, at once or after `timeout`.

    Until then data is dropped, and an end of data waits.  What was passed on before
    (the fault was put on a living session) is delivered first.

    :ivar timeout: in milliseconds, from when the session is relayed or the fault put
        on.  Toxiproxy waits for the first chunk, or the end, of its direction before.
    """

    timeout: Annotated[float, Milliseconds()] = 0.0

    name = "reset_peer"

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        return ResetPeerFilter(way, self.timeout / 1e3)


class ResetPeerFilter(TimedFilter):
    """Drops data, and resets the session.

    :param timeout: in seconds; 0: in the next turn of the reactor.
    """

    def __init__(self, way: Way, timeout: float) -> None:
        TimedFilter.__init__(self, way, self._reset)
        self._why = _after(timeout)
        self.wait(timeout)

    def _reset(self) -> None:
        self._way.end_session(self._why, reset=True)

    def data(self, data: bytes) -> bytes | Answer:
        return b""

    def end(self) -> bytes | Answer:
        return LATER

    def remove(self) -> bytes:
        self.close()
        return b""


@attrs.frozen
class LimitData(StreamFault):
    """Closes the session once `bytes` bytes have passed.

    Both connections are closed, politely: the last bytes are delivered.  With 0, the
    first byte closes it, and does not pass.

    :ivar bytes: how many pass.
    """

    bytes: Annotated[int, Size()]

    name = "limit_data"

    def build_fault(self, way: Way, numbers: random.Random) -> Filter:
        return LimitDataFilter(self.bytes)


class LimitDataFilter(Filter):
    """Ends the session after a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit

    def data(self, data: bytes) -> bytes | Answer:
        if len(data) < self._left:
            self._left -= len(data)
            return data
        last = data[: self._left]
        raise EndSession(f"{self._limit} bytes have passed", last, reset=False)
