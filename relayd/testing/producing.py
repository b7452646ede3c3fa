"""How a transport treats the producer that writes to it."""

from __future__ import annotations

from twisted.internet.error import (
    ConnectionAborted,
)

from relayd.testing.connection import ConnectionContract
from relayd.testing.protocols import Pieces, Producer
from relayd.testing.suite import checked, raises, turns, until


class ProducerContract(ConnectionContract):
    """Producers, of both kinds."""

    @checked
    async def test_a_full_buffer_pauses_its_producer_until_it_is_empty(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        written = await self.fill(protocol.transport)
        assert producer.asked[-1:] == ["pause"]
        assert self.unsent(protocol.transport) > 0
        await peer.read(written)
        await until(lambda: producer.asked[-1] == "resume")
        assert self.unsent(protocol.transport) == 0

    @checked
    async def test_a_producer_is_paused_within_the_write(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        assert producer.asked == []
        protocol.transport.write(b"x")
        assert producer.asked == ["pause"]
        await peer.read(written + 1)
        await until(lambda: producer.asked == ["pause", "resume"])

    @checked
    async def test_a_producer_is_resumed_only_when_it_was_paused(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        for _ in range(3):
            protocol.transport.write(b"x")
            await turns(5)
        assert producer.asked == []
        assert await peer.read(3) == b"xxx"

    @checked
    async def test_a_producer_that_writes_when_it_is_resumed(self) -> None:
        protocol, peer = await self.joined()
        transport, left = protocol.transport, 5
        written = await self.fill(transport)

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

    @checked
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

    @checked
    async def test_the_loss_of_the_connection_stops_the_producer(self) -> None:
        protocol, _ = await self.joined()
        transport = protocol.transport

        def stop() -> None:
            assert not protocol.lost, "the producer is stopped first"
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

    @checked
    async def test_one_producer_at_a_time(self) -> None:
        protocol, _ = await self.joined()
        transport, first, second = protocol.transport, Producer(), Producer()
        transport.unregisterProducer()
        transport.registerProducer(first, True)
        for streaming in (True, False):
            with raises(RuntimeError):
                transport.registerProducer(second, streaming)
        transport.unregisterProducer()
        transport.registerProducer(second, True)
        transport.abortConnection()
        await until(lambda: protocol.lost)
        assert (first.asked, second.asked) == ([], ["stop"])

    @checked
    async def test_a_producer_that_comes_too_late_is_stopped(self) -> None:
        protocol, _ = await self.joined()
        protocol.transport.abortConnection()
        await until(lambda: protocol.lost)
        for streaming in (True, False):
            producer = Producer()
            protocol.transport.registerProducer(producer, streaming)
            assert producer.asked == ["stop"]

    @checked
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

    @checked
    async def test_a_pull_producer_waits_for_a_reader(self) -> None:
        # Pieces checks that nothing is buffered whenever it is asked.
        protocol, peer = await self.joined()
        producer = Pieces(protocol.transport, [bytes(700_000)] * 8)
        protocol.transport.registerProducer(producer, False)
        await turns()
        assert len(producer.asked) < 8
        await peer.read(5_600_000)
        await until(lambda: producer.asked == ["resume"] * 9)

    @checked
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
