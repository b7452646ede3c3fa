"""What the connections of the soak do: the scripts, and what is drawn for each.

A script is a pair of coroutines, one for each end of a session, that read from top
to bottom like the blocking tests.  One that returns saw what it should have seen;
one that saw anything else raises :class:`bench.soak_ends.Violation`, or lets a
reset or a timeout escape that was not due.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from enum import Enum
from typing import Any

import attrs

from bench.soak_ends import (
    CONNECT,
    HALF_CLOSE,
    IDLE,
    SLACK,
    STALL,
    TICK,
    End,
    Violation,
)


class Where(Enum):
    """What is behind the listener that a client connects to."""

    SERVER = "a server that waits for the client"
    GREETER = "a server that speaks first"
    CLOSED = "a port that nobody listens on"
    DARK = "a listener whose queue is full, so that a dial hangs"


Role = Callable[[End], Awaitable[None]]


@attrs.frozen(eq=False)
class Script:
    """What both ends of a session do, and what the relay's log may say of it.

    :ivar share: how many of the sessions follow it, against the others' shares.
    :ivar endings: the words that may stand behind `ending=`.
    :ivar up: the fewest and the most bytes that the client sends at a time.
    :ivar down: the same for the server.
    :ivar seconds: the most that a transfer is spread over.
    :ivar delay: the most seconds that somebody thinks, or is away.
    :ivar introduces: the client says which session this is before anything else.
    :ivar late: words that may stand there as well, if the relay was stopped meanwhile.
    """

    name: str
    share: int
    client: Role
    server: Role
    endings: tuple[str, ...]
    up: tuple[int, int] = (1, 2000)
    down: tuple[int, int] = (1, 5000)
    seconds: float = 0.0
    delay: float = 0.0
    where: Where = Where.SERVER
    introduces: bool = True
    late: tuple[str, ...] = ()


@attrs.define(eq=False)
class Session:
    """One connection through the relay: what was drawn for it, and its two ends.

    :ivar coin: decides what a script leaves open.
    :ivar reset_at: when one of its ends reset it, on the loop's clock.
    :ivar ending: what the relay's log says of it; empty until it does.
    """

    number: int
    script: Script
    up: int
    down: int
    seconds: float
    delay: float
    coin: bool
    small_buffer: bool
    client: End | None = None
    server: End | None = None
    reset_at: float | None = None
    ending: str = ""
    violated: bool = False

    @property
    def label(self) -> str:
        return f"connection {self.number}"


def draw_session(seed: int, number: int) -> Session:
    """The session of this number: the same for the same seed."""
    dice = random.Random(f"{seed}/{number}")  # noqa: S311 - to be repeated
    [script] = dice.choices(SCRIPTS, _SHARES)
    return Session(
        number=number,
        script=script,
        up=dice.randint(*script.up),
        down=dice.randint(*script.down),
        # Some go as fast as they can.
        seconds=dice.choice((0, 1, 1)) * dice.uniform(0, script.seconds),
        delay=dice.uniform(0, script.delay),
        coin=dice.random() < 0.5,
        small_buffer=dice.random() < 0.5,
    )


# -- the scripts: what the client does, what the server does


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """Do several things at once; when one fails, none of the others goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _ask(end: End) -> None:
    session = end.session
    await end.send(session.up)
    await end.receive(session.down)


async def _ask_greeter(end: End) -> None:
    await end.receive_greeting()
    await end.introduce()
    await _ask(end)


async def _ask_and_see_the_end(end: End) -> None:
    await end.send(end.session.up)
    await end.receive_to_end()


async def _answer(end: End) -> None:
    session = end.session
    await end.receive(session.up)
    await asyncio.sleep(session.delay)
    await end.send(session.down)


async def _answer_and_see_the_end(end: End) -> None:
    await _answer(end)
    await end.receive_to_end()


async def _ask_twice(end: End) -> None:
    await _ask(end)
    await asyncio.sleep(end.session.delay)
    await _ask(end)


async def _answer_twice(end: End) -> None:
    session = end.session
    for _ in range(2):
        await end.receive(session.up)
        await end.send(session.down)
    await end.receive_to_end()


async def _upload(end: End) -> None:
    session = end.session
    await end.send(session.up, session.seconds)
    end.shut_write()
    await end.receive_to_end()


async def _take_upload(end: End) -> None:
    await end.receive_to_end()
    await asyncio.sleep(end.session.delay)
    await end.send(end.session.down)


async def _take_upload_slowly(end: End) -> None:
    await end.receive_to_end(pause=0.3)
    await end.send(end.session.down)


async def _download(end: End) -> None:
    await end.send(end.session.up)
    await end.receive_to_end()


async def _download_slowly(end: End) -> None:
    await end.send(end.session.up)
    await end.receive_to_end(pause=0.3)


async def _serve_download(end: End) -> None:
    session = end.session
    await end.receive(session.up)
    await end.send(session.down, session.seconds)
    end.shut_write()
    await end.receive_to_end()


async def _both_ways(end: End) -> None:
    session = end.session

    async def send() -> None:
        await end.send(session.up if end.client else session.down, session.seconds)
        end.shut_write()

    await _together(send(), end.receive_to_end())


async def _end_first(end: End) -> None:
    await end.send(end.session.down)
    end.shut_write()
    await end.receive_to_end()


async def _go_on_after_the_end(end: End) -> None:
    session = end.session
    await end.receive_to_end()
    await asyncio.sleep(session.delay)
    await end.send(session.up, session.seconds)


async def _ask_in_drops(end: End) -> None:
    session = end.session
    await end.send(session.up, session.seconds, chunk=1)
    await end.receive(session.down)


async def _answer_in_drops(end: End) -> None:
    session = end.session
    await end.receive(session.up)
    await end.send(session.down, session.seconds, chunk=1)
    await end.receive_to_end()


async def _reset_while_sending(end: End) -> None:
    session = end.session
    # Reads meanwhile, or the relay would rightly find that it stalls.
    reading = asyncio.ensure_future(end.receive_to_end())
    try:
        await end.send(session.up if end.client else session.down, session.seconds)
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    if not reading.cancelled():
        reading.result()
    end.reset()


async def _see_the_reset(end: End) -> None:
    await end.expect_reset()


async def _see_the_reset_while_sending(end: End) -> None:
    session = end.session

    async def send() -> None:
        with suppress(ConnectionError):
            await end.send(session.down if end.client else session.up, session.seconds)

    await _together(send(), end.expect_reset())


async def _fill_and_reset(end: End) -> None:
    await end.fill()
    end.reset()


async def _read_after_the_reset(end: End) -> None:
    session = end.session
    while session.reset_at is None:
        await asyncio.sleep(TICK)
    if session.coin:
        await end.until_cut(STALL, early=True)
    await end.expect_reset()


async def _flood(end: End) -> None:
    await end.flood()


async def _stall(end: End) -> None:
    # The flood has its own look at what is early.
    await end.until_cut(STALL, early=True)
    await end.expect_reset()


async def _idle(end: End) -> None:
    await end.until_cut(IDLE)


async def _end_and_idle(end: End) -> None:
    end.shut_write()
    await end.until_cut(HALF_CLOSE)


async def _idle_after_the_end(end: End) -> None:
    await end.receive_to_end()
    await end.until_cut(HALF_CLOSE)


async def _leave(end: End) -> None:
    await asyncio.sleep(end.session.delay)
    if end.session.coin:
        end.reset()


async def _be_refused(end: End) -> None:
    if end.session.coin:
        with suppress(ConnectionError):
            await end.introduce()
    await end.expect_refusal(0, SLACK)


async def _be_given_up(end: End) -> None:
    await end.expect_refusal(CONNECT, CONNECT + 2 * TICK + SLACK)


async def _absent(end: End) -> None:
    raise Violation("a session that should have reached no server reached one")


_MIB = 1024 * 1024
_BULK = (_MIB // 16, 2 * _MIB)

#: A reset meets a relay that is reading, one that writes, or one that still dials.
_CLIENT_RESET = ("downstream_reset", "downstream_write_failed", "client_left")
_SERVER_RESET = ("upstream_reset", "upstream_write_failed")

SCRIPTS = (
    Script("client closes first", 8, _ask, _answer_and_see_the_end, ("done",), delay=8),
    Script("server closes first", 8, _ask_and_see_the_end, _answer, ("done",), delay=8),
    Script(
        "server speaks first",
        4,
        _ask_greeter,
        _answer_and_see_the_end,
        ("done",),
        where=Where.GREETER,
        introduces=False,
    ),
    Script("bulk up", 8, _upload, _take_upload, ("done",), up=_BULK, seconds=15),
    Script(
        "bulk down", 8, _download, _serve_download, ("done",), down=_BULK, seconds=15
    ),
    Script(
        "bulk both ways",
        5,
        _both_ways,
        _both_ways,
        ("done",),
        up=_BULK,
        down=_BULK,
        seconds=15,
    ),
    Script("client half-closes", 6, _upload, _take_upload, ("done",), delay=3),
    Script(
        "server half-closes",
        6,
        _go_on_after_the_end,
        _end_first,
        ("done",),
        up=(1, _MIB // 4),
        delay=3,
    ),
    Script("idle, then on", 16, _ask_twice, _answer_twice, ("done",), delay=15),
    Script(
        "byte by byte",
        12,
        _ask_in_drops,
        _answer_in_drops,
        ("done",),
        up=(5, 30),
        down=(5, 30),
        seconds=12,
    ),
    Script(
        "slow client",
        6,
        _download_slowly,
        _serve_download,
        ("done",),
        down=(_MIB // 2, 3 * _MIB // 2),
    ),
    Script(
        "slow server",
        6,
        _upload,
        _take_upload_slowly,
        ("done",),
        up=(_MIB // 2, 3 * _MIB // 2),
    ),
    Script(
        "client resets",
        4,
        _reset_while_sending,
        _see_the_reset,
        _CLIENT_RESET,
        up=_BULK,
        seconds=10,
    ),
    Script(
        "server resets",
        4,
        _see_the_reset,
        _reset_while_sending,
        _SERVER_RESET,
        down=_BULK,
        seconds=10,
    ),
    Script(
        "client resets, both sending",
        2,
        _reset_while_sending,
        _see_the_reset_while_sending,
        _CLIENT_RESET,
        up=_BULK,
        down=_BULK,
        seconds=10,
    ),
    Script(
        "server resets, both sending",
        2,
        _see_the_reset_while_sending,
        _reset_while_sending,
        _SERVER_RESET,
        up=_BULK,
        down=_BULK,
        seconds=10,
    ),
    Script(
        "client resets, server not reading",
        1,
        _fill_and_reset,
        _read_after_the_reset,
        (*_CLIENT_RESET, "upstream_stalled"),
    ),
    Script(
        "server resets, client not reading",
        1,
        _read_after_the_reset,
        _fill_and_reset,
        (*_SERVER_RESET, "downstream_stalled"),
    ),
    Script("client stalls", 2, _stall, _flood, ("downstream_stalled",)),
    Script("server stalls", 2, _flood, _stall, ("upstream_stalled",)),
    Script("idle for ever", 12, _idle, _idle, ("idle",)),
    Script(
        "half-closed for ever", 5, _end_and_idle, _idle_after_the_end, ("half_closed",)
    ),
    Script(
        "client leaves at once",
        4,
        _leave,
        _absent,
        ("done", "downstream_reset", "client_left"),
        introduces=False,
    ),
    Script(
        "client leaves during the dial",
        2,
        _leave,
        _absent,
        ("client_left",),
        delay=1.5,
        where=Where.DARK,
        introduces=False,
        # One that ends its side may be waiting for the server, which hung too long.
        late=("connect_timeout",),
    ),
    Script(
        "client asks, leaves during the dial",
        2,
        _leave,
        _absent,
        ("client_left", "connect_timeout"),
        delay=3,
        where=Where.DARK,
    ),
    Script(
        "dial hangs", 3, _be_given_up, _absent, ("connect_timeout",), where=Where.DARK
    ),
    Script(
        "server refuses",
        4,
        _be_refused,
        _absent,
        ("connect_refused",),
        where=Where.CLOSED,
        introduces=False,
    ),
)

_SHARES = [script.share for script in SCRIPTS]
