"""What is counted of a relay, for metrics and whoever else asks for totals.

A stream relay that somebody counts has a :class:`SessionCounts`
(`StreamRelay.counts`); it is added to when a server is connected and when a session
ends, never for a chunk.  What moves meanwhile is in the records of the sessions that
live, and who wants a total adds the two: :meth:`SessionCounts.close` adds a session's
bytes when its record is final, so such a total never goes down.

A UDP relay has :class:`FlowCounts` beside :class:`relayd.core.flows.Counters`, for the
same reason: the bytes of its flows that have ended.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from relayd.core.flows import Flow
from relayd.core.session import Ending, Session

#: Upper bounds of the buckets, in seconds: of sessions, from a health check to a day,
DURATIONS: tuple[float, ...] = (
    0.01,
    0.05,
    0.1,
    0.5,
    1,
    5,
    10,
    30,
    60,
    300,
    1800,
    3600,
    21600,
    86400,
)

#: and of the dials that have succeeded.
CONNECTS: tuple[float, ...] = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)

#: The results of a dial that are no ending's word.
CONNECTED, CANCELLED = "connected", "cancelled"

#: The endings of clients that were not served for what they are, said or asked for:
#: those in whose code the second letter is R.
REFUSALS = frozenset(each.word for each in Ending if each.code[1] == "R")


class Tally:
    """A number that several count together."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Histogram:
    """How many values there were, by size.

    :param bounds: upper bounds of the buckets, each included, ascending.

    :ivar counts: by bucket; the last is for what is above all bounds.
    :ivar total: the sum of the values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def include(self, other: Histogram) -> None:
        """Add another one, of the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class ServerCounts:
    """What is counted of one of a relay's servers.

    :ivar results: its dials that are over, by result: `connected`, `cancelled`, or the
        word of the ending that a failed one leads to.  One that has succeeded, but was
        followed by another as the server has reset it at once, is counted twice.
    :ivar failed_at: when the last dial has failed, if it has: in seconds, on the
        relay's clock; None if it has succeeded, or there was none.
    """

    __slots__ = ("failed_at", "results")

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        self.failed_at: float | None = None


class SessionCounts:
    """What is counted of the sessions of a stream relay.

    :param servers: the names of its servers; dials to others, which a proxy's clients
        choose, are counted by no name.

    :ivar closed: sessions that were admitted and have ended, by their ending's word.
    :ivar refused: clients that were not admitted, by the gate's word or the ending's.
    :ivar up: bytes that the closed ones have had from clients; `down` from servers.
    :ivar spliced: how many of those did not pass through this process.
    :ivar durations: of the closed ones, in seconds.
    :ivar connects: how long the dials took that have succeeded, in seconds.
    :ivar servers: by name.
    """

    __slots__ = (
        "closed",
        "connects",
        "down",
        "durations",
        "refused",
        "servers",
        "spliced",
        "up",
    )

    def __init__(self, servers: Iterable[str] = ()) -> None:
        self.closed: Counter[str] = Counter({Ending.DONE.word: 0})
        self.refused: Counter[str] = Counter()
        self.up = self.down = self.spliced = 0
        self.durations = Histogram(DURATIONS)
        self.connects = Histogram(CONNECTS)
        self.servers = {name: ServerCounts() for name in servers}

    def refuse(self, word: str) -> None:
        """A client was not admitted.

        :param word: the gate's for it (:data:`relayd.core.errors.REASONS`), or else the
            ending's.
        """
        self.refused[word] += 1

    def connect(self, session: Session) -> None:
        """A session's server is connected."""
        server, connected, dialed = (
            session.server,
            session.connected_at,
            session.dialed_at,
        )
        if server is None or connected is None or dialed is None:
            # The peer of a BIND, which has taken its time.
            return
        self.connects.add(connected - dialed)
        if self.servers:
            counts = self.servers.get(server.name)
            if counts is not None:
                counts.results[CONNECTED] += 1
                counts.failed_at = None

    def fail(self, server: str, ending: Ending, now: float) -> None:
        """A dial to the server of this name has failed."""
        counts = self.servers.get(server)
        if counts is not None:
            counts.results[ending.word] += 1
            counts.failed_at = now

    def cancel(self, server: str) -> None:
        """A dial to the server of this name was cancelled: its client has left."""
        counts = self.servers.get(server)
        if counts is not None:
            counts.results[CANCELLED] += 1

    def close(self, session: Session) -> None:
        """A session that was admitted has ended."""
        up, down, ending = session.up, session.down, session.ending
        self.up += up.read
        self.down += down.read
        self.spliced += up.spliced + down.spliced
        if ending is not None and session.ended_at is not None:
            self.closed[ending.word] += 1
            self.durations.add(session.ended_at - session.opened_at)


class FlowCounts:
    """What is counted of the flows of a UDP relay, beside its counters.

    :ivar up: bytes that flows which have ended have sent to servers; `down` to clients.
    :ivar kernel_replies_dropped: of the datagrams that the kernel dropped, those from
        servers.
    :ivar kept: of the datagrams from clients, how many filters keep back now, less
        those that they have made in addition, which are only among the sent ones;
        `replies_kept` likewise.
    """

    __slots__ = ("down", "kept", "kernel_replies_dropped", "replies_kept", "up")

    def __init__(self) -> None:
        self.up = self.down = self.kernel_replies_dropped = 0
        self.kept = self.replies_kept = 0

    def close(self, flow: Flow) -> None:
        """A flow has ended."""
        self.up += flow.up_bytes
        self.down += flow.down_bytes
