"""A transport without a network, for tests without real time.

Twisted's own test transports do not half-close, and none has a peer that may refuse to
read.  `FakeTransport` has both: written bytes stay in its buffer until the test has the
network take them.  It passes :class:`relayd.testing.StreamTransportContract`, as real
transports do, so that what works on it works on them: above all, an abort is reported
in the reactor's next turn, never from within the call.

The turns come from a clock.  With a :class:`twisted.internet.task.Clock`, which the
program under test uses too, there is a turn after each call that stands for the
network, and at each advance of the clock; after calls of the program, the test calls
:meth:`turn`.  With a reactor, turns are the reactor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

from twisted.internet.address import IPv4Address
from twisted.internet.error import (
    ConnectionAborted,
    ConnectionDone,
    ConnectionLost,
)
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IProtocol,
    IPushProducer,
    ITCPTransport,
)
from twisted.internet.task import Clock
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

_log = Logger()


@implementer(ITCPTransport, IConsumer, IHalfCloseableDescriptor, IPushProducer)
class FakeTransport:
    """One end of a connection, with the buffers of Twisted's own descriptors.

    :param port: of the peer.
    :param clock: for the turns (IReactorTime); a new Clock, unless given.
    :ivar log: the program's calls, in order.
    :ivar taken: the written bytes that the network has taken.
    :ivar capacity: how many more bytes the network takes by itself, in the turn after
        they were written; the others wait for :meth:`take`.
    :ivar reading: whether it reads what arrives.
    :ivar aborted: the program has aborted it.
    """

    bufferSize = 65536

    def __init__(self, port: int = 50000, clock: Any = None) -> None:
        self.clock = Clock() if clock is None else clock
        self.protocol: Any = None
        self.peer: IAddress = IPv4Address("TCP", "192.0.2.1", port)
        self.host: IAddress = IPv4Address("TCP", "192.0.2.2", 80)
        self.log: list[str] = []
        self.taken = b""
        self.capacity = 0
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0
        self.producer: Any = None
        self.streamingProducer = False
        self.reading = True
        self.connected = True
        self.disconnected = False
        self.disconnecting = False
        self.aborted = False
        self.write_shut = False
        self._half_closing = False
        self._producer_paused = False
        self._options = {"nodelay": False, "keepalive": False}
        #: Bytes that have arrived and were not read, and the end that follows them.
        self._arrived = b""
        self._arrived_end: type[Exception] | None = None
        self._read_ended = False
        #: The peer is gone: the next write meets a reset.
        self._refuses = False
        #: Calls scheduled for the next turn.
        self._scheduled: set[Callable[[], None]] = set()

    def connect(self, protocol: IProtocol) -> Self:
        """Connect `protocol` to this end."""
        self.protocol = protocol
        protocol.makeConnection(self)
        self.turn()
        return self

    def turn(self) -> None:
        """Run the reactor's next turn, unless the reactor is a real one."""
        advance = getattr(self.clock, "advance", None)
        if advance is not None:
            advance(0)

    def _next_turn(self, call: Callable[[], None]) -> None:
        if call not in self._scheduled:
            self._scheduled.add(call)
            self.clock.callLater(0, self._do, call)

    def _do(self, call: Callable[[], None]) -> None:
        self._scheduled.discard(call)
        call()

    # -- what the network does, read at once

    def receive(self, data: bytes) -> None:
        """The peer sent `data`, and it is read."""
        if not self.reading:
            raise AssertionError("data arrived while reading was paused")
        self._call(self.protocol.dataReceived, data)
        self.turn()

    def receive_eof(self) -> None:
        """The peer ended its side, and the end is read."""
        self.readConnectionLost(Failure(ConnectionDone()))
        self.turn()

    def lose(self, reason: Exception | None = None) -> None:
        """The connection is gone; ConnectionLost unless another reason is given."""
        self._lose(Failure(reason or ConnectionLost()))
        self.turn()

    def take(self, count: int | None = None) -> None:
        """The network takes `count` of the buffered bytes; all, unless given."""
        self._take(len(self.dataBuffer) if count is None else count)
        self.turn()

    # -- what the network does, read when the transport is not paused

    def arrive(self, data: bytes) -> None:
        """The peer sent `data`, which waits until it is read."""
        self._arrived += data
        self._next_turn(self._read)

    def arrive_eof(self) -> None:
        """The peer ended its side; the end is read after its data."""
        self._arrived_end = self._arrived_end or ConnectionDone
        self._next_turn(self._read)

    def arrive_reset(self) -> None:
        """The peer reset the connection: the next read after its data fails.

        So does a write; if bytes are buffered, one follows at once.
        """
        self._arrived_end = ConnectionLost
        self._refuses = True
        self._next_turn(self._read)
        self._next_turn(self._flush)

    def arrive_close(self) -> None:
        """The peer closed its connection: its data ends, and the next write fails."""
        self._refuses = True
        self.arrive_eof()

    @property
    def waiting(self) -> int:
        """How many bytes have arrived and were not read."""
        return len(self._arrived)

    def add_capacity(self, count: int) -> None:
        """The network takes so many more bytes by itself."""
        self.capacity += count
        self._next_turn(self._flush)

    # -- what the reactor does

    def _read(self) -> None:
        if not self.reading or not self.connected:
            return
        if self._arrived:
            data = self._arrived[: self.bufferSize]
            self._arrived = self._arrived[self.bufferSize :]
            self._call(self.protocol.dataReceived, data)
            self._next_turn(self._read)
        elif self._arrived_end is ConnectionDone:
            self.readConnectionLost(Failure(ConnectionDone()))
        elif self._arrived_end is ConnectionLost:
            self._lose(Failure(ConnectionLost()))

    def readConnectionLost(self, reason: Failure) -> None:
        self.reading = False
        self._read_ended = True
        self.log.append("eof")
        if IHalfCloseableProtocol.providedBy(self.protocol):
            self._call(self.protocol.readConnectionLost)
        else:
            self._lose(reason)

    def _flush(self) -> None:
        """Write what the network takes."""
        if not self.connected or self.aborted:
            return
        # After the end of data no read will find a reset.
        unread = self._read_ended and self._arrived_end is ConnectionLost
        if unread or (self._refuses and self.dataBuffer):
            self._lose(Failure(ConnectionLost()))
            return
        if not self.dataBuffer:
            return
        count = min(self.capacity, len(self.dataBuffer))
        self.capacity -= count
        self._take(count)

    def _take(self, count: int) -> None:
        self.taken += self.dataBuffer[:count]
        self.dataBuffer = self.dataBuffer[count:]
        self._written()

    def _written(self) -> None:
        """Act on an empty buffer, in the order of FileDescriptor.doWrite."""
        if self.dataBuffer or not self.connected or self.aborted:
            return
        producer = self.producer
        if producer is not None and (
            self._producer_paused or not self.streamingProducer
        ):
            self._producer_paused = False
            self._call(producer.resumeProducing)
        elif self.disconnecting:
            self._lose(Failure(ConnectionDone()))
        elif self._half_closing and not self.write_shut:
            self.writeConnectionLost(Failure(ConnectionDone()))

    def writeConnectionLost(self, reason: Failure) -> None:
        self.write_shut = True
        self.log.append("shut")
        if IHalfCloseableProtocol.providedBy(self.protocol):
            self._call(self.protocol.writeConnectionLost)

    def _abort(self) -> None:
        self._lose(Failure(ConnectionAborted()))

    def _call(self, call: Callable[..., object], *args: Any) -> None:
        """Call the program; as with a reactor, an exception ends the connection."""
        try:
            call(*args)
        except Exception:
            reason = Failure()
            _log.failure("Unhandled error of a protocol", reason)
            self._lose(reason)

    def _lose(self, reason: Failure) -> None:
        if not self.connected:
            return
        self.connected = False
        self.disconnected = True
        self.reading = False
        producer, protocol = self.producer, self.protocol
        if producer is not None:
            self._call(producer.stopProducing)
        self.producer = self.protocol = None
        self._call(protocol.connectionLost, reason)

    # -- ITransport and its kin

    def write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError(f"only bytes can be written, not {type(data).__name__}")
        if not data or not self.connected or self.write_shut or self.aborted:
            return
        self.dataBuffer += data
        if (
            self.producer is not None
            and self.streamingProducer
            and len(self.dataBuffer) > self.bufferSize
        ):
            self._producer_paused = True
            self.producer.pauseProducing()
        if self.capacity or self._refuses:
            self._next_turn(self._flush)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        pieces = list(data)
        for each in pieces:
            if not isinstance(each, bytes):
                raise TypeError(f"only bytes can be written, not {type(each).__name__}")
        self.write(b"".join(pieces))

    def loseConnection(self) -> None:
        self.log.append("close")
        if not self.connected or self.disconnecting or self.aborted:
            return
        self.disconnecting = True
        self.reading = False
        if self._read_ended and not self.dataBuffer and self.producer is None:
            # At once, as relayd's transports do: no event can be pending.
            self._lose(Failure(ConnectionDone()))
        else:
            self._next_turn(self._written)

    def loseWriteConnection(self) -> None:
        if not self.connected or self.write_shut or self.aborted:
            return
        self._half_closing = True
        if self.producer is None:
            # At once if nothing is buffered, as relayd's transports do.
            self._written()
        else:
            self._next_turn(self._written)

    def abortConnection(self) -> None:
        if self.connected and not self.aborted:
            self.log.append("abort")
            self.aborted = True
            self.reading = False
            self.dataBuffer = b""
            self._next_turn(self._abort)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.producer is not None:
            raise RuntimeError("a producer is registered already")
        if not self.connected:
            producer.stopProducing()
            return
        self.producer = producer
        self.streamingProducer = streaming
        if not streaming:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        self._producer_paused = False
        if self.disconnecting:
            self._next_turn(self._written)

    def stopConsuming(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    def pauseProducing(self) -> None:
        self.reading = False
        self.log.append("pause")

    def resumeProducing(self) -> None:
        self.log.append("resume")
        ended = self.disconnecting or self.aborted or self._read_ended
        if self.connected and not ended:
            self.reading = True
            self._next_turn(self._read)

    def stopProducing(self) -> None:
        self.loseConnection()

    def getPeer(self) -> Any:
        return self.peer

    def getHost(self) -> Any:
        return self.host

    def setTcpNoDelay(self, enabled: bool) -> None:
        self._set("nodelay", enabled)

    def getTcpNoDelay(self) -> bool:
        return self._options["nodelay"]

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self._set("keepalive", enabled)

    def getTcpKeepAlive(self) -> bool:
        return self._options["keepalive"]

    def _set(self, option: str, enabled: bool) -> None:
        self._options[option] = enabled
        self.log.append(f"{option}={enabled}")
