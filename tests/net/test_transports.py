"""Twisted's connections as relayd makes them: what they do at once.

What every stream transport must do is in `contracts.py`; here is what ours
do sooner than Twisted's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.ssl import optionsForClientTLS
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.interfaces import ILossListener
from relayd.net.transports import (
    PeerVanished,
    TCPConnection,
    connection_class,
    loss_failed,
)
from relayd.stream.bridge import unsent
from tests.conftest import LoggedFailures, pause
from tests.support.contracts import Peer, Producer, Recorder, turns, until
from tests.support.dials import VANISHED, StillReactor, connection
from tests.support.process import PATIENCE, Server, read_all, read_exactly, reset
from tests.support.standing import refuse

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


@pytest_twisted.ensureDeferred
async def test_a_write_is_sent_at_once() -> None:
    """The peer has it before the reactor gets another turn."""
    async with connection() as (_, transport, peer):
        transport.write(b"")
        transport.write(b"now")
        assert read_exactly(peer, 3) == b"now"
        assert not unsent(transport)


@pytest_twisted.ensureDeferred
async def test_bytes_that_the_kernel_does_not_take_follow_in_order() -> None:
    """Partly sent, then buffered; what is written meanwhile comes after it."""
    async with connection() as (_, transport, peer):
        transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pieces = [bytes([n]) * 30_000 for n in range(40)]
        for piece in pieces[:20]:
            transport.write(piece)
        buffered = unsent(transport)
        assert 0 < buffered < 20 * 30_000
        transport.writeSequence(pieces[20:25])
        assert unsent(transport) == buffered + 5 * 30_000
        # One that is written while the rest drains waits its turn, too.
        got = bytearray()
        peer.setblocking(False)
        expected = b"".join(pieces)
        late = pieces[25:]
        while len(got) < len(expected):
            with suppress(BlockingIOError):
                got += peer.recv(20_000)
            if late:
                transport.write(late.pop(0))
            await pause(0)
        assert got == expected
        assert not unsent(transport)
        transport.write(b"and now at once")
        assert peer.recv(100) == b"and now at once"


@pytest_twisted.ensureDeferred
async def test_a_partial_write_pauses_the_producer() -> None:
    """A full buffer is one, however much of the last write was sent at once."""
    async with connection() as (_, transport, _):
        producer = Producer()
        transport.registerProducer(producer, True)
        while not producer.asked:
            transport.write(bytes(1 << 18))
        assert producer.asked == ["pause"]
        assert unsent(transport) > transport.bufferSize
        transport.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_text_can_not_be_written() -> None:
    """A caller's mistake is the caller's, and the connection lives."""
    async with connection() as (_, transport, peer):
        with pytest.raises(TypeError):
            transport.write("text")
        transport.write(b"data")
        assert read_exactly(peer, 4) == b"data"


@pytest_twisted.ensureDeferred
async def test_a_half_close_is_passed_on_at_once() -> None:
    """Once: the protocol hears of it before the call returns, and never again."""
    async with connection() as (protocol, transport, peer):
        transport.write(b"all")
        transport.loseWriteConnection()
        assert protocol.events == ["made", "shut"]
        assert read_all(peer) == b"all"
        transport.write(b"more")
        transport.writeSequence([b"more"])
        await turns()
        assert protocol.events == ["made", "shut"]
        assert peer.recv(10) == b""
        peer.sendall(b"answer")
        await until(lambda: protocol.data == b"answer")


@pytest_twisted.ensureDeferred
async def test_a_reset_reported_as_a_hang_up_is_no_end_of_data() -> None:
    """As epoll reports one that arrives at that moment; Twisted takes it for an end."""
    async with connection() as (protocol, transport, peer):
        reset(peer)
        event = select.poll()
        event.register(transport.fileno(), 0)
        assert event.poll(PATIENCE * 1000)
        # What Twisted's reactors do then.
        transport.stopReading()
        transport.readConnectionLost(Failure(CONNECTION_DONE))
        assert protocol.lost
        assert isinstance(protocol.reason.value, error.ConnectionLost)
        assert "eof" not in protocol.events


class Unreachable:
    """A socket that can be closed; other calls fail with what it is told."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.recv = self.send = refuse(number)
        self.shutdown, self.close = sock.shutdown, sock.close


@pytest.mark.parametrize("number", VANISHED)
@pytest.mark.parametrize("how", ["read", "hung up", "write"])
@pytest_twisted.ensureDeferred
async def test_a_lost_peer_is_distinguished_from_a_reset(
    how: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connection() as (protocol, transport, peer):
        real = transport.socket
        with monkeypatch.context() as patched:
            patched.setattr(transport, "socket", Unreachable(real, number))
            if how == "hung up":
                transport.stopReading()
                transport.readConnectionLost(Failure(CONNECTION_DONE))
                lost = protocol.reason.value
            elif how == "read":
                lost = transport.doRead()
            else:
                lost = transport.writeSomeData(b"x")
        assert type(lost) is PeerVanished
        assert isinstance(lost, error.ConnectionLost)
        assert str(lost) == os.strerror(number)
        if how == "write":
            # The kernel has said so once: what comes later is not what it was.
            patched.setattr(transport, "socket", Unreachable(real, errno.EPIPE))
            assert transport.writeSomeData(b"x") is lost
            patched.undo()
            peer.close()
            transport.write(b"x")
            assert transport._read_remaining() is lost


@pytest_twisted.ensureDeferred
async def test_an_end_of_data_reported_as_a_hang_up_is_one() -> None:
    async with connection() as (protocol, transport, peer):
        for ends in (False, True):
            if ends:
                peer.shutdown(socket.SHUT_WR)
            # With nothing to read, and then with the end to be read.
            transport.stopReading()
            transport.readConnectionLost(Failure(CONNECTION_DONE))
            assert not protocol.lost
            assert protocol.events[-1] == "eof"


@pytest_twisted.ensureDeferred
async def test_a_half_close_waits_for_what_is_buffered() -> None:
    """And for a producer, which may have more to say."""
    async with connection() as (protocol, transport, peer):
        producer = Producer()
        transport.registerProducer(producer, True)
        transport.loseWriteConnection()
        assert "shut" not in protocol.events
        transport.unregisterProducer()
        written = 0
        while not unsent(transport):
            transport.write(bytes(1 << 18))
            written += 1 << 18
        transport.loseWriteConnection()
        assert "shut" not in protocol.events
        assert len(await Peer(peer).read_all()) == written
        assert protocol.events == ["made", "shut"]


class Closing(Recorder):
    """Closes as soon as the peer has ended its side."""

    def readConnectionLost(self) -> None:
        super().readConnectionLost()
        self.transport.loseConnection()
        self.events.append("closed")


@pytest_twisted.ensureDeferred
async def test_a_close_after_the_end_of_data_is_immediate() -> None:
    """Even within the call that tells of it; politely, and once."""
    async with connection(Closing()) as (protocol, transport, peer):
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        assert protocol.events == ["made", "eof", "lost", "closed"]
        assert protocol.reason is not None
        assert protocol.reason.check(error.ConnectionDone)
        assert read_all(peer) == b""
        transport.loseConnection()
        transport.abortConnection()
        transport.write(b"nobody listens")
        await turns()


@pytest_twisted.ensureDeferred
async def test_a_close_with_data_buffered_delivers_it() -> None:
    """The end of data was read, the peer is slow: it gets all of it, then the end."""
    async with connection() as (protocol, transport, peer):
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        written = 0
        while not unsent(transport):
            transport.write(bytes(1 << 18))
            written += 1 << 18
        transport.loseConnection()
        assert "lost" not in protocol.events
        assert len(await Peer(peer).read_all()) == written


@pytest_twisted.ensureDeferred
async def test_a_close_before_the_end_of_data_is_left_to_the_reactor() -> None:
    """Whoever calls may be in the middle of things.

    What is written before the reactor closes is still sent, as with Twisted's own.
    """
    async with connection() as (protocol, transport, peer):
        transport.loseConnection()
        assert "lost" not in protocol.events
        transport.write(b"last words")
        await until(lambda: "lost" in protocol.events)
        assert read_all(peer) == b"last words"


@pytest_twisted.ensureDeferred
async def test_a_close_waits_for_a_paused_producer_after_the_end_of_data_too() -> None:
    """It has promised more; without one the connection closes when all is sent."""
    async with connection() as (protocol, transport, peer):
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        producer = Producer()
        transport.registerProducer(producer, True)
        written = 0
        while not producer.asked:
            transport.write(bytes(1 << 18))
            written += 1 << 18
        transport.loseConnection()
        far = Peer(peer)
        await far.read(written)
        await until(lambda: producer.asked == ["pause", "resume"])
        transport.loseConnection()
        await turns()
        assert "lost" not in protocol.events
        transport.unregisterProducer()
        await until(lambda: "lost" in protocol.events)
        assert len(await far.read_all()) == written


@pytest_twisted.ensureDeferred
async def test_a_write_to_a_peer_that_is_gone_is_reported_later() -> None:
    """`write` never calls back into its caller's protocol."""
    async with connection() as (protocol, transport, peer):
        transport.pauseProducing()
        reset(peer)
        for _ in range(3):
            transport.write(b"to nobody")
        assert protocol.events == ["made"]
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(error.ConnectionLost)


@pytest_twisted.ensureDeferred
async def test_after_starttls_nothing_is_sent_in_the_clear() -> None:
    """The transport provides ITLSTransport, so what is written after is encrypted."""
    async with connection() as (_, transport, peer):
        transport.startTLS(optionsForClientTLS("example.com"), False)
        far = Peer(peer)
        # A TLS record: the client's handshake, which the peer does not answer.
        assert (await far.read(5))[0] == 22
        transport.write(b"the password")
        transport.writeSequence([b"the password"])
        await turns()
        far.take()
        assert b"the password" not in far.data


# -- how connections are told apart


def test_a_connection_has_a_name_for_logs(tmp_socket: Path) -> None:
    """Twisted's own repr needs a Twisted port, which ours don't have."""
    for family, where, kind in (
        (socket.AF_INET, None, "TCPConnection"),
        (socket.AF_UNIX, str(tmp_socket), "UNIXConnection"),
    ):
        with Server(family, where) as server, closing(socket.socket(family)) as client:
            client.connect(server.socket.getsockname())
            with server.accept() as accepted:
                made: Any = connection_class(family)(
                    accepted, Recorder(), client.getsockname(), None, 7, StillReactor()
                )
                assert repr(made) == f"<{kind} #7>"
                assert made.logPrefix().startswith("Recorder,7,")


@pytest.mark.cost
def test_a_known_local_address_needs_no_system_call() -> None:
    """A test of cost.

    A listener on one address tells its connections; the peer's is the socket's.
    """
    with Server() as server, closing(socket.socket()) as client:
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            made = TCPConnection(
                accepted, Recorder(), client.getsockname(), None, 1, StillReactor()
            )
            assert made.getPeer() == IPv4Address("TCP", *client.getsockname())
            assert made.getHost() == IPv4Address("TCP", *server.socket.getsockname())
            known = IPv4Address("TCP", "192.0.2.1", 80)
            made.local = known
            assert made.getHost() is known


def test_a_loss_that_fails_twice_is_logged_twice(
    logged_failures: LoggedFailures,
) -> None:
    """An override raises, and so does what cleans up after it: nobody else hears."""

    @implementer(ILossListener)
    class Broken:
        def lost_anyway(self, reason: Failure) -> None:
            raise ZeroDivisionError

    try:
        raise LookupError
    except LookupError:
        loss_failed(Broken(), Failure(CONNECTION_DONE))
    logged_failures.take("LookupError")
    logged_failures.take("ZeroDivisionError")
