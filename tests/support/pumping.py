"""Two connections of the plane that are joined, as a Bridge joins them.

Plain sockets are at their far ends:

    client  <->  transport  =  transport  <->  server
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from zope.interface import implementer

from relayd.core.interfaces import ISplicer
from relayd.core.session import Direction, PacedDirection
from relayd.net.transports import set_options
from relayd.plane.connection_base import EDGE_READ
from relayd.plane.pipes import Pipes
from relayd.plane.poller import Plane
from relayd.plane.transport import transport_class
from tests.support.contracts import Peer, Recorder
from tests.support.standing import Still, still

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


class Slow:
    """A pace that grants what a test says.

    :ivar spent: bytes that were read.
    """

    def __init__(self, side: Side) -> None:
        self.granted = self.spent = 0
        self.lifted = False
        self._transport = side.transport
        side.told = PacedDirection(side.told)
        side.told.pace = self  # type: ignore[assignment]
        side.transport.keep_pace(side.told)

    def grant(self, most: int) -> int:
        return most if self.lifted else min(most, self.granted - self.spent)

    def spend(self, count: int) -> None:
        self.spent += count

    def rest(self) -> None:
        """Nobody else wants it."""

    def wait(self) -> None:
        self._transport.pauseProducing()

    def lift(self) -> None:
        self.lifted = True

    def more(self, count: int) -> None:
        self.granted += count
        self._transport.resumeProducing()


@implementer(ISplicer)
class Pump:
    """Two connections that relay to each other."""

    def __init__(self, still: Still, client: Side, server: Side) -> None:
        self.still, self.plane = still, Plane.of(still)
        self.client, self.server = client, server
        self.until, self.settle = still.until, still.settle
        self._bridges = False
        self._join()

    def _join(self) -> None:
        client, server = self.client, self.server
        assert client.transport.splice(server.transport, client.told, server.told, self)

    def ended(self, direction: Direction, sink: Any) -> None:
        """See :meth:`ISplicer.ended`: as the end of data of its protocol."""
        side = self.client if direction is self.client.told else self.server
        assert sink is self.other(side).transport
        side.protocol.readConnectionLost()
        self._pass_end(sink)

    def _pass_end(self, sink: Any) -> None:
        """Nothing more comes for `sink`."""
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
            read = side.told.read, len(side.protocol.data)
            self.settle(1)
            moved = part or (side.told.read, len(side.protocol.data)) != read
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
    :ivar midway: called when the next "out" has moved half of what it was to move.
    """

    def __init__(self) -> None:
        self.moved: list[tuple[str, int]] = []
        self.refuse: dict[str, list[int]] = {"in": [], "out": []}
        self.midway: Callable[[], None] | None = None
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
            midway = None if into else self.midway
            if midway is not None:
                self.midway, count = None, count // 2
            moved = self._really(source, sink, count, flags=flags)
            if midway is not None:
                midway()
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
