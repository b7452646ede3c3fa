"""What the Bridge relies on in a stream transport, whoever made it.

`StreamTransportContract` is a suite without a transport: a subclass says how to
connect a protocol to a plain socket, and inherits the tests.  It runs on
Twisted's own transports and on those of `relayd.transports`; a transport that
passes it can stand in a relay.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IPushProducer,
    ITCPTransport,
    ITransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relayd.bridge import unsent
from tests.conftest import LoggedFailures, pause

#: Reactor turns that a test waits for something that should happen.
PATIENCE = 2000


async def until(condition: Any, what: str = "") -> None:
    """Run the reactor until `condition()` is true."""
    for _ in range(PATIENCE):
        if condition():
            return
        await pause(0.001)
    raise AssertionError(f"never happened: {what or condition}")


async def turns(count: int = 20) -> None:
    """Run the reactor for long enough that what was to happen has happened."""
    for _ in range(count):
        await pause(0.001)


@implementer(IHalfCloseableProtocol)
class Recorder(Protocol):
    """Keeps what a transport tells its protocol."""

    transport: Any

    def __init__(self) -> None:
        self.data = bytearray()
        self.events: list[str] = []
        self.reason: Failure | None = None
        self.on_data: Any = None

    def connectionMade(self) -> None:
        self.events.append("made")

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        if self.on_data is not None:
            self.on_data()

    def readConnectionLost(self) -> None:
        self.events.append("eof")

    def writeConnectionLost(self) -> None:
        self.events.append("shut")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.events.append("lost")
        self.reason = reason


@implementer(IPushProducer)
class Producer:
    """Records what a consumer asks of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def pauseProducing(self) -> None:
        self.asked.append("pause")

    def resumeProducing(self) -> None:
        self.asked.append("resume")

    def stopProducing(self) -> None:
        self.asked.append("stop")


class Peer:
    """The far end: a plain socket that blocks nobody."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.data = bytearray()
        self.ended = False

    def take(self) -> bool:
        """Read what there is; True once the end of data was read."""
        try:
            while not self.ended:
                part = self.socket.recv(1 << 20)
                self.data += part
                self.ended = not part
        except BlockingIOError:
            pass
        return self.ended

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                await pause(0.001)

    async def read(self, count: int) -> bytes:
        await until(lambda: self.take() or len(self.data) >= count, f"{count} bytes")
        return bytes(self.data)

    async def read_all(self) -> bytes:
        await until(self.take, "the end of data")
        return bytes(self.data)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()


async def fill(transport: Any) -> int:
    """Write until the kernel takes no more and a megabyte is buffered."""
    written = 0
    while unsent(transport) < 1 << 20:
        transport.write(bytes(1 << 18))
        written += 1 << 18
        await pause(0.001)
    return written


class StreamTransportContract:
    """The tests.  A subclass provides :meth:`connect` and :meth:`disconnect`."""

    #: Whether an abort reaches the peer as a reset; UNIX sockets have none.
    resets = True

    async def connect(self, protocol: Protocol) -> Peer:
        """Connect `protocol` to a transport of the kind under test."""
        raise NotImplementedError

    async def disconnect(self) -> None:
        """Close whatever `connect` opened beyond the connection itself."""

    async def joined(self) -> tuple[Recorder, Peer]:
        protocol = Recorder()
        peer = await self.connect(protocol)
        await until(lambda: protocol.events == ["made"], "connectionMade")
        return protocol, peer

    async def over(self, protocol: Recorder, peer: Peer) -> None:
        """Leave nothing behind."""
        peer.socket.close()
        if "lost" not in protocol.events:
            protocol.transport.abortConnection()
        await until(lambda: protocol.events[-1] == "lost", "connectionLost")
        assert protocol.events.count("lost") == 1
        await self.disconnect()

    @pytest_twisted.ensureDeferred
    async def test_provides_the_interfaces(self) -> None:
        protocol, peer = await self.joined()
        for interface in (ITransport, IConsumer, IPushProducer):
            assert verifyObject(interface, protocol.transport)
        assert IHalfCloseableDescriptor.providedBy(protocol.transport)
        assert ITCPTransport.providedBy(protocol.transport)
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_names_both_ends(self) -> None:
        protocol, peer = await self.joined()
        local, remote = protocol.transport.getHost(), protocol.transport.getPeer()
        if peer.socket.family == socket.AF_INET:
            assert (local.host, local.port) == peer.socket.getpeername()
            assert (remote.host, remote.port) == peer.socket.getsockname()
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_bytes_arrive_in_order_both_ways(self) -> None:
        protocol, peer = await self.joined()
        for piece in (b"one", b"", b"two", bytes(300_000), b"end"):
            protocol.transport.write(piece)
        protocol.transport.writeSequence([b"1", b"2"])
        expected = b"onetwo" + bytes(300_000) + b"end12"
        assert await peer.read(len(expected)) == expected
        await peer.send(expected)
        await until(lambda: len(protocol.data) >= len(expected))
        assert protocol.data == expected
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_a_paused_transport_delivers_nothing_and_loses_nothing(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.pauseProducing()
        await peer.send(b"later")
        await turns()
        assert not protocol.data
        protocol.transport.resumeProducing()
        await until(lambda: protocol.data == b"later")
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_pausing_within_data_received_is_obeyed(self) -> None:
        protocol, peer = await self.joined()
        protocol.on_data = lambda: protocol.transport.pauseProducing()
        await peer.send(b"x")
        await until(lambda: protocol.data == b"x")
        await peer.send(b"y")
        await turns()
        assert protocol.data == b"x"
        protocol.transport.resumeProducing()
        await until(lambda: protocol.data == b"xy")
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_a_full_buffer_pauses_its_producer_until_it_is_empty(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        written = await fill(protocol.transport)
        assert producer.asked[-1] == "pause"
        assert unsent(protocol.transport) > 0
        await peer.read(written)
        await until(lambda: producer.asked[-1] == "resume")
        assert unsent(protocol.transport) == 0
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_the_loss_of_the_connection_stops_the_producer(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        protocol.transport.abortConnection()
        await until(lambda: "lost" in protocol.events)
        assert producer.asked == ["stop"]
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_half_close_follows_what_is_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        await turns()
        assert "shut" not in protocol.events
        assert len(await peer.read_all()) == written
        await until(lambda: "shut" in protocol.events)
        await peer.send(b"the answer")
        await until(lambda: protocol.data == b"the answer")
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_a_write_after_half_close_is_ignored(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.write(b"last")
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.write(b"never")
        assert await peer.read_all() == b"last"
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_the_peers_half_close_leaves_writing_open(self) -> None:
        protocol, peer = await self.joined()
        await peer.send(b"question")
        peer.socket.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == b"question"
        protocol.transport.write(b"answer")
        assert await peer.read(6) == b"answer"
        assert "lost" not in protocol.events
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_close_follows_what_is_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseConnection()
        protocol.transport.loseConnection()
        await turns()
        assert "lost" not in protocol.events
        assert len(await peer.read_all()) == written
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(ConnectionDone)
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_close_waits_for_a_paused_producer(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        written = await fill(protocol.transport)
        protocol.transport.loseConnection()
        await peer.read(written)
        await until(lambda: producer.asked[-1] == "resume")
        await turns()
        assert "lost" not in protocol.events
        protocol.transport.unregisterProducer()
        assert len(await peer.read_all()) == written
        await until(lambda: "lost" in protocol.events)
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_close_after_both_ends_of_data(self) -> None:
        protocol, peer = await self.joined()
        peer.socket.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.loseConnection()
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(ConnectionDone)
        assert await peer.read_all() == b""
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_abort_drops_what_is_buffered_and_resets(self) -> None:
        protocol, peer = await self.joined()
        await fill(protocol.transport)
        protocol.transport.abortConnection()
        protocol.transport.abortConnection()
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(ConnectionAborted)
        if self.resets:
            with pytest.raises(ConnectionResetError):
                await peer.read_all()
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_abort_within_data_received(self) -> None:
        protocol, peer = await self.joined()
        protocol.on_data = lambda: protocol.transport.abortConnection()
        with suppress(ConnectionError):
            await peer.send(bytes(500_000))
        await until(lambda: "lost" in protocol.events)
        assert 0 < len(protocol.data) <= 65536
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_a_reset_is_a_lost_connection_after_the_data(self) -> None:
        protocol, peer = await self.joined()
        await peer.send(b"last words")
        await until(lambda: protocol.data == b"last words")
        if self.resets:
            peer.reset()
            await until(lambda: "lost" in protocol.events)
            assert protocol.reason is not None
            assert protocol.reason.check(ConnectionLost)
            assert "eof" not in protocol.events
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_a_reset_that_a_write_meets_first_is_no_end_of_data(self) -> None:
        protocol, peer = await self.joined()
        if self.resets:
            peer.reset()
            # No turn of the reactor since: this meets the reset, not a read.
            protocol.transport.write(b"to nobody")
            await until(lambda: "lost" in protocol.events)
            assert protocol.reason is not None
            assert protocol.reason.check(ConnectionLost)
            assert "eof" not in protocol.events
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_a_failed_write_is_reported_by_the_reactor(self) -> None:
        protocol, peer = await self.joined()
        peer.socket.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        peer.socket.close()
        for _ in range(3):
            protocol.transport.write(b"to nobody")
            # Never from within write: the caller may be in the middle of things.
            assert "lost" not in protocol.events
            await turns(5)
            if "lost" in protocol.events:
                break
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(ConnectionLost)
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_an_exception_ends_this_connection(
        self, logged_failures: LoggedFailures
    ) -> None:
        protocol, peer = await self.joined()

        def fail() -> None:
            raise ZeroDivisionError("of the test")

        protocol.on_data = fail
        await peer.send(b"x")
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(ZeroDivisionError)
        assert "of the test" in logged_failures.take("ZeroDivisionError")
        await self.over(protocol, peer)

    @pytest_twisted.ensureDeferred
    async def test_options_of_tcp(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)
        assert transport.getTcpKeepAlive()
        if peer.socket.family != socket.AF_UNIX:
            assert transport.getTcpNoDelay()
        await self.over(protocol, peer)
