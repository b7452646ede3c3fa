"""Fakes for tests in which time and the network stand still.

Twisted's StringTransport does not half-close, and nothing of its kind has a
peer that may refuse to read.  `FakeTransport` does: what is written stays
'buffered' until the test says that the network took it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import (
    ConnectionAborted,
    ConnectionDone,
    ConnectionLost,
)
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IListeningPort,
    INegotiated,
    IProtocol,
    IProtocolFactory,
    IPushProducer,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
    ITCPTransport,
)
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(ITCPTransport, IHalfCloseableDescriptor, IPushProducer)
class FakeTransport:
    """One end of a connection, with the buffers of Twisted's own descriptors.

    :ivar log: what was asked of it, in order.
    :ivar taken: what 'the network' has taken of what was written.
    """

    bufferSize = 65536

    def __init__(self, port: int = 50000) -> None:
        self.protocol: Any = None
        self.peer: IAddress = IPv4Address("TCP", "192.0.2.1", port)
        self.host: IAddress = IPv4Address("TCP", "192.0.2.2", 80)
        self.log: list[str] = []
        self.taken = b""
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0
        self.producer: Any = None
        self.reading = True
        self.connected = True
        self.disconnecting = False
        self.write_shut = False
        self._half_closing = False
        self._producer_paused = False

    def connect(self, protocol: IProtocol) -> FakeTransport:
        """Connect `protocol` to this end."""
        self.protocol = protocol
        protocol.makeConnection(self)
        return self

    # -- what the network does

    def receive(self, data: bytes) -> None:
        """The peer sent `data`."""
        assert self.reading, "data arrived while reading was paused"
        self.protocol.dataReceived(data)

    def receive_eof(self) -> None:
        """The peer ended its side."""
        self.reading = False
        self.log.append("eof")
        if IHalfCloseableProtocol.providedBy(self.protocol):
            self.protocol.readConnectionLost()
        else:
            self.lose(ConnectionDone())

    def lose(self, reason: Exception | None = None) -> None:
        """The connection is gone; ConnectionLost unless another reason is given."""
        if not self.connected:
            return
        self.connected = False
        self.reading = False
        if self.producer is not None:
            self.producer.stopProducing()
            self.producer = None
        self.protocol.connectionLost(Failure(reason or ConnectionLost()))

    def take(self, count: int | None = None) -> None:
        """The network takes `count` of the buffered bytes; all, unless given."""
        count = len(self.dataBuffer) if count is None else count
        self.taken += self.dataBuffer[:count]
        self.dataBuffer = self.dataBuffer[count:]
        if self.dataBuffer or not self.connected:
            return
        if self.producer is not None and self._producer_paused:
            self._producer_paused = False
            self.producer.resumeProducing()
        elif self.disconnecting and self.producer is None:
            self.lose(ConnectionDone())
        elif self._half_closing and not self.write_shut:
            self.write_shut = True
            self.log.append("shut")
            self.protocol.writeConnectionLost()

    # -- ITransport and its kin

    def write(self, data: bytes) -> None:
        if not self.connected or self.write_shut:
            return
        self.dataBuffer += data
        if self.producer is not None and len(self.dataBuffer) > self.bufferSize:
            self._producer_paused = True
            self.producer.pauseProducing()

    def writeSequence(self, data: list[bytes]) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        self.log.append("close")
        self.disconnecting = True
        self.reading = False
        if not self.dataBuffer:
            self.take()

    def loseWriteConnection(self) -> None:
        self._half_closing = True
        if not self.dataBuffer:
            self.take()

    def abortConnection(self) -> None:
        if self.connected:
            self.log.append("abort")
            self.dataBuffer = b""
            self.lose(ConnectionAborted())

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        assert streaming
        assert self.producer is None, "a producer is registered already"
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None
        self._producer_paused = False

    def pauseProducing(self) -> None:
        self.reading = False
        self.log.append("pause")

    def resumeProducing(self) -> None:
        self.reading = True
        self.log.append("resume")

    def stopProducing(self) -> None:
        self.loseConnection()

    def getPeer(self) -> IAddress:
        return self.peer

    def getHost(self) -> IAddress:
        return self.host

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.log.append(f"nodelay={enabled}")

    def getTcpNoDelay(self) -> bool:
        return "nodelay=True" in self.log

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self.log.append(f"keepalive={enabled}")

    def getTcpKeepAlive(self) -> bool:
        return "keepalive=True" in self.log


class FakeTLSConnection:
    """What is asked of pyOpenSSL's.

    :ivar name: what it asks for (SNI).
    :ivar certificate: what the server has shown.
    :ivar verify: what was set to check the chain.
    :ivar stage: how far the handshake has come.
    """

    def __init__(self) -> None:
        self.stage = b"nothing was read"
        self.name: bytes | None = None
        self.certificate: Any = None
        self.mode = 1
        self.verify: Any = None

    def get_state_string(self) -> bytes:
        return self.stage

    def get_servername(self) -> bytes | None:
        return self.name

    def get_peer_certificate(self) -> Any:
        return self.certificate

    def get_verify_mode(self) -> int:
        return self.mode

    def set_verify(self, mode: int, callback: Any) -> None:
        assert mode == self.mode
        self.verify = callback


@implementer(INegotiated)
class FakeTLSTransport(FakeTransport):
    """The same with TLS, which tells who listens when its handshake is done."""

    negotiatedProtocol = None

    def __init__(self, port: int = 50000) -> None:
        super().__init__(port)
        self.connection = FakeTLSConnection()

    @property
    def wrappedProtocol(self) -> Any:
        return self.protocol

    def getHandle(self) -> FakeTLSConnection:
        return self.connection

    def getPeerCertificate(self) -> Any:
        return self.connection.certificate

    def shake_hands(self) -> None:
        """The handshake is done."""
        self.protocol.handshakeCompleted()


@implementer(IStreamClientEndpoint)
class FakeEndpoint:
    """A server that answers when the test says so.

    :ivar dials: the dials under way.
    :ivar cancelled: how many were cancelled.
    """

    def __init__(self) -> None:
        self.dials: list[FakeDial] = []
        self.cancelled = 0

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        dial = FakeDial(factory, self._cancel)
        self.dials.append(dial)
        return dial.deferred

    def _cancel(self, _: Deferred[Any]) -> None:
        self.cancelled += 1

    @property
    def dial(self) -> FakeDial:
        """The only dial that was made."""
        [dial] = self.dials
        return dial


class FakeDial:
    """One dial of a FakeEndpoint."""

    def __init__(
        self, factory: IProtocolFactory, canceller: Callable[[Deferred[Any]], None]
    ) -> None:
        self.factory = factory
        self.deferred: Deferred[IProtocol] = Deferred(canceller)

    def connect(
        self,
        peer: IAddress | None = None,
        transport: FakeTransport | None = None,
    ) -> Any:
        """The server answers; return the relay's end of the connection.

        :param transport: what that is, unless TCP.
        """
        transport = transport or FakeTransport(port=9000)
        if peer is not None:
            transport.peer = peer
        protocol: Any = self.factory.buildProtocol(transport.peer)
        transport.connect(protocol)
        self.deferred.callback(protocol)
        return transport

    def fail(self, problem: Exception) -> None:
        """The dial fails."""
        self.deferred.errback(problem)


@implementer(IStreamServerEndpoint)
class FakeServerEndpoint:
    """A listener that opens when the test says so.

    :param host: the address that it listens on.
    :ivar opened: what :meth:`listen` has returned.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.factory: Any = None
        self.opened: Deferred[IListeningPort] = Deferred()

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        self.factory = factory
        return self.opened

    def open(self, port: int = 7000) -> FakePort:
        """It listens now."""
        made = FakePort(self.factory, IPv4Address("TCP", self.host, port))
        self.opened.callback(made)
        return made


@implementer(IListeningPort)
class FakePort:
    """What accepts those who connect, until it is closed."""

    def __init__(self, factory: Any, address: IAddress) -> None:
        self.factory = factory
        self.address = address
        self.is_open = True

    def startListening(self) -> None:
        """It does."""

    def stopListening(self) -> Deferred[None]:
        self.is_open = False
        return succeed(None)

    def getHost(self) -> IAddress:
        return self.address

    def accept(self, host: str, port: int = 4321) -> FakeTransport:
        """Somebody connects; return the relay's end of the connection."""
        assert self.is_open, "nobody listens there any more"
        transport = FakeTransport()
        transport.peer = IPv4Address("TCP", host, port)
        protocol = self.factory.buildProtocol(transport.peer)
        if protocol is None:
            transport.connected = False
            return transport
        return transport.connect(protocol)


class FakeResolver:
    """Finds the addresses of a name when the test says so.

    :ivar asked: the names and ports that were asked for.
    :ivar cancelled: how many look-ups were cancelled.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.cancelled = 0
        self._answers: list[Deferred[list[Any]]] = []

    def addresses(self, host: str, port: int, owner: str) -> Deferred[list[Any]]:
        self.asked.append((host, port))
        self._answers.append(Deferred(self._cancel))
        return self._answers[-1]

    def _cancel(self, _: Deferred[Any]) -> None:
        self.cancelled += 1

    def answer(self, *addresses: str) -> None:
        """These are the addresses of the last name that was asked for."""
        _, port = self.asked[-1]
        self._answers[-1].callback(
            [
                (socket.AF_INET6, (each, port, 0, 0))
                if ":" in each
                else (socket.AF_INET, (each, port))
                for each in addresses
            ]
        )

    def fail(self, problem: Exception) -> None:
        """The last look-up fails."""
        self._answers[-1].errback(problem)
