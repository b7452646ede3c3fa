"""Large reads, for who expects bulk, and large writes with a producer."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
from twisted.python.failure import Failure

from relayd.core.session import PacedDirection
from relayd.net.transports import WriteRefused
from relayd.plane.connection import READ_SIZE
from relayd.plane.connection_base import DONE, UNREAD
from relayd.plane.large_reads import LARGE_READ, LONGEST
from relayd.plane.poller import MAX_SHARE, Plane
from relayd.plane.writing import BUFFER_LIMIT
from relayd.testing import Producer
from tests.support.one_way import OneWay, sides_of, tcp
from tests.support.pumping import NOISE, Scripted, Side, sockets
from tests.support.standing import Still, still

__all__ = ["still", "tcp"]


def end(still: Still, *sides: Side) -> None:
    for side in sides:
        side.peer.socket.close()
        side.transport.abortConnection()
    still.until(lambda: all(side.protocol.lost for side in sides))
    still.settle(2)


@pytest.mark.parametrize("much", [True, False])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_who_expects_bulk_is_given_more_at_once(
    kind: str, much: bool, still: Still
) -> None:
    [side] = sides_of(still, kind)
    sizes: list[int] = []
    side.protocol.on["data"] = lambda: sizes.append(len(side.protocol.data))
    if much:
        side.transport.read_much()
    side.transport.pauseProducing()
    side.peer.socket.setblocking(False)
    sent = side.peer.socket.send(NOISE[:LARGE_READ])
    assert sent > READ_SIZE
    still.settle()
    side.transport.resumeProducing()
    still.until(lambda: side.protocol.data == NOISE[:sent])
    assert sizes[0] == (sent if much else READ_SIZE)
    end(still, side)


def test_large_reads_may_become_spliced_ones(tcp: OneWay) -> None:
    tcp.server.transport.read_much()
    tcp.through(tcp.server, NOISE)
    tcp.stop_passing(tcp.server)
    tcp.splice_one_way(tcp.server)
    tcp.splice(tcp.server)
    assert tcp.server.told.spliced > 0


@pytest.mark.parametrize("first", ["pace", "much"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_pace_is_kept(kind: str, first: str, still: Still) -> None:
    """Whichever was asked for first."""

    class Three:
        asked = 0

        def grant(self, most: int) -> int:
            self.asked += 1
            return 3 if self.asked == 1 else 0

        def wait(self) -> None:
            side.transport.pauseProducing()

    [side] = sides_of(still, kind)
    direction, pace = PacedDirection(), Three()
    direction.pace = pace  # type: ignore[assignment]
    if first == "much":
        side.transport.read_much()
    side.transport.keep_pace(direction)
    if first == "pace":
        side.transport.read_much()
    side.peer.socket.send(b"1234567")
    still.until(lambda: pace.asked == 2)
    assert side.protocol.data == b"123"
    direction.pace = None
    end(still, side)


class Full(socket.socket):
    """Has more than anybody reads.

    :ivar reads: how often it was read.
    """

    reads = 0

    def recv(self, most: int, flags: int = 0) -> bytes:
        self.reads += 1
        return bytes(most)


@pytest.fixture(params=["tcp", "unix"])
def full(request: pytest.FixtureRequest, still: Still) -> Iterator[Side]:
    """One that expects bulk, and gets as much as it reads."""
    side = Side(Plane.of(still), sockets(request.param), kind=Full)
    side.transport.read_much()
    yield side
    end(still, side)


@pytest.mark.parametrize(("share", "reads"), [(1, 1), (LARGE_READ, 1), (MAX_SHARE, 8)])
def test_it_reads_until_its_share_is_used_up(
    share: int, reads: int, full: Side, still: Still
) -> None:
    Plane.of(still).share = share
    full.transport.ready(UNREAD)
    assert full.transport.getHandle().reads == reads
    assert full.protocol.data == bytes(reads * LARGE_READ)
    # The rest has its turn.
    still.settle(1)
    assert full.transport.getHandle().reads > reads


def test_what_takes_long_has_no_more_in_a_turn(full: Side, still: Still) -> None:
    def work() -> None:
        still.rightNow += LONGEST / 2

    full.protocol.on["data"] = work
    full.transport.ready(UNREAD)
    assert full.transport.getHandle().reads == 2


@pytest.mark.parametrize("what", ["pause", "abort", "lose", "pace", "splice"])
def test_it_reads_no_more_once_that_is_asked_for(
    what: str, full: Side, still: Still
) -> None:
    """By the protocol, as it gets a piece."""

    class Nothing:
        def grant(self, most: int) -> int:
            return 0

        def wait(self) -> None:
            full.transport.pauseProducing()

    other = Side(Plane.of(still), sockets("tcp"))
    direction = PacedDirection()
    direction.pace = Nothing()  # type: ignore[assignment]
    transport = full.transport
    asked = {
        "pause": transport.pauseProducing,
        "abort": transport.abortConnection,
        "lose": lambda: transport.connectionLost(Failure(DONE.value)),
        "pace": lambda: transport.keep_pace(direction),
        "splice": lambda: transport.splice_one_way(other.transport, direction, None),
    }
    full.protocol.on["data"] = asked[what]
    handle = transport.getHandle()
    transport.ready(UNREAD)
    assert handle.reads == 1
    assert full.protocol.data == bytes(LARGE_READ)
    direction.pace = None
    end(still, other)


# -- writes


MUCH = NOISE[: BUFFER_LIMIT + 1]


def test_a_large_write_is_sent_at_once_and_pauses_its_producer(still: Still) -> None:
    """As Twisted's transports, which buffer it first; it is resumed in a moment."""
    side = Side(Plane.of(still), sockets("tcp"))
    producer = Producer()
    side.transport.registerProducer(producer, True)
    side.transport.write(MUCH)
    assert producer.asked == ["pause"]
    assert side.transport.unsent == 0
    # What is written meanwhile is behind it, and stays paused.
    side.transport.write(b"more")
    side.transport.write(MUCH)
    assert producer.asked == ["pause"]
    still.until(lambda: producer.asked == ["pause", "resume"])
    assert side.transport.clear
    whole = MUCH + b"more" + MUCH
    still.until(lambda: side.peer.take() or side.peer.data == whole)
    side.transport.unregisterProducer()
    end(still, side)


def test_what_does_not_fit_of_a_large_write_waits(tcp: OneWay) -> None:
    """However little that is."""
    side = tcp.client
    producer = Producer()
    side.transport.unregisterProducer()
    side.transport.registerProducer(producer, True)
    side.transport.write(NOISE)
    assert producer.asked == ["pause"]
    assert 0 < side.transport.unsent < len(NOISE)
    assert tcp.take(side, len(NOISE)) == NOISE
    tcp.until(lambda: producer.asked == ["pause", "resume"])
    side.transport.unregisterProducer()


@pytest.mark.parametrize("write", ["write", "write_on"])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.EAGAIN, errno.ENOBUFS])
def test_a_large_write_that_fails(number: int, write: str, still: Still) -> None:
    side = Side(Plane.of(still), sockets("tcp"), kind=Scripted)
    handle = side.transport.getHandle()
    producer = Producer()
    side.transport.registerProducer(producer, True)
    handle.script = [number]
    getattr(side.transport, write)(MUCH)
    if number == errno.EPIPE:
        still.until(lambda: side.protocol.lost or side.peer.socket.close())
        assert side.why is WriteRefused
        assert side.protocol.reason.value.data == MUCH
        still.settle(2)
        return
    assert producer.asked == ["pause"]
    assert side.transport.unsent == len(MUCH)
    still.until(lambda: side.peer.take() or side.peer.data == MUCH)
    still.until(lambda: producer.asked == ["pause", "resume"])
    side.transport.unregisterProducer()
    end(still, side)


def test_a_large_write_to_one_that_ends_pauses_nobody(still: Still) -> None:
    side = Side(Plane.of(still), sockets("tcp"))
    producer = Producer()
    side.transport.loseWriteConnection()
    side.transport.registerProducer(producer, True)
    side.transport.write(MUCH)
    assert producer.asked == []
    assert side.transport.unsent == 0
    side.transport.unregisterProducer()
    assert side.peer.socket.recv(1, socket.MSG_DONTWAIT) == b""
    end(still, side)


# -- writes of a producer that need not be paused for them


def test_a_write_that_is_sent_pauses_nobody(still: Still) -> None:
    side = Side(Plane.of(still), sockets("tcp"))
    producer = Producer()
    side.transport.registerProducer(producer, True)
    side.transport.write_on(MUCH)
    assert producer.asked == []
    assert side.transport.clear
    still.until(lambda: side.peer.take() or side.peer.data == MUCH)
    side.transport.unregisterProducer()
    end(still, side)


def test_what_is_left_of_a_write_pauses_its_producer(tcp: OneWay) -> None:
    side = tcp.client
    producer = Producer()
    side.transport.unregisterProducer()
    side.transport.registerProducer(producer, True)
    side.transport.write_on(NOISE)
    assert producer.asked == ["pause"]
    assert side.transport.unsent > BUFFER_LIMIT
    # It waits behind that.
    side.transport.write_on(b"more")
    assert tcp.take(side, len(NOISE) + 4) == NOISE + b"more"
    tcp.until(lambda: producer.asked == ["pause", "resume"])
    side.transport.unregisterProducer()


def test_a_write_to_one_that_ends_is_dropped(still: Still) -> None:
    side = Side(Plane.of(still), sockets("tcp"))
    side.transport.loseWriteConnection()
    side.transport.write_on(MUCH)
    assert side.transport.unsent == 0
    assert side.peer.socket.recv(1, socket.MSG_DONTWAIT) == b""
    end(still, side)
