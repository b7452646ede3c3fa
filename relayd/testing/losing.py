"""The contract of losses: by an abort, a reset, an exception of the program."""

from __future__ import annotations

import random
from contextlib import suppress

from twisted.internet.defer import ensureDeferred
from twisted.internet.error import (
    ConnectionAborted,
    ConnectionDone,
    ConnectionLost,
)

from relayd.testing.connection import ConnectionContract
from relayd.testing.protocols import Producer, Recorder, fail
from relayd.testing.suite import checked, each, raises, turns, until


class LossContract(ConnectionContract):
    """Each loss has its reason, and is reported by the reactor."""

    # -- aborting

    @checked
    async def test_abort_drops_what_is_buffered_and_resets(self) -> None:
        protocol, peer = await self.joined()
        written = await self.fill(protocol.transport)
        protocol.transport.abortConnection()
        protocol.transport.abortConnection()
        assert not protocol.lost, "it is reported by the reactor"
        await self.gone(protocol, ConnectionAborted)
        with suppress(ConnectionError):
            await peer.read_all()
            assert not self.resets, "the end of data instead of a reset"
        assert len(peer.data) < written

    @checked
    @each(event=["made", "data", "eof"])
    async def test_abort_within_an_event(self, event: str) -> None:
        def abort() -> None:
            protocol.transport.abortConnection()
            assert not protocol.lost, "it is reported by the reactor"

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

    @checked
    @each(state=["paused", "closing", "shut", "shutting", "ended", "ended and shut"])
    async def test_abort_in_every_state(self, state: str) -> None:
        protocol, peer = await self.joined()
        transport = protocol.transport
        if state == "paused":
            transport.pauseProducing()
            await peer.send(b"unread")
        elif state == "closing":
            await self.fill(transport)
            transport.loseConnection()
        elif state == "shutting":
            await self.fill(transport)
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

    @checked
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
        with raises(ConnectionResetError):
            await peer.read_all()
        assert peer.data == b""

    @checked
    async def test_abort_at_the_end_of_data_is_not_a_close(self) -> None:
        protocol, peer = await self.joined()
        peer.end()
        await until(lambda: "eof" in protocol.events)
        protocol.transport.abortConnection()
        protocol.transport.loseConnection()
        await self.gone(protocol, ConnectionAborted)

    @checked
    async def test_a_pull_producer_may_abort(self) -> None:
        protocol, _ = await self.joined()
        transport, asked = protocol.transport, 0

        def produce() -> None:
            nonlocal asked
            asked += 1
            transport.write(b"x")
            if asked == 3:
                transport.abortConnection()
                assert not protocol.lost, "it is reported by the reactor"

        producer = Producer(resume=produce)
        transport.registerProducer(producer, False)
        await self.gone(protocol, ConnectionAborted)
        assert producer.asked == ["resume"] * 3 + ["stop"]

    # -- resets and failed writes

    @checked
    async def test_a_reset_is_a_lost_connection_after_the_data(self) -> None:
        protocol, peer = await self.joined()
        await peer.send(b"last words")
        if self.resets:
            peer.reset()
            await self.gone(protocol, ConnectionLost)
            assert "eof" not in protocol.events
        await until(lambda: protocol.data == b"last words")

    @checked
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

    @checked
    async def test_a_reset_does_not_wait_while_bytes_are_buffered(self) -> None:
        protocol, peer = await self.joined()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        protocol.transport.pauseProducing()
        await self.fill(protocol.transport)
        peer.reset()
        await self.gone(protocol, ConnectionLost)
        assert producer.asked[-1] == "stop"

    @checked
    async def test_a_reset_of_a_connection_that_is_closing(self) -> None:
        protocol, peer = await self.joined()
        await self.fill(protocol.transport)
        protocol.transport.loseConnection()
        await turns(3)
        peer.reset()
        await self.gone(protocol, ConnectionLost)

    @checked
    async def test_a_reset_after_half_close(self) -> None:
        protocol, peer = await self.joined()
        protocol.transport.loseWriteConnection()
        await until(lambda: "shut" in protocol.events)
        if self.resets:
            peer.reset()
            await self.gone(protocol, ConnectionLost)
            assert "eof" not in protocol.events

    @checked
    async def test_a_reset_that_a_write_meets_first_is_no_end_of_data(self) -> None:
        protocol, peer = await self.joined()
        if self.resets:
            peer.reset()
            # No turn of the reactor since: this meets the reset, not a read.
            protocol.transport.write(b"to nobody")
            await self.gone(protocol, ConnectionLost)
            assert "eof" not in protocol.events

    @checked
    async def test_a_failed_write_is_reported_by_the_reactor(self) -> None:
        protocol, peer = await self.joined()
        peer.end()
        await until(lambda: "eof" in protocol.events)
        peer.close()
        for _ in range(3):
            protocol.transport.write(b"to nobody")
            # Never from within write: the caller may not be ready.
            assert not protocol.lost
            await turns(5)
            if protocol.lost:
                break
        await self.gone(protocol, ConnectionLost)

    # -- errors of the program

    @checked
    @each(event=["data", "eof", "shut"])
    async def test_an_exception_ends_this_connection(self, event: str) -> None:
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
        self.logged(ZeroDivisionError)
        assert await peer.read_all() in (b"", bytes(10))

    @checked
    async def test_an_exception_is_not_hidden_by_an_abort(self) -> None:
        protocol, peer = await self.joined()

        def abort_and_fail() -> None:
            protocol.transport.abortConnection()
            fail()

        protocol.on["data"] = abort_and_fail
        await peer.send(b"x")
        await self.gone(protocol, ZeroDivisionError)
        self.logged(ZeroDivisionError)

    @checked
    @each(way=["abort", "close"])
    async def test_an_exception_at_the_loss_is_logged(self, way: str) -> None:
        protocol, peer = await self.joined(Recorder(lost=fail))
        if way == "abort":
            protocol.transport.abortConnection()
        else:
            protocol.transport.loseConnection()
        await until(lambda: protocol.lost)
        with suppress(ConnectionError):
            assert await peer.read_all() == b""
        await turns(3)
        self.logged(ZeroDivisionError)

    @checked
    @each(streaming=[True, False])
    async def test_an_exception_of_a_producer_ends_the_connection(
        self, streaming: bool
    ) -> None:
        protocol, peer = await self.joined()
        transport, producer = protocol.transport, Producer()
        written = await self.fill(transport)
        transport.registerProducer(producer, streaming)
        producer.on["resume"] = fail
        transport.write(b"x")
        await peer.read(written)
        await self.gone(protocol, ZeroDivisionError)
        self.logged(ZeroDivisionError)
        assert producer.asked[-2:] == ["resume", "stop"]

    # -- several at once

    @checked
    async def test_20_connections_at_once(self) -> None:
        data = random.Random(5).randbytes(100_000)
        ends = [await self.joined() for _ in range(20)]
        sending = []
        for protocol, peer in ends:
            sending.append(ensureDeferred(peer.send(data)))
            protocol.transport.write(data)
            protocol.transport.loseWriteConnection()
        for _, peer in ends:
            assert await peer.read_all() == data
        await until(lambda: all(protocol.data == data for protocol, _ in ends))
        for sent in sending:
            await sent

    @checked
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
            most = max(most, self.unsent(sink.transport))

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

    @checked
    async def test_an_exception_is_nobody_elses(self) -> None:
        ends = [await self.joined() for _ in range(3)]
        ends[1][0].on["data"] = fail
        for _, peer in ends:
            peer.send_some(b"x")
        await until(lambda: all(protocol.data == b"x" for protocol, _ in ends))
        await self.gone(ends[1][0], ZeroDivisionError)
        self.logged(ZeroDivisionError)
        assert not ends[0][0].lost
        assert not ends[2][0].lost
