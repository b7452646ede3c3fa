"""What is bounded in a running relay, where it stands, and how often it was reached.

Each row has `what` (the setting's name, where a setting says how much), the relay (None
for those of the process), the limit (None: there is none), how many there are `now`,
and `hits`: how often one more was refused, had to wait, or took another one's place.
Of limits of one client, `now` is that of the client who has most.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import attrs

from relayd.admission.bandwidth import MAX_CLIENTS as MAX_AWAY
from relayd.admission.bandwidth import Bandwidth
from relayd.admission.connect_rates import MAX_CLIENTS, ConnectRates
from relayd.admission.gates import parts_of
from relayd.admission.own_limits import OwnLimits
from relayd.admission.session_limits import SessionLimits
from relayd.control.steering import Json, Work
from relayd.core.route_spec import DEFAULT
from relayd.core.routing import MOST_LEAVING
from relayd.datagrams.standby import FULL, MAX_BYTES
from relayd.datagrams.unanswered import MAX_KEPT_BYTES
from relayd.net.descriptors import Descriptors
from relayd.net.fair_queue import WORKERS
from relayd.net.resolving import MAX_QUEUE, Resolver
from relayd.operating.listing import Shown, parts
from relayd.operating.listing_servers import by_name
from relayd.operating.log_writer import LIMIT
from relayd.operating.logs import Logs
from relayd.operating.process_counts import (
    count_descriptors,
    max_descriptors,
    pipes_in_use,
)
from relayd.upstreams.checks import AT_ONCE, Checker
from relayd.upstreams.server import Server


@attrs.frozen(eq=False, kw_only=True)
class Process:
    """What the relays of a process share.

    :ivar logs: of the command.
    :ivar checker: of all servers.
    :ivar more: each returns rows of something else's, as of the metrics'.
    """

    reactor: Any
    logs: Logs | None = None
    checker: Checker | None = None
    more: list[Callable[[], Iterable[Json]]] = attrs.field(factory=list)


def limits(shown: Iterable[Shown], process: Process) -> Work:
    """All limits.

    :return: `{limits: [{what, relay, limit, now, hits}]}`.
    """
    rows = yield from _of_process(process)
    for each in shown:
        if each.kind == "udp":
            rows += yield from _of_flows(each)
        else:
            rows += yield from _of_streams(each)
        rows += yield from _of_servers(each)
        yield
    return {"limits": rows}


def _row(
    what: str, relay: str | None, limit: float | None, now: float, hits: int
) -> Json:
    return {"what": what, "relay": relay, "limit": limit, "now": now, "hits": hits}


def _of_process(process: Process) -> Generator[None, None, list[Json]]:
    descriptors = yield from count_descriptors()
    reactor, most = process.reactor, max_descriptors()
    resolver = Resolver.of(reactor)
    rows = [
        _row(
            "max_descriptors",
            None,
            most if math.isfinite(most) else None,
            # Without /proc nobody knows.
            0 if math.isnan(descriptors) else descriptors,
            Descriptors.of(reactor).pauses,
        ),
        # Of the operator, and of all clients.
        _row(
            *("look_ups", None, 2 * (WORKERS + MAX_QUEUE)),
            *(resolver.pending, resolver.refused),
        ),
    ]
    if sys.platform == "linux":
        from relayd.plane.pipes import PIPES_IN_USE
        from relayd.plane.poller import Plane

        refused = Plane.of(reactor).pipes.refused
        rows.append(_row("pipes", None, PIPES_IN_USE, pipes_in_use(reactor), refused))
    logs, checker = process.logs, process.checker
    if logs is not None:
        rows.append(_row("log_bytes", None, LIMIT, logs.waiting, logs.lines_lost))
    if checker is not None:
        rows.append(_row("checks", None, AT_ONCE, checker.running, checker.late))
    for each in process.more:
        rows += each()
    return rows


def _gates(factories: Iterable[Any]) -> Iterator[Any]:
    """The gates of a relay's factories, which mostly share them; each once."""
    seen = set()
    for each in factories:
        for gate in parts_of(getattr(each, "made_of", each).gate):
            if id(gate) not in seen:
                seen.add(id(gate))
                yield gate


def _of_gates(
    shown: Shown, hits: Callable[[str], int]
) -> Generator[None, None, list[Json]]:
    """What counts clients.

    :param hits: how many were refused for a reason.
    """
    rows, relay = [], shown.name
    for gate in _gates(shown.factories):
        if isinstance(gate, SessionLimits):
            what = "max_sessions"
            rows.append(_row(what, relay, gate.max_sessions, gate.sessions, hits(what)))
            if gate.max_sessions_per_client is not None:
                what, most = "max_sessions_per_client", gate.max_sessions_per_client
                rows.append(_row(what, relay, most, gate.most_of_one, hits(what)))
            if gate.queue:
                refused = hits("queue") + hits("queue_timeout")
                rows.append(_row("queue", relay, gate.queue, gate.waiting, refused))
        elif isinstance(gate, ConnectRates):
            used = 0.0
            for part in parts(gate.buckets):
                used = max(used, *map(gate.used_of, part))
                yield
            what = "max_connects_per_client"
            rows += [
                _row(what, relay, gate.rate.count, round(used, 3), hits(what)),
                _row(
                    *(f"{what}: clients that are remembered", relay, MAX_CLIENTS),
                    *(len(gate), gate.evicted),
                ),
            ]
    return rows


def _of_bandwidth(shown: Shown) -> Iterator[Json]:
    for limit in dict.fromkeys(each.bandwidth for each in shown.factories):
        if isinstance(limit, Bandwidth):
            # There is no number of bytes that are there: sessions wait for it.
            yield _row("bandwidth", shown.name, None, limit.clients, limit.waits)
            yield _row(
                *("bandwidth: clients that were here", shown.name, MAX_AWAY),
                *(limit.remembered, limit.evicted),
            )


def _of_streams(shown: Shown) -> Generator[None, None, list[Json]]:
    relay = shown.name

    def hits(reason: str) -> int:
        # Factories that succeed each other count together.
        counted = {id(each.refusals): each.refusals for each, _ in shown.generations}
        return sum(each[reason] for each in counted.values())

    rows = yield from _of_gates(shown, hits)
    rows += _of_bandwidth(shown)
    rows += yield from _of_keys(shown)
    # A proxy's listeners share them, and so do those of a relay that decides.
    for name in ("handshakes", "binds"):
        tables = (getattr(each, name, None) for each in shown.factories)
        for table in dict.fromkeys(each for each in tables if each is not None):
            of_all = table.hits - table.client_hits
            what = f"max_{'deciding' if shown.kind == 'tcp' else name}"
            rows += [
                _row(what, relay, table.limit, len(table), of_all),
                _row(
                    *(f"{what}_per_client", relay, table.limit_per_client),
                    *(table.most_of_one, table.client_hits),
                ),
            ]
    for router in dict.fromkeys(each.router for each in shown.factories):
        # A program's own may have no such thing.
        if (leaving := getattr(router, "leaving", None)) is not None:
            what = "route: goes on though its client has left"
            rows.append(_row(what, relay, MOST_LEAVING, leaving, router.closed))
    for pool, standby in _standbys(shown.factories):
        what = f"when_none: clients that wait{pool}"
        rows.append(_row(what, relay, standby.most, len(standby), standby.turned_away))
    return rows


def _of_keys(shown: Shown) -> Generator[None, None, list[Json]]:
    """What routes say of sessions that have a key together: each has its own limit."""
    rows = []
    for own in dict.fromkeys(each.own_limits for each in shown.factories):
        if isinstance(own, OwnLimits) and (own.counts or own.refused):
            most = 0
            for part in parts(list(own.counts.values())):
                most = max(most, *part)
                yield
            what = "sessions of a key, by a route"
            rows.append(_row(what, shown.name, None, most, own.refused))
    return rows


def _standbys(factories: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Where clients wait for a server, of each pool that is not the only one."""
    for each in factories:
        pools = getattr(each, "pools", None)
        if pools is None:
            pools = {DEFAULT: each}
        for name, pool in pools.items():
            standby = getattr(pool, "standby", None)
            if standby is not None:
                yield "" if name == DEFAULT else f" for {name}", standby


def _of_flows(shown: Shown) -> Generator[None, None, list[Json]]:
    relay = shown.name

    def hits(reason: str) -> int:
        dropped = [each.counters.dropped for each, _ in shown.generations]
        return sum(each[reason] for each in dropped)

    rows = yield from _of_gates(shown, hits)
    rows += _of_bandwidth(shown)
    for factory in shown.factories:
        table, most = factory.table, 0
        for part in parts(table.by_client):
            most = max(most, *part)
            yield
        what, limit = "max_flows_per_client", table.max_flows_per_client
        rows += [
            _row("max_flows", relay, table.max_flows, len(table), table.hits),
            _row(what, relay, limit, most, table.client_hits),
            # Those of one flow make place for another's.
            _row(
                *("datagrams kept: bytes", relay, MAX_KEPT_BYTES),
                *(factory.ledger.unanswered.size, factory.ledger.unanswered.evicted),
            ),
        ]
        if factory.standby is not None:
            now, full = factory.standby.size, factory.counters.dropped[FULL]
            rows.append(_row("when_none: bytes that wait", relay, MAX_BYTES, now, full))
    return rows


def _of_servers(shown: Shown) -> Generator[None, None, list[Json]]:
    """Those that may have so many sessions; several of one name each."""
    rows = []
    servers = [each for same in by_name(shown).values() for each in same]
    for part in parts(servers):
        for each in part:
            if isinstance(each, Server) and each.max_sessions is not None:
                what = f"max of {each.name}"
                now, most = each.sessions, each.max_sessions
                rows.append(_row(what, shown.name, most, now, each.filled))
        yield
    return rows
