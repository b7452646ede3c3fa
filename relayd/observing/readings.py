"""What metrics say of a relay, read from what it counts, a little at a time.

A reading is a total since the relay's start: what its sessions or flows have counted
that are over (:mod:`relayd.core.counts`), and what is in the records of those that
live.  With tens of thousands of these it takes longer than a turn of the reactor may,
so a reader is a generator: it yields after each part of the work.

**No total ever goes down**, as long as one reading begins when the one before it is
complete.  The counters and the list of those that live are taken at one moment; a
record that is read later holds at least as much as at that moment, and whoever ends
meanwhile is still in the list, but in the counters only of the next reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol

import attrs

from relayd.core.counts import REFUSALS, FlowCounts, Histogram, SessionCounts
from relayd.core.errors import REASONS
from relayd.core.flows import Counters, Flow

#: Records that are read in one part of the work.
PART = 250


class Living(Protocol):
    """Those that live, as a registry has them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Waits(Protocol):
    """What sessions wait for."""

    @property
    def waits(self) -> int:
        """How often one has."""


class Retried(Protocol):
    """What follows dials that have failed."""

    @property
    def count(self) -> int:
        """How many were followed by another."""


class Servers(Protocol):
    """The servers of a relay."""

    @property
    def upstreams(self) -> Sequence[Any]:
        """Each with `name` and `counted`; one that is counted with `up` and
        `offered_weight`, too."""


@attrs.frozen
class Sessions:
    """A stream relay that is counted.

    :ivar relay: its name.
    :ivar counts: of all its listeners.
    :ivar living: of each listener: what has a `session`.
    :ivar bandwidth: what limits its bytes, if anything does.
    :ivar pools: the servers of each listener.
    :ivar retries: what follows dials that have failed, likewise.
    :ivar undecided: its tables of clients that are undecided, if it has some.
    """

    relay: str
    counts: SessionCounts
    living: Sequence[Living]
    bandwidth: Waits | None = None
    pools: Sequence[Servers] = ()
    retries: Sequence[Retried] = ()
    undecided: Sequence[Sized] = ()


class FlowSource(Protocol):
    """A UDP relay, or what it has for one of its listeners.

    :ivar registry: the open flows.
    """

    @property
    def counters(self) -> Counters: ...

    @property
    def counts(self) -> FlowCounts: ...

    @property
    def registry(self) -> Living: ...


@attrs.frozen
class Flows:
    """A UDP relay that is counted: its name, and what it has for each listener.

    :ivar pools: its servers, if they are counted.
    """

    relay: str
    sources: Sequence[FlowSource]
    pools: Sequence[Servers] = ()


@attrs.define
class ServerReading:
    """One server of a stream relay.

    :ivar results: see :class:`relayd.core.counts.ServerCounts`.
    :ivar up: nothing says that it is down: its checks, or dials that have failed; of a
        single one without checks, its last dial has not failed.
    :ivar weight: that it has now; 0 if its operator has taken it out.
    :ivar active: sessions that are connected to it, or dial it.
    """

    results: dict[str, int]
    up: bool
    active: int = 0
    weight: float = 1


@attrs.define
class StreamReading:
    """The totals of a stream relay.

    :ivar opened: sessions that were admitted; `closed`, by ending, and `active` are
        those that have ended, and that live.
    :ivar refused: clients that were not served, by reason; some were admitted first.
    :ivar up: bytes from clients; `down` from servers.
    :ivar spliced: of both, what did not pass through this process.
    :ivar waits: how often a session had to wait for its bandwidth.
    :ivar retried: how many dials that failed were followed by another.
    :ivar deciding: clients that are undecided; None: of this relay there are none.
    :ivar durations: of the closed sessions; `connects` of the dials that succeeded.
    """

    relay: str
    opened: int
    active: int
    closed: dict[str, int]
    refused: dict[str, int]
    up: int
    down: int
    spliced: int
    durations: Histogram
    connects: Histogram
    servers: dict[str, ServerReading]
    waits: int = 0
    retried: int = 0
    deciding: int | None = None


@attrs.define
class FlowReading:
    """The totals of a UDP relay.

    :ivar active: the open flows.
    :ivar up: datagrams that were sent to servers; `down` to clients.
    :ivar up_bytes: what they held; `down_bytes` likewise.
    :ivar dropped: by direction and reason.
    :ivar servers: by name; none if they are not counted.
    """

    relay: str
    active: int = 0
    up: int = 0
    down: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    dropped: Counter[tuple[str, str]] = attrs.Factory(Counter)
    servers: dict[str, ServerReading] = attrs.Factory(dict)

    @property
    def refused(self) -> dict[str, int]:
        """Of the dropped, those of clients that a gate has refused, by its word."""
        return {
            reason: count
            for (direction, reason), count in self.dropped.items()
            if direction == "up" and reason in REASONS
        }


@attrs.frozen
class RuleCounts:
    """Of the netfilter rules of a process's relays.

    :ivar failed: how many changes of them have failed.
    :ivar lost: how often some were found that somebody else had removed, or added to.
    """

    failed: int
    lost: int


@attrs.frozen
class ProcessReading:
    """What metrics say of the process.

    :ivar build: versions, by the name of their label.
    :ivar accept_pauses: how often listeners have paused as descriptors ran out.
    :ivar open_descriptors: and how many there may be, in `max_descriptors`; NaN where
        the system does not say.
    :ivar pipes_in_use: by connections that splice.
    :ivar reactor_lag: seconds by which the last timer of the second was late.
    :ivar log_lines_dropped: of all logs.
    :ivar stopping: it was told to stop.
    :ivar loaded_at: when its settings were last read with success: seconds since the
        epoch.
    :ivar rules: of netfilter; None: it makes none.
    """

    build: dict[str, str]
    accept_pauses: int
    open_descriptors: float
    max_descriptors: float
    pipes_in_use: int
    reactor_lag: float
    log_lines_dropped: int
    stopping: bool
    loaded_at: float
    rules: RuleCounts | None = None


def read_sessions(relay: Sessions) -> Generator[None, None, StreamReading]:
    """Read a stream relay; yields after each part of the work."""
    counts = relay.counts
    # Those whose PROXY header is awaited are not admitted yet.
    living = [
        each
        for members in relay.living
        for each in members
        if each.session.ordinal >= 0
    ]
    closed = dict(counts.closed)
    refused = Counter(counts.refused)
    for word in REFUSALS & closed.keys():
        refused[word] += closed[word]
    reading = StreamReading(
        relay=relay.relay,
        opened=len(living) + sum(closed.values()),
        active=len(living),
        closed=closed,
        refused=refused,
        up=counts.up,
        down=counts.down,
        spliced=counts.spliced,
        durations=_copy(counts.durations),
        connects=_copy(counts.connects),
        servers={
            name: ServerReading(dict(each.results), each.failed_at is None)
            for name, each in counts.servers.items()
        },
        retried=sum(each.count for each in relay.retries),
        waits=0 if relay.bandwidth is None else relay.bandwidth.waits,
        deciding=sum(map(len, relay.undecided)) if relay.undecided else None,
    )
    servers = reading.servers
    for pool in relay.pools:
        for one in pool.upstreams:
            if one.counted and one.name in servers:
                servers[one.name].up = one.up
                servers[one.name].weight = one.offered_weight
    for part in _parts(living):
        for each in part:
            session = each.session
            up, down = session.up, session.down
            reading.up += up.read
            reading.down += down.read
            reading.spliced += up.spliced + down.spliced
            if servers and session.server is not None:
                server = servers.get(session.server.name)
                if server is not None:
                    server.active += 1
        yield
    return reading


def read_flows(relay: Flows) -> Generator[None, None, FlowReading]:
    """Read a UDP relay; yields after each part of the work."""
    reading = FlowReading(relay.relay)
    for pool in relay.pools:
        for one in pool.upstreams:
            server = reading.servers.setdefault(
                one.name, ServerReading({}, one.up, 0, one.offered_weight)
            )
            server.active += one.sessions
    living: list[Flow] = []
    for source in relay.sources:
        counters, counts = source.counters, source.counts
        living += source.registry
        reading.up += counters.sent
        reading.down += counters.replies_sent
        reading.up_bytes += counts.up
        reading.down_bytes += counts.down
        dropped = reading.dropped
        for direction, reasons, by_kernel in (
            (
                "up",
                counters.dropped,
                counters.kernel_dropped - counts.kernel_replies_dropped,
            ),
            ("down", counters.replies_dropped, counts.kernel_replies_dropped),
        ):
            for reason, number in reasons.items():
                dropped[direction, reason] += number
            dropped[direction, "kernel"] += by_kernel
    reading.active = len(living)
    for part in _parts(living):
        for flow in part:
            reading.up_bytes += flow.up_bytes
            reading.down_bytes += flow.down_bytes
        yield
    return reading


def _copy(histogram: Histogram) -> Histogram:
    copied = Histogram(histogram.bounds)
    copied.include(histogram)
    return copied


def _parts(living: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (living[at : at + PART] for at in range(0, len(living), PART))
