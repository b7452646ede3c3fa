"""The plan of a run, and the rounds, in which the relays take turns.

A shared machine may be half as fast from one second to the next.  At most workloads,
all relays are therefore started at once in a round, and then take turns in short
windows, each of which counts as a round: relays that are compared are measured a
fraction of a second apart, and the median is of many.  The next round starts them
again, since one process may be a little faster than another of the same program.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from attrs import evolve, frozen

from bench import datagrams
from bench.children import CannotMeasure, allow_descriptors, program
from bench.figures import MANY, Results, figure_named
from bench.limits import needed_for_limits
from bench.own_relays import Setup
from bench.pythons import VARIABLE
from bench.relays import RELAYS, Readings
from bench.report import lines_of
from bench.workloads import WORKLOADS

#: Open files of one process: two for each pair, and HAProxy's spare ones and pipes.
DESCRIPTORS = 2 * MANY + 2_000


#: The shortest window, in seconds.
WINDOW = 0.4


@frozen
class Mode:
    """A mode of the command line."""

    rounds: int
    seconds: float
    #: The (workload, relay) pairs to measure.
    pairs: Collection[tuple[str, str]]
    #: How often a relay is measured in a round, at workloads with windows.
    windows: int = 1


_QUICK_WORKS = (
    "bulk-1",
    "bulk-8",
    "requests",
    "short-client",
    "short-server",
    "short-client-quiet",
    "short-server-quiet",
    "latency",
    "memory",
    "socks4-bulk",
    "socks4-short",
    "socks4-short-quiet",
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
    ("growth-turn", "relayd-plane"),
    ("growth-short", "relayd-plane"),
]

MODES = {
    "full": Mode(3, 2.0, _ALL, windows=5),
    "quick": Mode(1, 1.0, _QUICK),
    "check": Mode(3, 2.0, needed_for_limits(), windows=7),
}


@frozen
class Plan:
    """What to measure."""

    rounds: int
    #: About how long each load lasts.
    seconds: float
    #: Relays by the name of the workload, in the order of a round.
    workloads: dict[str, list[str]]
    windows: int = 1

    @property
    def window(self) -> float:
        """About how long a window lasts, in seconds."""
        return max(self.seconds / self.windows, WINDOW)

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
        return cls(
            rounds or mode.rounds, seconds or mode.seconds, planned, mode.windows
        )

    def without(self, relays: Collection[str], workloads: Collection[str] = ()) -> Plan:
        """The plan without some of the relays, and of the workloads.

        :raises CannotMeasure: nothing is left to measure.
        """
        left = {
            workload: [relay for relay in planned if relay not in relays]
            for workload, planned in self.workloads.items()
            if workload not in workloads
        }
        left = {workload: planned for workload, planned in left.items() if planned}
        if not left:
            raise CannotMeasure("nothing is left to measure")
        return evolve(self, workloads=left)

    @property
    def titles(self) -> dict[str, str]:
        """The titles of its relays, by their names."""
        chosen = {relay for relays in self.workloads.values() for relay in relays}
        return {name: relay.title for name, relay in RELAYS.items() if name in chosen}


def lacking_workloads(plan: Plan, asked: Collection[str] = ()) -> dict[str, str]:
    """Workloads that can't be measured on this machine, or by this user, and why.

    :param asked: workloads that were asked for by name, so that it is an error.
    :raises CannotMeasure: one of these can't.
    """
    lacking: dict[str, str] = {}
    for workload in plan.workloads:
        why = WORKLOADS[workload].lacking()
        if why is None:
            continue
        if workload in asked:
            raise CannotMeasure(f"{workload} can't be measured: {why}")
        lacking[workload] = why
    return lacking


def check_requirements(plan: Plan, asked: Collection[str] = ()) -> dict[str, str]:
    """Check that nothing is missing, before the first measurement.

    :param asked: relays that were asked for by name, so that their lack is an error.
    :returns: optional relays that can't be measured, and why.
    :raises CannotMeasure: a program is missing, or the limit of open files too low.
    """
    allow_descriptors(DESCRIPTORS)
    lacking: dict[str, str] = {}
    for workload in plan.workloads:
        for name in WORKLOADS[workload].programs:
            program(name)
    if any(RELAYS[relay].datagrams for relay in plan.titles):
        datagrams.built()
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as folder:
        for relay in plan.titles:
            try:
                RELAYS[relay].command(Setup(Path(folder), 0, 0))
            except CannotMeasure as error:
                wanted = relay in asked or VARIABLE in os.environ
                if wanted or not RELAYS[relay].optional:
                    raise
                lacking[relay] = str(error)
    return lacking


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
            for relay, taken in _round(plan, workload, relays, number).items():
                for readings in taken:
                    results.add(relay, readings)
                done += 1
                names = dict.fromkeys(name for each in taken for name in each)
                shown = ", ".join(
                    f"{name} "
                    + figure_named(name).show(
                        median(r[name] for r in taken if name in r)
                    )
                    for name in names
                )
                seconds = time.monotonic() - begin
                print(
                    f"{seconds:5.0f} s  {done}/{every}  {RELAYS[relay].title}: {shown}",
                    file=sys.stderr,
                )
            if number == plan.rounds - 1:
                titles = {relay: plan.titles[relay] for relay in relays}
                print("\n".join(lines_of(names, results, titles)), flush=True)
    return results


def _round(
    plan: Plan, workload: str, relays: list[str], number: int
) -> dict[str, list[Readings]]:
    """One round of one workload: the readings of each relay, of each of its windows."""
    kind = WORKLOADS[workload]
    windows, seconds = 1, plan.seconds
    if kind.windows:
        windows, seconds = plan.windows * kind.times, plan.window
    taken: dict[str, list[Readings]] = {relay: [] for relay in relays}
    for together in [[relay] for relay in relays] if kind.alone else [relays]:
        with ExitStack() as begun:
            measures = {
                relay: begun.enter_context(kind.begin(RELAYS[relay], seconds))
                for relay in together
            }
            for window in range(number, number + windows):
                # So that no relay is always the first.
                first = window % len(together)
                for relay in together[first:] + together[:first]:
                    taken[relay].append(measures[relay]())
    return taken
