"""Measurements of UDP relays: CPU of a round trip, and what is delivered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from attrs import evolve

from bench.children import CannotMeasure, udp_addresses
from bench.datagrams import (
    bursts_in_turn,
    delivered,
    echo,
    new_flows,
    round_trips,
)
from bench.figures import FLOWS
from bench.places import CLIENT, GATEWAY, in_a_row
from bench.relays import Measure, Readings, Relay, Running, started

#: Flows that stay, and the datagrams of each that are pending, between namespaces.
TRANSPARENT_FLOWS = 500, 1

#: New flows for each second that a measurement may take.
NEW_EACH_SECOND = 2_500

#: The settings of a relay that is full when it is measured.
FULL = ("--max-flows", "500", "--max-flows-per-client", "500")


@contextmanager
def begin_udp(
    flows: int, at_once: int, relay: Relay, seconds: float
) -> Iterator[Measure]:
    """CPU per round trip of a datagram, with so many of each flow pending."""
    with echo() as destination, started(relay, destination) as running:
        with round_trips(running.port, flows, at_once, seconds) as load:
            yield lambda: {f"udp-{flows}": _cpu_per_round_trip(running, load)}


@contextmanager
def begin_transparent_udp(relay: Relay, seconds: float) -> Iterator[Measure]:
    """CPU per round trip, and of a flow of one, between namespaces.

    Flows that stay, and new ones, each with a relay of its own.  The second one is
    full: each new flow evicts one, so that its end is counted, too.
    """
    flows = int(NEW_EACH_SECOND * seconds)
    full = evolve(relay, command=lambda setup: [*relay.command(setup), *FULL])
    with ExitStack() as begun:

        def begin(relay: Relay) -> Running:
            places = begun.enter_context(in_a_row())
            destination = begun.enter_context(echo(places.server))
            return begun.enter_context(started(relay, destination, places=places))

        running, other = begin(relay), begin(full)
        stay = begun.enter_context(
            round_trips(running.port, *TRANSPARENT_FLOWS, seconds, running.places)
        )
        expected = CLIENT if relay.kind == "transparent-udp" else GATEWAY
        if expected not in udp_addresses(running.child.pid):
            raise CannotMeasure(f"{relay.title} does not send from {expected}")
        come = begun.enter_context(new_flows(other.port, flows, other.places))
        yield lambda: {
            "transparent-udp": _cpu_per_round_trip(running, stay),
            "transparent-udp-new": _cpu_per_round_trip(other, come),
        }


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
