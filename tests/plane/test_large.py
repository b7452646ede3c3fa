"""Large reads, for who expects bulk, and large writes with a producer."""

from __future__ import annotations

import errno
import socket

import pytest

from relayd.core.session import PacedDirection
from relayd.net.transports import WriteRefused
from relayd.plane.connection import READ_SIZE
from relayd.plane.poller import Plane
from relayd.plane.transport import LARGE_READ
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


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EAGAIN, errno.ENOBUFS])
def test_a_large_write_that_fails(number: int, still: Still) -> None:
    side = Side(Plane.of(still), sockets("tcp"), kind=Scripted)
    handle = side.transport.getHandle()
    producer = Producer()
    side.transport.registerProducer(producer, True)
    handle.script = [number]
    side.transport.write(MUCH)
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
