"""What each end of a session does, as coroutines that the scripts combine.

They read from top to bottom like the blocking tests.  A coroutine returns if the end
saw what was expected; otherwise it raises :class:`soak.timeouts.Violation`, or the
error of an unexpected reset or timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from soak.ends import End
from soak.timeouts import CONNECT, HALF_CLOSE, IDLE, SLACK, STALL, TICK, Violation


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """Run several coroutines at once; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def ask(end: End) -> None:
    session = end.session
    await end.send(session.up)
    await end.receive(session.down)


async def ask_greeter(end: End) -> None:
    await end.receive_greeting()
    await end.introduce()
    await ask(end)


async def ask_and_see_the_end(end: End) -> None:
    await end.send(end.session.up)
    await end.receive_to_end()


async def answer(end: End) -> None:
    session = end.session
    await end.receive(session.up)
    await asyncio.sleep(session.delay)
    await end.send(session.down)


async def answer_and_see_the_end(end: End) -> None:
    await answer(end)
    await end.receive_to_end()


async def ask_twice(end: End) -> None:
    await ask(end)
    await asyncio.sleep(end.session.delay)
    await ask(end)


async def answer_twice(end: End) -> None:
    session = end.session
    for _ in range(2):
        await end.receive(session.up)
        await end.send(session.down)
    await end.receive_to_end()


async def upload(end: End) -> None:
    session = end.session
    await end.send(session.up, session.seconds)
    end.shut_write()
    await end.receive_to_end()


async def take_upload(end: End) -> None:
    await end.receive_to_end()
    await asyncio.sleep(end.session.delay)
    await end.send(end.session.down)


async def take_upload_slowly(end: End) -> None:
    await end.receive_to_end(pause=0.3)
    await end.send(end.session.down)


async def download(end: End) -> None:
    await end.send(end.session.up)
    await end.receive_to_end()


async def download_slowly(end: End) -> None:
    await end.send(end.session.up)
    await end.receive_to_end(pause=0.3)


async def serve_download(end: End) -> None:
    session = end.session
    await end.receive(session.up)
    await end.send(session.down, session.seconds)
    end.shut_write()
    await end.receive_to_end()


async def both_ways(end: End) -> None:
    session = end.session

    async def send() -> None:
        await end.send(session.up if end.client else session.down, session.seconds)
        end.shut_write()

    await _together(send(), end.receive_to_end())


async def end_first(end: End) -> None:
    await end.send(end.session.down)
    end.shut_write()
    await end.receive_to_end()


async def go_on_after_the_end(end: End) -> None:
    session = end.session
    await end.receive_to_end()
    await asyncio.sleep(session.delay)
    await end.send(session.up, session.seconds)


async def ask_in_drops(end: End) -> None:
    session = end.session
    await end.send(session.up, session.seconds, chunk=1)
    await end.receive(session.down)


async def answer_in_drops(end: End) -> None:
    session = end.session
    await end.receive(session.up)
    await end.send(session.down, session.seconds, chunk=1)
    await end.receive_to_end()


async def reset_while_sending(end: End) -> None:
    session = end.session
    # Reads meanwhile, or the relay would rightly end it as stalled.
    reading = asyncio.ensure_future(end.receive_to_end())
    try:
        await end.send(session.up if end.client else session.down, session.seconds)
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    if not reading.cancelled():
        reading.result()
    end.reset()


async def see_the_reset(end: End) -> None:
    await end.expect_reset()


async def see_the_reset_while_sending(end: End) -> None:
    session = end.session

    async def send() -> None:
        with suppress(ConnectionError):
            await end.send(session.down if end.client else session.up, session.seconds)

    await _together(send(), end.expect_reset())


async def fill_and_reset(end: End) -> None:
    await end.fill()
    end.reset()


async def read_after_the_reset(end: End) -> None:
    session = end.session
    while session.reset_at is None:
        await asyncio.sleep(TICK)
    if session.coin:
        await end.until_aborted(STALL, early=True)
    await end.expect_reset()


async def flood(end: End) -> None:
    await end.flood()


async def stall(end: End) -> None:
    # The flood itself checks what is too early.
    await end.until_aborted(STALL, early=True)
    await end.expect_reset()


async def idle(end: End) -> None:
    await end.until_aborted(IDLE)


async def end_and_idle(end: End) -> None:
    end.shut_write()
    await end.until_aborted(HALF_CLOSE)


async def idle_after_the_end(end: End) -> None:
    await end.receive_to_end()
    await end.until_aborted(HALF_CLOSE)


async def leave(end: End) -> None:
    await asyncio.sleep(end.session.delay)
    if end.session.coin:
        end.reset()


async def be_refused(end: End) -> None:
    if end.session.coin:
        with suppress(ConnectionError):
            await end.introduce()
    await end.expect_refusal(0, SLACK)


async def be_given_up(end: End) -> None:
    await end.expect_refusal(CONNECT, CONNECT + 2 * TICK + SLACK)


async def absent(end: End) -> None:
    raise Violation("a session that should have reached no server reached one")
