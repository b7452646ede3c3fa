"""Measurements of stream relays with more and more connections.

What a limit compares, a relay with few connections and one with many, stands side by
side and is measured in windows that alternate.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from attrs import frozen

from bench.children import eventually
from bench.connections import IdlePairs, idle_pairs
from bench.figures import FEW, MANY, SIZES
from bench.origins import Site, site
from bench.relays import Measure, Readings, Relay, Running, started
from bench.streams import SHORT_EACH_SECOND, WARM_UP, Short, cpu_per_request, kept

#: Requests on connections used in turn, for each second that a measurement may take:
#: each of the most connections has two turns in a window.
TURNS_EACH_SECOND = 40_000

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
        # Each connection has a turn before it counts: it has been quiet for a while.
        self.pairs.take_turns(self.size)
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


def _by_size(name: str, measures: Mapping[int, Callable[[], float]]) -> Measure:
    """Measures every size once, and what the limits compare each time."""
    sizes = itertools.chain([list(measures)], itertools.repeat([FEW, MANY]))
    return lambda: {f"{name}@{size}": measures[size]() for size in next(sizes)}


@contextmanager
def begin_growth_turn(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per request, when connections are used in turn."""
    count = max(int(TURNS_EACH_SECOND * seconds), SIZES[-1])
    with _every_size(relay) as grown:
        for one in grown:
            one.pairs.take_turns(WARM_UP)
        measures = {one.size: partial(one.cpu_per_turn, count) for one in grown}
        yield _by_size("turn", measures)


@contextmanager
def begin_growth_short(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per short connection, while others are open and idle."""
    count = int(SHORT_EACH_SECOND * seconds)
    with _every_size(relay) as grown:
        time.sleep(UNTIL_IDLE)
        measures = {}
        for one in grown:
            short = Short(one.running, one.origin, "server")
            short.make(WARM_UP)
            measures[one.size] = partial(short.cpu_each, count)
        yield _by_size("short", measures)


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
