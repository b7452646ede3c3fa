"""What the Bridge relies on in a stream transport, whoever made it.

`StreamTransportContract` is a suite without a transport: a subclass says how to
connect a protocol to a plain socket, and inherits the tests.  It runs on
Twisted's own transports and on relayd's; a transport that passes it can stand in
a relay, and in any program that was written for Twisted's.

The tests say what Twisted documents, and what its transports do besides and
programs have come to rely on, whichever reactor runs them.  Where Twisted's
documentation promises more than its transports keep, a test asks for no more than
both allow.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import (
    ConnectionAborted,
    ConnectionClosed,
    ConnectionDone,
    ConnectionLost,
)
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
from relayd.foreign_transports import set_options
from relayd.transports import PeerVanished
from tests.conftest import LoggedFailures, pause

#: Reactor turns that a test waits for something that should happen.
PATIENCE = 2000

#: Events that may be told from within another one, as what leads to them is done at
#: once where nothing has to be waited for: a close once the write side is shut (on
#: every transport) or the peer's end of data was read, and shutting the write side.
NESTED = {
    "lost within shut",
    "lost within eof",
    "shut within made",
    "shut within data",
    "shut within eof",
}


async def until(condition: Any, what: str = "") -> None:
    """Run the reactor until `condition()` is true."""
    for turn in range(PATIENCE):
        if condition():
            return
        await pause(0 if turn < 50 else 0.001)
    raise AssertionError(f"never happened: {what or condition}")


async def turns(count: int = 20) -> None:
    """Run the reactor for long enough that what was to happen has happened."""
    for _ in range(count):
        await pause(0)
    await pause(0.001)


class Plain(Protocol):
    """Keeps what a transport tells its protocol; knows nothing of half-closing.

    :ivar events: made, eof, shut and lost, in order; deliveries are only counted.
    :ivar on: what to do within an event, by its name; also for "data".
    :ivar nested: events that came from within another.
    """

    transport: Any

    def __init__(self, **on: Callable[[], object]) -> None:
        self.data = bytearray()
        self.deliveries = 0
        self.events: list[str] = []
        self.reason: Failure | None = None
        self.on = on
        self.nested: list[str] = []
        self._within: list[str] = []

    def _tell(self, event: str) -> None:
        self.nested += [f"{event} within {outer}" for outer in self._within[-1:]]
        self._within.append(event)
        try:
            if event in self.on:
                self.on[event]()
        finally:
            self._within.pop()

    def connectionMade(self) -> None:
        self.events.append("made")
        self._tell("made")

    def dataReceived(self, data: bytes) -> None:
        assert type(data) is bytes
        assert data
        self.deliveries += 1
        self.data += data
        self._tell("data")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.events.append("lost")
        self.reason = reason
        self._tell("lost")

    @property
    def lost(self) -> bool:
        return "lost" in self.events


@implementer(IHalfCloseableProtocol)
class Recorder(Plain):
    """A protocol that can half-close."""

    def readConnectionLost(self) -> None:
        self.events.append("eof")
        self._tell("eof")

    def writeConnectionLost(self) -> None:
        self.events.append("shut")
        self._tell("shut")


@implementer(IPushProducer)
class Producer:
    """Records what a consumer asks of it.

    :ivar on: what to do when asked to pause, resume or stop.
    """

    def __init__(self, **on: Callable[[], object]) -> None:
        self.asked: list[str] = []
        self.on = on

    def _asked(self, what: str) -> None:
        self.asked.append(what)
        if what in self.on:
            self.on[what]()

    def pauseProducing(self) -> None:
        self._asked("pause")

    def resumeProducing(self) -> None:
        self._asked("resume")

    def stopProducing(self) -> None:
        self._asked("stop")


class Pieces(Producer):
    """A pull producer: writes a piece each time it is asked, then unregisters."""

    def __init__(self, transport: Any, pieces: list[bytes]) -> None:
        super().__init__(resume=self._resume)
        self._transport = transport
        self._pieces = pieces
        self._writing = False

    def _resume(self) -> None:
        assert not self._writing, "asked from within a write"
        assert not unsent(self._transport), "asked before the last was written"
        self._writing = True
        if self._pieces:
            self._transport.write(self._pieces.pop(0))
        else:
            self._transport.unregisterProducer()
        self._writing = False


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

    def flood(self) -> int:
        """Send until the kernel takes no more; return how much it took."""
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += self.socket.send(bytes(1 << 18))
        return sent

    async def read(self, count: int) -> bytes:
        await until(lambda: self.take() or len(self.data) >= count, f"{count} bytes")
        return bytes(self.data)

    async def read_all(self) -> bytes:
        await until(self.take, "the end of data")
        return bytes(self.data)

    def end(self) -> None:
        """End this side's data."""
        self.socket.shutdown(socket.SHUT_WR)

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


def fail() -> None:
    raise ZeroDivisionError("of the test")


class ConnectionContract:
    """What every kind shows: that it is one, who is connected, that bytes arrive.

    Enough for a kind that differs from a tested one in its addresses alone.  A
    subclass provides :meth:`connect` and :meth:`disconnect`.
    """

    #: Whether this is TCP, with resets and urgent data; UNIX sockets have neither.
    resets = True

    async def connect(self, protocol: Protocol) -> Peer:
        """Connect `protocol` to a transport of the kind under test.

        May be called again, for several connections at once.
        """
        raise NotImplementedError

    async def disconnect(self) -> None:
        """Close whatever `connect` opened beyond the connection itself."""

    @pytest.fixture(autouse=True)
    def nothing_stays_connected(self) -> Iterator[None]:
        """End what a test has opened, and hold it to what every end is held to."""
        self.opened: list[tuple[Plain, Peer]] = []
        yield
        pytest_twisted.blockon(ensureDeferred(self._end()))

    async def _end(self) -> None:
        for protocol, peer in self.opened:
            peer.socket.close()
            if protocol.transport is not None and not protocol.lost:
                protocol.transport.abortConnection()
        try:
            for protocol, _ in self.opened:
                await until(lambda protocol=protocol: protocol.lost, "connectionLost")
            await turns(2)
            for protocol, _ in self.opened:
                assert protocol.events[-1] == "lost"
                assert protocol.events.count("made") == 1
                assert protocol.events.count("lost") == 1
                assert set(protocol.nested) <= NESTED
        finally:
            await self.disconnect()

    async def open(self, protocol: Plain) -> Peer:
        """Connect `protocol`, for the length of the test."""
        peer = await self.connect(protocol)
        self.opened.append((protocol, peer))
        return peer

    async def joined(self, protocol: Any = None) -> tuple[Any, Peer]:
        """A connected protocol and its peer."""
        protocol = Recorder() if protocol is None else protocol
        peer = await self.open(protocol)
        await until(lambda: "made" in protocol.events, "connectionMade")
        return protocol, peer

    async def gone(self, protocol: Plain, reason: type[Exception]) -> None:
        """Wait for the loss of the connection, which has this reason."""
        await until(lambda: protocol.lost, "connectionLost")
        assert protocol.reason is not None
        assert issubclass(protocol.reason.type, reason)

    # -- what it is

    @pytest_twisted.ensureDeferred
    async def test_provides_the_interfaces(self) -> None:
        protocol, _ = await self.joined()
        for interface in (ITransport, IConsumer, IPushProducer):
            assert verifyObject(interface, protocol.transport)
        assert IHalfCloseableDescriptor.providedBy(protocol.transport)
        assert ITCPTransport.providedBy(protocol.transport)

    @pytest_twisted.ensureDeferred
    async def test_names_both_ends(self) -> None:
        protocol, peer = await self.joined()
        local, remote = protocol.transport.getHost(), protocol.transport.getPeer()
        if peer.socket.family != socket.AF_UNIX:
            assert (local.host, local.port) == peer.socket.getpeername()[:2]
            assert (remote.host, remote.port) == peer.socket.getsockname()[:2]
        protocol.transport.loseConnection()
        await until(lambda: protocol.lost)
        assert protocol.transport.getPeer() == remote

    @pytest_twisted.ensureDeferred
    async def test_options_of_tcp(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport
        for enabled in (True, False, True):
            transport.setTcpNoDelay(enabled)
            transport.setTcpKeepAlive(enabled)
            assert transport.getTcpKeepAlive() is enabled
            tcp = peer.socket.family != socket.AF_UNIX
            assert transport.getTcpNoDelay() is (enabled and tcp)

    @pytest_twisted.ensureDeferred
    async def test_has_a_descriptor_and_a_name_in_the_log(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport
        assert transport.getHandle().fileno() == transport.fileno() >= 0
        assert "Recorder" in transport.logPrefix()
        transport.abortConnection()
        await until(lambda: protocol.lost)
        assert transport.fileno() == -1

    @pytest_twisted.ensureDeferred
    async def test_tells_how_far_it_is(self) -> None:
        # LineReceiver asks for `disconnecting` before each line.
        protocol, _ = await self.joined()
        transport = protocol.transport

        def state() -> list[bool]:
            return [
                bool(transport.connected),
                bool(transport.disconnecting),
                bool(transport.disconnected),
            ]

        assert state() == [True, False, False]
        transport.loseConnection()
        assert state() == [True, True, False]
        await until(lambda: protocol.lost)
        assert state() == [False, True, True]

    @pytest_twisted.ensureDeferred
    async def test_a_lost_transport_takes_every_call(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport

        def call_all() -> None:
            transport.write(b"to nobody")
            transport.writeSequence([b"to ", b"nobody"])
            transport.pauseProducing()
            transport.resumeProducing()
            transport.unregisterProducer()
            transport.loseConnection()
            transport.abortConnection()
            transport.stopProducing()
            transport.stopConsuming()

        protocol.on["lost"] = call_all
        transport.loseConnection()
        await self.gone(protocol, ConnectionDone)
        call_all()
        assert unsent(transport) == 0
        assert await peer.read_all() == b""

    @pytest_twisted.ensureDeferred
    async def test_a_lost_transport_lets_go_of_protocol_and_producer(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport
        transport.registerProducer(Producer(), True)
        transport.abortConnection()
        await until(lambda: protocol.lost)
        assert getattr(transport, "protocol", None) is None
        assert transport.producer is None

    # -- bytes

    @pytest_twisted.ensureDeferred
    async def test_bytes_arrive_in_order_both_ways(self) -> None:
        protocol, peer = await self.joined()
        for piece in (b"one", b"", b"two", bytes(300_000), b"end"):
            protocol.transport.write(piece)
        protocol.transport.writeSequence([])
        protocol.transport.writeSequence([b"1", b"", b"2"])
        expected = b"onetwo" + bytes(300_000) + b"end12"
        assert await peer.read(len(expected)) == expected
        await peer.send(expected)
        await until(lambda: len(protocol.data) >= len(expected))
        assert protocol.data == expected


class StreamTransportContract(ConnectionContract):
    """All of it."""

    # -- bytes

    @pytest_twisted.ensureDeferred
    async def test_2_mb_both_ways_at_once_with_a_peer_that_pauses(self) -> None:
        data = random.Random(1).randbytes(2_000_000)
        protocol, peer = await self.joined()
        for start in range(0, len(data), 50_000):
            protocol.transport.write(data[start : start + 50_000])
        sending = ensureDeferred(peer.send(data))
        while len(peer.data) < len(data):
            with suppress(BlockingIOError):
                peer.data += peer.socket.recv(200_000)
            await pause(0.002)
        await sending
        await until(lambda: len(protocol.data) == len(data))
        assert protocol.data == data
        assert peer.data == data

    @pytest_twisted.ensureDeferred
    async def test_an_echo_returns_every_byte(self) -> None:
        data = random.Random(2).randbytes(1_000_000)
        protocol, peer = await self.joined()
        taken = 0

        def echo() -> None:
            nonlocal taken
            protocol.transport.write(bytes(protocol.data[taken:]))
            taken = len(protocol.data)

        protocol.on["data"] = echo
        sending = ensureDeferred(peer.send(data))
        assert await peer.read(len(data)) == data
        await sending

    @pytest_twisted.ensureDeferred
    async def test_what_is_not_bytes_is_refused(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport
        for wrong in ("text", None, 5, bytearray(b"array"), memoryview(b"view")):
            with pytest.raises(TypeError):
                transport.write(wrong)
            with pytest.raises(TypeError):
                transport.writeSequence([b"this neither", wrong])
        transport.write(b"right")
        transport.loseConnection()
        assert await peer.read_all() == b"right"

    @pytest_twisted.ensureDeferred
    async def test_many_small_writes_and_a_close(self) -> None:
        protocol, peer = await self.joined()
        pieces = [b"%d," % number for number in range(3000)]
        for piece in pieces[:2000]:
            protocol.transport.write(piece)
        protocol.transport.writeSequence(pieces[2000:])
        protocol.transport.loseConnection()
        assert await peer.read_all() == b"".join(pieces)
        await self.gone(protocol, ConnectionDone)

    @pytest_twisted.ensureDeferred
    async def test_urgent_data_does_not_stop_what_follows(self) -> None:
        # It comes in its place, on Twisted's own transports once they are a relay's;
        # a read ends at its mark, however much waits behind.
        protocol, peer = await self.joined()
        set_options(protocol.transport)
        if self.resets:
            for way in ("read as it comes", "found when resumed"):
                protocol.data.clear()
                if way == "found when resumed":
                    protocol.transport.pauseProducing()
                peer.socket.send(b"before")
                peer.socket.send(b"!", socket.MSG_OOB)
                peer.socket.send(b"behind")
                await turns()
                protocol.transport.resumeProducing()
                await until(lambda: protocol.data == b"before!behind")
            protocol.data.clear()
            peer.socket.send(b"!", socket.MSG_OOB)
            peer.end()
            await until(lambda: "eof" in protocol.events)
            assert protocol.data == b"!"

    # -- reading and pausing

    @pytest_twisted.ensureDeferred
    async def test_a_paused_transport_delivers_nothing_and_loses_nothing(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.pauseProducing()
        await peer.send(b"later")
        await turns()
        assert not protocol.data
        protocol.transport.resumeProducing()
        # Never from within a call: the caller may be in the middle of things.
        assert not protocol.data
        await until(lambda: protocol.data == b"later")

    @pytest_twisted.ensureDeferred
    async def test_pausing_when_connected(self) -> None:
        made = Recorder(made=lambda: made.transport.pauseProducing())
        protocol, peer = await self.joined(made)
        await peer.send(b"x")
        await turns()
        assert not protocol.data
        protocol.transport.resumeProducing()
        await until(lambda: protocol.data == b"x")

    @pytest_twisted.ensureDeferred
    async def test_pausing_within_data_received_is_obeyed(self) -> None:
        protocol, peer = await self.joined()
        protocol.on["data"] = lambda: protocol.transport.pauseProducing()
        await peer.send(bytes(200_000))
        while len(protocol.data) < 200_000:
            protocol.deliveries = 0
            await until(lambda: protocol.deliveries)
            await turns(3)
            assert protocol.deliveries == 1
            protocol.transport.resumeProducing()
        await peer.send(b"y")
        await until(lambda: protocol.data[200_000:] == b"y")

    @pytest_twisted.ensureDeferred
    async def test_pausing_and_resuming_within_data_received(self) -> None:
        data = random.Random(3).randbytes(300_000)
        protocol, peer = await self.joined()

        def dither() -> None:
            protocol.transport.pauseProducing()
            protocol.transport.resumeProducing()
            protocol.transport.resumeProducing()

        protocol.on["data"] = dither
        await peer.send(data)
        peer.end()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == data

    @pytest_twisted.ensureDeferred
    async def test_pausing_at_random_loses_nothing(self) -> None:
        chance = random.Random(4)
        data = chance.randbytes(400_000)
        protocol, peer = await self.joined()
        sending = ensureDeferred(peer.send(data))
        while len(protocol.data) < len(data):
            if chance.random() < 0.5:
                protocol.transport.pauseProducing()
            else:
                protocol.transport.resumeProducing()
            await pause(0)
        await sending
        assert protocol.data == data

    @pytest_twisted.ensureDeferred
    async def test_the_end_of_data_waits_for_a_paused_transport(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.pauseProducing()
        await peer.send(b"last")
        peer.end()
        await turns()
        assert protocol.events == ["made"]
        protocol.on["data"] = lambda: protocol.transport.pauseProducing()
        protocol.transport.resumeProducing()
        await until(lambda: protocol.data == b"last")
        await turns()
        assert protocol.events == ["made"]
        protocol.transport.resumeProducing()
        await until(lambda: protocol.events == ["made", "eof"])

    @pytest_twisted.ensureDeferred
    async def test_a_switched_protocol_gets_what_follows(self) -> None:
        first, peer = await self.joined()
        transport, second = first.transport, Recorder()

        def switch() -> None:
            transport.protocol = second
            second.transport = transport

        first.on["data"] = switch
        await peer.send(bytes(200_000))
        peer.end()
        await until(lambda: "eof" in second.events)
        assert first.deliveries == 1
        assert len(first.data) + len(second.data) == 200_000
        transport.loseWriteConnection()
        transport.loseConnection()
        await until(lambda: second.lost)
        assert first.events == ["made"]
        self.opened[:] = [(second, peer)]
        second.events.insert(0, "made")

    # -- producers

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

    @pytest_twisted.ensureDeferred
    async def test_a_producer_is_paused_within_the_write(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        assert producer.asked == []
        protocol.transport.write(b"x")
        assert producer.asked == ["pause"]
        await peer.read(written + 1)
        await until(lambda: producer.asked == ["pause", "resume"])

    @pytest_twisted.ensureDeferred
    async def test_a_producer_is_resumed_only_when_it_was_paused(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        for _ in range(3):
            protocol.transport.write(b"x")
            await turns(5)
        assert producer.asked == []
        assert await peer.read(3) == b"xxx"

    @pytest_twisted.ensureDeferred
    async def test_a_producer_that_writes_when_it_is_resumed(self) -> None:
        protocol, peer = await self.joined()
        transport, left, written = protocol.transport, 5, await fill(protocol.transport)

        def more() -> None:
            nonlocal left, written
            if left:
                transport.write(bytes(500_000))
                left, written = left - 1, written + 500_000
            else:
                transport.unregisterProducer()

        producer = Producer(resume=more)
        transport.registerProducer(producer, True)
        more()
        await until(lambda: not peer.take() and len(peer.data) == written and not left)

    @pytest_twisted.ensureDeferred
    async def test_a_producer_may_abort_when_it_is_paused(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport
        producer = Producer(pause=transport.abortConnection)
        transport.registerProducer(producer, True)
        while "pause" not in producer.asked:
            transport.write(bytes(1 << 20))
        assert not protocol.lost
        await self.gone(protocol, ConnectionAborted)
        assert producer.asked[-1] == "stop"

    @pytest_twisted.ensureDeferred
    async def test_the_loss_of_the_connection_stops_the_producer(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport

        def stop() -> None:
            assert not protocol.lost, "the producer hears of it first"
            assert not transport.connected
            transport.write(b"to nobody")
            transport.unregisterProducer()
            transport.loseConnection()

        producer = Producer(stop=stop)
        transport.registerProducer(producer, True)
        transport.abortConnection()
        assert producer.asked == []
        await until(lambda: protocol.lost)
        assert producer.asked == ["stop"]

    @pytest_twisted.ensureDeferred
    async def test_one_producer_at_a_time(self) -> None:
        protocol, _ = await self.joined()
        transport, first, second = protocol.transport, Producer(), Producer()
        transport.unregisterProducer()
        transport.registerProducer(first, True)
        for streaming in (True, False):
            with pytest.raises(RuntimeError):
                transport.registerProducer(second, streaming)
        transport.unregisterProducer()
        transport.registerProducer(second, True)
        transport.abortConnection()
        await until(lambda: protocol.lost)
        assert (first.asked, second.asked) == ([], ["stop"])

    @pytest_twisted.ensureDeferred
    async def test_a_producer_that_comes_too_late_is_stopped(self) -> None:
        protocol, _ = await self.joined()
        protocol.transport.abortConnection()
        await until(lambda: protocol.lost)
        for streaming in (True, False):
            producer = Producer()
            protocol.transport.registerProducer(producer, streaming)
            assert producer.asked == ["stop"]

    @pytest_twisted.ensureDeferred
    async def test_a_pull_producer_is_asked_until_it_unregisters(self) -> None:
        protocol, peer = await self.joined()
        pieces = [b"%d," % number for number in range(300)]
        producer = Pieces(protocol.transport, pieces[:])
        protocol.transport.registerProducer(producer, False)
        assert producer.asked == ["resume"]
        expected = b"".join(pieces)
        assert await peer.read(len(expected)) == expected
        await turns()
        assert producer.asked == ["resume"] * 301
        protocol.transport.write(b"end")
        protocol.transport.loseConnection()
        assert await peer.read_all() == expected + b"end"

    @pytest_twisted.ensureDeferred
    async def test_a_pull_producer_waits_for_a_reader(self) -> None:
        # Pieces checks that nothing is buffered whenever it is asked.
        protocol, peer = await self.joined()
        producer = Pieces(protocol.transport, [bytes(700_000)] * 8)
        protocol.transport.registerProducer(producer, False)
        await turns()
        assert len(producer.asked) < 8
        await peer.read(5_600_000)
        await until(lambda: producer.asked == ["resume"] * 9)

    @pytest_twisted.ensureDeferred
    async def test_a_pull_producer_is_asked_again_once_something_is_written(
        self,
    ) -> None:
        protocol, _ = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, False)
        await turns()
        assert producer.asked == ["resume"], "it had nothing"
        protocol.transport.write(b"by somebody else")
        await until(lambda: producer.asked == ["resume"] * 2)

    # -- closing

    @pytest_twisted.ensureDeferred
    async def test_close_follows_what_is_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseConnection()
        protocol.transport.loseConnection()
        await turns()
        assert not protocol.lost
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)

    @pytest_twisted.ensureDeferred
    async def test_what_is_written_before_the_close_happens_is_sent(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseConnection()
        protocol.transport.write(b"at once, ")
        await turns()
        protocol.transport.writeSequence([b"and ", b"later"])
        assert (await peer.read_all())[written:] == b"at once, and later"

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize("event", ["made", "data"])
    async def test_close_within_an_event(self, event: str) -> None:
        def close() -> None:
            protocol.transport.write(b"goodbye")
            protocol.transport.loseConnection()
            assert not protocol.lost, "it is told by the reactor"

        protocol = Recorder(**{event: close})
        peer = await self.open(protocol)
        await peer.send(b"x")
        await self.gone(protocol, ConnectionDone)
        assert protocol.data == (b"x" if event == "data" else b"")
        with suppress(ConnectionError):
            await peer.read_all()
        assert peer.data == b"goodbye"

    @pytest_twisted.ensureDeferred
    async def test_close_at_the_end_of_data(self) -> None:
        protocol, peer = await self.joined()

        def close() -> None:
            protocol.transport.write(b"goodbye")
            protocol.transport.loseConnection()

        protocol.on["eof"] = close
        await peer.send(b"hello")
        peer.end()
        await self.gone(protocol, ConnectionDone)
        assert protocol.data == b"hello"
        assert await peer.read_all() == b"goodbye"

    @pytest_twisted.ensureDeferred
    async def test_nothing_is_read_after_a_close(self) -> None:
        protocol, peer = await self.joined()
        await fill(protocol.transport)
        protocol.transport.loseConnection()
        await peer.send(b"too late")
        peer.end()
        protocol.transport.resumeProducing()
        await turns()
        with suppress(ConnectionError):
            await peer.read_all()
        await self.gone(protocol, ConnectionDone)
        assert protocol.deliveries == 0
        assert protocol.events == ["made", "lost"]

    @pytest_twisted.ensureDeferred
    async def test_nothing_is_delivered_after_a_close_within_data_received(
        self,
    ) -> None:
        protocol, peer = await self.joined()
        protocol.on["data"] = lambda: protocol.transport.loseConnection()
        with suppress(ConnectionError):
            await peer.send(bytes(500_000))
        await self.gone(protocol, ConnectionDone)
        assert protocol.deliveries == 1

    @pytest_twisted.ensureDeferred
    async def test_an_answer_reaches_a_peer_that_was_not_heard_out(self) -> None:
        # With bytes unread the kernel resets the connection; the end of data
        # must be on its way before that.
        protocol, peer = await self.joined()
        protocol.transport.pauseProducing()
        await peer.send(b"more than anybody wanted to know")
        protocol.transport.write(b"too large")
        protocol.transport.loseConnection()
        await self.gone(protocol, ConnectionDone)
        if self.resets:
            assert await peer.read_all() == b"too large"

    @pytest_twisted.ensureDeferred
    async def test_closing_as_a_producer_or_a_consumer(self) -> None:
        first, one = await self.joined()
        second, two = await self.joined()
        first.transport.stopProducing()
        second.transport.registerProducer(Producer(), False)
        second.transport.stopConsuming()
        for protocol, peer in ((first, one), (second, two)):
            await self.gone(protocol, ConnectionDone)
            assert await peer.read_all() == b""

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
        assert not protocol.lost
        protocol.transport.unregisterProducer()
        assert not protocol.lost, "it is told by the reactor"
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)
        assert "stop" not in producer.asked

    @pytest_twisted.ensureDeferred
    async def test_close_waits_for_what_a_paused_producer_has_left(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport

        def finish() -> None:
            transport.write(b"the rest")
            transport.unregisterProducer()

        producer = Producer(resume=finish)
        written = await fill(transport)
        transport.registerProducer(producer, True)
        transport.write(b"x")
        transport.loseConnection()
        assert (await peer.read_all())[written:] == b"xthe rest"
        await self.gone(protocol, ConnectionDone)

    @pytest_twisted.ensureDeferred
    async def test_close_lets_a_pull_producer_finish(self) -> None:
        protocol, peer = await self.joined()
        pieces = [b"one", b"two", bytes(300_000), b"three"]
        producer = Pieces(protocol.transport, pieces[:])
        protocol.transport.registerProducer(producer, False)
        protocol.transport.loseConnection()
        assert await peer.read_all() == b"".join(pieces)
        await self.gone(protocol, ConnectionDone)

    @pytest_twisted.ensureDeferred
    async def test_close_waits_for_a_pull_producer_that_has_nothing(self) -> None:
        protocol, _ = await self.joined()
        protocol.transport.registerProducer(Producer(), False)
        protocol.transport.loseConnection()
        await turns()
        assert not protocol.lost
        protocol.transport.unregisterProducer()
        assert not protocol.lost, "it is told by the reactor"
        await self.gone(protocol, ConnectionDone)

    # -- the end of data, either way

    @pytest_twisted.ensureDeferred
    async def test_half_close_follows_what_is_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        protocol.transport.loseWriteConnection()
        await turns()
        assert "shut" not in protocol.events
        assert len(await peer.read_all()) == written
        await until(lambda: "shut" in protocol.events)
        await peer.send(b"the answer")
        await until(lambda: protocol.data == b"the answer")
        assert protocol.events == ["made", "shut"]

    @pytest_twisted.ensureDeferred
    async def test_what_is_written_before_a_half_close_happens_is_sent(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        protocol.transport.write(b"at once, ")
        await turns()
        protocol.transport.write(b"and later")
        assert (await peer.read_all())[written:] == b"at once, and later"

    @pytest_twisted.ensureDeferred
    async def test_a_write_after_half_close_is_ignored(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.write(b"last")
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.write(b"never")
        protocol.transport.writeSequence([b"never"])
        assert unsent(protocol.transport) == 0
        assert await peer.read_all() == b"last"
        await turns()
        assert protocol.events == ["made", "shut"]

    @pytest_twisted.ensureDeferred
    async def test_the_peers_half_close_leaves_writing_open(self) -> None:
        protocol, peer = await self.joined()
        await peer.send(b"question")
        peer.end()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == b"question"
        for word in (b"an ", b"answer, "):
            protocol.transport.write(word)
            await turns()
        written = await fill(protocol.transport)
        assert len(await peer.read(11 + written)) == 11 + written
        assert protocol.events == ["made", "eof"], "told once"

    @pytest_twisted.ensureDeferred
    async def test_the_peers_half_close_while_bytes_are_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        await peer.send(b"question")
        peer.end()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == b"question"
        protocol.transport.loseConnection()
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)

    @pytest_twisted.ensureDeferred
    async def test_both_ends_of_data_are_not_the_end(self) -> None:
        # The kernel reports a hang-up then.  The protocol still decides.
        protocol, peer = await self.joined()
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.pauseProducing()
        await peer.send(b"last")
        peer.end()
        await turns()
        assert protocol.events == ["made", "shut"]
        protocol.transport.resumeProducing()
        await until(lambda: "eof" in protocol.events)
        await turns()
        assert protocol.data == b"last"
        assert protocol.events == ["made", "shut", "eof"]

    @pytest_twisted.ensureDeferred
    async def test_close_after_both_ends_of_data(self) -> None:
        protocol, peer = await self.joined()
        peer.end()
        await until(lambda: "eof" in protocol.events)
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.loseConnection()
        await self.gone(protocol, ConnectionDone)
        assert await peer.read_all() == b""

    @pytest_twisted.ensureDeferred
    async def test_answering_an_end_of_data_with_one_and_closing(self) -> None:
        protocol, peer = await self.joined()
        protocol.on["eof"] = lambda: protocol.transport.loseWriteConnection()
        protocol.on["shut"] = lambda: protocol.transport.loseConnection()
        peer.end()
        await self.gone(protocol, ConnectionDone)
        assert protocol.events == ["made", "eof", "shut", "lost"]
        assert await peer.read_all() == b""

    @pytest_twisted.ensureDeferred
    async def test_close_after_half_close_with_bytes_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        protocol.transport.loseConnection()
        await turns()
        assert not protocol.lost
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)
        assert protocol.events == ["made", "lost"]

    @pytest_twisted.ensureDeferred
    async def test_half_close_waits_for_what_a_paused_producer_has_left(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport

        def finish() -> None:
            transport.write(b"the rest")
            transport.unregisterProducer()

        written = await fill(transport)
        transport.registerProducer(Producer(resume=finish), True)
        transport.write(b"x")
        transport.loseWriteConnection()
        assert (await peer.read_all())[written:] == b"xthe rest"
        await until(lambda: protocol.events == ["made", "shut"])

    @pytest_twisted.ensureDeferred
    async def test_half_close_lets_a_pull_producer_finish(self) -> None:
        protocol, peer = await self.joined()
        transport, pieces = protocol.transport, [b"one", b"two", b"three"]

        def produce() -> None:
            transport.write(pieces.pop(0))
            if not pieces:
                transport.unregisterProducer()

        transport.registerProducer(Producer(resume=produce), False)
        transport.loseWriteConnection()
        assert await peer.read_all() == b"onetwothree"
        await until(lambda: protocol.events == ["made", "shut"])

    @pytest_twisted.ensureDeferred
    async def test_an_end_of_data_that_a_protocol_does_not_know(self) -> None:
        # It is the end: what is buffered by then is dropped.
        protocol, peer = await self.joined(Plain())
        protocol.transport.pauseProducing()
        await peer.send(b"last")
        peer.end()
        await turns()
        assert not protocol.lost
        protocol.transport.resumeProducing()
        await self.gone(protocol, ConnectionDone)
        assert protocol.data == b"last"
        assert await peer.read_all() == b""

    @pytest_twisted.ensureDeferred
    async def test_a_half_close_that_a_protocol_does_not_know(self) -> None:
        protocol, peer = await self.joined(Plain())
        protocol.transport.write(b"question")
        protocol.transport.loseWriteConnection()
        assert await peer.read_all() == b"question"
        await peer.send(b"answer")
        await until(lambda: protocol.data == b"answer")
        peer.end()
        await self.gone(protocol, ConnectionDone)

    # -- aborting

    @pytest_twisted.ensureDeferred
    async def test_abort_drops_what_is_buffered_and_resets(self) -> None:
        protocol, peer = await self.joined()
        written = await fill(protocol.transport)
        protocol.transport.abortConnection()
        protocol.transport.abortConnection()
        assert not protocol.lost, "it is told by the reactor"
        await self.gone(protocol, ConnectionAborted)
        with suppress(ConnectionError):
            await peer.read_all()
            assert not self.resets, "the end of data instead of a reset"
        assert len(peer.data) < written

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize("event", ["made", "data", "eof"])
    async def test_abort_within_an_event(self, event: str) -> None:
        def abort() -> None:
            protocol.transport.abortConnection()
            assert not protocol.lost, "it is told by the reactor"

        protocol = Recorder(**{event: abort})
        peer = await self.open(protocol)
        with suppress(ConnectionError):
            await peer.send(bytes(500_000))
        with suppress(OSError):
            peer.end()
        await self.gone(protocol, ConnectionAborted)
        assert protocol.events == ["made", *["eof"] * (event == "eof"), "lost"]
        if event != "eof":
            assert protocol.deliveries == (event == "data")

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize(
        "state", ["paused", "closing", "shut", "shutting", "ended", "ended and shut"]
    )
    async def test_abort_in_every_state(self, state: str) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport
        if state == "paused":
            transport.pauseProducing()
            await peer.send(b"unread")
        elif state == "closing":
            await fill(transport)
            transport.loseConnection()
        elif state == "shutting":
            await fill(transport)
            transport.loseWriteConnection()
        if "ended" in state:
            peer.end()
            await until(lambda: "eof" in protocol.events)
        if state.endswith("shut"):
            transport.loseWriteConnection()
            await until(lambda: "shut" in protocol.events)
        await turns(3)
        transport.abortConnection()
        await self.gone(protocol, ConnectionAborted)

    @pytest_twisted.ensureDeferred
    async def test_nothing_happens_after_an_abort(self) -> None:
        protocol, peer = await self.joined()
        transport, producer = protocol.transport, Producer()
        transport.pauseProducing()
        await peer.send(b"unread")
        transport.abortConnection()
        transport.write(b"never")
        transport.writeSequence([b"never"])
        transport.resumeProducing()
        transport.registerProducer(producer, True)
        transport.loseWriteConnection()
        transport.loseConnection()
        await self.gone(protocol, ConnectionAborted)
        assert protocol.events == ["made", "lost"]
        assert protocol.deliveries == 0
        assert producer.asked == ["stop"]
        with pytest.raises(ConnectionResetError):
            await peer.read_all()
        assert peer.data == b""

    @pytest_twisted.ensureDeferred
    async def test_abort_at_the_end_of_data_is_not_a_close(self) -> None:
        protocol, peer = await self.joined()
        peer.end()
        await until(lambda: "eof" in protocol.events)
        protocol.transport.abortConnection()
        protocol.transport.loseConnection()
        await self.gone(protocol, ConnectionAborted)

    @pytest_twisted.ensureDeferred
    async def test_a_pull_producer_may_abort(self) -> None:
        protocol, _ = await self.joined()
        transport, asked = protocol.transport, 0

        def produce() -> None:
            nonlocal asked
            asked += 1
            transport.write(b"x")
            if asked == 3:
                transport.abortConnection()
                assert not protocol.lost, "it is told by the reactor"

        producer = Producer(resume=produce)
        transport.registerProducer(producer, False)
        await self.gone(protocol, ConnectionAborted)
        assert producer.asked == ["resume"] * 3 + ["stop"]

    # -- resets and failed writes

    @pytest_twisted.ensureDeferred
    async def test_a_reset_is_a_lost_connection_after_the_data(self) -> None:
        protocol, peer = await self.joined()
        await peer.send(b"last words")
        if self.resets:
            peer.reset()
            await self.gone(protocol, ConnectionLost)
            assert "eof" not in protocol.events
        await until(lambda: protocol.data == b"last words")

    @pytest_twisted.ensureDeferred
    async def test_a_reset_waits_for_a_paused_transport(self) -> None:
        protocol, peer = await self.joined()
        if self.resets:
            protocol.transport.pauseProducing()
            await peer.send(b"last words")
            peer.reset()
            await turns()
            assert protocol.events == ["made"]
            protocol.transport.resumeProducing()
            await self.gone(protocol, ConnectionLost)
            assert protocol.data == b"last words"

    @pytest_twisted.ensureDeferred
    async def test_a_peer_that_vanished_has_not_reset(self) -> None:
        # The kernel gives up (here it was told to, on a peer that takes nothing):
        # that is told apart from a reset, by the connections that are ours.
        protocol, _ = await self.joined()
        if self.resets:
            transport = protocol.transport
            ours = getattr(transport, "options_are_set", False)
            transport.getHandle().setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50
            )
            await fill(transport)
            await self.gone(protocol, PeerVanished if ours else ConnectionLost)
            assert "eof" not in protocol.events
            if ours:
                assert str(protocol.reason.value) == "Connection timed out"

    @pytest_twisted.ensureDeferred
    async def test_a_reset_does_not_wait_while_bytes_are_buffered(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        protocol.transport.pauseProducing()
        await fill(protocol.transport)
        peer.reset()
        await self.gone(protocol, ConnectionLost)
        assert producer.asked[-1] == "stop"

    @pytest_twisted.ensureDeferred
    async def test_a_reset_of_a_connection_that_is_closing(self) -> None:
        protocol, peer = await self.joined()
        await fill(protocol.transport)
        protocol.transport.loseConnection()
        await turns(3)
        peer.reset()
        await self.gone(protocol, ConnectionLost)

    @pytest_twisted.ensureDeferred
    async def test_a_reset_after_half_close(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        if self.resets:
            peer.reset()
            await self.gone(protocol, ConnectionLost)
            assert "eof" not in protocol.events

    @pytest_twisted.ensureDeferred
    async def test_a_reset_that_a_write_meets_first_is_no_end_of_data(self) -> None:
        protocol, peer = await self.joined()
        if self.resets:
            peer.reset()
            # No turn of the reactor since: this meets the reset, not a read.
            protocol.transport.write(b"to nobody")
            await self.gone(protocol, ConnectionLost)
            assert "eof" not in protocol.events

    @pytest_twisted.ensureDeferred
    async def test_a_failed_write_is_reported_by_the_reactor(self) -> None:
        protocol, peer = await self.joined()
        peer.end()
        await until(lambda: "eof" in protocol.events)
        peer.socket.close()
        for _ in range(3):
            protocol.transport.write(b"to nobody")
            # Never from within write: the caller may be in the middle of things.
            assert not protocol.lost
            await turns(5)
            if protocol.lost:
                break
        await self.gone(protocol, ConnectionLost)

    # -- errors of the program

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize("event", ["data", "eof", "shut"])
    async def test_an_exception_ends_this_connection(
        self, event: str, logged_failures: LoggedFailures
    ) -> None:
        protocol, peer = await self.joined(Recorder(**{event: fail}))
        if event == "shut":
            protocol.transport.write(bytes(10))
            protocol.transport.loseWriteConnection()
        elif event == "data":
            await peer.send(b"x")
        else:
            peer.end()
        await self.gone(protocol, ZeroDivisionError)
        assert protocol.events.count(event) == (event != "data")
        assert "of the test" in logged_failures.take("ZeroDivisionError")
        assert await peer.read_all() in (b"", bytes(10))

    @pytest_twisted.ensureDeferred
    async def test_an_exception_is_not_hidden_by_an_abort(
        self, logged_failures: LoggedFailures
    ) -> None:
        protocol, peer = await self.joined()

        def abort_and_fail() -> None:
            protocol.transport.abortConnection()
            fail()

        protocol.on["data"] = abort_and_fail
        await peer.send(b"x")
        await self.gone(protocol, ZeroDivisionError)
        logged_failures.take("ZeroDivisionError")

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize("way", ["abort", "close"])
    async def test_an_exception_at_the_loss_is_logged(
        self, way: str, logged_failures: LoggedFailures
    ) -> None:
        protocol, peer = await self.joined(Recorder(lost=fail))
        if way == "abort":
            protocol.transport.abortConnection()
        else:
            protocol.transport.loseConnection()
        await until(lambda: protocol.lost)
        with suppress(ConnectionError):
            assert await peer.read_all() == b""
        await turns(3)
        logged_failures.take("ZeroDivisionError")

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize("streaming", [True, False])
    async def test_an_exception_of_a_producer_ends_the_connection(
        self, streaming: bool, logged_failures: LoggedFailures
    ) -> None:
        protocol, peer = await self.joined()
        transport, producer = protocol.transport, Producer()
        written = await fill(transport)
        transport.registerProducer(producer, streaming)
        producer.on["resume"] = fail
        transport.write(b"x")
        await peer.read(written)
        await self.gone(protocol, ZeroDivisionError)
        logged_failures.take("ZeroDivisionError")
        assert producer.asked[-2:] == ["resume", "stop"]

    # -- several at once

    @pytest_twisted.ensureDeferred
    async def test_20_connections_at_once(self) -> None:
        data = random.Random(5).randbytes(100_000)
        ends = [await self.joined() for _ in range(20)]
        sending = []
        for protocol, peer in ends:
            sending.append(ensureDeferred(peer.send(data)))
            protocol.transport.write(data)
            protocol.transport.loseWriteConnection()
        for protocol, peer in ends:
            assert await peer.read_all() == data
            await until(lambda protocol=protocol: len(protocol.data) == len(data))
            assert protocol.data == data
        for each in sending:
            await each

    @pytest_twisted.ensureDeferred
    async def test_a_flood_does_not_hold_its_neighbours_or_timers(self) -> None:
        loud, flooding = await self.joined()
        quiet, other = await self.joined()
        loud.transport.pauseProducing()
        quiet.transport.pauseProducing()
        total = flooding.flood()
        await other.send(b"x")
        loud.transport.resumeProducing()
        quiet.transport.resumeProducing()
        heard: dict[str, int] = {}
        quiet.on["data"] = lambda: heard.setdefault("neighbour", len(loud.data))
        await pause(0)
        heard["timer"] = len(loud.data)
        await until(lambda: len(loud.data) == total and "neighbour" in heard)
        assert heard["neighbour"] < total
        assert heard["timer"] < total

    @pytest_twisted.ensureDeferred
    async def test_one_is_the_others_producer(self) -> None:
        # As Twisted's own examples relay: what one reads the other writes, and a
        # full buffer stops the reading.
        data = random.Random(6).randbytes(6_000_000)
        source, sender = await self.joined()
        sink, receiver = await self.joined()
        most = 0

        def relay() -> None:
            nonlocal most
            sink.transport.write(bytes(source.data))
            source.data.clear()
            most = max(most, unsent(sink.transport))

        source.on["data"] = relay
        sink.transport.registerProducer(source.transport, True)
        sending = ensureDeferred(sender.send(data))
        await until(lambda: most > 65536, "a full buffer")
        await turns()
        assert most <= 200_000
        assert await receiver.read(len(data)) == data
        await sending
        assert most <= 200_000
        sink.transport.abortConnection()
        await self.gone(source, ConnectionDone)

    @pytest_twisted.ensureDeferred
    async def test_an_exception_is_nobody_elses(
        self, logged_failures: LoggedFailures
    ) -> None:
        ends = [await self.joined() for _ in range(3)]
        ends[1][0].on["data"] = fail
        for _, peer in ends:
            peer.socket.send(b"x")
        await until(lambda: all(protocol.data == b"x" for protocol, _ in ends))
        await self.gone(ends[1][0], ZeroDivisionError)
        logged_failures.take("ZeroDivisionError")
        assert not ends[0][0].lost
        assert not ends[2][0].lost

    @pytest_twisted.ensureDeferred
    @pytest.mark.parametrize("first", ["one", "two"])
    @pytest.mark.parametrize("news", ["data", "end", "reset", "reset after its end"])
    async def test_a_number_that_is_used_again_brings_no_old_events(
        self, news: str, first: str
    ) -> None:
        # Two connections have events in one batch.  One, when it is told, ends the
        # other and opens a new one, which may get its descriptor's number.
        (one, sender), (two, other) = await self.joined(), await self.joined()
        fresh = Recorder()
        opened: list[Deferred[Peer]] = []

        def replace() -> None:
            if not opened:
                two.on["data"] = fail
                if "after" in news:
                    two.transport.loseConnection()
                else:
                    two.transport.abortConnection()
                opened.append(ensureDeferred(self.open(fresh)))

        one.on["data"] = replace
        if "after" in news:
            other.end()
            await until(lambda: "eof" in two.events)
        if first == "one":
            sender.socket.send(b"for one")
        if news == "data":
            other.socket.send(b"for two")
        elif news == "end":
            other.end()
        else:
            other.reset()
        if first == "two":
            sender.socket.send(b"for one")
        await until(lambda: bool(opened))
        peer = await opened[0]
        await until(lambda: two.lost and fresh.events)
        await turns()
        assert fresh.events == ["made"]
        assert fresh.data == b""
        await peer.send(b"for the new one")
        await until(lambda: fresh.data == b"for the new one")
        assert two.reason is not None
        assert two.reason.check(ConnectionClosed)
