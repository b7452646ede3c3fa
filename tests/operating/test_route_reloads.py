"""Routes are imported anew by a reload, and by nothing else; all of them, or none."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, eventAsText

from relayd.control.steering import Invalid
from tests.support.route_modules import RouteModules, route_modules
from tests.support.steered import HOST, Relayd, at, running

__all__ = ["route_modules"]

ONE, OTHER = "127.0.0.1:9", "127.0.0.1:10"


def tables(**more: Any) -> dict[str, Any]:
    relay = {"listen": at(20001), "dest": ONE, "route": "myroutes:route", **more}
    return {"transport": "twisted", "tcp": {"a": relay}}


def refusing(why: str) -> str:
    return f"conn.refuse({why!r})"


def refused(relayd: Relayd, port: int = 20001) -> str:
    """Why a client is refused that comes now."""
    with (
        capturedLogs() as logged,
        socket.create_connection((HOST, port)) as client,
    ):
        client.setblocking(False)
        relayd.reactor.until(lambda: ended(logged))
    [line] = ended(logged)
    return line.partition("detail=")[2].strip("'")


def ended(logged: Any) -> list[str]:
    return [line for each in logged if "ending=denied" in (line := eventAsText(each))]


def test_a_reload_imports_them_anew(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    """Also of relays that are as they were; what was changed twice in a moment, too."""
    path = route_modules.write(refusing("A"))
    with running(tmp_path, tables()) as relayd:
        unit = relayd.unit("a")
        assert refused(relayd) == "A"
        times = path.stat()
        for why in ("B", "C"):
            # Of the same size, and as old, as far as anybody can tell.
            route_modules.write(refusing(why))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert refused(relayd) != why
            with capturedLogs() as logged:
                answer = relayd.reload()
            assert (answer["routes"], answer["unchanged"]) == (["myroutes:route"], 1)
            assert any(
                "reloaded: read anew: the routes myroutes:route" in eventAsText(each)
                for each in logged
            )
            assert refused(relayd) == why
            assert relayd.unit("a") is unit
        assert sys.modules["myroutes"].route is unit.router.route


def test_other_changes_import_nothing(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write(refusing("A"))
    with running(tmp_path, tables()) as relayd:
        before = relayd.unit("a").router.route
        route_modules.write(refusing("B"))
        relayd.set("a", idle_timeout=7)
        assert relayd.unit("a").router.route is before
        relayd.do("stop", "a")
        relayd.do("start", "a")
        assert refused(relayd) == "A"
        # Together with a change, it is read once.
        relayd.write(tables(stall_timeout=9))
        answer = relayd.reload()
        assert (answer["changed"], answer["routes"]) == (["a"], ["myroutes:route"])
        assert refused(relayd) == "B"
        relayd.set("a", idle_timeout=8)
        assert refused(relayd) == "B"


def test_a_file_that_is_not_read_yet_is_not_judged(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    """Its pools are those of the function that runs, until a reload."""
    route_modules.write('return conn.pool("b")')
    with running(tmp_path, tables(dest=f"{ONE},pool=b")) as relayd:
        route_modules.write('return conn.pool("nope")')
        relayd.set("a", idle_timeout=7)
        with pytest.raises(Invalid, match="'b'.*there is no such pool"):
            relayd.set("a", dest=f"{ONE},pool=nope")
        with pytest.raises(Invalid, match="'nope'.*there is no such pool"):
            relayd.reload()
        relayd.set("a", idle_timeout=8)


def test_another_route_is_set(tmp_path: Path, route_modules: RouteModules) -> None:
    """Once its module can be imported; nothing of an attempt in vain is kept."""
    route_modules.write(refusing("A"))
    with running(tmp_path, tables()) as relayd:
        for body in ("1/0\n", "def route(conn):\n    pass\n"):
            route_modules.write(body, "others")
            with pytest.raises(Invalid, match="relay a: route others:route: "):
                relayd.set("a", route="others:route")
        assert refused(relayd) == "A"
        route_modules.write(refusing("B"), "others")
        relayd.set("a", route="others:route")
        assert refused(relayd) == "B"
        relayd.set("a", route=None)
        assert refused(relayd) == "A"
        # Nor is what is there imported anew, after a reload.
        relayd.reload()
        route_modules.write(refusing("C"), "others")
        relayd.set("a", route="others:route")
        assert refused(relayd) == "B"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import nothing_at_all\n", "nothing_at_all"),
        ("async def route(conn):\n    return (\n", "SyntaxError"),
        ("async def others(conn):\n    return conn.pool()\n", "route"),
        ("def route(conn):\n    return conn.pool()\n", "async def"),
        ('async def route(conn):\n    return conn.pool("x")\n', "no such pool"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"idle_timeout": 7}], ids=["same", "changed"])
def test_one_that_fails_changes_nothing(
    tmp_path: Path,
    route_modules: RouteModules,
    body: str,
    said: str,
    more: dict[str, Any],
) -> None:
    route_modules.write(refusing("A"))
    with running(tmp_path, tables()) as relayd:
        before = relayd.unit("a"), sys.modules["myroutes"], relayd.relays.config
        route_modules.write(body)
        relayd.write(tables(**more))
        for _ in range(2):
            with pytest.raises(Invalid) as problem:
                relayd.reload()
            [line] = problem.value.problems
            assert line.startswith("relay a: ")
            assert said in line
            now = relayd.unit("a"), sys.modules["myroutes"], relayd.relays.config
            assert now == before
            assert refused(relayd) == "A"
        route_modules.write(refusing("B"))
        relayd.reload()
        assert refused(relayd) == "B"


def test_all_or_none(tmp_path: Path, route_modules: RouteModules) -> None:
    """A module that two relays have is read once; one that fails keeps the other."""
    both = tables()
    other = {"listen": at(20002), "route": "myroutes:second"}
    both["tcp"]["b"] = {**both["tcp"]["a"], **other}
    both["tcp"]["c"] = {**both["tcp"]["a"], "listen": at(20003), "route": "other:f"}
    counting = "import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n"
    route_modules.write(
        f"{counting}async def route(conn):\n    conn.refuse('A')\nsecond = route\n"
    )
    route_modules.write("async def f(conn):\n    conn.refuse('A')\n", "other")
    shared: Any = sys
    try:
        with running(tmp_path, both) as relayd:
            assert shared.counted == 1
            a, b, c = (relayd.unit(each).router for each in "abc")
            assert a.route is b.route
            before = a.route, c.route
            every = ["myroutes:route", "myroutes:second", "other:f"]
            assert relayd.reload()["routes"] == every
            assert shared.counted == 2
            assert a.route is b.route is not before[0]
            now = a.route, b.route, c.route
            route_modules.write("1/0\n", "other")
            with pytest.raises(Invalid, match="ZeroDivisionError"):
                relayd.reload()
            assert (a.route, b.route, c.route) == now
    finally:
        del shared.counted


def test_a_listener_that_can_not_be_opened_keeps_the_routes(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write(refusing("A"))
    with running(tmp_path, tables()) as relayd, socket.socket() as other:
        other.bind((HOST, 20002))
        other.listen()
        route_modules.write(refusing("B"))
        relayd.write(tables(listen=[at(20001), at(20002)]))
        with pytest.raises(Invalid):
            relayd.reload()
        assert refused(relayd) == "A"


def test_what_is_gone_back_to_has_the_old_routes(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write(refusing("A"))
    with running(tmp_path, tables()) as relayd:
        module = sys.modules["myroutes"]
        route_modules.write(refusing("B"))
        relayd.reload(confirm=5)
        assert refused(relayd) == "B"
        # Of what is in the file by then nothing is read.
        route_modules.write("1/0\n")
        relayd.reactor.advance(5)
        assert refused(relayd) == "A"
        assert sys.modules["myroutes"] is module
        relayd.set("a", idle_timeout=7)
        assert refused(relayd) == "A"


def test_who_is_being_decided_about_is_decided_by_the_old_one(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write(
        "waits = []\n"
        "async def route(conn):\n"
        "    from twisted.internet.defer import Deferred\n"
        "    waits.append(Deferred())\n"
        "    await waits[-1]\n"
        "    conn.refuse('old')\n"
    )
    with running(tmp_path, tables()) as relayd:
        waits: list[Deferred[None]] = sys.modules["myroutes"].waits
        with (
            capturedLogs() as logged,
            socket.create_connection((HOST, 20001)) as client,
        ):
            client.setblocking(False)
            relayd.reactor.until(lambda: waits)
            [row] = list(relayd.served("a").registry.living())
            assert row.session.stage.value == "deciding"
            route_modules.write(refusing("new"))
            relayd.reload()
            assert refused(relayd) == "new"
            relayd.set("a", idle_timeout=7)
            waits[0].callback(None)
            relayd.reactor.until(lambda: len(ended(logged)) == 2)
        assert "detail='old'" in ended(logged)[1]
