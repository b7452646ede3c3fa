"""What a running relay tells of its servers: how each is, why, and what it has to do.

Servers of one name, which a relay with several ports may have one of for each, are
told as one.  The names of those of one of several pools begin with the pool's, so that
the same address in two pools is two servers.  See :mod:`relayd.operating.listing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from relayd.control.steering import Json, Unknown, Work
from relayd.core.addresses import socket_name
from relayd.core.route_spec import DEFAULT
from relayd.observing.log_times import LogTimes
from relayd.operating.listing import (
    Shown,
    is_called,
    listing_of,
    parts,
    relays_of,
)
from relayd.operating.servers import BACKUPS
from relayd.udp_nat import Server as Where
from relayd.upstreams.server import LastCheck, Server


def servers(shown: Iterable[Shown], relay: str | None = None) -> Work:
    """The servers of all relays, or of one.

    :return: `{servers: […]}`, in the operator's order; a proxy has none, as its clients
        choose them.  `fails` is None where nothing is known of a server but its
        sessions: where it is the only one and nothing is said of it.
    :raises Unknown: there is no such relay.
    """
    rows: list[Json] = []
    for each in relays_of(shown, relay):
        rows += yield from _rows(each)
    return {"servers": rows}


def server(shown: Shown, name: str) -> Json:
    """One server, by its name or its label; of several that are called so, the first.

    :raises Unknown: the relay has none.
    """
    own = [each for each in by_name(shown).items() if is_called(each[1][0], name)]
    if not own:
        raise no_server(shown, name)
    _, same = own[0]
    counts: Counter[Any] = Counter()
    if not isinstance(same[0], Server):
        counts = _drive(_sessions_of(shown))
    return _row(shown, same, counts)


def no_server(shown: Shown, name: str) -> Unknown:
    """What to raise for a server that a relay does not have."""
    return Unknown(
        f"{shown.name} has no server {name!r}: there {listing_of(by_name(shown))}"
    )


def by_name(shown: Shown) -> dict[str, list[Any]]:
    """The servers of a relay; of each name there may be several."""
    found: dict[str, list[Any]] = {}
    for pool in shown.pools:
        for each in pool.upstreams:
            found.setdefault(each.name, []).append(each)
    if shown.kind == "udp" and not found:
        # Nothing is said of them, so no pool has them.
        for factory in shown.factories:
            for where in factory.servers:
                found.setdefault(where.name, []).append(where)
    return found


def _rows(shown: Shown) -> Generator[None, None, list[Json]]:
    there = list(by_name(shown).values())
    counts: Counter[Any] = Counter()
    if not all(isinstance(same[0], Server) for same in there):
        counts = yield from _sessions_of(shown)
    rows = []
    for part in parts(there):
        rows += [_row(shown, same, counts) for same in part]
        yield
    return rows


def _sessions_of(shown: Shown) -> Generator[None, None, Counter[Any]]:
    """How many sessions servers have that do not count them."""
    counts: Counter[Any] = Counter()
    for factory, _ in shown.generations:
        for part in parts(factory.registry.living()):
            for each in part:
                flow = shown.kind == "udp"
                counts[each.server if flow else each.session.server] += 1
            yield
    return counts


def _drive(work: Generator[None, None, Any]) -> Any:
    """Do all of it at once."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def _row(shown: Shown, same: Sequence[Any], counts: Counter[Any]) -> Json:
    """What is told of the servers of one name."""
    one = same[0]
    if not isinstance(one, Server):
        return {
            "relay": shown.name,
            "pool": _pool_of(one),
            "name": one.name,
            "label": None,
            "address": _address_of(one),
            "state": "up",
            "why": "",
            "weight": 1,
            "max_sessions": None,
            "sessions": sum(counts[each] for each in same),
            "fails": None,
            "checked": False,
            "last_check": None,
            "backup": False,
            "operator": None,
        }
    # Of several, one that is not as it should be says more.
    one = next((each for each in same if each.state != "up"), one)
    return {
        "relay": shown.name,
        "pool": _pool_of(one),
        "name": one.name,
        "label": one.label or None,
        "address": _address_of(one),
        "state": one.state,
        "why": one.reason,
        "weight": one.weight,
        "max_sessions": one.max_sessions,
        "sessions": sum(each.sessions for each in same),
        "fails": sum(each.fails for each in same),
        "checked": one.has_checks,
        "last_check": _check_of(one.last_check, shown),
        "backup": one.tier >= BACKUPS,
        "operator": one.operator,
    }


def _address_of(upstream: Any) -> str:
    """Where it is, if that is known; else what its operator wrote."""
    endpoint = getattr(upstream, "endpoint", upstream)
    there = getattr(endpoint, "peer_name", "")
    if not there and isinstance(endpoint, Where) and endpoint.address and endpoint.end:
        there = socket_name(endpoint.address[1])
    name = upstream.name
    for before in (getattr(upstream, "pool", ""), getattr(upstream, "label", "")):
        name = name.removeprefix(f"{before}/" if before else "")
    return there or str(name)


def _pool_of(upstream: Any) -> str:
    """The name of its pool; servers of datagrams without state are in none."""
    return getattr(upstream, "pool", "") or DEFAULT


def _check_of(last: LastCheck | None, shown: Shown) -> Json | None:
    if last is None:
        return None
    first = shown.factories[0]
    passed = first.clock.seconds() - last.at
    times = LogTimes()
    return {"at": times(times.since_epoch() - passed), "ok": last.up, "why": last.why}
