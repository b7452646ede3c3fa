"""Measurements of UDP relays: CPU of a round trip, and what is delivered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from bench.datagrams import bursts_in_turn, delivered, echo, round_trips
from bench.figures import FLOWS
from bench.relays import Measure, Readings, Relay, Running, started


@contextmanager
def begin_udp(
    flows: int, at_once: int, relay: Relay, seconds: float
) -> Iterator[Measure]:
    """CPU per round trip of a datagram, with so many of each flow pending."""
    with echo() as destination, started(relay, destination) as running:
        with round_trips(running.port, flows, at_once, seconds) as load:
            yield lambda: {f"udp-{flows}": _cpu_per_round_trip(running, load)}


@contextmanager
def begin_udp_turns(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per round trip when few, and when many, flows send bursts in turn.

    Each on a relay of its own, in windows side by side, since a limit compares them.
    """
    with ExitStack() as begun:
        loads = {}
        for flows in FLOWS:
            running = begun.enter_context(started(relay, begun.enter_context(echo())))
            load = begun.enter_context(bursts_in_turn(running.port, flows, seconds))
            loads[f"udp-turns-{flows}"] = running, load
        yield lambda: {name: _cpu_per_round_trip(*load) for name, load in loads.items()}


def _cpu_per_round_trip(running: Running, load: Callable[[], int]) -> float:
    """Microseconds."""
    used = running.cpu()
    made = load()
    return (running.cpu() - used) * 1e6 / made


def measure_delivered(relay: Relay, seconds: float) -> Readings:
    """Per cent of datagrams that come back, at a rate that relays can handle."""
    with echo() as destination, started(relay, destination) as running:
        return {"udp-delivered": delivered(running.port, seconds)}
