"""Awaits what is asyncio's, where Deferreds are awaited.

    rows = await from_asyncio(pool.fetch("select ..."))

A route, a gate and a check are coroutines over Deferreds.  What belongs to asyncio (a
driver of a database, an HTTP client) runs in asyncio's event loop, which there is only
under Twisted's asyncio reactor: `twistd --reactor=asyncio relayd ...`.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable
from typing import TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from relayd.core.errors import RelayError

T = TypeVar("T")


def from_asyncio(awaitable: Awaitable[T]) -> Deferred[T]:
    """A Deferred of what belongs to asyncio: a coroutine, a future or a task.

    When it is cancelled, so is that.  What ends a program (SystemExit,
    KeyboardInterrupt) is an error like any other.

    :raises RelayError: asyncio does not run here.
    :raises TypeError: it can't be awaited.
    """
    loop = _loop()
    if loop is None:
        if inspect.iscoroutine(awaitable):
            # Or it would be said that it was never awaited.
            awaitable.close()
        raise RelayError(
            "asyncio does not run here: start with `twistd --reactor=asyncio`"
        )
    if not asyncio.isfuture(awaitable):
        awaitable = _tame(awaitable)
    future = asyncio.ensure_future(awaitable, loop=loop)
    return Deferred.fromFuture(future).addErrback(_translate)


def _loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs, or that will, as soon as its reactor has started."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        # Which one it is, and not: import it, which would install one.
        reactor = sys.modules.get("twisted.internet.reactor")
        # There is no public name for it.
        return getattr(reactor, "_asyncioEventloop", None)


async def _tame(awaitable: Awaitable[T]) -> T:
    """The same, but a task of asyncio would stop the loop with what ends a program."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as problem:
        raise RelayError(f"{type(problem).__name__}: {problem}") from problem


def _translate(reason: Failure) -> Failure:
    """Twisted's word for what was cancelled."""
    if reason.check(asyncio.CancelledError):
        return Failure(CancelledError())
    return reason
