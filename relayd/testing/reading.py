"""The contract of reading: delivery, and pauses."""

from __future__ import annotations

import random

from twisted.internet.defer import ensureDeferred
from twisted.internet.error import (
    ConnectionDone,
)

from relayd.testing.connection import ConnectionContract
from relayd.testing.protocols import Recorder
from relayd.testing.suite import checked, pause, raises, turns, until


class ReadingContract(ConnectionContract):
    """Bytes, and when they are read."""

    # -- bytes

    @checked
    async def test_2_mb_both_ways_at_once_with_a_peer_that_pauses(self) -> None:
        data = random.Random(1).randbytes(2_000_000)
        protocol, peer = await self.joined()
        for start in range(0, len(data), 50_000):
            protocol.transport.write(data[start : start + 50_000])
        sending = ensureDeferred(peer.send(data))
        while len(peer.data) < len(data):
            peer.data += peer.receive_some(200_000) or b""
            await pause(0.002)
        await sending
        await until(lambda: len(protocol.data) == len(data))
        assert protocol.data == data
        assert peer.data == data

    @checked
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

    @checked
    async def test_what_is_not_bytes_is_refused(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport
        for wrong in ("text", None, 5, bytearray(b"array"), memoryview(b"view")):
            with raises(TypeError):
                transport.write(wrong)
            with raises(TypeError):
                transport.writeSequence([b"this neither", wrong])
        transport.write(b"right")
        transport.loseConnection()
        assert await peer.read_all() == b"right"

    @checked
    async def test_many_small_writes_and_a_close(self) -> None:
        protocol, peer = await self.joined()
        pieces = [b"%d," % number for number in range(3000)]
        for piece in pieces[:2000]:
            protocol.transport.write(piece)
        protocol.transport.writeSequence(pieces[2000:])
        protocol.transport.loseConnection()
        assert await peer.read_all() == b"".join(pieces)
        await self.gone(protocol, ConnectionDone)

    # -- reading and pausing

    @checked
    async def test_a_paused_transport_delivers_nothing_and_loses_nothing(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.pauseProducing()
        await peer.send(b"later")
        await turns()
        assert not protocol.data
        protocol.transport.resumeProducing()
        # Never from within a call: the caller may not be ready.
        assert not protocol.data
        await until(lambda: protocol.data == b"later")

    @checked
    async def test_pausing_when_connected(self) -> None:
        made = Recorder(made=lambda: made.transport.pauseProducing())
        protocol, peer = await self.joined(made)
        await peer.send(b"x")
        await turns()
        assert not protocol.data
        protocol.transport.resumeProducing()
        await until(lambda: protocol.data == b"x")

    @checked
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

    @checked
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

    @checked
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

    @checked
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

    @checked
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
