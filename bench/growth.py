"""Measurements of stream relays with more and more connections.

What a limit compares, a relay with few connections and one with many, stands side by
side and is measured in windows that alternate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from attrs import frozen

from bench.children import eventually
from bench.connections import IdlePairs, idle_pairs
from bench.figures import SIZES
from bench.origins import Site, site
from bench.relays import Measure, Readings, Relay, Running, started
from bench.streams import SHORT_EACH_SECOND, WARM_UP, Short, cpu_per_request, kept

#: Requests on connections used in turn, for each second that a measurement may take.
TURNS_EACH_SECOND = 20_000

#: Seconds after which a connection is idle for every relay: relayd checks each once a
#: second, and asks the kernel about those that have just become idle.
UNTIL_IDLE = 3.5


@frozen
class _Grown:
    """A relay with so many kept connections."""

    size: int
    running: Running
    origin: Site
    pairs: IdlePairs

    def cpu_per_turn(self, count: int) -> float:
        """Microseconds of CPU per request, one connection after the other."""
        used = self.running.cpu()
        self.pairs.take_turns(count)
        return (self.running.cpu() - used) * 1e6 / count


@contextmanager
def _every_size(relay: Relay) -> Iterator[list[_Grown]]:
    """A relay for each size."""
    with ExitStack() as begun:
        grown = []
        for size in SIZES:
            origin = begun.enter_context(site())
            running = begun.enter_context(started(relay, origin.port))
            pairs = begun.enter_context(idle_pairs(running.port, size))
            grown.append(_Grown(size, running, origin, pairs))
        yield grown


@contextmanager
def begin_growth_turn(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per request, when connections are used in turn."""
    with _every_size(relay) as grown:
        for one in grown:
            one.pairs.take_turns(max(WARM_UP, one.size))
        # Each connection has its turn.
        count = max(int(TURNS_EACH_SECOND * seconds), SIZES[-1])
        yield lambda: {f"turn@{one.size}": one.cpu_per_turn(count) for one in grown}


@contextmanager
def begin_growth_short(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per short connection, while others are open and idle."""
    with _every_size(relay) as grown:
        time.sleep(UNTIL_IDLE)
        short = {one.size: Short(one.running, one.origin, "server") for one in grown}
        for load in short.values():
            load.make(WARM_UP)
        count = int(SHORT_EACH_SECOND * seconds)
        yield lambda: {
            f"short@{size}": load.cpu_each(count) for size, load in short.items()
        }


def measure_growth_busy(relay: Relay, seconds: float) -> Readings:
    """CPU per request on more and more connections, each with a request pending."""
    with site() as origin, started(relay, origin.port) as running:
        readings = {}
        for size in SIZES:
            with kept(running, origin, size) as requests:
                used = cpu_per_request(running, origin, requests, size, seconds)
            readings[f"request@{size}"] = used
            eventually(
                lambda: origin.counts().open == 0, f"{relay.title} ends its connections"
            )
        return readings
