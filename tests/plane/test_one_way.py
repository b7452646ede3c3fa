"""One direction is spliced, and the other goes through its protocol.

What the client sends is moved to the server by their transports; what the server sends
is given to its protocol, which writes it to the client's transport, as the filters of
that direction would.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone

import relayd.plane.pipes
from relayd.core.session import Direction
from relayd.plane.poller import Plane
from relayd.testing import Producer
from tests.support.contracts import Recorder
from tests.support.pumping import (
    KINDS,
    LOTS,
    NOISE,
    Pump,
    Side,
    Splices,
    small,
    sockets,
    splices,
)
from tests.support.standing import Still, still

__all__ = ["splices", "still"]


class Through(Recorder):
    """Passes what it reads to a sink, as long as it has one."""

    sink: Any = None

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        if self.sink is not None:
            self.sink.write(data)


class OneWay(Pump):
    """A pump of which one way is spliced; the server's protocol passes on the other."""

    def _join(self) -> None:
        self.splice_one_way(self.client)
        self.pass_through(self.server)

    def pass_through(self, side: Side) -> None:
        """What this side reads goes through its protocol, which the sink may pause."""
        sink = self.other(side).transport
        side.protocol.sink = sink
        side.protocol.on["eof"] = lambda: self._end_through(sink)
        sink.registerProducer(
            Producer(
                pause=side.transport.pauseProducing,
                resume=side.transport.resumeProducing,
            ),
            True,
        )

    def _end_through(self, sink: Any) -> None:
        sink.unregisterProducer()
        self._pass_end(sink)

    def stop_passing(self, side: Side) -> None:
        """What this side reads does not go through its protocol any more."""
        side.protocol.sink = None
        side.protocol.on.clear()
        self.other(side).transport.unregisterProducer()
        side.transport.resumeProducing()

    def splice_one_way(self, side: Side) -> None:
        """What this side reads is moved from now on."""
        sink = self.other(side).transport
        assert side.transport.splice_one_way(sink, side.told, self)


@contextmanager
def relaying(still: Still, *sides: Side) -> Iterator[OneWay]:
    """Such a pump; when it ends, so have both sides."""
    pump = OneWay(still, *sides)
    try:
        yield pump
    finally:
        for side in sides:
            side.peer.socket.close()
            side.transport.abortConnection()
        pump.settle(2)
    assert [side.events.count("lost") for side in sides] == [1, 1]


def sides_of(still: Still, kinds: str, **how: Any) -> list[Side]:
    plane = Plane.of(still)
    return [Side(plane, sockets(kind, **how), Through()) for kind in kinds.split()]


@pytest.fixture
def tcp(still: Still) -> Iterator[OneWay]:
    """Two TCP connections whose kernel buffers are small."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp", small()), Through()) for _ in range(2)]
    with relaying(still, *sides) as pump:
        yield pump


@pytest.fixture(params=KINDS)
def pump(request: pytest.FixtureRequest, still: Still) -> Iterator[OneWay]:
    """Each kind of connection with each."""
    with relaying(still, *sides_of(still, request.param)) as made:
        yield made


@pytest.fixture
def no_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pipe can be had."""
    monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)


# -- who is joined


def test_only_two_of_a_plane_are_joined(still: Still) -> None:
    other = Still()
    one, two = sides_of(still, "tcp tcp")
    [elsewhere] = sides_of(other, "tcp")
    how = Direction(), object()
    assert not one.transport.splice_one_way(object(), *how)
    assert not one.transport.splice_one_way(elsewhere.transport, *how)
    two.transport.registerProducer(Producer(), True)
    assert not one.transport.splice_one_way(two.transport, *how)
    two.transport.unregisterProducer()
    two.transport.abortConnection()
    still.until(lambda: two.protocol.lost)
    assert not one.transport.splice_one_way(two.transport, *how)
    assert not two.transport.splice_one_way(one.transport, *how)
    assert not one.transport.blocked
    # It still reads for its protocol.
    one.peer.socket.send(b"data")
    still.until(lambda: one.protocol.data == b"data")
    for side in (one, elsewhere):
        side.transport.abortConnection()
    for side in (one, two, elsewhere):
        side.peer.socket.close()
    still.settle()
    other.settle()
    assert elsewhere.protocol.lost


# -- what moves


def test_one_way_is_moved_and_the_other_is_read_for_its_protocol(pump: OneWay) -> None:
    client, server = pump.client, pump.server
    client.peer.socket.send(b"request")
    assert pump.take(server, 7) == b"request"
    server.peer.socket.send(b"response")
    assert pump.take(client, 8) == b"response"
    assert client.told.read == 7
    assert server.told.read == 0
    assert client.protocol.data == b""
    assert server.protocol.data == b"response"
    assert client.events == server.events == []
    assert not client.transport.blocked
    assert not server.transport.blocked


def test_much_arrives_as_it_was_sent(pump: OneWay) -> None:
    client, server = pump.client, pump.server
    pump.send(client, NOISE)
    assert pump.take(server, LOTS) == NOISE
    pump.send(server, NOISE)
    assert pump.take(client, LOTS) == NOISE
    assert client.told.read == LOTS
    assert server.told.read == server.told.spliced == 0
    assert server.protocol.data == NOISE
    assert pump.pipes.in_use == 0


def test_a_bulk_transfer_of_one_way_is_spliced(tcp: OneWay, splices: Splices) -> None:
    """And what passes through the protocol meanwhile does not change that."""
    client, server = tcp.client, tcp.server
    tcp.splice(client)
    before = client.told.read, client.told.spliced
    tcp.through(server, NOISE[:3_000_000])
    tcp.through(client, NOISE)
    assert client.told.read - before[0] == LOTS
    assert client.told.spliced - before[1] > LOTS * 0.9
    assert splices.total("in") == splices.total("out") == client.told.spliced
    assert (tcp.pipes.users, tcp.pipes.in_use) == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_at_once_with_pauses(seed: int, pump: OneWay) -> None:
    """Each end sends and takes when it likes; sides pause, and change their ways."""
    rng = random.Random(seed)
    pump.bridge()
    sides = pump.client, pump.server
    left = {side: memoryview(NOISE)[: rng.randrange(LOTS // 2)] for side in sides}
    whole = {side: bytes(data) for side, data in left.items()}
    client, server = sides

    def change() -> None:
        """Another way for one of the two, or both, whatever is in the middle."""
        rng.choice(sides).transport.unsplice()
        for side in sides:
            pump.stop_passing(side)
        through = rng.choice([(), (client,), (server,), sides])
        if not through and rng.random() < 0.5:
            assert client.transport.splice(
                server.transport, client.told, server.told, pump
            )
            return
        for side in sides:
            if side not in through:
                pump.splice_one_way(side)
        for side in through:
            pump.pass_through(side)

    def step() -> bool:
        side = rng.choice(sides)
        match rng.randrange(5):
            case 0 | 1:
                with suppress(BlockingIOError):
                    count = rng.choice([1, 1000, 100_000, 3_000_000])
                    sent = side.peer.socket.send(left[side][:count])
                    left[side] = left[side][sent:]
            case 2:
                with suppress(BlockingIOError):
                    part = side.peer.socket.recv(rng.choice([1, 5000, 1 << 20]))
                    side.peer.data += part
            case 3:
                change()
            case 4:
                client.transport.pauseProducing()
                pump.settle(1)
                client.transport.resumeProducing()
        return not any(map(len, left.values()))

    pump.until(step, "all is sent")
    for side in sides:
        side.peer.end()
    for side in sides:
        assert pump.take_all(pump.other(side)) == whole[side]
        assert side.told.read + len(side.protocol.data) == len(whole[side])
    pump.until(lambda: client.protocol.lost and server.protocol.lost)
    for side in sides:
        assert side.why is ConnectionDone
