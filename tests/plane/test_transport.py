"""The plane's connections relaying: copied or spliced, blocked, ended and broken.

What they do for a protocol is in `contracts.py`, by way of
`tests/plane/test_contract.py`.  Here two of them are joined, as a Bridge joins them,
and plain sockets are at their far ends:

    client  <->  transport  =  transport  <->  server
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import select
import socket
import stat
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import Factory, connectionDone
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import alsoProvides, implementer, providedBy
from zope.interface.verify import verifyObject

import relayd.plane.pipes
from relayd.core.interfaces import IResetListener, ISpliceable, ISplicer
from relayd.core.session import Direction, Ending, Session
from relayd.net.transports import LOSSES, PeerReset, PeerVanished, set_options
from relayd.plane.connection import READ_SIZE
from relayd.plane.connection_base import EDGE_BOTH, EDGE_READ
from relayd.plane.pipes import PIPE_SIZE, Pipes
from relayd.plane.poller import BATCHES_PER_TURN, COPY_SIZE, MAX_SHARE, MIN_SHARE, Plane
from relayd.plane.splicing import FULL_READ, FULL_READS, MIN_SPLICE
from relayd.plane.transport import PlaneTransport, transport_class
from relayd.plane.writing import BUFFER_LIMIT
from relayd.stream.bridge import Bridge, Leg, Timeouts, unsent
from tests.conftest import LoggedFailures, descriptors
from tests.plane.test_poller import Still, still
from tests.support.contracts import Peer, Producer, Recorder
from tests.support.dials import VANISHED
from tests.support.process import PATIENCE

__all__ = ["still"]

#: What is sent where it must not be mistaken: no part of it comes twice.
NOISE = random.Random(7).randbytes(12 << 20)

#: Enough to fill the kernel's buffers, and ours.
LOTS = len(NOISE)

KINDS = ["tcp tcp", "unix unix", "tcp unix", "unix tcp"]


def sockets(kind: str, listening: socket.socket | None = None) -> list[socket.socket]:
    """Two ends of a connection: ours, and the far one."""
    if kind == "unix":
        return list(socket.socketpair())
    far = socket.socket()
    with listening or of_size(1 << 20) as server:
        # Left to itself, the kernel makes them as large as the reader is quick.
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        far.connect(server.getsockname())
        near = server.accept()[0]
        set_options(near)
        return [near, far]


def of_size(size: int) -> socket.socket:
    """A listening socket; its connections' kernel buffers are about that large."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return server


def small() -> socket.socket:
    """A listening socket whose clients are soon blocked."""
    return of_size(100_000)


#: linux/sockios.h: what a TCP socket has queued, and what of it was never sent.
SIOCOUTQ, SIOCOUTQNSD = 0x5411, 0x894B


def at_rest(sock: Any) -> bool:
    """Whether nothing is under way: what a TCP socket has queued, its peer can't take.

    A busy machine may deliver it much later, and make room for more.
    """
    if sock.fileno() == -1:
        return True
    queued, not_sent = (
        int.from_bytes(fcntl.ioctl(sock.fileno(), what, bytes(4)), sys.byteorder)
        for what in (SIOCOUTQ, SIOCOUTQNSD)
    )
    return queued == not_sent


class Side:
    """One of the two connections.

    :ivar peer: the plain socket at its far end.
    :ivar told: counts what is read here.
    """

    def __init__(
        self,
        plane: Plane,
        ends: list[socket.socket],
        protocol: Any = None,
        kind: type[socket.socket] | None = None,
    ) -> None:
        near, far = ends
        near.setblocking(False)
        if kind is not None:
            near = kind(fileno=near.detach())
        self.peer = Peer(far)
        self.family = far.family
        self.protocol: Any = protocol or Recorder()
        made = transport_class(int(near.family))
        self.transport: Any = made(plane, near, self.protocol, "", None)
        self.told = Direction()
        plane.watch(near.fileno(), self.transport, EDGE_READ)
        self.protocol.makeConnection(self.transport)

    @property
    def events(self) -> list[str]:
        """What its protocol was told since it is connected."""
        events: list[str] = self.protocol.events[1:]
        return events

    @property
    def why(self) -> type[BaseException] | None:
        """What its connection was lost with."""
        reason = self.protocol.reason
        return None if reason is None else type(reason.value)


@implementer(ISplicer)
class Pump:
    """Two connections that relay to each other."""

    def __init__(self, still: Still, client: Side, server: Side) -> None:
        self.still, self.plane = still, Plane.of(still)
        self.client, self.server = client, server
        self.until, self.settle = still.until, still.settle
        self._bridges = False
        assert client.transport.splice(server.transport, client.told, server.told, self)

    def ended(self, direction: Direction, sink: Any) -> None:
        """See :meth:`ISplicer.ended`: as the end of data of its protocol."""
        side = self.client if direction is self.client.told else self.server
        assert sink is self.other(side).transport
        side.protocol.readConnectionLost()
        if not self._bridges:
            return
        if all("eof" in side.events for side in (self.client, self.server)):
            self.client.transport.loseConnection()
            self.server.transport.loseConnection()
        else:
            sink.loseWriteConnection()

    def bridge(self) -> None:
        """Pass ends of data on, and close when both have ended, as a Bridge does."""
        self._bridges = True

    def send(self, side: Side, data: bytes) -> None:
        """Have the far end send, and the other one take it."""
        view, other = memoryview(data), self.other(side)

        def sent() -> bool:
            nonlocal view
            with suppress(BlockingIOError):
                view = view[side.peer.socket.send(view[: 1 << 20]) :]
            other.peer.take()
            return not view

        self.until(sent, "all is sent")

    def through(self, side: Side, data: bytes) -> None:
        """Have the far end send, and wait until the other one has got it all."""
        got = self.other(side).peer.data
        count = len(got) + len(data)
        self.send(side, data)
        self.take(self.other(side), count)
        assert got[-len(data) :] == data

    def other(self, side: Side) -> Side:
        return self.server if side is self.client else self.client

    def take(self, side: Side, count: int) -> bytes:
        """What its far end gets, once that is as much."""
        peer = side.peer
        self.until(lambda: peer.take() or len(peer.data) >= count, f"{count} bytes")
        return bytes(peer.data)

    def take_all(self, side: Side) -> bytes:
        """What its far end gets until the end of data."""
        self.until(side.peer.take, "the end of data")
        return bytes(side.peer.data)

    def block(self, side: Side) -> int:
        """Have the far end send until nothing moves; return how much it has sent."""
        sent, quiet = 0, 0
        # UNIX sockets deliver at once.
        into: Any = self.other(side).transport
        under_way = [
            each
            for each, near in ((side.peer.socket, side), (into, self.other(side)))
            if near.family != socket.AF_UNIX
        ]
        while quiet < 10:
            part = 0
            with suppress(BlockingIOError):
                while sent + part < LOTS:
                    at = sent + part
                    part += side.peer.socket.send(
                        memoryview(NOISE)[at : at + (1 << 18)]
                    )
            sent += part
            read = side.told.read
            self.settle(1)
            moved = part or side.told.read > read
            resting = all(map(at_rest, under_way))
            quiet = quiet + 1 if resting and not moved else 0
        assert sent < LOTS, "NOISE is too small for the kernel's buffers"
        return sent

    def splice(self, side: Side) -> None:
        """Send much, until nothing is under way and what comes next is spliced."""
        for _ in range(20):
            self.through(side, NOISE)
            self.settle(1)
            if self.pipes.users:
                return
        raise AssertionError("it is never spliced")

    def fill_pipe(self, side: Side) -> tuple[int, int]:
        """Block it with something in a pipe; what was sent, and read, since then."""
        peer = self.other(side).peer
        for _ in range(20):
            self.splice(side)
            peer.data.clear()
            before, used = side.told.read, self.pipes.in_use
            sent = self.block(side)
            if self.pipes.in_use > used:
                return sent, side.told.read - before
            self.take(self.other(side), sent)
        raise AssertionError("nothing is ever left in a pipe")

    @property
    def pipes(self) -> Pipes:
        return self.plane.pipes


@contextmanager
def pumping(still: Still, *sides: Side) -> Iterator[Pump]:
    """A pump; when it ends, so have both sides."""
    pump = Pump(still, *sides)
    try:
        yield pump
    finally:
        for side in sides:
            side.peer.socket.close()
            side.transport.abortConnection()
        pump.settle(2)
    assert [side.events.count("lost") for side in sides] == [1, 1]


@contextmanager
def closing_both(still: Still, *sides: Side) -> Iterator[None]:
    """Two connections that are not joined; they end with the block."""
    yield
    for side in sides:
        side.peer.socket.close()
        side.transport.abortConnection()
    still.settle(2)


@pytest.fixture
def tcp(still: Still) -> Iterator[Pump]:
    """Two TCP connections whose kernel buffers are small."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp", small())) for _ in range(2)]
    with pumping(still, *sides) as pump:
        yield pump


@pytest.fixture(params=KINDS)
def pump(request: pytest.FixtureRequest, still: Still) -> Iterator[Pump]:
    """Each kind of connection with each."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets(kind)) for kind in request.param.split()]
    with pumping(still, *sides) as made:
        yield made


class Splices:
    """What stands in for os.splice: does it, and keeps a list of what was moved.

    :ivar moved: ("in" or "out", bytes or errno) of each call.
    :ivar refuse: the errnos that the next calls of each kind fail with.
    """

    def __init__(self) -> None:
        self.moved: list[tuple[str, int]] = []
        self.refuse: dict[str, list[int]] = {"in": [], "out": []}
        self._really = os.splice

    def __call__(
        self,
        source: int,
        sink: int,
        count: int,
        offset_src: None = None,
        offset_dst: None = None,
        flags: int = 0,
    ) -> int:
        into = stat.S_ISSOCK(os.fstat(source).st_mode)
        kind = "in" if into else "out"
        assert count > 0
        assert flags & os.SPLICE_F_NONBLOCK
        try:
            if self.refuse[kind]:
                number = self.refuse[kind].pop(0)
                raise OSError(number, os.strerror(number))
            moved = self._really(source, sink, count, flags=flags)
        except OSError as problem:
            assert problem.errno is not None
            self.moved.append((kind, -problem.errno))
            raise
        self.moved.append((kind, moved))
        return moved

    def total(self, kind: str) -> int:
        """How many bytes were moved this way."""
        return sum(count for what, count in self.moved if what == kind and count > 0)


@pytest.fixture
def splices(monkeypatch: pytest.MonkeyPatch) -> Splices:
    """What is spliced, which a test may refuse."""
    spy = Splices()
    monkeypatch.setattr(os, "splice", spy)
    return spy


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
    Bridge(session, legs[0], legs[1], Timeouts(), still, lambda: None).start()
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


# -- ends of data


def test_the_end_of_data_is_told_and_the_other_direction_goes_on(pump: Pump) -> None:
    """Each side in turn; nothing is passed on by itself."""
    client, server = pump.client, pump.server
    client.peer.socket.send(b"request")
    client.peer.end()
    assert pump.take(server, 7) == b"request"
    pump.until(lambda: client.events == ["eof"])
    assert not server.peer.ended
    server.transport.loseWriteConnection()
    pump.until(server.peer.take)
    server.peer.socket.send(b"response")
    server.peer.end()
    assert pump.take(client, 8) == b"response"
    pump.until(lambda: server.events == ["eof"])
    assert not client.peer.ended


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_close_while_splicing(first: str, pump: Pump) -> None:
    """What was sent before it arrives; the other direction may be bulk as well."""
    one, other = pump.client, pump.server
    if first == "server":
        one, other = other, one
    pump.bridge()
    pump.send(one, NOISE)
    one.peer.end()
    assert pump.take_all(other) == NOISE
    pump.until(lambda: one.events == ["eof"])
    assert other.events == []
    pump.send(other, NOISE)
    other.peer.end()
    assert pump.take_all(one) == NOISE
    pump.until(lambda: one.protocol.lost and other.protocol.lost)
    assert (one.told.read, other.told.read) == (LOTS, LOTS)


@pytest.mark.parametrize("spliced", [True, False])
def test_an_end_of_data_waits_behind_a_full_sink(
    spliced: bool, pump: Pump, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found when the source is read again, and passed on behind everything."""
    if not spliced:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
    pump.bridge()
    sent = pump.block(pump.client)
    pump.client.peer.end()
    pump.settle()
    assert pump.client.events == pump.server.events == []
    assert pump.take_all(pump.server) == NOISE[:sent]
    assert pump.client.events == ["eof"]
    assert pump.server.events == []
    assert pump.client.told.read == sent
    pump.server.peer.socket.send(b"answer")
    assert pump.take(pump.client, 6) == b"answer"


def test_an_end_behind_the_last_bytes_is_found_with_them(tcp: Pump) -> None:
    """In one turn: the kernel has said that it is there."""
    tcp.client.peer.socket.send(b"last words")
    tcp.client.peer.end()
    tcp.until(lambda: tcp.client.events == ["eof"])
    assert tcp.client.told.read == 10


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("lost", [False, True])
def test_last_bytes_that_can_not_wait_for_their_end_go_without(
    lost: bool, number: int, still: Still
) -> None:
    """MSG_MORE is refused: only what `send` says without it is a lost connection."""
    plane = Plane.of(still)
    client = Side(plane, sockets("tcp"))
    server = Side(plane, sockets("tcp"), kind=Scripted)
    with pumping(still, client, server) as pump:
        pump.bridge()
        sink = server.transport.getHandle()
        sink.script = [number, errno.EPIPE] if lost else [number]
        client.peer.socket.send(b"last words")
        client.peer.end()
        if lost:
            pump.until(lambda: server.protocol.lost)
            assert server.why is ConnectionLost
        else:
            assert pump.take_all(server) == b"last words"
        assert not sink.script


def test_a_side_with_nothing_more_to_be_written_is_not_blocked(tcp: Pump) -> None:
    """A pair that is quiet after an end of data is not stalled."""
    tcp.bridge()
    tcp.client.peer.end()
    tcp.until(tcp.server.peer.take)
    assert tcp.client.events == ["eof"]
    assert not tcp.client.transport.blocked
    assert not tcp.server.transport.blocked
    assert tcp.server.transport.unsent == 0


def test_a_pipe_is_nobodys_after_a_half_close(tcp: Pump, splices: Splices) -> None:
    """The direction that has ended splices no more, though its connection lives."""
    tcp.bridge()
    tcp.splice(tcp.client)
    tcp.client.peer.end()
    tcp.take_all(tcp.server)
    assert tcp.pipes.users == 0
    # Nothing is asked again and again.
    assert splices.moved.count(("in", 0)) <= 1


# -- urgent data


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_urgent_data_does_not_stop_what_is_behind_it(
    at_once: bool, bulk: bool, end: bool, tcp: Pump
) -> None:
    """The urgent byte comes in its place; splice(2) can't pass it, a read can."""
    client, server = tcp.client, tcp.server
    tcp.bridge()
    before = NOISE if bulk else b""
    tcp.send(client, before)
    tcp.take(server, len(before))
    if at_once:
        client.transport.pauseProducing()
    client.peer.socket.send(NOISE[:30_000])
    client.peer.socket.send(b"!", socket.MSG_OOB)
    if not at_once:
        tcp.settle()
    client.peer.socket.send(NOISE[30_000:60_000])
    if end:
        client.peer.end()
    tcp.settle()
    client.transport.resumeProducing()
    expected = before + NOISE[:30_000] + b"!" + NOISE[30_000:60_000]
    if end:
        assert tcp.take_all(server) == expected
    else:
        assert tcp.take(server, len(expected)) == expected
        # And on it goes.
        tcp.send(client, NOISE)
        assert tcp.take(server, len(expected) + LOTS) == expected + NOISE
    assert client.told.read == len(server.peer.data)


# -- what splice(2) may say


def test_a_source_that_has_nothing_to_splice_is_waited_for(
    tcp: Pump, splices: Splices
) -> None:
    """EAGAIN from the source: the next edge goes on, with the same pipe."""
    tcp.splice(tcp.client)
    tcp.settle()
    # That is what ended it: nothing is read in vain again and again.
    assert splices.moved[-1] == ("in", -errno.EAGAIN)
    calls = len(splices.moved)
    tcp.settle()
    assert len(splices.moved) == calls
    assert (tcp.pipes.users, tcp.pipes.in_use) == (1, 0)
    tcp.through(tcp.client, NOISE[:100_000])
    assert len(splices.moved) > calls


def test_a_sink_that_takes_nothing_yet_is_waited_for(
    tcp: Pump, splices: Splices
) -> None:
    """EAGAIN from the sink: what is in the pipe stays there until there is room."""
    client, server = tcp.client, tcp.server
    tcp.splice(client)
    got = len(server.peer.data)
    splices.refuse["out"] = [errno.EAGAIN]
    client.peer.socket.send(NOISE[:100_000])
    tcp.until(lambda: client.transport.blocked)
    read = client.told.read
    assert server.transport.unsent == read - got
    tcp.settle()
    assert client.told.read == read
    # The kernel, which has room, did not say so, as it did not refuse.
    tcp.plane.change_mask(server.transport.fileno(), EDGE_BOTH)
    tcp.take(server, got + 100_000)
    assert server.peer.data[got:] == NOISE[:100_000]
    assert tcp.plane.not_spliced == 0


#: What a kernel without splice(2) says, or a sandbox, or one that nobody knows.
REFUSALS = [
    errno.EINVAL,
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EIO,
    errno.EBADF,
    errno.ENOTTY,
]


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("where", ["in", "out"])
def test_a_socket_that_can_not_be_spliced_is_copied(
    where: str, number: int, pump: Pump, splices: Splices
) -> None:
    """By either side: asked once, counted, and what is in the pipe is kept."""
    splices.refuse[where] = [number] * 1000
    for _ in range(2):
        pump.client.peer.data.clear()
        pump.server.peer.data.clear()
        pump.send(pump.client, NOISE)
        assert pump.take(pump.server, LOTS) == NOISE
    failed = splices.moved.count((where, -number))
    assert failed == pump.plane.not_spliced == (1 if splices.moved else 0)
    assert (pump.pipes.users, pump.pipes.in_use) == (0, 0)
    # The end of data is none the less one.
    pump.client.peer.end()
    pump.until(lambda: "eof" in pump.client.events)
    assert not pump.client.protocol.lost


@pytest.mark.parametrize("number", REFUSALS)
def test_an_end_of_data_behind_a_refusal_is_no_loss(
    number: int, tcp: Pump, splices: Splices
) -> None:
    """It is there already when splice(2) is refused, by whatever errno."""
    tcp.splice(tcp.client)
    got = len(tcp.server.peer.data)
    tcp.client.transport.pauseProducing()
    tcp.client.peer.end()
    tcp.settle()
    splices.refuse["in"] = [number]
    tcp.client.transport.resumeProducing()
    tcp.until(lambda: tcp.client.events)
    assert tcp.client.events == ["eof"]
    assert len(tcp.server.peer.data) == got


@pytest.mark.parametrize("number", sorted(LOSSES))
def test_a_loss_that_splice_is_told_of_is_no_end_of_data(
    number: int, tcp: Pump, splices: Splices
) -> None:
    """The kernel tells of it once: to `recv` it looks like an end."""
    tcp.splice(tcp.client)
    tcp.client.transport.pauseProducing()
    tcp.client.peer.end()
    tcp.settle()
    splices.refuse["in"] = [number]
    tcp.client.transport.resumeProducing()
    tcp.until(lambda: tcp.client.events)
    assert tcp.client.events == ["lost"]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOBUFS])
@pytest.mark.parametrize("where", ["in", "out"])
def test_a_kernel_that_is_short_of_memory_is_asked_to_splice_again(
    where: str, number: int, tcp: Pump, splices: Splices
) -> None:
    splices.refuse[where] = [number]
    tcp.through(tcp.client, NOISE)
    assert tcp.plane.not_spliced == 1
    calls = len(splices.moved)
    tcp.through(tcp.client, NOISE)
    assert splices.total("out") > 0
    assert len(splices.moved) > calls


@pytest.mark.cost
def test_a_socket_that_can_not_be_spliced_is_not_asked_again(
    tcp: Pump, splices: Splices
) -> None:
    """A test of cost.  Not after its own full reads either."""
    splices.refuse["out"] = [errno.EINVAL] * 1000
    for _ in range(3):
        for side in (tcp.client, tcp.server):
            tcp.send(side, NOISE)
    assert tcp.take(tcp.client, 3 * LOTS) == NOISE * 3
    assert tcp.take(tcp.server, 3 * LOTS) == NOISE * 3
    assert len([each for each in splices.moved if each[1] < 0]) <= 2
    assert tcp.plane.not_spliced <= 2


def test_what_was_in_the_pipe_of_a_sink_that_can_not_be_spliced_is_first(
    tcp: Pump, splices: Splices
) -> None:
    """Before what was written to it meanwhile, and before what is read later."""
    sent, read = tcp.fill_pipe(tcp.client)
    tcp.server.transport.write(b"a word of ours")
    splices.refuse["out"] = [errno.EINVAL]
    got = tcp.take(tcp.server, sent + 14)
    assert got == NOISE[:read] + b"a word of ours" + NOISE[read:sent]
    assert tcp.plane.not_spliced == 1


@pytest.mark.parametrize("refused", [None, errno.EPERM])
def test_a_sink_whose_peer_is_gone_is_lost(
    refused: int | None, tcp: Pump, splices: Splices
) -> None:
    """Whoever is told of it first, splice or `send`; the pipe is closed.

    What its peer had sent is relayed before that is told.
    """
    client, server = tcp.client, tcp.server
    tcp.fill_pipe(client)
    server.peer.socket.send(b"last words")
    server.peer.reset()
    if refused is not None:
        splices.refuse["out"] = [refused]
    tcp.until(lambda: server.protocol.lost)
    assert splices.moved[-1][0] == "out"
    assert splices.moved[-1][1] < 0
    assert server.why is ConnectionLost
    assert tcp.take(client, 10) == b"last words"
    assert tcp.plane.not_spliced == 0
    # What it can't be given any more is not kept.
    assert (server.transport.unsent, tcp.pipes.in_use) == (0, 0)
    # The other side is somebody else's to end.
    assert client.events == []
    assert not client.transport.blocked


@pytest.mark.parametrize("refused", [None, *REFUSALS])
def test_a_source_that_is_reset_while_splicing_is_lost(
    refused: int | None, tcp: Pump, splices: Splices
) -> None:
    """Whoever is told of it first, splice or `recv`: never as an end of data."""
    client, server = tcp.client, tcp.server
    tcp.splice(client)
    tcp.settle()
    client.peer.reset()
    if refused is not None:
        splices.refuse["in"] = [refused]
    tcp.until(lambda: client.protocol.lost)
    assert splices.moved[-1][0] == "in"
    assert client.events == ["lost"]
    assert client.why is ConnectionLost
    assert server.events == []
    assert len(server.peer.data) == client.told.read
    assert tcp.plane.not_spliced == 0


# -- reads that end early


class Scripted(socket.socket):
    """A socket whose send fails as often as the script says; it counts reads."""

    script: list[int] = []
    reads = 0

    def recv_into(self, *args: Any, **keywords: Any) -> int:
        self.reads += 1
        return super().recv_into(*args, **keywords)

    def send(self, data: Any, flags: int = 0) -> int:
        if self.script:
            number = self.script.pop(0)
            raise OSError(number, os.strerror(number))
        return super().send(data, flags)


@pytest.mark.parametrize("joined", [True, False])
def test_a_descriptor_that_is_passed_ends_a_read_and_not_the_data(
    joined: bool, still: Still
) -> None:
    """Only on a UNIX socket: there is more behind it, for which no edge will come."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("unix")) for _ in range(2)]
    one, other = sides
    one.transport.pauseProducing()
    for count in range(5):
        with open(__file__) as file:
            rights = (
                socket.SOL_SOCKET,
                socket.SCM_RIGHTS,
                file.fileno().to_bytes(4, "little"),
            )
            one.peer.socket.sendmsg([b"%d" % count], [rights])
    if joined:
        with pumping(still, *sides) as pump:
            one.transport.resumeProducing()
            assert pump.take(other, 5) == b"01234"
        return
    one.transport.resumeProducing()
    still.until(lambda: one.protocol.data == b"01234")
    for side in sides:
        side.peer.socket.close()
        side.transport.abortConnection()
    still.settle()


@pytest.mark.cost
def test_the_end_is_not_looked_for_twice(still: Still) -> None:
    """A test of cost.

    A short read and the kernel's word that an end is behind it: nothing follows.
    """
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp"), kind=Scripted) for _ in range(2)]
    with pumping(still, *sides) as pump:
        one, other = sides
        one.transport.pauseProducing()
        one.peer.socket.send(b"last words")
        one.peer.end()
        # Let the kernel say it all.
        still.until(lambda: select.select([one.transport], [], [], 0)[0])
        still.settle()
        reads = one.transport.getHandle().reads
        one.transport.resumeProducing()
        assert pump.take(other, 10) == b"last words"
        assert one.events == ["eof"]
        assert one.transport.getHandle().reads == reads + 1


@pytest.mark.cost
def test_reads_are_as_few_as_ever_behind_urgent_data(still: Still) -> None:
    """A test of cost.  Once it is passed, one read for what comes is enough again."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp"), kind=Scripted) for _ in range(2)]
    with pumping(still, *sides) as pump:
        one, other = sides
        one.peer.socket.send(b"!", socket.MSG_OOB)
        one.peer.socket.send(b"one")
        assert pump.take(other, 4) == b"!one"
        still.settle()
        reads = one.transport.getHandle().reads
        one.peer.socket.send(b"two")
        assert pump.take(other, 7) == b"!onetwo"
        still.settle()
        assert one.transport.getHandle().reads == reads + 1


# -- peers that vanish


class Unreachable(socket.socket):
    """A socket whose reads fail with what it is told, once."""

    number = 0

    def _fail(self) -> None:
        number, self.number = self.number, 0
        if number:
            raise OSError(number, os.strerror(number))

    def recv(self, *args: Any) -> bytes:
        self._fail()
        return super().recv(*args)

    def recv_into(self, *args: Any, **keywords: Any) -> int:
        self._fail()
        return super().recv_into(*args, **keywords)


@pytest.mark.parametrize("number", VANISHED)
@pytest.mark.parametrize("joined", [True, False])
def test_a_peer_that_vanished_is_told_apart_from_a_reset(
    joined: bool, number: int, still: Still
) -> None:
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp"), kind=Unreachable) for _ in range(2)]
    one = sides[0]
    with pumping(still, *sides) if joined else closing_both(still, *sides):
        one.transport.getHandle().number = number
        one.peer.socket.send(b"x")
        still.until(lambda: one.protocol.lost)
        assert one.why is PeerVanished
        assert str(one.protocol.reason.value) == os.strerror(number)


@pytest.mark.parametrize("bulk", [True, False])
def test_a_sink_that_vanished_is_told_apart_from_one_that_reset(
    bulk: bool, tcp: Pump, splices: Splices
) -> None:
    """A write is told of it, maybe splice, and the kernel says it once."""
    client, server = tcp.client, tcp.server
    server.transport.getHandle().setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50
    )
    if bulk:
        tcp.fill_pipe(client)
    else:
        server.transport.write(NOISE)
    tcp.until(lambda: server.protocol.lost)
    assert server.events == ["lost"]
    assert server.why is PeerVanished
    assert bulk is (("out", -errno.ETIMEDOUT) in splices.moved)


@pytest.mark.parametrize("number", VANISHED)
def test_a_source_that_vanished_is_told_apart_from_one_that_reset(
    number: int, tcp: Pump, splices: Splices
) -> None:
    """Splice was told of it, and what `recv` finds then looks like an end."""
    client = tcp.client
    tcp.splice(client)
    tcp.settle()
    splices.refuse["in"] = [number]
    client.peer.end()
    tcp.until(lambda: client.protocol.lost)
    assert client.events == ["lost"]
    assert client.why is PeerVanished
    assert str(client.protocol.reason.value) == os.strerror(number)


# -- resets


@implementer(IResetListener)
class Hearing(Recorder):
    """Says whether it wants to hear of a reset while it does not read."""

    def __init__(self, hears: bool) -> None:
        super().__init__()
        self.hears = hears

    def wants_reset(self) -> bool:
        return self.hears


@pytest.mark.parametrize("pauses", ["before", "as it reads"])
@pytest.mark.parametrize("hears", [True, False])
def test_a_reset_while_paused_is_told_to_who_wants_to_hear(
    hears: bool, pauses: str, still: Still
) -> None:
    """By its event, which may have come before the pause; to others behind the data."""
    plane = Plane.of(still)
    protocol = Hearing(hears)
    side = Side(plane, sockets("tcp"), protocol)
    with closing_both(still, side):
        if pauses == "before":
            side.transport.pauseProducing()
        else:
            protocol.on["data"] = side.transport.pauseProducing
        side.peer.socket.send(NOISE[:200_000])
        side.peer.reset()
        still.settle()
        if hears:
            assert side.events[-1] == "lost"
            assert side.why is PeerReset
            assert len(protocol.data) <= READ_SIZE
        else:
            assert not protocol.lost
            protocol.on.clear()
            side.transport.resumeProducing()
            still.until(lambda: protocol.lost)
            assert side.why is ConnectionLost
            assert protocol.data == NOISE[:200_000]


@pytest.mark.parametrize("how", ["at once", "later"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_reset_behind_the_end_of_data_is_told_at_once(
    joined: bool, how: str, still: Still
) -> None:
    """Nothing is read any more that would tell of it; the end is told first."""
    plane = Plane.of(still)
    one, other = [Side(plane, sockets("tcp")) for _ in range(2)]
    joining = pumping if joined else closing_both
    with joining(still, one, other):
        one.peer.socket.send(b"last words")
        one.peer.end()
        if how == "later":
            still.until(lambda: "eof" in one.events)
            still.settle()
            assert not one.protocol.lost
        one.peer.reset()
        still.until(lambda: one.protocol.lost)
        assert one.events[-2:] == ["eof", "lost"]
        assert one.why is PeerReset
        if joined:
            still.until(lambda: other.peer.take() or other.peer.data == b"last words")
            assert other.events == []


def test_a_unix_peer_that_leaves_its_answer_unread_is_told_at_once(
    still: Still,
) -> None:
    """The nearest to a reset that a UNIX socket has."""
    side = Side(Plane.of(still), sockets("unix"))
    with closing_both(still, side):
        side.transport.write(b"an answer")
        side.peer.end()
        still.until(lambda: "eof" in side.events)
        still.settle()
        assert not side.protocol.lost
        side.peer.socket.close()
        still.until(lambda: side.protocol.lost)
        assert side.why is PeerReset


def test_a_peer_that_vanished_behind_its_end_is_told_apart_from_one_that_reset(
    still: Still,
) -> None:
    class Vanished(socket.socket):
        def getsockopt(self, level: int, option: int, *size: int) -> Any:
            if option == socket.SO_ERROR:
                return errno.ETIMEDOUT
            return super().getsockopt(level, option, *size)

    side = Side(Plane.of(still), sockets("tcp"), kind=Vanished)
    with closing_both(still, side):
        side.peer.end()
        side.peer.reset()
        still.until(lambda: side.protocol.lost)
        assert side.why is PeerVanished


def test_an_event_whose_error_was_taken_already_is_no_loss(still: Still) -> None:
    """Whoever took it tells."""
    side = Side(Plane.of(still), sockets("tcp"))
    with closing_both(still, side):
        side.peer.end()
        still.until(lambda: "eof" in side.events)
        side.transport.ready(select.EPOLLIN | select.EPOLLERR)
        assert not side.protocol.lost
        # Nor is an abort, which is told as such.
        side.transport.abortConnection()
        side.peer.reset()
        side.transport.ready(select.EPOLLIN | select.EPOLLERR)
        still.settle()
        assert side.why is ConnectionAborted


def test_a_source_that_reset_and_was_only_paused_is_read_to_its_end(tcp: Pump) -> None:
    """Of two that are joined, what is in the kernel is still to be delivered."""
    client = tcp.client
    client.protocol.wants_reset = lambda: True
    alsoProvides(client.protocol, IResetListener)
    client.transport.pauseProducing()
    client.peer.socket.send(NOISE[:60_000])
    client.peer.reset()
    tcp.settle()
    assert not client.protocol.lost
    client.transport.resumeProducing()
    assert tcp.take(tcp.server, 60_000) == NOISE[:60_000]
    tcp.until(lambda: client.protocol.lost)


def test_an_abort_behind_the_end_of_data_is_a_reset_too(tcp: Pump) -> None:
    """The peer has ended its side, and waits for an answer that will not come."""
    client = tcp.client
    client.peer.end()
    tcp.until(lambda: client.events == ["eof"])
    client.transport.abortConnection()
    tcp.until(lambda: client.protocol.lost)
    assert client.why is ConnectionAborted
    with pytest.raises(ConnectionResetError):
        client.peer.take()


@pytest.mark.parametrize("spliced", [True, False])
def test_what_was_read_before_a_reset_is_delivered(
    spliced: bool, tcp: Pump, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is in a full pipe; the reset is found when the source is read again."""
    if not spliced:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
    client, server = tcp.client, tcp.server
    tcp.block(client)
    client.peer.reset()
    tcp.settle()
    assert client.transport.blocked
    assert not client.protocol.lost
    waits = server.transport.unsent
    assert waits
    tcp.until(lambda: server.peer.take() or client.protocol.lost)
    assert client.why is ConnectionLost
    assert server.events == []
    got = tcp.take(server, client.told.read)
    assert got == NOISE[: client.told.read]
    assert server.transport.unsent == 0


def test_a_reset_that_is_read_is_told_behind_the_data(tcp: Pump) -> None:
    client, server = tcp.client, tcp.server
    client.transport.pauseProducing()
    client.peer.socket.send(b"last words")
    tcp.settle()
    client.peer.reset()
    tcp.settle()
    client.transport.resumeProducing()
    assert tcp.take(server, 10) == b"last words"
    tcp.until(lambda: client.protocol.lost)
    assert client.why is ConnectionLost
    assert client.events == ["lost"]


def test_a_write_that_fails_is_a_lost_connection(tcp: Pump) -> None:
    """While it is copied: its source is read on, and what it sent itself is relayed."""
    client, server = tcp.client, tcp.server
    server.transport.pauseProducing()
    server.peer.socket.send(b"last words")
    tcp.settle()
    server.peer.reset()
    tcp.settle()
    client.peer.socket.send(b"for nobody")
    tcp.until(lambda: client.told.read == 10)
    # It is paused: no more is to be known of it than that.
    tcp.until(lambda: server.protocol.lost)
    assert server.why is ConnectionLost
    assert client.events == []


def test_a_connection_that_broke_is_read_to_the_end(tcp: Pump) -> None:
    """As a reset: what came before it is relayed."""
    client, server = tcp.client, tcp.server
    server.transport.pauseProducing()
    server.peer.socket.send(b"last words")
    tcp.settle()
    server.peer.reset()
    tcp.settle()
    server.transport._reading = True
    client.peer.socket.send(b"for nobody")
    tcp.until(lambda: server.protocol.lost)
    assert tcp.take(client, 10) == b"last words"
    assert server.events == ["lost"]
    assert server.why is ConnectionLost


def test_a_connection_that_broke_while_its_own_sink_is_full_is_lost_at_once(
    tcp: Pump,
) -> None:
    """It can't be read, so there is nothing to wait for."""
    client, server = tcp.client, tcp.server
    tcp.block(server)
    assert server.transport.blocked
    server.peer.reset()
    tcp.settle()
    client.peer.socket.send(b"for nobody")
    tcp.until(lambda: server.protocol.lost)
    assert server.why is ConnectionLost


# -- one batch


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_side_that_the_other_one_ends_in_the_same_batch(
    first: str, how: str, tcp: Pump
) -> None:
    """Its own event is in the batch as well, and comes to nothing."""
    pair = tcp.client, tcp.server
    for side, other in (pair, pair[::-1]):

        def end(other: Side = other) -> None:
            if how == "abort":
                other.transport.abortConnection()
            else:
                other.transport.loseConnection()

        side.protocol.on["lost"] = end
        side.transport.pauseProducing()
    ready = pair if first == "client" else pair[::-1]
    for side in ready:
        side.peer.socket.send(b"x")
        tcp.settle()
        side.peer.reset()
        tcp.settle()
        side.transport.resumeProducing()
    tcp.settle()
    assert [side.events for side in pair] == [["lost"], ["lost"]]


def test_a_pair_that_ends_within_one_event(tcp: Pump) -> None:
    """The second end of data closes both, while the other has an event behind it."""
    client, server = tcp.client, tcp.server
    tcp.bridge()
    client.peer.socket.send(b"request")
    client.peer.end()
    assert tcp.take(server, 7) == b"request"
    tcp.until(server.peer.take)
    server.peer.socket.send(b"response")
    server.peer.end()
    # Its event is in the batch too.
    client.peer.socket.shutdown(socket.SHUT_RD)
    tcp.until(lambda: client.protocol.lost and server.protocol.lost)
    for side in (client, server):
        assert side.events.count("lost") == 1
        assert side.why is ConnectionDone


def test_an_abort_is_not_undone_by_writability_in_the_same_batch(still: Still) -> None:
    """Nothing is sent any more, and the peer learns of a reset."""
    plane = Plane.of(still)
    other = Side(plane, sockets("unix"))
    side = Side(plane, sockets("tcp", small()))
    while not side.transport.unsent:
        side.transport.write(bytes(4096))
        still.settle(1)
    # So little that it would all go at once.
    other.protocol.on["data"] = side.transport.abortConnection
    # First this event, then room for the rest; both are there before the turn.
    other.peer.socket.send(b"now")

    def room() -> bool:
        with suppress(BlockingIOError):
            side.peer.socket.recv(1 << 20)
        return bool(select.select([], [side.transport], [], 0)[1])

    limit = time.monotonic() + PATIENCE
    while not room():
        assert time.monotonic() < limit
    still.turn()
    still.settle()
    assert side.why is ConnectionAborted
    with pytest.raises(ConnectionResetError):
        while side.peer.socket.recv(1 << 20):
            pass
    side.peer.socket.close()
    other.peer.socket.close()
    still.until(lambda: "eof" in other.events)
    other.transport.loseConnection()


# -- what the kernel is short of


@pytest.mark.parametrize("count", [100, BUFFER_LIMIT])
def test_a_kernel_without_memory_is_asked_again(
    count: int, still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOBUFS says nothing about the connection, and no edge says when it is over."""
    side = Side(Plane.of(still), sockets("unix"), kind=Scripted)
    monkeypatch.setattr(Scripted, "script", [errno.ENOBUFS] * 3)
    side.transport.write(NOISE[:count])
    assert side.transport.unsent == count
    side.transport.write(b"!")
    still.until(lambda: side.peer.take() or len(side.peer.data) > count)
    assert side.peer.data == NOISE[:count] + b"!"
    assert Scripted.script == []
    assert side.events == []
    side.peer.socket.close()
    still.until(lambda: "eof" in side.events)
    side.transport.loseConnection()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EPIPE])
def test_a_relay_to_a_kernel_without_memory_goes_on(
    number: int, still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost but what can't be sent to a peer that is gone."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp"), kind=Scripted) for _ in range(2)]
    with pumping(still, *sides) as pump:
        monkeypatch.setattr(Scripted, "script", [number] * 2)
        sides[0].peer.socket.send(b"data")
        if number == errno.ENOBUFS:
            assert pump.take(sides[1], 4) == b"data"
            assert sides[1].events == []
        else:
            pump.until(lambda: sides[1].protocol.lost)
            assert sides[1].transport.unsent == 0
        assert sides[0].told.read == 4
        assert sides[0].events == []


# -- what programs may do besides


def test_a_producer_that_fails_ends_its_own_connection(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """When it is resumed from the plane; the other connections go on."""

    def fail() -> None:
        raise ZeroDivisionError

    side = Side(Plane.of(still), sockets("unix"))
    producer = Producer(resume=fail)
    side.transport.registerProducer(producer, True)
    side.transport.write(bytes(BUFFER_LIMIT + 1))
    assert producer.asked == ["pause"]
    still.until(lambda: side.peer.take() or side.protocol.lost)
    assert producer.asked == ["pause", "resume", "stop"]
    assert side.why is ZeroDivisionError
    logged_failures.take("resumeProducing of the producer")
    side.peer.socket.close()


def test_a_protocol_that_fails_behind_its_abort_is_closed(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """As Twisted's are: the exception is the reason, and the close an orderly one."""

    def fail() -> None:
        side.transport.abortConnection()
        raise ZeroDivisionError

    side = Side(Plane.of(still), sockets("tcp"), Recorder(data=fail))
    side.peer.socket.send(b"data")
    still.until(lambda: side.protocol.lost)
    assert side.why is ZeroDivisionError
    still.until(side.peer.take)
    logged_failures.take("dataReceived of")
    side.peer.socket.close()
    still.settle()


def test_what_fails_as_a_connection_ends_is_logged(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """Producer and protocol are each told, whatever the other does."""

    def fail() -> None:
        raise ZeroDivisionError

    side = Side(Plane.of(still), sockets("unix"), Recorder(lost=fail))
    side.transport.registerProducer(Producer(stop=fail), True)
    side.transport.abortConnection()
    still.settle()
    assert side.events == ["lost"]
    logged_failures.take("stopProducing of")
    logged_failures.take("connectionLost of")
    side.peer.socket.close()


def test_a_connection_that_is_lost_is_lost_once(still: Still) -> None:
    """Whoever says it again: the reactor that stops, or the plane."""
    side = Side(Plane.of(still), sockets("unix"))
    reason = Failure(CONNECTION_LOST)
    side.transport.connectionLost(reason)
    side.transport.connectionLost(reason)
    assert side.events == ["lost"]
    assert side.protocol.reason is reason
    assert side.peer.take()
    side.peer.socket.close()


def test_a_connection_says_what_it_is(still: Still) -> None:
    """In a log, and to a program that asks."""
    side = Side(Plane.of(still), sockets("tcp"))
    transport = side.transport
    assert repr(transport).startswith(f"<PlaneTransport {transport.fileno()} of ")
    assert transport.logPrefix() == "Recorder"
    assert transport.reactor is still
    assert transport.getHandle().fileno() == transport.fileno()
    assert (transport.connected, transport.disconnected) == (True, False)
    assert transport.TLS is transport.streamingProducer is False
    side.peer.socket.close()
    still.until(lambda: "eof" in side.events)
    transport.loseConnection()
    assert (transport.connected, transport.disconnected) == (False, True)
    assert transport.fileno() == -1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_read_is_no_larger_than_twisteds(kind: str, still: Still) -> None:
    """A protocol gets as much at once as it would get from Twisted, and all of it."""
    protocol, largest = Recorder(), 0
    received = protocol.dataReceived

    def note(data: bytes) -> None:
        nonlocal largest
        largest = max(largest, len(data))
        received(data)

    protocol.dataReceived = note  # type: ignore[method-assign]
    side = Side(Plane.of(still), sockets(kind), protocol)
    view = memoryview(NOISE)[: 4 << 20]

    def sent() -> bool:
        nonlocal view
        with suppress(BlockingIOError):
            view = view[side.peer.socket.send(view) :]
        return not view and len(protocol.data) == 4 << 20

    still.until(sent)
    assert protocol.data == NOISE[: 4 << 20]
    assert largest == READ_SIZE
    side.peer.end()
    still.until(lambda: side.events == ["eof"])
    side.transport.loseConnection()
    side.peer.socket.close()


def a_session(still: Still) -> list[weakref.ref[Leg]]:
    """Relay much both ways, each end in turn; return the two legs' references."""
    plane, session, over = Plane.of(still), Session(1, "", "", 0.0), []
    legs = Leg(session.up), Leg(session.down)
    client, server = (Side(plane, sockets("tcp"), leg) for leg in legs)
    Bridge(session, *legs, Timeouts(), still, lambda: over.append(1)).start()
    assert legs[0].spliced
    assert legs[1].spliced
    for one, other in ((client, server), (server, client)):
        view = memoryview(NOISE)

        def sent(one: Side = one, other: Side = other) -> bool:
            nonlocal view
            with suppress(BlockingIOError):
                view = view[one.peer.socket.send(view) :]
            other.peer.take()
            return not view

        still.until(sent)
        one.peer.end()
        still.until(other.peer.take)
        assert other.peer.data == NOISE
    still.until(lambda: over)
    assert over == [1]
    assert session.ending is Ending.DONE
    assert (session.up.read, session.down.read) == (LOTS, LOTS)
    for side in (client, server):
        side.peer.socket.close()
    return [weakref.ref(leg) for leg in legs]


@pytest.mark.cost
def test_a_session_over_the_plane_ends_as_any_other(still: Still) -> None:
    """A test of cost.  And leaves nothing for the collector: it is freed as it ends."""
    gc.collect()
    gc.disable()
    try:
        assert [leg() for leg in a_session(still)] == [None, None]
    finally:
        gc.enable()


# -- both at once


def joined_legs(
    still: Still, client: type[Leg] = Leg, server: type[Leg] = Leg
) -> tuple[Session, list[Leg], list[Side], list[int]]:
    """Two legs on a Bridge, whose sides are spliced; and what counts its end."""
    plane, session, over = Plane.of(still), Session(1, "", "", 0.0), list[int]()
    legs = [client(session.up), server(session.down)]
    sides = [Side(plane, sockets("tcp"), leg) for leg in legs]
    Bridge(session, *legs, Timeouts(), still, lambda: over.append(1)).start()
    assert all(leg.spliced for leg in legs)
    return session, legs, sides, over


def end_both(still: Still, sides: list[Side]) -> None:
    """Each far end says its last word, and hears the other's."""
    one, other = sides
    one.peer.socket.send(b"question")
    one.peer.end()
    still.until(other.peer.take)
    assert other.peer.data == b"question"
    other.peer.socket.send(b"answer")
    other.peer.end()
    still.until(one.peer.take)
    assert one.peer.data == b"answer"
    for side in sides:
        side.peer.socket.close()


def test_a_pair_whose_both_ends_have_come_is_closed_at_once(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word to the legs: the Bridge knows, and tells them."""
    told: list[object] = []
    monkeypatch.setattr(
        PlaneTransport, "connectionLost", lambda *args: told.append(args)
    )
    session, legs, sides, over = joined_legs(still)
    end_both(still, sides)
    still.until(lambda: over)
    assert over == [1]
    assert session.ending is Ending.DONE
    assert not told
    for leg, side in zip(legs, sides, strict=True):
        assert not leg.alive
        assert leg.bridge is leg.peer is None
        assert not side.transport.connected
        assert side.transport.disconnecting
        assert side.transport.fileno() == -1
        # What comes too late finds nobody.
        side.transport.write(b"late")
        side.transport.resumeProducing()
        side.transport.abortConnection()
        side.transport.proceed()
    still.settle()
    assert over == [1]


class Mourner(Leg):
    """A leg that wants to hear of its loss."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reason = reason
        super().connectionLost(reason)


@pytest.mark.cost
def test_what_was_closed_at_once_is_freed_at_once(still: Still) -> None:
    """A test of cost.

    Nothing is left for the collector, whose work would cost each session a tenth.
    """
    gc.collect()
    gc.disable()
    try:
        session, legs, sides, over = joined_legs(still)
        end_both(still, sides)
        still.until(lambda: over)
        left = [weakref.ref(leg) for leg in legs]
        del session, legs, sides
        assert [leg() for leg in left] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("which", [0, 1])
def test_a_leg_with_a_loss_of_its_own_hears_of_it(which: int, still: Still) -> None:
    kinds: list[type[Leg]] = [Leg, Leg]
    kinds[which] = Mourner
    session, legs, sides, over = joined_legs(still, *kinds)
    end_both(still, sides)
    still.until(lambda: over)
    mourner: Any = legs[which]
    assert mourner.reason.type is ConnectionDone
    assert over == [1]
    assert session.ending is Ending.DONE


@pytest.mark.parametrize("which", ["client", "server"])
def test_an_aborted_side_is_not_closed_as_if_it_were_not(which: str, tcp: Pump) -> None:
    """It is a reset, as was asked for."""
    client, server = tcp.client, tcp.server
    for side in (client, server):
        side.peer.end()
    tcp.until(lambda: client.events == server.events == ["eof"])
    aborted = client if which == "client" else server
    aborted.transport.abortConnection()
    assert not client.transport.close_both(client.protocol, server.protocol)
    tcp.until(lambda: aborted.protocol.lost)
    assert aborted.why is ConnectionAborted
    tcp.other(aborted).transport.loseConnection()


def test_a_splicer_that_fails_costs_nobody_else_anything(
    tcp: Pump, logged_failures: LoggedFailures
) -> None:
    def fail(direction: Direction, sink: Any) -> None:
        raise RuntimeError("the splicer fails")

    tcp.ended = fail  # type: ignore[method-assign]
    tcp.client.peer.end()
    tcp.until(lambda: tcp.client.protocol.lost)
    logged_failures.take("the end of data of")
    assert tcp.client.why is RuntimeError
    assert tcp.server.transport.connected


def test_what_can_not_be_closed_at_once(tcp: Pump) -> None:
    """Another's connection, one that has not ended, one that was laden, a lost one."""
    client, server = tcp.client, tcp.server
    protocols = client.protocol, server.protocol
    assert not client.transport.close_both(*protocols)  # nothing has ended
    client.peer.end()
    tcp.until(lambda: client.events == ["eof"])
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    server.peer.end()
    tcp.until(lambda: server.events == ["eof"])
    assert not client.transport.close_both(server.protocol, client.protocol)
    assert not client.transport.close_both(client.protocol, object())
    producer = Producer()
    server.transport.registerProducer(producer, True)
    server.transport.unregisterProducer()
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    client.transport.loseConnection()
    assert client.protocol.lost
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    server.transport.loseConnection()
    assert server.protocol.lost
