"""The plan of a run, and the rounds, in which the relays take turns.

A shared machine may be half as fast from one second to the next.  At workloads that
have a limit, each relay is therefore measured in several short turns in each round,
each of which counts as a round: relays that are compared are measured seconds apart,
and the median is of many.  Mode check has the most turns, quick has one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from attrs import frozen

from bench import datagrams
from bench.children import CannotMeasure, allow_descriptors, program
from bench.figures import MANY, Results, figure_named, needed_for_limits
from bench.relays import RELAYS, Setup
from bench.report import lines_of
from bench.workloads import WORKLOADS, Readings

#: Open files of one process: two for each pair, and HAProxy's spare ones and pipes.
DESCRIPTORS = 2 * MANY + 2_000


#: The shortest of several turns, in seconds.
TURN = 0.4


@frozen
class Mode:
    """A mode of the command line."""

    rounds: int
    seconds: float
    #: The (workload, relay) pairs to measure.
    pairs: Collection[tuple[str, str]]
    #: How often a relay is measured in a round, at workloads with several turns.
    turns: int = 1


_QUICK_WORKS = (
    "bulk-1",
    "bulk-8",
    "requests",
    "short-client",
    "short-server",
    "latency",
    "memory",
    "socks4-bulk",
    "socks4-short",
    "udp-50",
    "udp-turns",
    "udp-delivered",
)
_QUICK_RELAYS = (
    "relayd-plane",
    "haproxy-splice",
    "portforward",
    "relayd-socks4",
    "dante",
    "twistd-socks",
    "relayd-udp",
    "nginx-udp",
    "twisted-udp",
)

_ALL = [(workload, relay) for workload in WORKLOADS for relay in RELAYS]
_QUICK = [
    *((w, p) for w, p in _ALL if w in _QUICK_WORKS and p in _QUICK_RELAYS),
    ("growth-busy", "relayd-plane"),
    ("growth-open", "relayd-plane"),
]

MODES = {
    "full": Mode(3, 2.0, _ALL, turns=2),
    "quick": Mode(1, 1.0, _QUICK),
    "check": Mode(3, 2.0, needed_for_limits(), turns=7),
}


@frozen
class Plan:
    """What to measure."""

    rounds: int
    #: About how long each load lasts.
    seconds: float
    #: Relays by the name of the workload, in the order of a round.
    workloads: dict[str, list[str]]
    turns: int = 1

    @classmethod
    def of(
        cls,
        mode: Mode,
        workloads: Iterable[str] = (),
        relays: Iterable[str] = (),
        *,
        rounds: int | None = None,
        seconds: float | None = None,
    ) -> Plan:
        """The plan of a mode, for these workloads and relays only; empty: all.

        :raises CannotMeasure: nothing is left to measure.
        """
        planned = {
            workload.name: [
                relay.name
                for relay in RELAYS.values()
                if (workload.name, relay.name) in mode.pairs
                and relay.name in (relays or RELAYS)
                and workload.takes(relay)
            ]
            for workload in WORKLOADS.values()
            if workload.name in (workloads or WORKLOADS)
        }
        planned = {workload: names for workload, names in planned.items() if names}
        if not planned:
            raise CannotMeasure(
                "none of these relays is measured at any of these workloads"
            )
        return cls(rounds or mode.rounds, seconds or mode.seconds, planned, mode.turns)

    @property
    def titles(self) -> dict[str, str]:
        """The titles of its relays, by their names."""
        chosen = {relay for relays in self.workloads.values() for relay in relays}
        return {name: relay.title for name, relay in RELAYS.items() if name in chosen}


def check_requirements(plan: Plan) -> None:
    """Check that nothing is missing, before the first measurement.

    :raises CannotMeasure: a program is missing, or the limit of open files too low.
    """
    allow_descriptors(DESCRIPTORS)
    for workload in plan.workloads:
        for name in WORKLOADS[workload].programs:
            program(name)
    if any(RELAYS[relay].kind == "udp" for relay in plan.titles):
        datagrams.built()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        for relay in plan.titles:
            RELAYS[relay].command(Setup(Path(folder), 0, 0, logs=False))


def measure(plan: Plan) -> Results:
    """Run all rounds; returns the results.

    Progress goes to standard error; a workload's figures go to standard output after
    its last round.

    :raises CannotMeasure: a measurement failed.
    """
    results = Results()
    begin = time.monotonic()
    done, every = 0, plan.rounds * sum(map(len, plan.workloads.values()))
    for number in range(plan.rounds):
        for workload, relays in plan.workloads.items():
            for relay, turns in _round(plan, workload, relays, number).items():
                for readings in turns:
                    results.add(relay, readings)
                done += 1
                shown = ", ".join(
                    f"{name} {figure_named(name).show(median(r[name] for r in turns))}"
                    for name in turns[0]
                )
                seconds = time.monotonic() - begin
                print(
                    f"{seconds:5.0f} s  {done}/{every}  {RELAYS[relay].title}: {shown}",
                    file=sys.stderr,
                )
            if number == plan.rounds - 1:
                titles = {relay: plan.titles[relay] for relay in relays}
                print("\n".join(lines_of(readings, results, titles)), flush=True)
    return results


def _round(
    plan: Plan, workload: str, relays: list[str], number: int
) -> dict[str, list[Readings]]:
    """One round of one workload: the readings of each relay, of each of its turns."""
    turns = 1 if plan.turns == 1 else max(1, plan.turns * WORKLOADS[workload].turns)
    seconds = max(plan.seconds / turns, TURN)
    taken: dict[str, list[Readings]] = {relay: [] for relay in relays}
    with ExitStack() as begun:
        measures = {
            relay: begun.enter_context(
                WORKLOADS[workload].begin(RELAYS[relay], seconds)
            )
            for relay in relays
        }
        for turn in range(number, number + turns):
            # So that no relay is always the first.
            first = turn % len(relays)
            for relay in relays[first:] + relays[:first]:
                taken[relay].append(measures[relay]())
    return taken
