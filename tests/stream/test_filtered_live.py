"""Filters over real sockets, on each kind of connections: splicing, and bounds."""

from __future__ import annotations

import functools
import socket
from contextlib import suppress
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.core.filtering import MOST_HELD
from relayd.core.pauses import ALLOWANCE
from relayd.core.session import Ending
from relayd.plane.large_reads import LARGE_READ
from relayd.stream.bridge import Bridge
from relayd.tcp import RelayFactory
from tests.stream.test_hooks_live import DATA, Relay, relaying
from tests.support.contracts import Peer, turns, until
from tests.support.own_filters import Delays, Keeps, Makes, Own, Sees
from tests.support.process import TRANSPORTS

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

on_each = pytest.mark.parametrize("kind", TRANSPORTS)


def filtered(*filters: Makes, **options: Any) -> Any:
    """What makes a relay with these."""
    return functools.partial(RelayFactory, filters=filters, **options)


@on_each
@pytest_twisted.ensureDeferred
async def test_what_has_seen_enough_at_once_leaves_all_to_be_spliced(kind: str) -> None:
    sees = Makes(Sees)
    async with relaying(kind, filtered(sees)) as relay:
        await relay.session()
        [session] = relay.witness.sessions
    assert sees.closed_once()
    for direction in (session.up, session.down):
        assert direction.written == len(DATA)
        # But for what came before it was spliced.
        least = len(DATA) // 3 if kind == "plane" else 0
        assert direction.spliced >= least


@on_each
@pytest.mark.parametrize("course", ["up", "down"])
@pytest_twisted.ensureDeferred
async def test_a_direction_without_filters_is_spliced(kind: str, course: str) -> None:
    async with relaying(kind, filtered(Makes(Delays, course=course))) as relay:
        await relay.session(servers_first=course == "up")
        [session] = relay.witness.sessions
    ways = {"up": session.up, "down": session.down}
    seen, unseen = ways.pop(course), *ways.values()
    assert seen.spliced == 0
    assert unseen.spliced > 0 or kind != "plane"
    assert seen.written == unseen.written == len(DATA)


@on_each
@pytest_twisted.ensureDeferred
async def test_a_server_that_an_endpoint_of_twisteds_dials(kind: str) -> None:
    """Its connection is none of ours, while the client's may be."""
    ports: list[int] = []

    def made(_: Any, **options: Any) -> RelayFactory:
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", ports[0])
        return RelayFactory(endpoint, filters=[Makes(Delays)], **options)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        ports.append(server.getsockname()[1])
        async with relaying(kind, made) as relay:
            relay.server = server
            await relay.session()


async def sends(near: Peer, far: Peer, data: bytes) -> None:
    """All arrives."""
    rest, before = memoryview(data), len(far.data)

    def arrived() -> bool:
        nonlocal rest
        with suppress(BlockingIOError):
            rest = rest[near.socket.send(rest) :]
        far.take()
        return len(far.data) - before == len(data)

    await until(arrived, "all has arrived")
    assert bytes(far.data[before:]) == data


@on_each
@pytest_twisted.ensureDeferred
async def test_a_living_session_is_looked_into_and_spliced_again(kind: str) -> None:
    own, keeps = Makes(Own), Makes(Keeps, course="up")
    async with relaying(kind) as relay:
        client, server, protocol = await joined(relay)
        [session] = relay.witness.sessions
        await sends(client, server, DATA)
        before = session.up.spliced
        protocol.change_filters([], [own])
        await sends(client, server, DATA)
        assert session.up.spliced == before
        # The other direction is not asked for: it goes on as it is.
        protocol.change_filters([own], [keeps])
        await sends(server, client, DATA)
        protocol.change_filters([keeps], [])
        assert type(protocol.bridge) is Bridge
        await sends(client, server, DATA)
        assert session.up.read == session.up.written == 3 * len(DATA)
        if kind == "plane":
            assert 0 < before < session.up.spliced
            assert session.down.spliced > 0
        client.end()
        server.end()
        await until(lambda: session.ended_at is not None)
        assert session.ending is Ending.DONE
        client.socket.close()
        server.socket.close()


async def joined(relay: Relay) -> tuple[Peer, Peer, Any]:
    client = relay.client()
    server = await relay.accepted()
    [protocol] = relay.factory.sessions.values()
    await until(lambda: protocol.bridge is not None)
    return client, server, protocol


@on_each
@pytest.mark.parametrize("keeps", [True, False])
@pytest_twisted.ensureDeferred
async def test_memory_is_bounded_while_nobody_reads(kind: str, keeps: bool) -> None:
    """The server reads nothing, or the filter keeps all."""
    made = Makes(Keeps if keeps else Own)
    async with relaying(kind, filtered(made)) as relay:
        client, server, protocol = await joined(relay)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        [session] = relay.witness.sessions
        for _ in range(5):
            # Until the kernels and the relay take no more.
            while client.flood():
                await turns(3)
            await turns(10)
        bridge = protocol.bridge
        held = made.of("up").held if keeps else 0
        unsent = bridge.upstream.buffered
        assert 0 < held <= MOST_HELD if keeps else 0 < unsent <= 65536 + MOST_HELD
        # A piece that was read may wait for what the filter does with the one before.
        waits = session.up.read - session.up.written - held
        assert 0 <= waits <= LARGE_READ
        assert session.up.kept == held + waits
        before = session.up.read
        await turns(20)
        assert session.up.read == before, "it is not read any more"
        client.socket.close()
        server.socket.close()


@on_each
@pytest_twisted.ensureDeferred
async def test_filters_come_and_go_while_bandwidth_is_waited_for(kind: str) -> None:
    # Not the machine's time: where the machine is slow, nobody would wait.
    clock = Clock()
    limits = Bandwidth(Rates(4e6, 4e6), clock=clock)
    async with relaying(kind, filtered(bandwidth=limits)) as relay:
        client, server, protocol = await joined(relay)
        own = Makes(Own)
        changes = [([], [own]), ([own], [])] * 3
        rest = memoryview(DATA)

        def arrived() -> bool:
            nonlocal rest
            with suppress(BlockingIOError):
                rest = rest[client.socket.send(rest) :]
            server.take()
            if protocol.paused & ALLOWANCE:
                if changes:
                    protocol.change_filters(*changes.pop(0))
                clock.advance(0.02)
            return len(server.data) == len(DATA)

        await until(arrived, "all has arrived")
        assert not changes
        assert bytes(server.data) == DATA
        client.socket.close()
        server.socket.close()
