"""Peers that reset and peers that vanish, of joined connections and single ones."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionLost
from zope.interface import alsoProvides, implementer

import relayd.plane.pipes
import relayd.plane.splicing
from relayd.core.interfaces import IResetListener
from relayd.net.transports import PeerReset, PeerVanished, WriteRefused
from relayd.plane.connection import READ_SIZE
from relayd.plane.connection_base import EDGE_BOTH
from relayd.plane.poller import Plane
from tests.support.contracts import Recorder
from tests.support.dials import VANISHED
from tests.support.pumping import (
    NOISE,
    Pump,
    Scripted,
    Side,
    Splices,
    pumping,
    sockets,
    splices,
    tcp,
)
from tests.support.standing import Still, still

__all__ = ["splices", "still", "tcp"]


@contextmanager
def closing_both(still: Still, *sides: Side) -> Iterator[None]:
    """Two connections that are not joined; they end with the block."""
    yield
    for side in sides:
        side.peer.socket.close()
        side.transport.abortConnection()
    still.settle(2)


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


@pytest.mark.parametrize("drains", [False, True])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_reset_that_a_splice_does_not_tell_is_no_end_of_data(
    kind: str,
    drains: bool,
    still: Still,
    splices: Splices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It came while the splice moved bytes: the kernel says only how many.

    A read finds no error then.  Taken for an end of data, it would be passed on as one,
    and what the other side has got until then would look complete.
    """
    plane = Plane.of(still)
    client, server = Side(plane, sockets("tcp")), Side(plane, sockets(kind))
    handle = server.transport.getHandle()

    def reset() -> None:
        server.peer.reset()
        number = handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert number == errno.ECONNRESET
        # It is read before the kernel is asked what has happened.
        server.transport.resumeProducing()

    with pumping(still, client, server) as pump:
        pump.bridge()
        # UNIX sockets reset only if something is left unread.
        server.transport.write(b"an answer")
        server.transport.pauseProducing()
        server.peer.socket.send(b"last words")
        monkeypatch.setattr(relayd.plane.splicing, "COPY_SIZE", len(b"last words"))
        if drains:
            pump.fill_pipe(client)
            splices.midway = reset
            pump.until(lambda: not splices.midway or server.peer.take())
        else:
            pump.splice(client)
            splices.midway = reset
            client.peer.socket.send(NOISE)
            client.transport.ready(select.EPOLLIN)
            server.transport.ready(select.EPOLLIN)
        pump.until(lambda: server.protocol.lost)
        assert server.events == ["lost"]
        assert server.why is ConnectionLost


@contextmanager
def urgent_and_reset(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Pump, bytes]]:
    """A source that is spliced: it sends, among it an urgent byte, and resets.

    All of that is there when it is read again.
    """
    plane = Plane.of(still)
    client = Side(plane, sockets("tcp"))
    server = Side(plane, sockets("tcp"), kind=Scripted)
    with pumping(still, client, server) as pump:
        pump.bridge()
        pump.splice(client)
        pump.settle()
        server.peer.data.clear()
        client.transport.pauseProducing()
        peer = client.peer.socket
        peer.send(NOISE[:30_000])
        peer.send(b"!", socket.MSG_OOB)
        peer.send(NOISE[30_000:60_000])
        client.peer.reset()
        pump.settle()
        # So that what is behind the mark takes several reads.
        monkeypatch.setattr(plane, "buffer", memoryview(bytearray(10_000)))
        yield pump, NOISE[:30_000] + b"!" + NOISE[30_000:60_000]


def test_a_reset_behind_an_urgent_byte_is_no_end_of_data(
    still: Still, splices: Splices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splice stops at the mark, and takes the error that is behind it."""
    with urgent_and_reset(still, monkeypatch) as (pump, sent):
        client, server = pump.client, pump.server
        client.transport.resumeProducing()
        assert pump.take(server, len(sent)) == sent
        pump.until(lambda: client.protocol.lost)
        assert ("in", -errno.ECONNRESET) in splices.moved
        assert client.events == ["lost"]
        assert client.why is ConnectionLost
        assert server.events == []
        # Nobody has refused to splice.
        assert pump.plane.not_spliced == 0


@pytest.mark.parametrize("number", VANISHED)
def test_a_peer_that_vanished_behind_an_urgent_byte_is_told_apart(
    number: int, still: Still, splices: Splices, monkeypatch: pytest.MonkeyPatch
) -> None:
    with urgent_and_reset(still, monkeypatch) as (pump, sent):
        client = pump.client
        splices.refuse["in"] = [number]
        handle = client.transport.getHandle()
        assert handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        client.transport.resumeProducing()
        assert pump.take(pump.server, len(sent)) == sent
        pump.until(lambda: client.protocol.lost)
        assert client.events == ["lost"]
        assert client.why is PeerVanished


@pytest.mark.parametrize("pauses", [True, False])
def test_what_is_before_such_a_reset_waits_for_a_full_sink(
    pauses: bool, still: Still, splices: Splices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before any reset; also while it is paused."""
    with urgent_and_reset(still, monkeypatch) as (pump, sent):
        client, server = pump.client, pump.server
        server.transport.getHandle().script = [errno.EAGAIN] * 2
        client.transport.resumeProducing()
        pump.until(lambda: client.transport.blocked)
        if pauses:
            client.transport.pauseProducing()
        pump.settle()
        assert not client.protocol.lost
        assert server.transport.unsent == 10_000
        # The kernel, which has room, did not say so, as it did not refuse.
        server.transport.getHandle().script.clear()
        pump.plane.change_mask(server.transport.fileno(), EDGE_BOTH)
        if pauses:
            assert pump.take(server, 40_000) == sent[:40_000]
            pump.settle()
            assert not client.protocol.lost
            client.transport.resumeProducing()
        assert pump.take(server, len(sent)) == sent
        pump.until(lambda: client.protocol.lost)
        assert client.events == ["lost"]


def test_a_close_does_not_wait_for_what_is_before_such_a_reset(
    still: Still, splices: Splices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads it."""
    with urgent_and_reset(still, monkeypatch) as (pump, _):
        client, server = pump.client, pump.server
        server.transport.getHandle().script = [errno.EAGAIN] * 2
        client.transport.resumeProducing()
        pump.until(lambda: client.transport.blocked)
        client.transport.loseConnection()
        pump.settle()
        assert client.events == ["lost"]
        assert client.why is ConnectionLost


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
    assert server.why is WriteRefused
    # What nobody has had may go to somebody else.
    assert server.protocol.reason.value.data == b"for nobody"
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
    assert server.why is WriteRefused


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
    assert server.why is WriteRefused
