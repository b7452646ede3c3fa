"""A fault on one direction of a session, on a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.task import Clock

from relayd.core.filtering import LATER, EndSession, Filter
from relayd.filters.faults import StreamFault
from tests.support.filtering import FakeWay

#: Times are equal within a thousandth of a millisecond.
CLOSE = 1e-3


class TimedWay(FakeWay):
    """One that notes when the bytes have come.

    :ivar arrived: pairs of milliseconds and bytes.
    :ivar finished_at: when the end of data has come, in milliseconds, or None.
    """

    def __init__(self, **options: Any) -> None:
        FakeWay.__init__(self, **options)
        self.arrived: list[tuple[float, bytes]] = []
        self.finished_at: float | None = None

    @property
    def now(self) -> float:
        return round(self.clock.seconds() * 1000, 6)

    def pass_on(self, data: bytes) -> None:
        FakeWay.pass_on(self, data)
        if data:
            self.arrived.append((self.now, data))

    def finish(self, data: bytes = b"") -> None:
        FakeWay.finish(self, data)
        self.finished_at = self.now


class Line:
    """What a source says goes through a fault; what arrives is noted, with its time.

    :ivar most_timers: how many timers there were at once.
    """

    def __init__(self, factory: StreamFault, ordinal: int = 0) -> None:
        self.clock = Clock()
        self.way = TimedWay(
            course=factory.direction,
            session=SimpleNamespace(ordinal=ordinal),
            clock=self.clock,
        )
        built: Filter | None = factory.build_filter(self.way)
        assert built is not None, "this session does not have the fault"
        self.filter = built
        self.most_timers = 0

    @property
    def arrived(self) -> list[tuple[float, bytes]]:
        return self.way.arrived

    @property
    def end_arrived(self) -> float | None:
        return self.way.finished_at

    @property
    def now(self) -> float:
        """In milliseconds."""
        return self.way.now

    @property
    def data(self) -> bytes:
        """All that has arrived."""
        return b"".join([data for _, data in self.arrived])

    @property
    def timers(self) -> int:
        return len(self.clock.getDelayedCalls())

    def read(self, data: bytes, at: float | None = None) -> None:
        """The source has sent bytes.

        :param at: when, in milliseconds; now, unless given.
        """
        if at is not None:
            self.run(at)
        answer = self.filter.data(data)
        assert isinstance(answer, bytes)
        self.way.pass_on(answer)
        self._check()

    def read_end(self, at: float | None = None) -> None:
        """The source has ended."""
        if at is not None:
            self.run(at)
        answer = self.filter.end()
        if answer is not LATER:
            assert isinstance(answer, bytes)
            self.way.finish(answer)
        self._check()

    def remove(self) -> None:
        """The fault is taken off."""
        self.way.pass_on(self.filter.remove())
        self.filter.close()

    def run(self, until: float) -> None:
        """Let time pass, from timer to timer.

        :param until: in milliseconds.
        """
        end = max(until / 1000, self.clock.seconds())
        while self.timers and self._soonest() <= end + 1e-9:
            self._go_to(self._soonest())
        self._go_to(max(end, self.clock.seconds()))

    def run_all(self) -> None:
        """Let time pass until no timer is left."""
        while self.timers:
            self._go_to(self._soonest())

    def late(self, until: float) -> None:
        """Let time pass at once, as if the process had not run."""
        self._go_to(until / 1000)

    def _soonest(self) -> float:
        return min([call.getTime() for call in self.clock.getDelayedCalls()])

    def _go_to(self, when: float) -> None:
        # Not by a difference, which is rounded.
        self.clock.rightNow = when
        self.clock.advance(0)
        self._check()

    def _check(self) -> None:
        self.most_timers = max(self.most_timers, self.timers)
        assert 0 <= self.filter.held <= self.filter.most_held


def read_until_ended(line: Line, data: bytes) -> EndSession:
    """The source has sent bytes, and the fault ends the session by that."""
    try:
        answer = line.filter.data(data)
    except EndSession as ended:
        return ended
    raise AssertionError(f"it passed {answer!r} on, and did not end the session")
