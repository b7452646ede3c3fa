"""Answers that go on, over real sockets: what a connection holds, and how they end."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import maybeDeferred

from relayd.control.streaming import MOST_WAITING
from relayd.operating.control_service import ControlService
from tests.control.bench import Answer, request
from tests.control.clients import connected
from tests.control.fake_steering import FakeSteering, FakeStream
from tests.support.contracts import turns, until

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

BLOCK = bytes(range(256)) * 256


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[list[FakeStream]]:
    """A control socket; the captures that have begun."""
    steering = FakeSteering()
    steering.streams = streams = []
    service = ControlService(reactor, str(path), steering)
    service.startService()
    try:
        yield streams
    finally:
        await maybeDeferred(service.stopService)
        await until(lambda: not service.site.channels, "no client")


async def begun(client: Any, streams: list[FakeStream]) -> FakeStream:
    client.send(request("GET", "/v1/sessions/7/capture"))
    await until(lambda: streams and streams[-1].sink is not None, "a capture")
    return streams[-1]


@pytest_twisted.ensureDeferred
async def test_a_client_that_does_not_read_is_given_no_more(tmp_path: Path) -> None:
    """What it reads later is all that was taken, in order."""
    async with serving(tmp_path / "c") as streams:
        with connected(tmp_path / "c") as client:
            stream = await begun(client, streams)
            sink: Any = stream.sink
            taken = []
            for number in range(100):
                block = number.to_bytes(2, "big") + BLOCK
                if sink.give(block):
                    taken.append(block)
                await turns(1)
            held = 4 * len(BLOCK) + 2 * client.sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF
            )
            assert MOST_WAITING < sum(map(len, taken)) < MOST_WAITING + held
            await until(lambda: client.read() or sink.give(b"after it"), "room")
            sink.end("the session has ended", b"the last")
            await until(client.has_answer, "its end")
            assert Answer(client.said).body == b"".join(
                [*taken, b"after it", b"the last"]
            )


@pytest_twisted.ensureDeferred
async def test_a_client_that_ends_its_side_reads_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path / "c") as streams:
        with connected(tmp_path / "c") as client:
            stream = await begun(client, streams)
            assert stream.sink is not None
            stream.sink.give(b"block")
            client.sock.shutdown(socket.SHUT_WR)
            await until(client.has_ended, "its end")
            assert Answer(client.said).body == b"blockits last"
            assert stream.stopped == ["its client has ended it"]


@pytest.mark.parametrize("said", [0, 40])
@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_ends_it(tmp_path: Path, said: int) -> None:
    """Though it has not read, and nothing more is to be sent."""
    async with serving(tmp_path / "c") as streams:
        with connected(tmp_path / "c") as client:
            stream = await begun(client, streams)
            assert stream.sink is not None
            for _ in range(said):
                stream.sink.give(BLOCK)
        await until(lambda: stream.stopped, "its end")


@pytest_twisted.ensureDeferred
async def test_relayd_stops(tmp_path: Path) -> None:
    with ExitStack() as stack:
        async with serving(tmp_path / "c") as streams:
            client = stack.enter_context(connected(tmp_path / "c"))
            stream = await begun(client, streams)
            assert stream.sink is not None
            stream.sink.give(b"block")
        await until(client.has_ended, "its end")
        assert Answer(client.said).body == b"blockits last"
        assert stream.stopped == ["relayd stops"]
