"""The outcome of a soak, and the rules that it must meet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import attrs

from soak.flows import Tally
from soak.log import DatagramsLine
from soak.relay import MIB, STOPPING, Reading

#: Limit of the relay's descriptors of pipes for splicing: the plane's pipes in use, and
#: those kept for the next session (PIPES_IN_USE and PIPES_KEPT), two each.
PIPE_BOUND = 2 * (64 + 16)


@attrs.frozen
class Datagrams:
    """The counters of datagrams.

    :ivar ours: of clients, servers and floods.
    :ivar relays: from the relay's log, at the end of each of its listeners.
    :ivar listeners: how many it had.
    """

    ours: Tally
    relays: Sequence[DatagramsLine]
    listeners: int


@attrs.frozen
class Outcome:
    """The outcome of one soak.

    :ivar start: before the first session.
    :ivar baseline: without sessions, after the warm-up.
    :ivar load: every INTERVAL under load, after the warm-up; at least one.
    :ivar final: without sessions, at the end.
    :ivar violations: sessions and flows that broke a rule.
    :ivar troubles: errors and tracebacks in the relay's log.
    :ivar failed: sessions with `ending=failed` in the relay's log.
    :ivar status: the relay's exit status; None if it had to be killed.
    :ivar datagrams: None if there were none.
    :ivar steps: how often the relay's wall clock was set; None if --step is 0.
    """

    start: Reading
    baseline: Reading
    load: Sequence[Reading]
    final: Reading
    violations: int
    troubles: int
    failed: int
    status: int | None
    datagrams: Datagrams | None = None
    steps: int | None = None


def failures(outcome: Outcome) -> list[str]:
    """The conditions that do not hold, a line each.

    Without sessions, there must be as many descriptors of each kind at the end as
    before the first session, so that a leak in the warm-up is not hidden in the
    baseline; and one thread more at most.  Under load there may be pipes, up to a
    limit.

    Memory without sessions may be a tenth, or 8 MiB, above the baseline: how much freed
    memory an allocator returns is chance.  A leak of a few bytes a session stays below
    that for a long time, so medians under load are compared as well, which differ less:
    from the second third of the time to the last, a quarter as much may be added.
    """
    start, final = outcome.start, outcome.final
    found = [
        f"{kind}: {after} at the end, {before} at the start"
        for kind, before, after in (
            ("sockets", start.sockets, final.sockets),
            ("pipes", start.pipes, final.pipes),
            ("other descriptors", start.other, final.other),
        )
        if before != after
    ]
    # One comes soon after the start (relayd/operating/huge_pages.py), and stays.
    if not start.threads <= final.threads <= start.threads + 1:
        found.append(f"threads: {final.threads} at the end, {start.threads} at first")
    most_pipes = max(reading.pipes for reading in outcome.load)
    if most_pipes > start.pipes + PIPE_BOUND:
        found.append(
            f"pipes: {most_pipes} under load, {start.pipes} at the start and"
            f" {PIPE_BOUND} more allowed"
        )
    third = math.ceil(len(outcome.load) / 3)
    late = outcome.load[-third:]
    # Not the first third: each of its busiest moments, when the relay was stopped and
    # thousands of events wait, is the busiest so far.
    early = outcome.load[-2 * third : -third] or late
    settled, last = (
        statistics.median(reading.rss for reading in part) for part in (early, late)
    )
    for when, before, after, fraction, least in (
        ("in quiet", outcome.baseline.rss, final.rss, 0.10, 8 * MIB),
        ("under load", settled, last, 0.025, 2 * MIB),
    ):
        allowed = max(fraction * before, least)
        if after - before > allowed:
            found.append(
                f"rss {when}: from {before / MIB:.1f} to {after / MIB:.1f} MiB,"
                f" {allowed / MIB:.1f} MiB more allowed"
            )
    for count, what in (
        (outcome.violations, "violations"),
        (outcome.troubles, "errors or tracebacks in the relay's log"),
        (outcome.failed, "sessions that failed inside the relay"),
    ):
        if count:
            found.append(f"{what}: {count}")
    if outcome.steps == 0:
        found.append("the relay's wall clock was never set")
    if outcome.datagrams is not None:
        found += lost_datagrams(outcome.datagrams)
    if outcome.status is None:
        found.append(f"the relay still ran {STOPPING:g} s after SIGTERM")
    elif outcome.status != 0:
        found.append(f"the relay's exit status: {outcome.status}")
    return found


def lost_datagrams(datagrams: Datagrams) -> list[str]:
    """Datagrams that are in no counter, a line each.

    The relay itself must drop none here, as there are never more flows in use than its
    table holds.  The kernel may, if a process is late, but it counts them: what was
    sent and not received must be in a counter.  Except that an answer may reach a port
    that is closed by then, the relay's or the client's.
    """
    ours, relays = datagrams.ours, datagrams.relays
    if len(relays) != datagrams.listeners:
        problem = (
            f"datagrams: {len(relays)} lines of counters in the relay's log, of"
            f" {datagrams.listeners} listeners"
        )
        return [problem]
    found = [problem for line in relays for problem in _unbalanced(line)]
    kernel = sum(line.kernel_dropped for line in relays)
    for where, sent, came, may_be_lost in (
        (
            "from clients",
            ours.sent + ours.flooded,
            sum(line.received for line in relays),
            kernel,
        ),
        (
            "to servers",
            sum(line.sent for line in relays),
            ours.arrived,
            ours.dropped,
        ),
        (
            "from servers",
            ours.replied,
            sum(line.replies_received for line in relays),
            math.inf,
        ),
        (
            "to clients",
            sum(line.replies_sent for line in relays),
            ours.received,
            math.inf,
        ),
    ):
        if not 0 <= sent - came <= may_be_lost:
            found.append(
                f"datagrams {where}: {sent} sent and {came} received; the kernel"
                f" dropped {kernel} before the relay, {ours.dropped} behind it"
            )
    relay = sum(line.dropped.total() + line.replies_dropped.total() for line in relays)
    # The kernel gives a new flow one of 28,000 ports at random.
    allowed = 1 + (ours.sent + ours.flooded) // 1000
    if ours.strays > allowed:
        found.append(
            f"datagrams: {ours.strays} answers met a new flow of the same port,"
            f" {allowed} allowed"
        )
    if ours.lost > kernel + ours.dropped + relay:
        found.append(
            f"datagrams: {ours.lost} lost; the kernel dropped {kernel} before the"
            f" relay, {ours.dropped} behind it, and the relay {relay}"
        )
    return found


def _unbalanced(line: DatagramsLine) -> Iterator[str]:
    """Errors in the relay's own counters."""
    for received, sent, dropped in (
        (line.received, line.sent, line.dropped),
        (line.replies_received, line.replies_sent, line.replies_dropped),
    ):
        if received != sent + dropped.total():
            yield f"datagrams of {line.listener} don't add up: {line.counters}"
        if dropped:
            yield f"datagrams of {line.listener} were dropped: {line.counters}"
