"""Measurements of stream relays and proxies: bulk, requests, short sessions, latency,
memory."""

from __future__ import annotations

import platform
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Literal

from attrs import frozen

from bench.children import PATIENCE, CannotMeasure, eventually, time_wait
from bench.connections import CLIENTS, client_hosts, idle_pairs, short_connections
from bench.figures import MEMORY_PAIRS, SIZES
from bench.loads import AT_ONCE, KeptRequests, bulk, fixed_rate, kept_requests
from bench.origins import Site, sink, site
from bench.places import CLIENT, GATEWAY, in_a_row
from bench.relays import Measure, Readings, Relay, Running, started
from bench.tls_sessions import tls_sessions

#: Bytes that iperf3 sends for each second that a load may last, by streams.  One stream
#: has more: what HAProxy's costs depends on how the scheduler places the processes, and
#: is half as much again from one window to the next.
BULK_EACH_SECOND = {1: 3_000_000_000, 8: 1_500_000_000}

#: Short connections for each second that a measurement may take.
SHORT_EACH_SECOND = 1_250

#: Short connections, and pairs, before a relay is measured.
WARM_UP = 300

#: Sessions before a proxy is measured: by then Dante has started most of its processes
#: for this load, which is not the cost of a session.
PROXY_WARM_UP = 1_000

#: Short connections at the beginning of each window that do not count: meanwhile the
#: processor's caches had another relay's code and data.
RUN_UP = 100

#: Clients in each window, where each is another: all of them in five.
CLIENTS_EACH_WINDOW = 2_000

#: Connections to one server that have ended within a minute (TIME_WAIT): more than half
#: of the ports that there are for it; and how many follow in each window.
ENDED, ENDED_EACH_WINDOW = 15_000, 200

#: ip-sysctl.rst: 1: a port whose connection has ended is taken again after a second.
_REUSE = Path("/proc/sys/net/ipv4/tcp_tw_reuse")

#: Seconds after requests have begun, or stopped, until they are counted.
SETTLED = 0.05


@contextmanager
def begin_bulk(
    streams: int, relay: Relay, seconds: float, *, name: str | None = None
) -> Iterator[Measure]:
    """CPU per GB, and throughput, of so many iperf3 streams.

    :param name: of the figure of the CPU, if there is to be no other.
    """
    size = int(BULK_EACH_SECOND[streams] * seconds)
    with sink() as destination, started(relay, destination) as running:
        socks4_to = destination if relay.kind == "socks4" else None

        def measure() -> Readings:
            before = running.cpu()
            moved = bulk(running.port, streams, size, socks4_to=socks4_to)
            time.sleep(0.1)
            used = (running.cpu() - before) * 1e3 / (moved.bytes / 1e9)
            if name is not None:
                return {name: used}
            return {f"bulk-{streams}": used, f"throughput-{streams}": moved.gigabits}

        bulk(running.port, streams, size // 4, socks4_to=socks4_to)
        time.sleep(0.1)
        yield measure


@contextmanager
def begin_requests(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per request on kept connections."""
    with site() as origin, started(relay, origin.port) as running:
        with kept(running, origin, AT_ONCE) as requests:
            yield lambda: {
                "request": cpu_per_request(running, origin, requests, AT_ONCE, seconds)
            }


@contextmanager
def kept(running: Running, origin: Site, connections: int) -> Iterator[KeptRequests]:
    """Connections through a relay, all of which have had a request."""
    begin = origin.counts().requests
    title = running.relay.title

    def wait_open(count: int) -> None:
        eventually(
            lambda: origin.counts().open >= count,
            f"{title} has {count} connections open",
        )

    with kept_requests(running.port, connections, wait_open) as requests:
        with requests.under_way():
            eventually(
                lambda: origin.counts().requests - begin >= 2 * connections,
                f"{title} relays on {connections} connections",
            )
            time.sleep(0.3)
        yield requests


def cpu_per_request(
    running: Running,
    origin: Site,
    requests: KeptRequests,
    connections: int,
    seconds: float,
) -> float:
    """Microseconds, over a time in which all connections are used."""
    with requests.under_way():
        time.sleep(SETTLED)
        counted, used = origin.counts().requests, running.cpu()
        limit = time.monotonic() + seconds
        while True:
            time.sleep(max(0.1, limit - time.monotonic()))
            made = origin.counts().requests - counted
            spent = running.cpu() - used
            # With thousands of connections it may take longer until each was used.
            if made >= 2 * connections:
                break
            if time.monotonic() > limit + 30:
                raise CannotMeasure(
                    f"{made} requests on {connections} connections: too few to tell"
                )
    # What is under way is answered before another relay is measured.
    time.sleep(SETTLED)
    return spent * 1e6 / made


@contextmanager
def begin_short(
    name: str,
    closed_by: Literal["client", "server"],
    relay: Relay,
    seconds: float,
    *,
    quiet: bool = False,
    warm_up: int = WARM_UP,
) -> Iterator[Measure]:
    """CPU per short connection, or per short session of a proxy."""
    with site() as origin, started(relay, origin.port, quiet=quiet) as running:
        short = Short(running, origin, closed_by)
        short.make(warm_up)
        yield lambda: {name: short.cpu_each(int(SHORT_EACH_SECOND * seconds))}


@contextmanager
def begin_transparent(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per short connection between namespaces, which the client closes."""
    with (
        in_a_row() as places,
        site(place=places.server) as origin,
        started(relay, origin.port, quiet=True, places=places) as running,
    ):
        expected = CLIENT if relay.kind == "transparent" else GATEWAY
        if (seen := _client_seen(running)) != expected:
            raise CannotMeasure(f"{relay.title} dials from {seen}, not {expected}")
        short = Short(running, origin, "client")
        short.make(WARM_UP)
        yield lambda: {"transparent": short.cpu_each(int(SHORT_EACH_SECOND * seconds))}


def leaves_odd_ports() -> str | None:
    """Why connect(2) tries even ports first whatever it is asked; None: it does not."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    if found and (int(found[1]), int(found[2])) >= (6, 8):
        return None
    return "it takes Linux 6.8 to have connect(2) take odd ports first"


@contextmanager
def begin_ended(relay: Relay, _: float) -> Iterator[Measure]:
    """CPU per short connection, when very many to the server have ended before.

    The client's own ones end as many, but it takes their ports again after a second.
    """
    with (
        in_a_row() as places,
        site(place=places.server) as origin,
        started(relay, origin.port, quiet=True, places=places) as running,
    ):
        with places.client.inside():
            _REUSE.write_text("1\n")
        short = Short(running, origin, "client")
        short.make(WARM_UP)

        def kept() -> int:
            with places.relay.inside():
                return time_wait()

        def measure() -> Readings:
            if (missing := ENDED - kept()) > 0:
                short.make(missing)
            if kept() < ENDED * 0.9:
                raise CannotMeasure(
                    f"only {kept()} connections stay in TIME_WAIT: raise"
                    " net.ipv4.tcp_max_tw_buckets"
                )
            return {"ended": short.cpu_each(ENDED_EACH_WINDOW)}

        yield measure


def _client_seen(running: Running) -> str:
    """The address that a server sees as its client's."""
    with running.places.client.inside():
        address = running.places.relay.host, running.port
        connection = socket.create_connection(address, PATIENCE)
    with connection:
        connection.sendall(b"GET /client HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(partial(connection.recv, 65536), b""))
    return answer.rpartition(b"\r\n\r\n")[2].decode()


@contextmanager
def begin_tls(name: str, relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per short TLS session, which the client closes."""
    with (
        site(tls=True) as origin,
        started(relay, origin.tls_port, quiet=True) as running,
    ):
        short = Short(running, origin, "client", tls=True)
        short.make(WARM_UP)
        yield lambda: {name: short.cpu_each(int(SHORT_EACH_SECOND * seconds))}


@frozen
class Short:
    """Short connections, in addition to those that the relay has already.

    :param tls: they are TLS sessions with the server.
    """

    running: Running
    origin: Site
    closed_by: Literal["client", "server"]
    tls: bool = False

    def make(self, count: int, hosts: Iterator[str] | None = None) -> float:
        """Make them, and wait until the relay has ended them; CPU used until then.

        :param hosts: the clients' addresses, one for each.
        """
        running, origin = self.running, self.origin
        before = origin.counts()
        socks4_to = origin.port if running.relay.kind == "socks4" else None
        if self.tls:
            tls_sessions(running.port, count, origin.certificate)
        else:
            with running.places.client.inside():
                short_connections(
                    *(running.port, count, self.closed_by),
                    to=running.places.relay.host,
                    socks4_to=socks4_to,
                    hosts=hosts,
                )
        eventually(
            lambda: origin.counts().open <= before.open,
            f"{running.relay.title} ends its connections",
        )
        time.sleep(0.05)
        made = origin.counts().accepted - before.accepted
        if not 0 <= made - count <= running.relay.checks:
            raise CannotMeasure(
                f"{running.relay.title} made {made} connections for {count}"
            )
        return running.cpu()

    def cpu_each(self, count: int) -> float:
        """Microseconds of CPU for each."""
        with self.running.places.client.inside():
            _leave_time_wait(2 * (RUN_UP + count))
        used = self.make(RUN_UP)
        return (self.make(count) - used) * 1e6 / count


@contextmanager
def begin_clients(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per short connection, where each client is another one: of all of them.

    There is one figure, when all have had their sessions, over some windows.
    """
    with site() as origin, started(relay, origin.port, quiet=True) as running:
        short = Short(running, origin, "server")
        short.make(WARM_UP)
        hosts = client_hosts()
        used, made = 0.0, 0

        def measure() -> Readings:
            nonlocal used, made
            if made == CLIENTS:
                return {}
            _leave_time_wait(2 * CLIENTS_EACH_WINDOW)
            before = running.cpu()
            used += short.make(CLIENTS_EACH_WINDOW, hosts) - before
            made += CLIENTS_EACH_WINDOW
            return {"short-clients": used * 1e6 / made} if made == CLIENTS else {}

        yield measure


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
