"""The contract of closing and half-closing."""

from __future__ import annotations

from contextlib import suppress

from twisted.internet.error import (
    ConnectionDone,
)

from relayd.testing.connection import ConnectionContract
from relayd.testing.protocols import Pieces, Plain, Producer, Recorder
from relayd.testing.suite import checked, each, turns, until


class ClosingContract(ConnectionContract):
    """A close and a half-close come after what is buffered."""

    # -- closing

    @checked
    async def test_close_follows_what_is_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        protocol.transport.loseConnection()
        protocol.transport.loseConnection()
        await turns()
        assert not protocol.lost
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)

    @checked
    async def test_what_is_written_before_the_close_happens_is_sent(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        protocol.transport.loseConnection()
        protocol.transport.write(b"at once, ")
        await turns()
        protocol.transport.writeSequence([b"and ", b"later"])
        assert (await peer.read_all())[written:] == b"at once, and later"

    @checked
    @each(event=["made", "data"])
    async def test_close_within_an_event(self, event: str) -> None:
        def close() -> None:
            protocol.transport.write(b"goodbye")
            protocol.transport.loseConnection()
            assert not protocol.lost, "it is reported by the reactor"

        protocol = Recorder(**{event: close})
        peer = await self.open(protocol)
        await peer.send(b"x")
        await self.gone(protocol, ConnectionDone)
        assert bytes(protocol.data) == (b"x" if event == "data" else b"")
        with suppress(ConnectionError):
            await peer.read_all()
        assert peer.data == b"goodbye"

    @checked
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

    @checked
    async def test_nothing_is_read_after_a_close(self) -> None:
        protocol, peer = await self.joined()
        await self.fill(protocol.transport)
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

    @checked
    async def test_nothing_is_delivered_after_a_close_within_data_received(
        self,
    ) -> None:
        protocol, peer = await self.joined()
        protocol.on["data"] = lambda: protocol.transport.loseConnection()
        with suppress(ConnectionError):
            await peer.send(bytes(500_000))
        await self.gone(protocol, ConnectionDone)
        assert protocol.deliveries == 1

    @checked
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

    @checked
    async def test_closing_as_a_producer_or_a_consumer(self) -> None:
        first, one = await self.joined()
        second, two = await self.joined()
        first.transport.stopProducing()
        second.transport.registerProducer(Producer(), False)
        second.transport.stopConsuming()
        for protocol, peer in ((first, one), (second, two)):
            await self.gone(protocol, ConnectionDone)
            assert await peer.read_all() == b""

    @checked
    async def test_close_waits_for_a_paused_producer(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        written = await self.fill(protocol.transport)
        protocol.transport.loseConnection()
        await peer.read(written)
        await until(lambda: producer.asked[-1] == "resume")
        await turns()
        assert not protocol.lost
        protocol.transport.unregisterProducer()
        assert not protocol.lost, "it is reported by the reactor"
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)
        assert "stop" not in producer.asked

    @checked
    async def test_close_waits_for_what_a_paused_producer_has_left(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport

        def finish() -> None:
            transport.write(b"the rest")
            transport.unregisterProducer()

        producer = Producer(resume=finish)
        written = await self.fill(transport)
        transport.registerProducer(producer, True)
        transport.write(b"x")
        transport.loseConnection()
        assert (await peer.read_all())[written:] == b"xthe rest"
        await self.gone(protocol, ConnectionDone)

    @checked
    async def test_close_lets_a_pull_producer_finish(self) -> None:
        protocol, peer = await self.joined()
        pieces = [b"one", b"two", bytes(300_000), b"three"]
        producer = Pieces(protocol.transport, pieces[:])
        protocol.transport.registerProducer(producer, False)
        protocol.transport.loseConnection()
        assert await peer.read_all() == b"".join(pieces)
        await self.gone(protocol, ConnectionDone)

    @checked
    async def test_close_waits_for_a_pull_producer_that_has_nothing(self) -> None:
        protocol, _ = await self.joined()
        protocol.transport.registerProducer(Producer(), False)
        protocol.transport.loseConnection()
        await turns()
        assert not protocol.lost
        protocol.transport.unregisterProducer()
        assert not protocol.lost, "it is reported by the reactor"
        await self.gone(protocol, ConnectionDone)

    # -- the end of data, either way

    @checked
    async def test_half_close_follows_what_is_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        protocol.transport.loseWriteConnection()
        await turns()
        assert "shut" not in protocol.events
        assert len(await peer.read_all()) == written
        await until(lambda: "shut" in protocol.events)
        await peer.send(b"the answer")
        await until(lambda: protocol.data == b"the answer")
        assert protocol.events == ["made", "shut"]

    @checked
    async def test_what_is_written_before_a_half_close_happens_is_sent(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        protocol.transport.write(b"at once, ")
        await turns()
        protocol.transport.write(b"and later")
        assert (await peer.read_all())[written:] == b"at once, and later"

    @checked
    async def test_a_write_after_half_close_is_ignored(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.write(b"last")
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.write(b"never")
        protocol.transport.writeSequence([b"never"])
        assert self.unsent(protocol.transport) == 0
        assert await peer.read_all() == b"last"
        await turns()
        assert protocol.events == ["made", "shut"]

    @checked
    async def test_the_peers_half_close_leaves_writing_open(self) -> None:
        protocol, peer = await self.joined()
        await peer.send(b"question")
        peer.end()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == b"question"
        for word in (b"an ", b"answer, "):
            protocol.transport.write(word)
            await turns()
        written = await self.fill(protocol.transport)
        assert len(await peer.read(11 + written)) == 11 + written
        assert protocol.events == ["made", "eof"], "reported once"

    @checked
    async def test_the_peers_half_close_while_bytes_are_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        await peer.send(b"question")
        peer.end()
        await until(lambda: "eof" in protocol.events)
        assert protocol.data == b"question"
        protocol.transport.loseConnection()
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)

    @checked
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

    @checked
    async def test_close_after_both_ends_of_data(self) -> None:
        protocol, peer = await self.joined()
        peer.end()
        await until(lambda: "eof" in protocol.events)
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        protocol.transport.loseConnection()
        await self.gone(protocol, ConnectionDone)
        assert await peer.read_all() == b""

    @checked
    async def test_answering_an_end_of_data_with_one_and_closing(self) -> None:
        protocol, peer = await self.joined()
        protocol.on["eof"] = lambda: protocol.transport.loseWriteConnection()
        protocol.on["shut"] = lambda: protocol.transport.loseConnection()
        peer.end()
        await self.gone(protocol, ConnectionDone)
        assert protocol.events == ["made", "eof", "shut", "lost"]
        assert await peer.read_all() == b""

    @checked
    async def test_close_after_half_close_with_bytes_buffered(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        protocol.transport.loseWriteConnection()
        protocol.transport.loseConnection()
        await turns()
        assert not protocol.lost
        assert len(await peer.read_all()) == written
        await self.gone(protocol, ConnectionDone)
        assert protocol.events == ["made", "lost"]

    @checked
    async def test_half_close_waits_for_what_a_paused_producer_has_left(self) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport

        def finish() -> None:
            transport.write(b"the rest")
            transport.unregisterProducer()

        written = await self.fill(transport)
        transport.registerProducer(Producer(resume=finish), True)
        transport.write(b"x")
        transport.loseWriteConnection()
        assert (await peer.read_all())[written:] == b"xthe rest"
        await until(lambda: protocol.events == ["made", "shut"])

    @checked
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

    @checked
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

    @checked
    async def test_a_half_close_that_a_protocol_does_not_know(self) -> None:
        protocol, peer = await self.joined(Plain())
        protocol.transport.write(b"question")
        protocol.transport.loseWriteConnection()
        assert await peer.read_all() == b"question"
        await peer.send(b"answer")
        await until(lambda: protocol.data == b"answer")
        peer.end()
        await self.gone(protocol, ConnectionDone)
