"""Filters and limits of one session alone, over real sockets, as a route says them.

Clients at 127.0.0.2 have them; others are as if there were no route.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.core.session import Ending, PacedDirection
from relayd.filters.capture import Capture
from relayd.filters.capture_file import CaptureFile
from relayd.stream.bridge import Bridge
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures
from tests.stream.test_hooks_live import DATA, Relay, relaying
from tests.support.captures import sections_of, streams_of
from tests.support.contracts import Peer, turns, until
from tests.support.own_filters import Delays, Makes
from tests.support.process import TRANSPORTS

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

on_each = pytest.mark.parametrize("kind", TRANSPORTS)

ALONE, OTHER = "127.0.0.2", "127.0.0.1"


def routed(say: Callable[[Any], object], **options: Any) -> Any:
    """What makes a relay whose route says this of the clients that are meant."""

    async def route(conn: Any) -> Any:
        if conn.client.host == ALONE:
            say(conn)
        return conn.pool()

    return functools.partial(RelayFactory, route=route, **options)


class Session:
    """A client at a host, and its server's end."""

    def __init__(self, relay: Relay, client: Peer, server: Peer, protocol: Any) -> None:
        self.relay, self.client, self.server = relay, client, server
        self.protocol, self.record = protocol, protocol.session

    async def sends(self, data: bytes, *, up: bool = True) -> None:
        """All of it arrives."""
        near, far = (self.client, self.server) if up else (self.server, self.client)
        rest, before = memoryview(data), len(far.data)

        def arrived() -> bool:
            nonlocal rest
            with suppress(BlockingIOError):
                rest = rest[near.socket.send(rest) :]
            far.take()
            return len(far.data) - before == len(data)

        await until(arrived, "all has arrived")
        assert bytes(far.data[before:]) == data

    async def ends(self, ending: Ending = Ending.DONE) -> None:
        if ending is Ending.DONE:
            self.client.end()
            self.server.end()
        await until(lambda: self.record.ended_at is not None)
        assert self.record.ending is ending
        self.client.socket.close()
        self.server.socket.close()


def connects(relay: Relay, host: str) -> Peer:
    address = "127.0.0.1", relay.port.getHost().port
    return Peer(socket.create_connection(address, source_address=(host, 0)))


async def joined(relay: Relay, host: str) -> Session:
    before = set(relay.factory.sessions)
    client = connects(relay, host)
    server = await relay.accepted()
    [number] = set(relay.factory.sessions) - before
    protocol = relay.factory.sessions[number]
    await until(lambda: protocol.bridge is not None)
    return Session(relay, client, server, protocol)


@on_each
@pytest_twisted.ensureDeferred
async def test_filters_of_one_session_while_others_are_spliced(kind: str) -> None:
    own = Makes(Delays)
    async with relaying(kind, routed(lambda conn: conn.filter(own))) as relay:
        alone, other = await joined(relay, ALONE), await joined(relay, OTHER)
        for each in alone, other:
            await each.sends(DATA)
            await each.sends(DATA, up=False)
        assert alone.protocol.filtered == ["own"]
        assert type(other.protocol.bridge) is Bridge
        assert alone.record.up.spliced == alone.record.down.spliced == 0
        if kind == "plane":
            assert other.record.up.spliced > 0
            assert other.record.down.spliced > 0
        await alone.ends()
        await other.ends()
    assert len(own.made) == 2
    assert own.closed_once()


@on_each
@pytest_twisted.ensureDeferred
async def test_the_capture_of_one_clients_sessions(kind: str, tmp_path: Path) -> None:
    """One after the other, and at once.  Others are not in it; no file stays open."""
    path = tmp_path / "c.pcapng"

    def say(conn: Any) -> None:
        conn.filter(Capture(str(path)))

    def is_open() -> bool:
        # The operating system says it: of whatever has opened it.
        return str(path) in map(os.path.realpath, Path("/proc/self/fd").iterdir())

    async with relaying(kind, routed(say)) as relay:
        first = await joined(relay, ALONE)
        other = await joined(relay, OTHER)
        await first.sends(b"first")
        second = await joined(relay, ALONE)
        await other.sends(b"other")
        await second.sends(b"second")
        await first.sends(b"answer", up=False)
        await first.ends()
        assert is_open()
        await second.ends()
        assert not is_open()
        third = await joined(relay, ALONE)
        await third.sends(b"third")
        await third.ends()
        assert not is_open()
        await other.ends()
    assert not CaptureFile.of(str(path)).is_open
    [section] = sections_of(path.read_bytes())
    streams = streams_of(section)
    assert [each.said for each in streams] == [
        (b"first", b"answer"),
        (b"second", b""),
        (b"third", b""),
    ]
    assert {each.client[0] for each in streams} == {ALONE}


@pytest_twisted.ensureDeferred
async def test_two_captures_to_one_file_are_a_mistake_of_the_route(
    tmp_path: Path, logged_failures: LoggedFailures
) -> None:
    """It is told as any other: not with each client."""
    path = str(tmp_path / "c.pcapng")

    def say(conn: Any) -> None:
        conn.filter("capture", file=path)

    made = routed(say, filters=[Capture(path)])
    async with relaying("twisted", made) as relay:
        for _ in range(3):
            client = connects(relay, ALONE)
            with pytest.raises(ConnectionResetError):
                await client.read_all()
            client.socket.close()
        other = await joined(relay, OTHER)
        await other.ends()
    assert [each.ending for each in relay.witness.sessions[:3]] == [
        Ending.ROUTE_FAILED
    ] * 3
    assert "two filters of a session have" in relay.witness.sessions[0].detail
    logged_failures.take("its route failed")


@on_each
@pytest.mark.parametrize("shared", [True, False])
@pytest_twisted.ensureDeferred
async def test_bandwidth_of_one_session(kind: str, shared: bool) -> None:
    """Another one has all of its relay's, and is spliced."""
    rates, clock = Rates(4e6, 4e6), cast("Any", reactor)
    limits = Bandwidth(Rates(1e12, 1e12), clock=clock) if shared else None
    made = routed(lambda conn: conn.limit(bandwidth=rates), bandwidth=limits)
    async with relaying(kind, made) as relay:
        alone, other = await joined(relay, ALONE), await joined(relay, OTHER)
        await other.sends(DATA)
        assert relay.factory.totals.waits == 0
        await alone.sends(DATA)
        await alone.sends(DATA, up=False)
        assert relay.factory.totals.waits > 0
        assert isinstance(other.record.up, PacedDirection) is shared
        if kind == "plane":
            assert other.record.up.spliced > 0
        await alone.ends()
        # But for what its buckets had, which is a fifth of a second's at most.
        assert alone.record.duration >= 2 * (len(DATA) / 4e6 - 0.2)
        await other.ends()


@on_each
@pytest_twisted.ensureDeferred
async def test_the_age_of_one_session(kind: str) -> None:
    made = routed(lambda conn: conn.limit(max_age=0.2), connect_timeout=0.4)
    async with relaying(kind, made) as relay:
        other, alone = await joined(relay, OTHER), await joined(relay, ALONE)
        await alone.ends(Ending.MAX_AGE)
        assert alone.record.detail == "the route's max_age 0.2"
        await other.sends(b"still here")
        await other.ends()


@on_each
@pytest_twisted.ensureDeferred
async def test_so_many_sessions_of_a_key(kind: str) -> None:
    made = routed(lambda conn: conn.limit(sessions=2, key=conn.client.host))
    async with relaying(kind, made) as relay:
        living = [await joined(relay, host) for host in (ALONE, OTHER, ALONE)]
        for _ in range(2):
            client = connects(relay, ALONE)
            with pytest.raises(ConnectionResetError):
                await client.read_all()
            client.socket.close()
        refused = [each for each in relay.witness.sessions if each.ending]
        assert [each.ending for each in refused] == [Ending.DENIED] * 2
        assert refused[0].detail == "the limit of sessions of '127.0.0.2' is reached: 2"
        await living.pop(0).ends()
        living.append(await joined(relay, ALONE))
        for each in living:
            await each.ends()
        await turns()
        own: Any = relay.factory.own_limits
        assert own.counts == {}
