"""The workloads: how each is measured, with a relay, a load, and two readings.

Every measurement starts its own relay and its own server, on ports of their own, and
warms the relay up with the same work (but for bulk, which runs little code many
times).  Short connections may be measured several times on one relay: a new process is
slower for a while, the more so the more code it has.  CPU is that of the relay's
process, by the kernel's account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Literal

from attrs import frozen

from bench.children import CannotMeasure, eventually, time_wait
from bench.datagrams import bursts_in_turn, delivered, echo, round_trips
from bench.figures import FLOWS, MEMORY_PAIRS, SIZES
from bench.loads import (
    AT_ONCE,
    Bulk,
    IdlePairs,
    bulk,
    fixed_rate,
    idle_pairs,
    kept_requests,
    short_connections,
)
from bench.origins import Site, sink, site
from bench.relays import Relay, Running, started

#: Short connections for each second that a measurement may take.
SHORT_EACH_SECOND = 2_000

#: Requests on connections used in turn, likewise.
TURNS_EACH_SECOND = 20_000

#: Short connections, and pairs, before a relay is measured.
WARM_UP = 300

#: Sessions before a proxy is measured: by then Dante has started most of its processes
#: for this load, which is not the cost of a session.
PROXY_WARM_UP = 1_000

Readings = dict[str, float]


Measure = Callable[[], Readings]


@frozen
class Workload:
    """A kind of load, and how it is measured.

    :param begin: called with the relay and about how many seconds a load may last;
        yields a function that measures, and returns figures by name.
    :param takes: whether it can be measured with a relay.
    :param programs: the programs that it needs besides the relay.
    :param turns: how often it is measured in a round if there are several turns, as a
        multiple of the plan's turns; 0: once.
    """

    name: str
    begin: Callable[[Relay, float], AbstractContextManager[Measure]]
    takes: Callable[[Relay], bool]
    programs: tuple[str, ...]
    turns: int = 0


def afresh(
    measure: Callable[[Relay, float], Readings],
) -> Callable[[Relay, float], AbstractContextManager[Measure]]:
    """A workload's `begin` for a function that starts a new relay each time."""

    @contextmanager
    def begin(relay: Relay, seconds: float) -> Iterator[Measure]:
        yield partial(measure, relay, seconds)

    return begin


def measure_bulk(streams: int, relay: Relay, seconds: float) -> Readings:
    """CPU per GB, and throughput, of so many iperf3 streams."""
    used, moved = _bulk(streams, relay, seconds)
    return {f"bulk-{streams}": used, f"throughput-{streams}": moved.gigabits}


def measure_socks4_bulk(relay: Relay, seconds: float) -> Readings:
    """CPU per GB of one iperf3 stream, after the handshake if it is a proxy."""
    used, _ = _bulk(1, relay, seconds)
    return {"socks4-bulk": used}


def _bulk(streams: int, relay: Relay, seconds: float) -> tuple[float, Bulk]:
    """Milliseconds per GB, and the transfer."""
    with sink() as destination, started(relay, destination) as running:
        before = running.cpu()
        moved = bulk(
            running.port,
            streams,
            seconds,
            socks4_to=destination if relay.kind == "socks4" else None,
        )
        time.sleep(0.1)
        used = running.cpu() - before
    return used * 1e3 / (moved.bytes / 1e9), moved


def measure_requests(relay: Relay, seconds: float) -> Readings:
    """CPU per request on kept connections."""
    with site() as origin, started(relay, origin.port) as running:
        return {"request": _cpu_per_request(running, origin, AT_ONCE, seconds)}


def _cpu_per_request(
    running: Running, origin: Site, connections: int, seconds: float
) -> float:
    """Microseconds, over a time in which all connections are open and used."""
    begin = origin.counts().requests

    def wait_open(count: int) -> None:
        eventually(
            lambda: origin.counts().open >= count,
            f"{running.relay.title} has {count} connections open",
        )

    with kept_requests(running.port, connections, wait_open):
        eventually(
            lambda: origin.counts().requests - begin >= 2 * connections,
            f"{running.relay.title} relays on {connections} connections",
        )
        time.sleep(0.3)
        requests, used = origin.counts().requests, running.cpu()
        limit = time.monotonic() + seconds
        while True:
            time.sleep(max(0.1, limit - time.monotonic()))
            made = origin.counts().requests - requests
            spent = running.cpu() - used
            # With thousands of connections it may take longer until each was used.
            if made >= 2 * connections:
                return spent * 1e6 / made
            if time.monotonic() > limit + 30:
                raise CannotMeasure(
                    f"{made} requests on {connections} connections: too few to tell"
                )


@contextmanager
def begin_short(
    name: str,
    closed_by: Literal["client", "server"],
    relay: Relay,
    seconds: float,
    *,
    logs: bool = False,
    warm_up: int = WARM_UP,
) -> Iterator[Measure]:
    """CPU per short connection, or per short session of a proxy."""
    with site() as origin, started(relay, origin.port, logs=logs) as running:
        short = _Short(running, origin, closed_by)
        short.make(warm_up)
        yield lambda: {name: short.cpu_each(int(SHORT_EACH_SECOND * seconds))}


@frozen
class _Short:
    """Short connections, in addition to those that the relay has already."""

    running: Running
    origin: Site
    closed_by: Literal["client", "server"]

    def make(self, count: int) -> float:
        """Make them, and wait until the relay has ended them; CPU used until then."""
        running, origin = self.running, self.origin
        before = origin.counts()
        socks4_to = origin.port if running.relay.kind == "socks4" else None
        short_connections(running.port, count, self.closed_by, socks4_to=socks4_to)
        eventually(
            lambda: origin.counts().open <= before.open,
            f"{running.relay.title} ends its connections",
        )
        time.sleep(0.05)
        made = origin.counts().accepted - before.accepted
        if made != count:
            raise CannotMeasure(
                f"{running.relay.title} made {made} connections for {count}"
            )
        return running.cpu()

    def cpu_each(self, count: int) -> float:
        """Microseconds of CPU for each."""
        _leave_time_wait(2 * count)
        used = self.running.cpu()
        return (self.make(count) - used) * 1e6 / count


def _leave_time_wait(count: int) -> None:
    """Wait until the kernel can keep so many more connections in TIME_WAIT.

    Beyond its limit it drops them at once, which costs less than keeping them.
    """
    limit = Path("/proc/sys/net/ipv4/tcp_max_tw_buckets").read_text()
    for _ in range(120):
        if time_wait() + count < int(limit):
            return
        time.sleep(0.5)
    raise CannotMeasure("more connections stay in TIME_WAIT than this machine allows")


def measure_latency(relay: Relay, seconds: float) -> Readings:
    """Latency of a request at a fixed rate, in microseconds."""
    with site() as origin, started(relay, origin.port) as running:
        took = fixed_rate(running.port, seconds)
    percentiles = quantiles(took, n=100)
    return {"latency-p50": percentiles[49], "latency-p99": percentiles[98]}


def measure_memory(relay: Relay, _: float) -> Readings:
    """Kilobytes that an idle pair adds to the relay.

    The first pairs stay open while the others are added: closed ones would leave
    memory that the next ones reuse.
    """
    with site() as origin, started(relay, origin.port) as running:
        with idle_pairs(running.port, WARM_UP) as pairs:
            time.sleep(0.5)
            before = running.memory()

            def each(count: int) -> float:
                pairs.grow(WARM_UP + count)
                time.sleep(0.2)
                return (running.memory() - before) / count / 1e3

            readings = {}
            # Ten pairs take less than a page or two, in which the kernel counts.
            for size in sorted({*SIZES[1:], MEMORY_PAIRS}):
                if size == MEMORY_PAIRS:
                    readings["memory"] = each(size)
                elif relay.grows:
                    readings[f"memory@{size}"] = each(size)
            return readings


def measure_growth_busy(relay: Relay, seconds: float) -> Readings:
    """CPU per request on more and more connections, each with a request pending."""
    with site() as origin, started(relay, origin.port) as running:
        readings = {}
        for size in SIZES:
            used = _cpu_per_request(running, origin, size, seconds)
            readings[f"request@{size}"] = used
            eventually(
                lambda: origin.counts().open == 0, f"{relay.title} ends its connections"
            )
        return readings


#: Seconds after which a connection is idle for every relay: relayd checks each once a
#: second, and asks the kernel about those that have just become idle.
UNTIL_IDLE = 3.5


def measure_growth_open(relay: Relay, seconds: float) -> Readings:
    """CPU per request, and per short connection, when more and more are open."""
    readings = {}
    with site() as origin, started(relay, origin.port) as running:
        with idle_pairs(running.port) as pairs:
            for size in SIZES:
                pairs.grow(size)
                readings[f"turn@{size}"] = _cpu_per_turn(running, pairs, size, seconds)
                time.sleep(UNTIL_IDLE)
                # Half as many: those of four sizes would fill TIME_WAIT.
                short = _Short(running, origin, "server")
                short.make(WARM_UP)
                count = int(SHORT_EACH_SECOND * seconds / 2)
                readings[f"short@{size}"] = short.cpu_each(count)
    return readings


def _cpu_per_turn(
    running: Running, pairs: IdlePairs, size: int, seconds: float
) -> float:
    """Microseconds of CPU per request, with requests on one after the other."""
    count = max(int(TURNS_EACH_SECOND * seconds), 2 * size)
    pairs.take_turns(max(WARM_UP, size))
    used = running.cpu()
    pairs.take_turns(count)
    return (running.cpu() - used) * 1e6 / count


def measure_udp(flows: int, at_once: int, relay: Relay, seconds: float) -> Readings:
    """CPU per round trip of a datagram, with so many of each flow pending."""
    with echo() as destination, started(relay, destination) as running:
        with round_trips(running.port, flows, at_once, seconds) as load:
            return {f"udp-{flows}": _cpu_per_round_trip(running, load)}


def measure_udp_turns(relay: Relay, seconds: float) -> Readings:
    """CPU per round trip when few, and when many, flows send bursts in turn.

    Both on the same relay, since a limit compares them.
    """
    with echo() as destination, started(relay, destination) as running:
        readings = {}
        for flows in FLOWS:
            with bursts_in_turn(running.port, flows, seconds) as load:
                readings[f"udp-turns-{flows}"] = _cpu_per_round_trip(running, load)
        return readings


def _cpu_per_round_trip(running: Running, load: Callable[[], int]) -> float:
    used = running.cpu()
    made = load()
    return (running.cpu() - used) * 1e6 / made


def measure_udp_delivered(relay: Relay, seconds: float) -> Readings:
    """Per cent of datagrams that come back, at a rate that relays can handle."""
    with echo() as destination, started(relay, destination) as running:
        return {"udp-delivered": delivered(running.port, seconds)}


def _relays(relay: Relay) -> bool:
    return relay.kind == "stream"


def _logs(relay: Relay) -> bool:
    return relay.logs and _relays(relay)


def _thousands(relay: Relay) -> bool:
    return not relay.forks and _relays(relay)


def _grows(relay: Relay) -> bool:
    return relay.grows and _relays(relay)


def _proxies(relay: Relay) -> bool:
    return relay.kind == "socks4"


def _proxies_and_ours(relay: Relay) -> bool:
    """The proxies, and relayd's TCP relay, with which its proxy is compared."""
    return _proxies(relay) or relay.name == "relayd-plane"


def _datagrams(relay: Relay) -> bool:
    return relay.kind == "udp"


_WRK, _IPERF3, _H2LOAD = ("nginx", "wrk"), ("iperf3",), ("nginx", "h2load")
_OWN = ("nginx",)

#: Ordered with other work between the short connections, so that those in TIME_WAIT are
#: gone before there are more.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("bulk-1", afresh(partial(measure_bulk, 1)), _relays, _IPERF3, turns=1),
        Workload(
            "short-client",
            partial(begin_short, "short-client", "client"),
            _relays,
            _OWN,
            turns=2,
        ),
        Workload("requests", afresh(measure_requests), _relays, _WRK, turns=1),
        Workload("bulk-8", afresh(partial(measure_bulk, 8)), _relays, _IPERF3),
        Workload(
            "short-server",
            partial(begin_short, "short-server", "server"),
            _relays,
            _OWN,
            turns=2,
        ),
        Workload("latency", afresh(measure_latency), _relays, _H2LOAD),
        Workload(
            "short-client-logged",
            partial(begin_short, "short-client-logged", "client", logs=True),
            _logs,
            _OWN,
        ),
        Workload("growth-busy", afresh(measure_growth_busy), _grows, _WRK),
        Workload(
            "short-server-logged",
            partial(begin_short, "short-server-logged", "server", logs=True),
            _logs,
            _OWN,
        ),
        Workload("memory", afresh(measure_memory), _thousands, _OWN),
        Workload("growth-open", afresh(measure_growth_open), _grows, _OWN, turns=1),
        Workload(
            "socks4-bulk",
            afresh(measure_socks4_bulk),
            _proxies_and_ours,
            ("iperf3", "proxychains4"),
            turns=1,
        ),
        Workload(
            "socks4-short",
            partial(begin_short, "socks4-short", "client", warm_up=PROXY_WARM_UP),
            _proxies,
            _OWN,
            turns=2,
        ),
        *(
            Workload(name, afresh(measure), _datagrams, ("gcc",), turns=1)
            for name, measure in (
                ("udp-1", partial(measure_udp, 1, 32)),
                ("udp-50", partial(measure_udp, 50, 4)),
                ("udp-500", partial(measure_udp, 500, 1)),
                ("udp-5000", partial(measure_udp, 5_000, 1)),
                ("udp-turns", measure_udp_turns),
                ("udp-delivered", measure_udp_delivered),
            )
        ),
    )
}
