"""The metrics, by prometheus_client: families, a collector, and their text.

:class:`RelayCollector` is a collector as prometheus_client has them; register it with a
registry of your own, and every exposition works.  That makes all of a scrape at once,
which takes a second for a thousand relays.  :func:`exposition` makes the same text in
pieces, family by family and some relays of it at a time, so that whoever serves it can
serve others between two of them.

Nothing is counted here: a scrape reads what the relays count
(:mod:`relayd.observing.readings`).  A label is the name of a relay or of one of its
servers, as they are configured, or a word of ours; never what a client has sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import attrs
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from relayd.core.counts import Histogram
from relayd.observing.readings import (
    FlowReading,
    Flows,
    ProcessReading,
    Sessions,
    StreamReading,
    read_flows,
    read_sessions,
)

#: Samples of a piece of text: about a millisecond's work.
PIECE = 200

#: Readings after which a piece ends that has no sample.
SPARSE = 500

#: What ends the text of OpenMetrics.
_END = b"# EOF\n"


#: Of one reading: the values of the labels after `relay`, and the sample.
_Samples = Iterable[tuple[Sequence[str], Any]]


@attrs.frozen
class _Family:
    """One family of relays' metrics.

    :ivar kind: makes it.
    :ivar name: without `_total`, which a counter's samples get.
    :ivar read: the samples of a reading.
    :ivar labels: beside `relay`.
    """

    kind: type[Metric]
    name: str
    help: str
    read: Callable[[Any], _Samples]
    labels: Sequence[str] = ()

    def pieces(self, readings: Iterable[Any]) -> Iterator[Metric]:
        """The family of these readings, in parts; one at least, maybe without any."""
        piece, since = self._new(), 0
        for reading in readings:
            since += 1
            for labels, value in self.read(reading):
                _add(piece, (reading.relay, *labels), value)
                if len(piece.samples) >= PIECE:
                    yield piece
                    piece, since = self._new(), 0
            if since >= SPARSE:
                yield piece
                piece, since = self._new(), 0
        yield piece

    def _new(self) -> Metric:
        # mypy sees Metric's arguments, not its subclasses'.
        kind: Any = self.kind
        made: Metric = kind(self.name, self.help, labels=("relay", *self.labels))
        return made


@functools.cache
def _bounds(bounds: tuple[float, ...]) -> list[str]:
    """What the buckets are called."""
    return [*map(repr, map(float, bounds)), "+Inf"]


def _add(metric: Any, labels: Sequence[str], value: Any) -> None:
    if isinstance(value, Histogram):
        counts = accumulate(value.counts)
        buckets = list(zip(_bounds(value.bounds), counts, strict=True))
        metric.add_metric(labels, buckets, value.total)
    else:
        metric.add_metric(labels, value)


def _one(read: Callable[[Any], Any]) -> Callable[[Any], _Samples]:
    """A family with one sample for each relay."""
    return lambda reading: (((), read(reading)),)


def _each(read: Callable[[Any], dict[str, int]]) -> Callable[[Any], _Samples]:
    """A family with a sample for each entry of a dictionary."""
    return lambda reading: (((name,), n) for name, n in read(reading).items())


def _connects(reading: StreamReading) -> _Samples:
    for name, server in reading.servers.items():
        for result, number in server.results.items():
            yield (name, result), number


def _up_and_down(up: str, down: str) -> Callable[[Any], _Samples]:
    return lambda reading: (
        (("up",), getattr(reading, up)),
        (("down",), getattr(reading, down)),
    )


STREAMS = (
    _Family(
        CounterMetricFamily,
        "relayd_sessions_opened",
        "Sessions that were admitted.",
        _one(lambda reading: reading.opened),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_sessions_closed",
        "Sessions that have ended, by their ending in the log.",
        _each(lambda reading: reading.closed),
        ("ending",),
    ),
    _Family(
        GaugeMetricFamily,
        "relayd_sessions_active",
        "Sessions that live.",
        _one(lambda reading: reading.active),
    ),
    _Family(
        GaugeMetricFamily,
        "relayd_deciding",
        "Clients that a route has not decided about, or whose server name has not come;"
        " of a SOCKS4 proxy with a route, those in their handshake, too.",
        lambda each: () if each.deciding is None else (((), each.deciding),),
    ),
    _Family(
        HistogramMetricFamily,
        "relayd_session_duration_seconds",
        "How long the sessions lived that have ended.",
        _one(lambda reading: reading.durations),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_relayed_bytes",
        "Bytes read from clients (up) and from servers (down).",
        _up_and_down("up", "down"),
        ("direction",),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_spliced_bytes",
        "Of these, bytes that the kernel moved, past the process.",
        _one(lambda reading: reading.spliced),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_bandwidth_waits",
        "How often sessions had to wait, as their bandwidth is limited.",
        _one(lambda reading: reading.waits),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_upstream_connects",
        "Dials to a server that are over, by result.",
        _connects,
        ("upstream", "result"),
    ),
    _Family(
        HistogramMetricFamily,
        "relayd_upstream_connect_seconds",
        "How long the dials took that have succeeded.",
        _one(lambda reading: reading.connects),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_upstream_retries",
        "Dials that failed and were followed by another.",
        _one(lambda reading: reading.retried),
    ),
)

#: Of relays of both kinds.
REFUSED = _Family(
    CounterMetricFamily,
    "relayd_refused",
    "Clients that were not served for what they are, said or asked for; of a UDP relay,"
    " their datagrams.",
    _each(lambda reading: reading.refused),
    ("reason",),
)

#: Of the servers of all relays that have some.
SERVERS = (
    _Family(
        GaugeMetricFamily,
        "relayd_upstream_sessions_active",
        "Sessions, or flows, that are connected to a server, or dial it.",
        _each(lambda reading: {n: s.active for n, s in reading.servers.items()}),
        ("upstream",),
    ),
    _Family(
        GaugeMetricFamily,
        "relayd_upstream_up",
        "0 if a server is down, by its checks or as its dials have failed; else 1.",
        _each(lambda reading: {n: int(s.up) for n, s in reading.servers.items()}),
        ("upstream",),
    ),
    _Family(
        GaugeMetricFamily,
        "relayd_upstream_weight",
        "The weight that a server has now; 0 if it is disabled, or its operator has"
        " taken it out.",
        _each(lambda reading: {n: s.weight for n, s in reading.servers.items()}),
        ("upstream",),
    ),
)

DATAGRAMS = (
    _Family(
        GaugeMetricFamily,
        "relayd_udp_flows_active",
        "Open flows.",
        _one(lambda reading: reading.active),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_udp_datagrams",
        "Datagrams sent to servers (up) and to clients (down).",
        _up_and_down("up", "down"),
        ("direction",),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_udp_bytes",
        "What these datagrams held, in bytes.",
        _up_and_down("up_bytes", "down_bytes"),
        ("direction",),
    ),
    _Family(
        CounterMetricFamily,
        "relayd_udp_dropped",
        "Datagrams of clients (up) and of servers (down) that were dropped.",
        lambda reading: reading.dropped.items(),
        ("direction", "reason"),
    ),
)


def _process(reading: ProcessReading) -> Iterator[Metric]:
    yield InfoMetricFamily("relayd_build", "The versions that run.", reading.build)
    yield CounterMetricFamily(
        "relayd_accept_pauses",
        "How often listeners have paused as descriptors ran out.",
        reading.accept_pauses,
    )
    yield GaugeMetricFamily(
        "relayd_open_descriptors",
        "Open file descriptors of the process.",
        reading.open_descriptors,
    )
    yield GaugeMetricFamily(
        "relayd_max_descriptors",
        "The process's limit of open files.",
        reading.max_descriptors,
    )
    yield GaugeMetricFamily(
        "relayd_pipes_in_use",
        "Pipes in use by connections that are spliced.",
        reading.pipes_in_use,
    )
    yield GaugeMetricFamily(
        "relayd_reactor_lag_seconds",
        "By how much a timer was late, a second ago at most.",
        reading.reactor_lag,
    )
    yield CounterMetricFamily(
        "relayd_log_lines_dropped",
        "Lines of the logs that were lost, as nothing took them in time.",
        reading.log_lines_dropped,
    )
    yield GaugeMetricFamily(
        "relayd_stopping", "1 once it was told to stop.", reading.stopping
    )
    yield GaugeMetricFamily(
        "relayd_config_last_load_success_timestamp_seconds",
        "When the settings were last read with success.",
        reading.loaded_at,
    )
    if reading.rules is not None:
        yield CounterMetricFamily(
            "relayd_netfilter_failures",
            "Changes of netfilter rules that have failed; they are tried again.",
            reading.rules.failed,
        )
        yield CounterMetricFamily(
            "relayd_netfilter_lost",
            "How often others had changed the rules; they are applied again.",
            reading.rules.lost,
        )


class RelayCollector(Collector):
    """Collects the metrics of a process's relays.

    :param relays: returns those that there are now; a relay that is not among them any
        more has no series.
    :param process: reads what concerns the process; yields after each part of the work.
    """

    def __init__(
        self,
        relays: Callable[[], Iterable[Sessions | Flows]],
        process: Callable[[], Generator[None, None, ProcessReading]],
    ) -> None:
        self._relays = relays
        self._process = process

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client: all families, whole."""
        whole: Metric | None = None
        for piece in self.pieces():
            if piece is None:
                continue
            if whole is not None and whole.name == piece.name:
                whole.samples += piece.samples
                continue
            if whole is not None:
                yield whole
            whole = piece
        if whole is not None:
            yield whole

    def pieces(self) -> Iterator[Metric | None]:
        """The families in parts, which follow each other; None after other work."""
        streams: list[StreamReading] = []
        flows: list[FlowReading] = []
        process = yield from self._process()
        for relay in self._relays():
            if isinstance(relay, Sessions):
                streams.append((yield from read_sessions(relay)))
            else:
                flows.append((yield from read_flows(relay)))
            yield None
        yield from _process(process)
        for family in STREAMS:
            yield from family.pieces(streams)
        everything = [*streams, *flows]
        for family in (*SERVERS, REFUSED):
            yield from family.pieces(everything)
        for family in DATAGRAMS:
            yield from family.pieces(flows)


class _One:
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield self._metric


def exposition(collector: RelayCollector, accept: str) -> tuple[str, Iterator[bytes]]:
    """The text of all families, in the format that the reader asks for.

    :param accept: the header of the request; Prometheus's own format unless it asks for
        OpenMetrics.
    :return: the content type, and the text in pieces, of which some are empty: each
        takes a millisecond or so to make.
    """
    encode, content_type = choose_encoder(accept)
    return content_type, _pieces(collector, encode)


def _pieces(
    collector: RelayCollector, encode: Callable[[Any], bytes]
) -> Iterator[bytes]:
    name, end = "", b""
    for piece in collector.pieces():
        if piece is None:
            yield b""
            continue
        text = encode(_One(piece))
        if text.endswith(_END):
            text, end = text.removesuffix(_END), _END
        if piece.name == name:
            # What the family is was said with its first part.
            while text.startswith(b"# "):
                text = text.partition(b"\n")[2]
        name = piece.name
        yield text
    yield end
