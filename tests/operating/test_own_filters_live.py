"""Filters and limits that a route gives one session, as its relay's settings change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.operating.test_changes_live import Ends, relaying, web
from tests.operating.test_filters_live import bulk, capture, connect, rows, spliced
from tests.support.process import TRANSPORTS
from tests.support.route_modules import RouteModules, route_modules

__all__ = ["route_modules"]

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)

#: Of every second client, it says this.
EVERY_SECOND = """
async def route(conn):
    if conn.session.ordinal % 2:
        {}
    return conn.pool()
"""


def routed(modules: RouteModules, said: str, **settings: Any) -> Any:
    modules.write(EVERY_SECOND.format(said))
    return web(route="myroutes:route", **settings)


def two(ends: Ends, server: Any) -> list[Any]:
    """A session without, and one with what the route says."""
    found = []
    for _ in range(2):
        client = connect(ends)
        found.append((client, ends.accept(server)))
    return found


def test_a_change_of_settings_takes_off_none_of_them(
    tmp_path: Path, kind: str, route_modules: RouteModules
) -> None:
    """Also where the relay gets the same one, and loses it again."""
    tables = routed(route_modules, 'conn.filter("slow_close", delay=0)')
    with relaying(tmp_path, kind, tcp=tables) as ends:
        sessions = two(ends, ends.server(20009))
        assert rows(ends) == [[], ["slow_close"]]
        for filters, shared in (
            (["slow_close:0"], ["slow_close"]),
            (["slicer:100"], ["slicer"]),
            ([], []),
        ):
            ends.relayd.set("web", filter=filters)
            plain, own = rows(ends)
            assert plain == shared
            assert sorted(own) == sorted({*shared, "slow_close"})
            for each in sessions:
                ends.talk(*each)
        ends.relayd.reload(discard=True)
        assert rows(ends) == [[], ["slow_close"]]
        # It is a fault of what servers send.
        (client, server), (own_client, own_server) = sessions
        before = spliced(ends)
        bulk(ends, own_server, own_client)
        assert spliced(ends) == before
        bulk(ends, server, client)
        assert kind == "twisted" or spliced(ends) > before


def test_one_is_looked_into_and_keeps_its_own(
    tmp_path: Path, kind: str, route_modules: RouteModules
) -> None:
    tables = routed(route_modules, 'conn.filter("slow_close", delay=0)')
    with relaying(tmp_path, kind, tcp=tables) as ends:
        server = ends.server(20009)
        [(plain, upstream), _] = two(ends, server)
        plain.close()
        upstream.close()
        ends.relayd.reactor.until(lambda: len(rows(ends)) == 1)
        stream, client = capture(ends)
        [filters] = rows(ends)
        assert sorted(filters) == ["capture", "slow_close"]
        stream.stop("enough")
        assert client.why == "enough"
        assert rows(ends) == [["slow_close"]]


def test_sessions_of_a_key_are_counted_through_changes_and_reloads(
    tmp_path: Path, kind: str, route_modules: RouteModules
) -> None:
    tables = routed(route_modules, "conn.limit(sessions=1, key='tenant')")
    with relaying(tmp_path, kind, tcp=tables) as ends:
        server = ends.server(20009)
        first = two(ends, server)
        for seconds in (60, 70):
            ends.relayd.set("web", idle_timeout=seconds)
            client = connect(ends)
            ends.talk(client, ends.accept(server))
            refused = connect(ends)
            refused.settimeout(0)
            ends.relayd.reactor.until(lambda one=refused: is_reset(one), "a reset")
        ends.relayd.reload(discard=True)
        for each in first[1]:
            each.close()
        ends.relayd.reactor.until(lambda: len(rows(ends)) == 3)
        for client, upstream in two(ends, server):
            ends.talk(client, upstream)


def is_reset(client: Any) -> bool:
    try:
        return not client.recv(1)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
