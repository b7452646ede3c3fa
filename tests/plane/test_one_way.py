"""One direction is spliced, and the other goes through its protocol."""

from __future__ import annotations

import errno
import random
import socket
from contextlib import suppress

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from zope.interface import alsoProvides

import relayd.plane.pipes
from relayd.core.interfaces import IResetListener
from relayd.core.session import Direction
from relayd.net.transports import WriteRefused
from relayd.plane.connection import READ_SIZE
from relayd.plane.pipes import PIPE_SIZE
from relayd.plane.poller import COPY_SIZE
from relayd.plane.writing import BUFFER_LIMIT
from relayd.testing import Producer
from tests.conftest import descriptors
from tests.support.one_way import OneWay, pump, relaying, sides_of, tcp
from tests.support.pumping import LOTS, NOISE, Slow, Splices, splices
from tests.support.standing import Still, still

__all__ = ["pump", "splices", "still", "tcp"]


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


# -- full sinks


@pytest.mark.parametrize("spliced", [True, False])
def test_a_sink_that_is_full_holds_no_more_than_a_chunk(
    spliced: bool, pump: OneWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source is not read; what it reads itself passes through its protocol."""
    if not spliced:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
    client, server = pump.client, pump.server
    sent = pump.block(client)
    assert client.transport.blocked
    assert not server.transport.blocked
    assert 0 < server.transport.unsent <= (PIPE_SIZE if spliced else COPY_SIZE)
    read = client.told.read
    pump.through(server, NOISE[:1_000_000])
    assert client.told.read == read
    assert pump.take(server, sent) == NOISE[:sent]
    assert not client.transport.blocked
    assert server.transport.unsent == pump.pipes.in_use == 0


def test_a_source_that_takes_nothing_pauses_what_is_written_to_it(
    tcp: OneWay,
) -> None:
    """As without splicing, which goes on meanwhile."""
    client, server = tcp.client, tcp.server
    sent = tcp.block(server)
    held = client.transport.unsent
    assert BUFFER_LIMIT < held <= BUFFER_LIMIT + READ_SIZE
    assert not server.transport.blocked
    tcp.through(client, NOISE)
    assert client.transport.unsent == held
    assert tcp.take(client, sent) == NOISE[:sent]


def test_both_full_go_on_when_their_peers_read(tcp: OneWay) -> None:
    client, server = tcp.client, tcp.server
    sent, answered = tcp.block(client), tcp.block(server)
    assert client.transport.blocked
    assert client.transport.unsent
    assert tcp.take(client, answered) == NOISE[:answered]
    assert tcp.take(server, sent) == NOISE[:sent]


# -- from one way to both, and back


@pytest.mark.parametrize("how", ["splice", "unsplice first", "one way twice"])
@pytest.mark.parametrize("waits", ["pipe", "buffer"])
def test_one_way_becomes_both_with_something_on_its_way(
    waits: str, how: str, tcp: OneWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits, in a pipe or a buffer, comes first."""
    client, server = tcp.client, tcp.server
    if waits == "pipe":
        sent, _ = tcp.fill_pipe(client)
    else:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
        sent = tcp.block(client)
    tcp.stop_passing(server)
    if how == "unsplice first":
        server.transport.unsplice()
    if how == "one way twice":
        tcp.splice_one_way(server)
    else:
        assert server.transport.splice(client.transport, server.told, client.told, tcp)
    # It still waits.
    tcp.settle()
    assert client.transport.blocked
    assert tcp.take(server, sent) == NOISE[:sent]
    server.peer.socket.send(b"response")
    assert tcp.take(client, 8) == b"response"
    assert server.told.read == 8
    assert server.protocol.data == client.protocol.data == b""
    client.peer.socket.send(b"request")
    assert tcp.take(server, sent + 7)[-7:] == b"request"


@pytest.mark.parametrize("asked", ["client", "server"])
def test_unspliced_in_the_middle_it_is_read_for_its_protocol(
    asked: str, tcp: OneWay
) -> None:
    """Asked of either; what is in the pipe is written, and what follows comes."""
    client, server = tcp.client, tcp.server
    sent, read = tcp.fill_pipe(client)
    (client if asked == "client" else server).transport.unsplice()
    assert tcp.pipes.users == 0
    assert not client.transport.blocked
    tcp.pass_through(client)
    assert tcp.take(server, sent) == NOISE[:sent]
    assert client.protocol.data == NOISE[read:sent]
    # And once more, which does nothing.
    client.transport.unsplice()
    server.transport.unsplice()
    server.peer.socket.send(b"response")
    assert tcp.take(client, 8) == b"response"


def test_both_ways_become_one(tcp: OneWay) -> None:
    """A filter is put on a session that goes on."""
    client, server = tcp.client, tcp.server
    tcp.stop_passing(server)
    tcp.splice_one_way(server)
    tcp.splice(server)
    assert tcp.pipes.users == 1
    client.transport.unsplice()
    tcp.splice_one_way(client)
    tcp.pass_through(server)
    counted = server.told.read
    tcp.through(server, NOISE)
    tcp.through(client, NOISE)
    assert server.told.read == counted
    assert server.protocol.data == NOISE


def test_a_way_that_changes_does_not_make_a_socket_one_that_can_be_spliced(
    tcp: OneWay, splices: Splices
) -> None:
    splices.refuse["out"] = [errno.EINVAL] * 1000
    tcp.through(tcp.client, NOISE)
    assert tcp.plane.not_spliced == 1
    calls = len(splices.moved)
    tcp.client.transport.unsplice()
    tcp.splice_one_way(tcp.client)
    tcp.through(tcp.client, NOISE)
    assert len(splices.moved) == calls


# -- ends of data


def test_the_end_of_the_spliced_way_and_the_other_goes_on(pump: OneWay) -> None:
    """The splicer is told of it; the sink's protocol of what it always is."""
    client, server = pump.client, pump.server
    pump.bridge()
    client.peer.socket.send(b"request")
    client.peer.end()
    assert pump.take_all(server) == b"request"
    assert client.events == ["eof"]
    assert server.events == ["shut"]
    pump.through(server, NOISE[:1_000_000])
    server.peer.end()
    assert pump.take_all(client) == NOISE[:1_000_000]
    pump.until(lambda: client.protocol.lost and server.protocol.lost)
    assert (client.why, server.why) == (ConnectionDone, ConnectionDone)


def test_the_end_of_the_other_way_and_the_spliced_one_goes_on(pump: OneWay) -> None:
    """The source's protocol is told of nothing, whatever its transport is asked."""
    client, server = pump.client, pump.server
    pump.bridge()
    server.peer.socket.send(b"response")
    server.peer.end()
    assert pump.take_all(client) == b"response"
    assert server.events == ["eof"]
    assert client.events == []
    pump.through(client, NOISE[:1_000_000])
    client.peer.end()
    assert pump.take_all(server) == NOISE[:1_000_000]
    pump.until(lambda: client.protocol.lost and server.protocol.lost)


@pytest.mark.parametrize("spliced", [True, False])
def test_an_end_of_data_waits_behind_a_full_sink(
    spliced: bool, tcp: OneWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not spliced:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
    tcp.bridge()
    sent = tcp.block(tcp.client)
    tcp.client.peer.end()
    tcp.settle()
    assert tcp.client.events == []
    assert tcp.take_all(tcp.server) == NOISE[:sent]
    assert tcp.client.events == ["eof"]
    tcp.through(tcp.server, b"response")


def test_they_are_not_closed_as_if_both_ways_were_spliced(tcp: OneWay) -> None:
    """Somebody waits to be told, who passes on the other way."""
    client, server = tcp.client, tcp.server
    tcp.stop_passing(server)
    for side in (client, server):
        side.peer.end()
    tcp.until(lambda: client.events == server.events == ["eof"])
    protocols = client.protocol, server.protocol
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    assert client.transport.connected
    # Unless they are.
    tcp.splice_one_way(server)
    assert client.transport.close_both(*protocols)
    for side in (client, server):
        assert side.transport.disconnected
        side.protocol.connectionLost()


@pytest.mark.parametrize("way", ["client", "server"])
def test_urgent_data_comes_in_its_place(way: str, tcp: OneWay) -> None:
    side = tcp.client if way == "client" else tcp.server
    tcp.through(side, NOISE)
    side.transport.pauseProducing()
    side.peer.socket.send(b"before")
    side.peer.socket.send(b"!", socket.MSG_OOB)
    side.peer.socket.send(b"behind")
    tcp.settle()
    side.transport.resumeProducing()
    other = tcp.other(side)
    assert tcp.take(other, LOTS + 13)[LOTS:] == b"before!behind"
    tcp.through(side, NOISE)


# -- losses


@pytest.mark.parametrize("how", ["abort", "reset"])
def test_a_source_is_lost_while_its_sink_holds_something(how: str, tcp: OneWay) -> None:
    """That is delivered, and the sink goes on for its protocol."""
    client, server = tcp.client, tcp.server
    _, read = tcp.fill_pipe(client)
    if how == "abort":
        client.transport.abortConnection()
    else:
        client.peer.reset()
        tcp.settle()
        # Behind what it has sent.
        assert not client.protocol.lost
    tcp.until(lambda: server.peer.take() or client.protocol.lost)
    assert client.why is (ConnectionAborted if how == "abort" else ConnectionLost)
    assert tcp.pipes.users == 0
    read = max(read, len(server.peer.data))
    got = tcp.take(server, read)
    assert got == NOISE[: len(got)]
    tcp.settle()
    assert server.transport.unsent == tcp.pipes.in_use == 0
    server.peer.socket.send(b"for nobody")
    tcp.until(lambda: server.protocol.data == b"for nobody")
    assert server.events == []


@pytest.mark.parametrize("how", ["abort", "reset"])
@pytest.mark.parametrize("spliced", [True, False])
def test_a_sink_is_lost_while_it_holds_something(
    spliced: bool, how: str, tcp: OneWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept for it; its source is not blocked, and nobody's any more."""
    client, server = tcp.client, tcp.server
    before = descriptors()
    if spliced:
        tcp.fill_pipe(client)
    else:
        monkeypatch.setattr(relayd.plane.pipes, "PIPES_IN_USE", 0)
        tcp.block(client)
    if how == "abort":
        server.transport.abortConnection()
    else:
        server.peer.reset()
    tcp.until(lambda: server.protocol.lost)
    assert server.why in (ConnectionAborted, ConnectionLost, WriteRefused)
    assert (server.transport.unsent, tcp.pipes.in_use) == (0, 0)
    assert client.events == []
    assert not client.transport.blocked
    # What it reads from now on is its protocol's, or another sink's.
    client.transport.resumeProducing()
    tcp.until(lambda: client.protocol.data)
    client.transport.unsplice()
    client.transport.abortConnection()
    tcp.until(lambda: client.protocol.lost)
    assert tcp.pipes.users == 0
    assert len(descriptors()) <= len(before) - 2


def test_a_sink_whose_write_fails_is_read_to_its_end(tcp: OneWay) -> None:
    """Through its protocol; then it is lost, and its source is told nothing."""
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
    assert server.why is WriteRefused
    assert server.protocol.reason.value.data == b"for nobody"
    assert client.events == []


def test_a_source_whose_write_fails_is_read_to_its_end(tcp: OneWay) -> None:
    """What it had sent is moved; then it is lost."""
    client, server = tcp.client, tcp.server
    client.transport.pauseProducing()
    client.peer.socket.send(b"last words")
    tcp.settle()
    client.peer.reset()
    tcp.settle()
    client.transport._reading = True
    server.peer.socket.send(b"for nobody")
    tcp.until(lambda: client.protocol.lost)
    assert tcp.take(server, 10) == b"last words"
    assert client.why is WriteRefused
    assert server.events == []


@pytest.mark.parametrize("way", ["client", "server"])
def test_a_reset_while_paused_is_told_to_who_reads_for_itself(
    way: str, still: Still
) -> None:
    """Of the source, what is in the kernel is delivered first."""
    sides = sides_of(still, "tcp tcp")
    with relaying(still, *sides) as pump:
        side = pump.client if way == "client" else pump.server
        side.protocol.wants_reset = lambda: True
        alsoProvides(side.protocol, IResetListener)
        side.transport.pauseProducing()
        side.peer.socket.send(b"last words")
        side.peer.reset()
        pump.settle()
        assert side.protocol.lost is (way == "server")
        if way == "client":
            side.transport.resumeProducing()
            assert pump.take(pump.server, 10) == b"last words"
            pump.until(lambda: side.protocol.lost)


def test_a_source_may_have_another_sink_when_the_first_is_lost(still: Still) -> None:
    """As a session that tries another server."""
    sides = sides_of(still, "tcp tcp")
    [second] = sides_of(still, "tcp")
    with relaying(still, *sides) as pump:
        client, server = sides
        pump.splice(client)
        server.transport.abortConnection()
        pump.until(lambda: server.protocol.lost)
        client.transport.unregisterProducer()
        pump.server = second
        pump.splice_one_way(client)
        pump.pass_through(second)
        pump.through(client, NOISE)
        pump.through(second, NOISE)
        # The first has nothing to say any more.
        server.transport.unsplice()
        pump.through(client, b"more")
    second.transport.abortConnection()
    second.peer.socket.close()
    still.settle()
    assert second.protocol.lost


# -- paced


@pytest.mark.parametrize("kinds", ["tcp tcp", "unix unix"])
@pytest.mark.parametrize("which", ["client", "server"])
def test_either_may_be_paced(which: str, kinds: str, still: Still) -> None:
    """The source spends what is granted; of the sink, its protocol does so."""
    sides = sides_of(still, kinds)
    with relaying(still, *sides) as pump:
        client, server = sides
        pump.bridge()
        side = client if which == "client" else server
        pace, other = Slow(side), pump.other(side)
        if side is client:
            pump.splice_one_way(client)
        else:
            read = side.protocol.data
            side.protocol.on["data"] = lambda: setattr(pace, "spent", len(read))
        side.peer.socket.send(b"12345678")
        pump.settle()
        assert other.peer.data == b""
        pump.through(other, NOISE[:500_000])
        pace.more(5)
        assert pump.take(other, 5) == b"12345"
        pump.settle()
        assert pace.spent == 5
        pace.more(1 << 30)
        assert pump.take(other, 8) == b"12345678"
        pump.through(side, NOISE)
        assert pace.spent == LOTS + 8
        # A sink that is full blocks it as ever.
        sent = pump.block(client)
        assert client.transport.blocked
        server.peer.data.clear()
        assert pump.take(server, sent) == NOISE[:sent]
        side.peer.end()
        pump.take_all(other)
        assert side.events == ["eof"]


def test_a_paced_source_is_spliced_and_lifted_when_it_is_reset(tcp: OneWay) -> None:
    client = tcp.client
    pace = Slow(client)
    tcp.splice_one_way(client)
    pace.more(1 << 30)
    tcp.splice(client)
    assert client.told.spliced > 0
    pace.granted = pace.spent
    got = len(tcp.server.peer.data)
    client.peer.socket.send(NOISE[:100_000])
    tcp.settle()
    client.peer.reset()
    tcp.until(lambda: pace.lifted)
    client.transport.resumeProducing()
    tcp.until(lambda: client.protocol.lost)
    assert tcp.take(tcp.server, got + 100_000)[got:] == NOISE[:100_000]
