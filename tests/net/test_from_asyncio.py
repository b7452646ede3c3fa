"""What is asyncio's, awaited by what awaits Deferreds.

asyncio runs here by itself: that it is the reactor's loop is Twisted's business.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

import relayd.gates
import relayd.pools
import relayd.routes
from relayd.core.errors import RelayError
from relayd.net.from_asyncio import from_asyncio


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine over Deferreds in a loop of asyncio."""

    async def within() -> Any:
        loop = asyncio.get_running_loop()
        return await Deferred.fromCoroutine(main()).asFuture(loop)

    return asyncio.run(within())


async def answers() -> int:
    await asyncio.sleep(0)
    return 5


def test_coroutines_tasks_and_futures() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(future.set_result, 7)
        later: list[Awaitable[int]] = [answers(), loop.create_task(answers()), future]
        return [await from_asyncio(each) for each in later]

    assert run(main) == [5, 5, 7]


def test_what_fails() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def main() -> None:
        await from_asyncio(fails())

    with pytest.raises(KeyError, match="x"):
        run(main)


@pytest.mark.parametrize("problem", [SystemExit, KeyboardInterrupt])
def test_what_ends_a_program_is_an_error(problem: type[BaseException]) -> None:
    """asyncio would end its loop by it, and that is the reactor's."""

    async def ends() -> None:
        await asyncio.sleep(0)
        raise problem(3)

    async def main() -> str:
        with pytest.raises(RelayError) as raised:
            await from_asyncio(ends())
        return str(raised.value)

    assert run(main) == f"{problem.__name__}: 3"


def test_what_is_cancelled_is_cancelled_there() -> None:
    seen: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            seen.append("cleaned")
            raise

    async def main() -> None:
        waiting = from_asyncio(waits())
        await from_asyncio(asyncio.sleep(0))
        failed: list[Failure] = []
        waiting.addErrback(failed.append)
        waiting.cancel()
        for _ in range(5):
            await from_asyncio(asyncio.sleep(0))
        assert failed[0].check(CancelledError)

    run(main)
    assert seen == ["cancelled", "cleaned"]


def test_what_can_not_be_awaited() -> None:
    async def main() -> None:
        wrong: Any = 5
        await from_asyncio(wrong)

    with pytest.raises(TypeError):
        run(main)


def test_without_asyncio_it_is_said_what_to_do() -> None:
    """And nothing warns of a coroutine that was never awaited."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RelayError, match="twistd --reactor=asyncio"):
            from_asyncio(answers())


def test_programs_have_it_where_they_write_what_awaits() -> None:
    for each in (relayd.routes, relayd.gates, relayd.pools):
        assert each.from_asyncio is from_asyncio


UNDER_THE_REACTOR = """
from twisted.internet import asyncioreactor
asyncioreactor.install()
import asyncio
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from relayd.routes import from_asyncio

async def answers():
    await asyncio.sleep(0.001)
    return 5

async def ends():
    await asyncio.sleep(0.001)
    raise SystemExit(3)

async def main():
    print(await from_asyncio(answers()))
    try:
        await from_asyncio(ends())
    except Exception as problem:
        print(problem)
    reactor.stop()

reactor.callWhenRunning(lambda: Deferred.fromCoroutine(main()))
reactor.run()
"""


def test_under_the_asyncio_reactor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNDER_THE_REACTOR],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("5\nSystemExit: 3\n", "")
