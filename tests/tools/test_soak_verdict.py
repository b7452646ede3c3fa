"""The rules that a soak is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import pytest

from soak.flows import Tally
from soak.log import DatagramsLine
from soak.relay import MIB, Reading
from soak.verdict import PIPE_BOUND, Datagrams, Outcome, failures, lost_datagrams

QUIET = Reading(sockets=11, pipes=6, other=3, rss=50 * MIB, threads=1, cpu=1.0)


LOAD = attrs.evolve(QUIET, sockets=4011, pipes=60, rss=60 * MIB)


FINE = Outcome(
    start=attrs.evolve(QUIET, rss=48 * MIB),
    baseline=QUIET,
    load=[LOAD] * 9,
    final=QUIET,
    violations=0,
    troubles=0,
    failed=0,
    status=0,
)


def final(**changes: int) -> Outcome:
    return attrs.evolve(FINE, final=attrs.evolve(QUIET, **changes))


def load(sizes: Sequence[float]) -> Outcome:
    return attrs.evolve(
        FINE, load=[attrs.evolve(LOAD, rss=int(size * MIB)) for size in sizes]
    )


@pytest.mark.parametrize(
    "outcome",
    [
        FINE,
        final(rss=57 * MIB),
        final(rss=30 * MIB),
        load([60]),
        load([60, 61.9]),
        # The outliers of a busy moment.
        load([60, 60, 75, 60, 61, 60, 60, 75, 60]),
        # What the first third adds shows in no comparison.
        load([50, 60, 63, 65, 66, 66, 66, 66, 67]),
    ],
)
def test_a_soak_that_passes(outcome: Outcome) -> None:
    assert failures(outcome) == []


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (final(sockets=12), "sockets: 12 at the end, 11 at the start"),
        (final(sockets=10), "sockets: 10 at the end, 11 at the start"),
        (final(pipes=8), "pipes: 8 at the end, 6 at the start"),
        (final(other=4), "other descriptors: 4 at the end, 3 at the start"),
        (final(threads=3), "threads: 3 at the end, 1 at first"),
        (
            final(rss=59 * MIB),
            "rss in quiet: from 50.0 to 59.0 MiB, 8.0 MiB more allowed",
        ),
        (
            load([60, 60, 60, 62, 63, 64, 65, 66, 67]),
            "rss under load: from 63.0 to 66.0 MiB, 2.0 MiB more allowed",
        ),
        (
            attrs.evolve(FINE, load=[attrs.evolve(LOAD, pipes=7 + PIPE_BOUND)]),
            "pipes: 167 under load, 6 at the start and 160 more allowed",
        ),
        (attrs.evolve(FINE, violations=3), "violations: 3"),
        (attrs.evolve(FINE, troubles=2), "errors or tracebacks in the relay's log: 2"),
        (attrs.evolve(FINE, failed=1), "sessions that failed inside the relay: 1"),
        (attrs.evolve(FINE, status=1), "the relay's exit status: 1"),
        (attrs.evolve(FINE, status=-9), "the relay's exit status: -9"),
        (attrs.evolve(FINE, status=None), "the relay still ran 5 s after SIGTERM"),
        (attrs.evolve(FINE, steps=0), "the relay's wall clock was never set"),
    ],
)
def test_a_soak_that_fails(outcome: Outcome, line: str) -> None:
    assert failures(outcome) == [line]


def test_a_leak_in_the_warm_up_is_found() -> None:
    leaked = attrs.evolve(QUIET, sockets=13)
    assert failures(attrs.evolve(FINE, baseline=leaked, final=leaked)) != []


def test_every_failure_is_reported() -> None:
    assert len(failures(attrs.evolve(FINE, violations=1, troubles=1, status=1))) == 3


COUNTED = DatagramsLine(
    "127.0.0.1:53", 100, 100, 90, 90, Counter(), Counter(), 3, "received=100 …"
)


OURS = Tally(
    sent=80, flooded=22, arrived=99, replied=90, received=89, lost=3, dropped=1
)


def lost(line: DatagramsLine = COUNTED, ours: Tally = OURS) -> list[str]:
    return lost_datagrams(Datagrams(ours, [line], 1))


def test_datagrams_that_add_up() -> None:
    assert lost() == []


@pytest.mark.parametrize(
    ("line", "ours", "problem"),
    [
        ({"received": 99}, {}, "of 127.0.0.1:53 don't add up: received=100 …"),
        ({"replies_received": 89}, {}, "of 127.0.0.1:53 don't add up: received=100 …"),
        (
            {"received": 101, "dropped": Counter(no_flow=1)},
            {},
            "of 127.0.0.1:53 were dropped: received=100 …",
        ),
        (
            {"replies_sent": 89, "replies_dropped": Counter(send_X=1)},
            {},
            "of 127.0.0.1:53 were dropped: received=100 …",
        ),
        ({}, {"flooded": 24}, "from clients: 104 sent and 100 received"),
        ({}, {"sent": 77}, "from clients: 99 sent and 100 received"),
        ({}, {"arrived": 98}, "to servers: 100 sent and 98 received"),
        ({}, {"replied": 89}, "from servers: 89 sent and 90 received"),
        ({}, {"received": 91}, "to clients: 90 sent and 91 received"),
        ({}, {"strays": 2}, "2 answers met a new flow of the same port, 1 allowed"),
        ({}, {"lost": 5}, "5 lost; the kernel dropped 3 before the relay, 1 behind it"),
    ],
)
def test_datagrams_that_do_not_add_up(
    line: dict[str, object], ours: dict[str, int], problem: str
) -> None:
    counted = attrs.evolve(COUNTED, **line)  # type: ignore[arg-type]
    said = lost(counted, attrs.evolve(OURS, **ours))
    assert any(problem in each for each in said)


def test_each_listener_must_have_logged_its_counters() -> None:
    [said] = lost_datagrams(Datagrams(OURS, [COUNTED], 2))
    assert said.startswith("datagrams: 1 lines of counters in the relay's log, of 2")
