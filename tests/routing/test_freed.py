"""What is left of a client once its route has decided, or it has left: nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from relayd.routing.connection import Connection
from relayd.routing.router import Router
from tests.support.arriving import Arrived, ask


async def to_ssh(conn: Connection) -> Any:
    return conn.pool("ssh")


async def waits(conn: Connection) -> Any:
    await conn.peek(1)
    return conn.pool()


async def fails_at_once(conn: Connection) -> Any:
    raise KeyError("x")


async def fails_later(conn: Connection) -> Any:
    await conn.peek(1)
    raise KeyError("x")


async def refuses(conn: Connection) -> Any:
    await conn.peek(1)
    conn.refuse("banned")


async def nonsense(conn: Connection) -> Any:
    await conn.sni()


KEPT: list[Any] = []


async def keeps(conn: Connection) -> Any:
    KEPT.append((conn, conn.pool(), conn.peek(5)))
    await conn.peek(1)
    return KEPT[-1][1]


@pytest.mark.parametrize(
    "route",
    [to_ssh, waits, fails_at_once, fails_later, refuses, nonsense, keeps],
)
@pytest.mark.parametrize("leaves", [False, True])
def test_a_client_is_free_at_once(route: Any, leaves: bool) -> None:
    """Without the garbage collector, which would come late, and cost time."""
    gc.collect()
    gc.disable()
    try:
        arrived = Arrived()
        kept = weakref.ref(arrived)
        answer = ask(Router(route), arrived)
        answer.addBoth(lambda _: None)
        if leaves:
            answer.cancel()
        else:
            arrived.send(b"x")
        assert answer.called
        del answer, arrived
        assert kept() is None
    finally:
        gc.enable()
        for _, _, peek in KEPT:
            peek.close()
        KEPT.clear()


ASKED: list[Deferred[None]] = []


async def is_answered_by_an_error(conn: Connection) -> Any:
    ASKED.append(Deferred())
    await ASKED[-1]


@pytest.mark.parametrize(
    "route",
    [
        *(to_ssh, waits, fails_at_once, fails_later, refuses),
        *(is_answered_by_an_error, nonsense),
    ],
)
@pytest.mark.parametrize("leaves", [False, True])
def test_a_decision_leaves_no_garbage(route: Any, leaves: bool) -> None:
    """Nor a client that leaves: a flood of them would be the collector's work."""
    router = Router(route)

    def once() -> None:
        arrived = Arrived()
        answer = ask(router, arrived)
        answer.addBoth(lambda _: None)
        if leaves:
            answer.cancel()
        arrived.send(b"x")
        if ASKED and not leaves:
            ASKED[-1].errback(KeyError("x"))
        ASKED.clear()

    once()
    gc.collect()
    gc.disable()
    try:
        once()
        assert gc.collect() == 0
    finally:
        gc.enable()
