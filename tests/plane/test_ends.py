"""Ends of data, urgent data and reads that end early, of joined connections."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

import relayd.plane.pipes
from relayd.net.transports import PeerVanished, WriteRefused
from relayd.plane.poller import Plane
from tests.support.dials import VANISHED
from tests.support.pumping import (
    LOTS,
    NOISE,
    Pump,
    Scripted,
    Side,
    Slow,
    Splices,
    pump,
    pumping,
    sockets,
    splices,
    tcp,
)
from tests.support.standing import Still, still

__all__ = ["pump", "splices", "still", "tcp"]


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
            assert server.why is WriteRefused
        else:
            assert pump.take_all(server) == b"last words"
        assert not sink.script


@pytest.mark.parametrize("paced", [False, True])
@pytest.mark.parametrize("number", VANISHED)
def test_a_sink_that_vanished_before_the_last_bytes_is_told_apart(
    number: int, paced: bool, still: Still
) -> None:
    """The kernel tells of a loss once, be it to a send with MSG_MORE."""
    plane = Plane.of(still)
    client = Side(plane, sockets("tcp"))
    server = Side(plane, sockets("tcp"), kind=Scripted)
    with pumping(still, client, server) as pump:
        pump.bridge()
        if paced:
            Slow(client).lift()
        server.transport.getHandle().script = [number, errno.EPIPE]
        client.peer.socket.send(b"last words")
        client.peer.end()
        pump.until(lambda: server.protocol.lost)
        assert server.why is PeerVanished
        assert str(server.protocol.reason.value) == os.strerror(number)


@pytest.mark.parametrize("paced", [False, True])
def test_last_bytes_for_a_sink_that_is_full_wait_with_their_end(
    paced: bool, still: Still
) -> None:
    """That has nothing to do with MSG_MORE."""
    plane = Plane.of(still)
    client = Side(plane, sockets("tcp"))
    server = Side(plane, sockets("tcp"), kind=Scripted)
    with pumping(still, client, server) as pump:
        pump.bridge()
        if paced:
            Slow(client).lift()
        server.transport.getHandle().script = [errno.EAGAIN]
        client.peer.socket.send(b"last words")
        client.peer.end()
        assert pump.take_all(server) == b"last words"
        assert not server.protocol.lost


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


# -- reads that end early


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
