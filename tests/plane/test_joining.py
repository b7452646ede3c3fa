"""Who is joined, copying, and full sinks.

Two connections of the plane are joined, as a Bridge joins them
(`tests/support/pumping.py`).
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import providedBy
from zope.interface.verify import verifyObject

import relayd.plane.pipes
from relayd.core.interfaces import ISpliceable
from relayd.core.session import Direction, Session
from relayd.plane.pipes import PIPE_SIZE
from relayd.plane.piping import FULL_READS, MIN_SPLICE
from relayd.plane.poller import BATCHES_PER_TURN, COPY_SIZE, MAX_SHARE, MIN_SHARE, Plane
from relayd.plane.splicing import FULL_READ
from relayd.plane.transport import PlaneTransport
from relayd.stream.bridge import Bridge, Leg, Timeouts, unsent
from tests.conftest import descriptors
from tests.support.pumping import (
    LOTS,
    NOISE,
    Pump,
    Side,
    Splices,
    pump,
    pumping,
    small,
    sockets,
    splices,
    tcp,
)
from tests.support.standing import Still, still

__all__ = ["pump", "splices", "still", "tcp"]


@pytest.fixture
def no_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pipe can be had."""
    monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)


# -- who is joined


def test_it_can_be_asked_to_splice(tcp: Pump) -> None:
    assert verifyObject(ISpliceable, tcp.client.transport)
    assert isinstance(tcp.client.transport, PlaneTransport)


def test_only_two_of_a_plane_are_joined(still: Still) -> None:
    """Another kind of transport, or one of another reactor, is written to."""
    elsewhere = Still()
    one = Side(Plane.of(still), sockets("tcp"))
    two = Side(Plane.of(elsewhere), sockets("tcp"))
    three = Side(Plane.of(still), sockets("tcp"))
    how = Direction(), Direction(), object()
    assert not one.transport.splice(object(), *how)
    assert not one.transport.splice(two.transport, *how)
    assert not one.transport.blocked
    three.peer.reset()
    still.until(lambda: three.protocol.lost)
    assert not one.transport.splice(three.transport, *how)
    assert not three.transport.splice(one.transport, *how)
    # They still read for their protocols.
    one.peer.socket.send(b"data")
    still.until(lambda: one.protocol.data == b"data")
    for side, its in ((one, still), (two, elsewhere)):
        side.peer.socket.close()
        its.until(lambda: "eof" in side.events)  # noqa: B023
        side.transport.loseConnection()
        assert side.protocol.lost


class Meter(ProtocolWrapper):
    """A wrapper that looks at what passes, as TLS and PROXY do, and throttles."""

    seen = b""

    def dataReceived(self, data: bytes) -> None:
        self.seen += data
        super().dataReceived(data)

    def write(self, data: bytes) -> None:
        super().write(data.upper())


def test_what_wraps_a_connection_is_not_passed_by(still: Still) -> None:
    """It declares the interfaces of what is below it; that must not be believed."""
    plane, session = Plane.of(still), Session(1, "", "", 0.0)
    legs = [Leg(session.up), Leg(session.down)]
    factory: Any = WrappingFactory(Factory.forProtocol(lambda: legs[0]))
    factory.protocol, factory.noisy = Meter, False
    meter: Any = factory.buildProtocol(None)
    client = Side(plane, sockets("tcp"), meter)
    server = Side(plane, sockets("tcp"), legs[1])
    # As it says itself.
    assert ISpliceable in providedBy(meter)
    Bridge(session, legs[0], legs[1], Timeouts(), still).start()
    client.peer.socket.send(b"seen")
    still.until(lambda: server.peer.take() or server.peer.data == b"seen")
    server.peer.socket.send(b"answered")
    still.until(lambda: client.peer.take() or client.peer.data == b"ANSWERED")
    assert meter.seen == b"seen"
    # What waits below it is what waits.
    assert unsent(meter) == 0
    client.peer.socket.setblocking(True)
    while not unsent(meter):
        legs[0].transport.write(bytes(1 << 20))
    assert unsent(meter) == client.transport.unsent
    for side in (client, server):
        side.peer.socket.close()
        side.transport.abortConnection()
    still.settle()
    assert session.ending is not None


# -- copying and splicing


def test_bytes_move_and_are_counted(pump: Pump) -> None:
    """Both ways, and the protocols have nothing to do with it."""
    client, server = pump.client, pump.server
    client.peer.socket.send(b"request")
    assert pump.take(server, 7) == b"request"
    server.peer.socket.send(b"response")
    assert pump.take(client, 8) == b"response"
    assert (client.told.read, server.told.read) == (7, 8)
    assert (client.told.written, server.told.written) == (7, 8)
    assert client.protocol.data == server.protocol.data == b""
    assert client.events == server.events == []
    assert not client.transport.blocked
    assert client.transport.unsent == 0


def test_much_arrives_as_it_was_sent(pump: Pump) -> None:
    """However it came through."""
    pump.send(pump.client, NOISE)
    assert pump.take(pump.server, LOTS) == NOISE
    assert pump.client.told.read == pump.client.told.written == LOTS
    assert pump.server.told.read == pump.server.told.written == 0


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_at_once_with_pauses(seed: int, pump: Pump) -> None:
    """Each end sends and takes when it likes, and so does each side read."""
    rng = random.Random(seed)
    pump.bridge()
    sides = pump.client, pump.server
    left = {side: memoryview(NOISE)[: rng.randrange(LOTS // 2)] for side in sides}
    whole = {side: bytes(data) for side, data in left.items()}

    def step() -> bool:
        side = rng.choice(sides)
        match rng.randrange(4):
            case 0 | 1:
                with suppress(BlockingIOError):
                    count = rng.choice([1, 1000, 100_000, 3_000_000])
                    sent = side.peer.socket.send(left[side][:count])
                    left[side] = left[side][sent:]
                    if not left[side]:
                        left[side] = memoryview(b"")
            case 2:
                with suppress(BlockingIOError):
                    part = side.peer.socket.recv(rng.choice([1, 5000, 1 << 20]))
                    side.peer.data += part
            case 3:
                side.transport.pauseProducing()
                if rng.random() < 0.7:
                    side.transport.resumeProducing()
        return not any(left.values())

    pump.until(step, "all is sent")
    for side in sides:
        side.transport.resumeProducing()
        side.peer.end()
    for side in sides:
        assert pump.take_all(pump.other(side)) == whole[side]
        assert side.told.read == len(whole[side])
    pump.until(lambda: sides[0].protocol.lost and sides[1].protocol.lost)
    for side in sides:
        assert side.why is ConnectionDone


def test_a_bulk_transfer_is_spliced(tcp: Pump, splices: Splices) -> None:
    """After so many full reads, and all that follows while there is much of it."""
    tcp.send(tcp.client, NOISE)
    assert tcp.take(tcp.server, LOTS) == NOISE
    assert splices.moved[0][0] == "in"
    assert splices.total("in") == splices.total("out") > LOTS // 2
    assert LOTS - splices.total("in") >= FULL_READS * FULL_READ
    # Empty pipes are everybody's.
    assert tcp.pipes.in_use == 0


@pytest.mark.cost
def test_small_reads_are_not_spliced(tcp: Pump, splices: Splices) -> None:
    """A test of cost.  A pipe for a few bytes costs more than it saves."""
    for _ in range(20):
        assert tcp.client.peer.socket.send(bytes(1000)) == 1000
        tcp.take(tcp.server, tcp.client.told.read)
        tcp.settle(1)
    assert splices.moved == []


def test_splicing_stops_when_there_is_little_to_read(
    tcp: Pump, splices: Splices
) -> None:
    """And its pipes are closed if nobody else splices."""
    before = descriptors()
    tcp.splice(tcp.client)
    for _ in range(100):
        if not tcp.pipes.users:
            break
        tcp.through(tcp.client, NOISE[: MIN_SPLICE - 1])
    assert tcp.pipes.users == 0
    assert descriptors() == before
    calls = len(splices.moved)
    tcp.through(tcp.client, b"a word")
    assert len(splices.moved) == calls
    # And begins again.
    tcp.through(tcp.client, NOISE)
    assert len(splices.moved) > calls


def test_what_is_left_in_a_pipe_is_not_for_another(still: Still) -> None:
    """A sink is aborted that holds some; others splice, and get what is theirs."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp", small())) for _ in range(4)]
    with pumping(still, *sides[:2]) as one, pumping(still, *sides[2:]) as other:
        other.splice(other.client)
        one.fill_pipe(one.client)
        assert plane.pipes.in_use == 1
        one.server.transport.abortConnection()
        still.until(lambda: one.server.protocol.lost)
        assert plane.pipes.in_use == 0
        other.through(other.client, NOISE)
        other.through(other.server, NOISE)


def test_what_is_left_of_a_share_does_not_stop_splicing(
    tcp: Pump, splices: Splices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A splice that moved little because little was asked for says nothing."""
    monkeypatch.setattr("relayd.plane.poller.MAX_SHARE", 2 * MIN_SPLICE + 1000)
    tcp.splice(tcp.client)
    before = splices.total("in")
    tcp.through(tcp.client, NOISE)
    assert tcp.pipes.users == 1
    assert splices.total("in") - before > 0.9 * LOTS


def test_without_a_pipe_bytes_are_copied(
    pump: Pump, splices: Splices, no_pipes: None
) -> None:
    pump.send(pump.client, NOISE)
    assert pump.take(pump.server, LOTS) == NOISE
    # The last of it may have been the full read after which splicing is tried.
    pump.through(pump.client, b"the end")
    assert splices.moved == []
    assert (pump.pipes.users, pump.pipes.in_use) == (0, 0)


def test_a_pipe_that_could_not_be_had_is_counted(
    tcp: Pump, no_pipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for again after as many full reads."""
    tcp.through(tcp.client, NOISE)
    assert 0 < tcp.pipes.refused <= LOTS // (FULL_READ * FULL_READS)
    # A pipe that is there again is used.
    monkeypatch.undo()
    tcp.splice(tcp.client)


@pytest.mark.cost
def test_spliced_connections_share_their_pipes(still: Still, splices: Splices) -> None:
    """A test of cost.  Each has one only while something is in it."""
    plane, before = Plane.of(still), len(descriptors())
    sides = [Side(plane, sockets("tcp")) for _ in range(8)]
    with pumping(still, *sides[:2]) as one, pumping(still, *sides[2:4]) as two:
        with pumping(still, *sides[4:6]) as three, pumping(still, *sides[6:]) as four:
            for pump in (one, two, three, four):
                pump.send(pump.client, NOISE)
                pump.take(pump.server, LOTS)
            assert plane.pipes.users == 4
            assert plane.pipes.in_use == 0
            # A pipe, an epoll, and what was there.
            assert len(descriptors()) <= before + 2 * len(sides) + 2 + 1
        assert plane.pipes.users == 2


# -- a full sink


@pytest.mark.parametrize("spliced", [True, False])
def test_a_sink_that_is_full_holds_no_more_than_a_chunk(
    spliced: bool, pump: Pump, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source is not read until it has room again; then everything arrives."""
    if not spliced:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
    client, server = pump.client, pump.server
    sent = pump.block(client)
    assert client.transport.blocked
    assert not server.transport.blocked
    assert 0 < server.transport.unsent <= (PIPE_SIZE if spliced else COPY_SIZE)
    assert pump.pipes.in_use <= 1
    read = client.told.read
    pump.settle()
    assert client.told.read == read
    # The other direction is not concerned.
    server.peer.socket.send(b"meanwhile")
    assert pump.take(client, 9) == b"meanwhile"
    assert pump.take(server, sent) == NOISE[:sent]
    assert not client.transport.blocked
    assert server.transport.unsent == pump.pipes.in_use == 0


def test_both_sinks_full_block_nobody_for_ever(tcp: Pump) -> None:
    """Each has a pipe, or a chunk; both go on when their peers read."""
    sent = tcp.block(tcp.client), tcp.block(tcp.server)
    assert tcp.client.transport.blocked
    assert tcp.server.transport.blocked
    assert tcp.take(tcp.client, sent[1]) == NOISE[: sent[1]]
    assert tcp.take(tcp.server, sent[0]) == NOISE[: sent[0]]


def test_a_sink_that_drains_a_little_at_a_time(tcp: Pump) -> None:
    """What is left in a pipe or a buffer follows, in order."""
    sent, server = tcp.block(tcp.client), tcp.server.peer
    while len(server.data) < sent:
        with suppress(BlockingIOError):
            server.data += server.socket.recv(30_000)
        tcp.settle(1)
    assert server.data == NOISE[:sent]


def test_what_a_protocol_writes_goes_behind_what_waits(
    tcp: Pump, splices: Splices
) -> None:
    """Also behind what is in the pipe, and before what is read later."""
    sent, read = tcp.fill_pipe(tcp.client)
    waits = tcp.server.transport.unsent
    assert splices.total("in") == splices.total("out") + waits
    tcp.server.transport.write(b"a word of ours")
    assert tcp.server.transport.unsent == waits + 14
    got = tcp.take(tcp.server, sent + 14)
    assert got == NOISE[:read] + b"a word of ours" + NOISE[read:sent]


def test_a_side_that_pauses_is_not_read(tcp: Pump) -> None:
    """As any other transport; what has come goes on when it resumes."""
    client, server = tcp.client, tcp.server
    client.transport.pauseProducing()
    client.peer.socket.send(b"data")
    tcp.settle()
    assert client.told.read == 0
    assert not server.peer.data
    client.transport.resumeProducing()
    assert client.told.read == 0
    assert tcp.take(server, 4) == b"data"


def test_connections_that_part_are_read_for_their_protocols(pump: Pump) -> None:
    client, server = pump.client, pump.server
    pump.through(client, b"moved")
    client.transport.unsplice()
    for side in (client, server):
        side.peer.socket.send(b"kept")
        pump.until(lambda: side.protocol.data == b"kept")  # noqa: B023
        side.peer.socket.shutdown(socket.SHUT_WR)
        pump.until(lambda: "eof" in side.events)  # noqa: B023
    assert (client.told.read, server.told.read) == (5, 0)
    # There is nothing to part any more.
    server.transport.unsplice()


def test_what_waits_in_a_pipe_is_written_after_they_have_parted(tcp: Pump) -> None:
    """And what was not read, as that waited, is read for the protocol."""
    client, server = tcp.client, tcp.server
    sent, read = tcp.fill_pipe(client)
    assert client.transport.blocked
    server.transport.unsplice()
    assert not client.transport.blocked
    assert tcp.pipes.users == 0
    tcp.until(lambda: len(client.protocol.data) == sent - read)
    tcp.take(server, read)
    tcp.settle()
    assert server.peer.data + client.protocol.data == NOISE[:sent]
    assert (tcp.pipes.in_use, server.transport.unsent) == (0, 0)


def test_one_busy_connection_leaves_others_their_turn(still: Still) -> None:
    """So much a round, whatever there is to read, and however fast it goes."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp")) for _ in range(4)]
    with pumping(still, *sides[:2]) as busy, pumping(still, *sides[2:]) as quiet:
        busy.send(busy.client, NOISE)
        busy.client.transport.pauseProducing()
        with suppress(BlockingIOError):
            while True:
                busy.client.peer.socket.send(bytes(1 << 20))
        busy.settle()
        quiet.client.peer.socket.send(b"excuse me")
        busy.client.transport.resumeProducing()
        before = busy.client.told.read
        plane.doRead()
        moved = busy.client.told.read - before
        # Twice in each round: for an event, and because it asked to go on.
        assert 0 < moved <= 2 * BATCHES_PER_TURN * (MAX_SHARE + PIPE_SIZE)
        assert quiet.server.peer.take() or quiet.server.peer.data == b"excuse me"


def test_many_busy_connections_share_a_round(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn is as long with many as with a few: timers wait for it."""
    plane, count = Plane.of(still), 4
    with ExitStack() as stack:
        pumps = []
        for _ in range(count):
            sides = [Side(plane, sockets("tcp")) for _ in range(2)]
            pumps.append(stack.enter_context(pumping(still, *sides)))
            pumps[-1].splice(pumps[-1].client)
        clients = [pump.client for pump in pumps]
        for client in clients:
            client.transport.pauseProducing()
            with suppress(BlockingIOError):
                while True:
                    client.peer.socket.send(bytes(1 << 20))
        still.settle()
        before = sum(client.told.read for client in clients)
        for client in clients:
            client.transport.resumeProducing()
        for bound in (count * MIN_SHARE, MIN_SHARE):
            monkeypatch.setattr("relayd.plane.poller.BATCH_BYTES", bound)
            plane.doRead()
            moved = sum(client.told.read for client in clients) - before
            # Each may go a little over its share, and has one in each half of a round.
            most = count * (MIN_SHARE + COPY_SIZE)
            assert 0 < moved <= 2 * BATCHES_PER_TURN * most
            before += moved
