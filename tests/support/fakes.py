"""Fakes for tests in which time and the network stand still.

What makes connections has a clock for them, whose turns tell of aborts and closes: see
`relayd.testing.FakeTransport`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    INegotiated,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relayd.testing import FakeTransport

#: The stage of a TLS handshake that has not begun.
NOTHING_READ = b"nothing was read"


class FakeTLSConnection:
    """What is asked of pyOpenSSL's.

    :ivar name: what it asks for (SNI).
    :ivar certificate: what the server has shown.
    :ivar verify: what was set to check the chain.
    :ivar stage: how far the handshake has come.
    """

    def __init__(self) -> None:
        self.stage = NOTHING_READ
        self.name: bytes | None = None
        self.certificate: Any = None
        self.mode = 1
        self.verify: Any = None

    def get_state_string(self) -> bytes:
        return self.stage

    def client_random(self) -> bytes | None:
        return None if self.stage == NOTHING_READ else b"random"

    def get_servername(self) -> bytes | None:
        return self.name

    def get_cipher_name(self) -> str | None:
        return None if self.stage == NOTHING_READ else "TLS_AES_128_GCM_SHA256"

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

    def __init__(self, port: int = 50000, clock: Any = None) -> None:
        super().__init__(port, clock)
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
        self.turn()


@implementer(IStreamClientEndpoint)
class FakeEndpoint:
    """A server that answers when the test says so.

    :param clock: of its connections.
    :ivar dials: the dials under way.
    :ivar cancelled: how many were cancelled.
    """

    def __init__(self, clock: Any = None) -> None:
        self.clock = clock
        self.dials: list[FakeDial] = []
        self.cancelled = 0

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        dial = FakeDial(factory, self._cancel, self.clock)
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
        self,
        factory: IProtocolFactory,
        canceller: Callable[[Deferred[Any]], None],
        clock: Any,
    ) -> None:
        self.factory = factory
        self.clock = clock
        self.deferred: Deferred[IProtocol] = Deferred(canceller)

    def connect(
        self,
        peer: IAddress | None = None,
        transport: FakeTransport | None = None,
    ) -> Any:
        """The server answers; return the relay's end of the connection.

        :param transport: what that is, unless TCP.
        """
        transport = transport or FakeTransport(9000, self.clock)
        if self.clock is not None:
            transport.clock = self.clock
        if peer is not None:
            transport.peer = peer
        protocol: Any = self.factory.buildProtocol(transport.peer)
        transport.connect(protocol)
        self.deferred.callback(protocol)
        transport.turn()
        return transport

    def fail(self, problem: Exception) -> None:
        """The dial fails."""
        self.deferred.errback(problem)
        if self.clock is not None:
            self.clock.advance(0)


@implementer(IStreamServerEndpoint)
class FakeServerEndpoint:
    """A listener that opens when the test says so.

    :param host: the address that it listens on.
    :param clock: of the connections that it accepts.
    :ivar opened: what :meth:`listen` has returned.
    """

    def __init__(self, host: str, clock: Any = None) -> None:
        self.host = host
        self.clock = clock
        self.factory: Any = None
        self.opened: Deferred[IListeningPort] = Deferred()

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        self.factory = factory
        return self.opened

    def open(self, port: int = 7000) -> FakePort:
        """It listens now."""
        address = IPv4Address("TCP", self.host, port)
        made = FakePort(self.factory, address, self.clock)
        self.opened.callback(made)
        if self.clock is not None:
            self.clock.advance(0)
        return made


@implementer(IListeningPort)
class FakePort:
    """What accepts those who connect, until it is closed."""

    def __init__(self, factory: Any, address: IAddress, clock: Any) -> None:
        self.factory = factory
        self.clock = clock
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
        transport = FakeTransport(clock=self.clock)
        transport.peer = IPv4Address("TCP", host, port)
        protocol = self.factory.buildProtocol(transport.peer)
        if protocol is None:
            transport.connected = False
            transport.turn()
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

    def forget(self) -> None:
        """Keep nothing of who has asked."""
        self._answers.clear()

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
