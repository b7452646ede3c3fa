"""The least of the contract: interfaces, addresses, states, and that bytes arrive."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import (
    ConnectionDone,
)
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IHalfCloseableDescriptor,
    IPushProducer,
    ITCPTransport,
    ITransport,
)
from twisted.internet.protocol import Protocol
from zope.interface.verify import verifyObject

from relayd.stream.legs import unsent
from relayd.testing.peers import Peer
from relayd.testing.protocols import Plain, Producer, Recorder
from relayd.testing.suite import Suite, checked, pause, turns, until

#: Events that may come within another one, as their cause may act at once if nothing
#: is buffered: a close once the write side is shut (on every transport) or the peer's
#: end of data was read, and shutting the write side.
NESTED = {
    "lost within shut",
    "lost within eof",
    "shut within made",
    "shut within data",
    "shut within eof",
}

#: Bytes after which a transport should have some in its buffer.
ENDLESS = 1 << 26


class ConnectionContract(Suite):
    """The least that every transport has.

    Enough for a kind that differs from a tested one only in its addresses.  A subclass
    provides :meth:`connect`, and :meth:`disconnect` if there is something to close.
    """

    #: Whether a peer can reset the connection, as over TCP; over UNIX sockets it can't.
    resets = True

    async def connect(self, protocol: Protocol) -> Peer:
        """Connect `protocol` to a transport of the kind under test.

        May be called again, for several connections at once.

        :return: the other end.
        """
        raise NotImplementedError

    async def disconnect(self) -> None:
        """Close what `connect` opened, except for the connections."""

    def unsent(self, transport: Any) -> int:
        """How many bytes are buffered in `transport`, as a relay finds them.

        See :func:`relayd.stream.legs.unsent`.
        """
        return unsent(transport)

    def begin(self) -> None:
        super().begin()
        self.opened: list[tuple[Plain, Peer]] = []

    async def end(self) -> None:
        """Close what a test has opened, and check each connection's events."""
        try:
            await self._close()
        finally:
            try:
                await self.disconnect()
            finally:
                await super().end()

    async def _close(self) -> None:
        for protocol, peer in self.opened:
            peer.close()
            if protocol.transport is not None and not protocol.lost:
                protocol.transport.abortConnection()
        for protocol, _ in self.opened:
            await self.gone(protocol)
        await turns(2)
        for protocol, _ in self.opened:
            assert protocol.events[-1] == "lost"
            assert protocol.events.count("made") == 1
            assert protocol.events.count("lost") == 1
            assert set(protocol.nested) <= NESTED

    async def open(self, protocol: Plain) -> Peer:
        """Connect `protocol`; closed at the end of the test."""
        peer = await self.connect(protocol)
        self.opened.append((protocol, peer))
        return peer

    async def joined(self, protocol: Any = None) -> tuple[Any, Peer]:
        """A connected protocol and its peer."""
        protocol = Recorder() if protocol is None else protocol
        peer = await self.open(protocol)
        await until(lambda: "made" in protocol.events, "connectionMade")
        return protocol, peer

    async def gone(self, protocol: Plain, reason: type[Exception] = Exception) -> None:
        """Wait for the loss of the connection; its reason must be of this class."""
        await until(lambda: protocol.lost, "connectionLost")
        assert protocol.reason is not None
        assert isinstance(protocol.reason.value, reason)

    async def fill(self, transport: Any) -> int:
        """Write until a megabyte is buffered; return the number of bytes written."""
        written = 0
        while self.unsent(transport) < 1 << 20:
            assert written < ENDLESS, "nothing of what was written is buffered"
            transport.write(bytes(1 << 18))
            written += 1 << 18
            await pause(0.001)
        return written

    # -- what it is

    @checked
    async def test_names_its_ends_to_the_last(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport
        ends = transport.getHost(), transport.getPeer()
        for end in ends:
            assert verifyObject(IAddress, end)
        transport.loseConnection()
        await until(lambda: protocol.lost)
        assert transport.getPeer() == ends[1]

    # -- what it is

    @checked
    async def test_provides_the_interfaces(self) -> None:
        protocol, _ = await self.joined()
        for interface in (ITransport, IConsumer, IPushProducer):
            assert verifyObject(interface, protocol.transport)
        assert IHalfCloseableDescriptor.providedBy(protocol.transport)
        assert ITCPTransport.providedBy(protocol.transport)

    @checked
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

    @checked
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
        assert self.unsent(transport) == 0
        assert await peer.read_all() == b""

    @checked
    async def test_a_lost_transport_lets_go_of_protocol_and_producer(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport
        transport.registerProducer(Producer(), True)
        transport.abortConnection()
        await until(lambda: protocol.lost)
        assert getattr(transport, "protocol", None) is None
        assert transport.producer is None

    # -- bytes

    @checked
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
