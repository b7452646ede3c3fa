"""Captures of real sessions, on each kind of connections: ends, resets, living ones."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted

from relayd.core.session import Ending
from relayd.filters.capture import Capture
from relayd.filters.live_capture import LiveCapture
from relayd.stream.bridge import Bridge
from relayd.tcp import RelayFactory
from tests.stream.test_filtered_live import joined, sends
from tests.stream.test_hooks_live import DATA, Relay, relaying
from tests.support.captures import Stream, sections_of, streams_of
from tests.support.contracts import Peer, until
from tests.support.process import TRANSPORTS

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

on_each = pytest.mark.parametrize("kind", TRANSPORTS)


def capturing(path: Path, **options: Any) -> Any:
    """What makes a relay that captures all."""
    return functools.partial(RelayFactory, filters=[Capture(str(path), **options)])


def stream_in(data: bytes) -> Stream:
    [section] = sections_of(data)
    [stream] = streams_of(section)
    return stream


async def over(relay: Relay, *peers: Peer) -> Any:
    """The session has ended."""
    [session] = relay.witness.sessions
    await until(lambda: session.ended_at is not None, "the end of the session")
    for each in peers:
        each.socket.close()
    return session


@on_each
@pytest.mark.parametrize("servers_first", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_session(kind: str, servers_first: bool, tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    async with relaying(kind, capturing(path)) as relay:
        await relay.session(servers_first=servers_first)
        [session] = relay.witness.sessions
        assert not session.up.spliced
    stream = stream_in(path.read_bytes())
    assert stream.said == (DATA, DATA)
    order = ["down", "up"] if servers_first else ["up", "down"]
    assert stream.finished == order
    assert not stream.reset
    assert "{}:{}".format(*stream.client) == session.client
    assert "{}:{}".format(*stream.server) == session.upstream
    assert stream.times == sorted(stream.times)


@on_each
@pytest_twisted.ensureDeferred
async def test_so_many_bytes_and_then_it_splices(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    async with relaying(kind, capturing(path, bytes=10)) as relay:
        await relay.session()
        [session] = relay.witness.sessions
        if kind == "plane":
            assert session.up.spliced > 0
            assert session.down.spliced > 0
    stream = stream_in(path.read_bytes())
    assert stream.said == (DATA[:10], DATA[:10])
    assert not stream.finished


@on_each
@pytest.mark.parametrize("resets", ["client", "server"])
@pytest_twisted.ensureDeferred
async def test_a_reset(kind: str, resets: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    async with relaying(kind, capturing(path)) as relay:
        client, server, _ = await joined(relay)
        await sends(client, server, b"question")
        await sends(server, client, b"answer")
        (client if resets == "client" else server).reset()
        session = await over(relay, client, server)
    stream = stream_in(path.read_bytes())
    assert stream.said == (b"question", b"answer")
    assert not stream.finished
    assert stream.reset == ("up" if resets == "client" else "down")
    assert stream.comments[1:] == [f"ending={session.ending.word}"]


@on_each
@pytest_twisted.ensureDeferred
async def test_one_that_an_operator_ends(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pcapng"
    async with relaying(kind, capturing(path)) as relay:
        client, server, protocol = await joined(relay)
        await sends(client, server, b"question")
        protocol.abort_session(Ending.KILLED)
        await over(relay, client, server)
    stream = stream_in(path.read_bytes())
    assert stream.said == (b"question", b"")
    assert stream.reset == "down"


@on_each
@pytest_twisted.ensureDeferred
async def test_a_living_session(kind: str) -> None:
    """Before, it is spliced; after, it is spliced again."""
    data, done = bytearray(), list[str]()

    def take(block: bytes) -> bool:
        data.extend(block)
        return True

    live = LiveCapture(take, len(DATA), done.append)
    async with relaying(kind) as relay:
        client, server, protocol = await joined(relay)
        [session] = relay.witness.sessions
        await sends(client, server, DATA)
        before = session.up.spliced
        protocol.change_filters([], [live])
        assert protocol.filtered == ["capture"]
        await sends(client, server, DATA[::-1])
        assert session.up.spliced == before
        assert not done
        # By now one direction has seen enough.
        await sends(client, server, b"not captured")
        await sends(server, client, DATA + b"nor is this")
        assert done == [""]
        assert type(protocol.bridge) is Bridge
        assert not protocol.filtered
        await sends(client, server, DATA)
        if kind == "plane":
            assert session.up.spliced > before > 0
        client.end()
        server.end()
        await over(relay, client, server)
        assert session.ending is Ending.DONE
    stream = stream_in(bytes(data))
    assert stream.said == (DATA[::-1], DATA)
    [began, *_] = stream.comments
    assert f"after up={len(DATA)} down=0 bytes" in began


@on_each
@pytest.mark.parametrize("leaves", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_living_session_that_ends(kind: str, leaves: bool) -> None:
    """Or whose reader leaves before."""
    data, done = bytearray(), list[str]()

    def take(block: bytes) -> bool:
        data.extend(block)
        return True

    live = LiveCapture(take, None, done.append)
    async with relaying(kind) as relay:
        client, server, protocol = await joined(relay)
        protocol.change_filters([], [live])
        await sends(client, server, b"question")
        if leaves:
            protocol.change_filters([live], [])
            assert done == [""]
        await sends(server, client, b"answer")
        client.end()
        server.end()
        session = await over(relay, client, server)
        assert session.ending is Ending.DONE
    assert done == ["" if leaves else "done"]
    stream = stream_in(bytes(data))
    assert stream.said == (b"question", b"" if leaves else b"answer")
    assert sorted(stream.finished) == ([] if leaves else ["down", "up"])


@on_each
@pytest_twisted.ensureDeferred
async def test_a_file_that_goes_away_ends_no_session(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full from the first write on."""
    path = tmp_path / "c.pcapng"

    real = os.write

    def full(to: int, data: bytes) -> int:
        if os.path.samestat(os.fstat(to), path.stat()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(to, data)

    async with relaying(kind, capturing(path)) as relay:
        with monkeypatch.context() as patch:
            patch.setattr("os.write", full)
            await relay.session()
        [session] = relay.witness.sessions
        if kind == "plane":
            assert session.up.spliced > 0
    assert not path.stat().st_size
