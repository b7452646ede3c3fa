"""The transport contract, on every kind of transport that a relay may meet."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    TCP6ServerEndpoint,
    UNIXServerEndpoint,
)
from twisted.internet.protocol import Factory, Protocol

from relayd.dialing import SocketEndpoint
from relayd.listening import TCPListenerEndpoint, UNIXListenerEndpoint
from tests.contracts import Peer, StreamTransportContract


class _Accepting(StreamTransportContract):
    """The transport under test is the accepted end."""

    port: Any
    folder: tempfile.TemporaryDirectory[str] | None = None

    def endpoint(self) -> Any:
        raise NotImplementedError

    async def connect(self, protocol: Protocol) -> Peer:
        factory: Any = Factory.forProtocol(lambda: protocol)
        factory.noisy = False
        self.port = await self.endpoint().listen(factory)
        where = self.port.getHost()
        if hasattr(where, "name"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(where.name)
        else:
            sock = socket.create_connection((where.host, where.port))
        return Peer(sock)

    async def disconnect(self) -> None:
        await self.port.stopListening()
        if self.folder is not None:
            self.folder.cleanup()

    def path(self) -> str:
        self.folder = tempfile.TemporaryDirectory()
        return str(Path(self.folder.name, "s"))


class TestTwistedTCP(_Accepting):
    def endpoint(self) -> Any:
        return TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")


class TestTwistedTCP6(_Accepting):
    def endpoint(self) -> Any:
        return TCP6ServerEndpoint(reactor, 0, interface="::1")


class TestTwistedUNIX(_Accepting):
    resets = False

    def endpoint(self) -> Any:
        return UNIXServerEndpoint(reactor, self.path())


class TestAcceptedTCP(_Accepting):
    def endpoint(self) -> Any:
        return TCPListenerEndpoint(reactor, "127.0.0.1", 0, 16)


class TestAcceptedTCP6(_Accepting):
    def endpoint(self) -> Any:
        return TCPListenerEndpoint(reactor, "::1", 0, 16)


class TestAcceptedUNIX(_Accepting):
    resets = False

    def endpoint(self) -> Any:
        return UNIXListenerEndpoint(reactor, self.path(), 16)


class _Dialling(StreamTransportContract):
    """The transport under test is the dialled end."""

    listener: socket.socket

    def endpoint(self, port: int) -> Any:
        raise NotImplementedError

    async def connect(self, protocol: Protocol) -> Peer:
        self.listener = socket.create_server(("127.0.0.1", 0))
        factory: Any = Factory.forProtocol(lambda: protocol)
        factory.noisy = False
        await self.endpoint(self.listener.getsockname()[1]).connect(factory)
        return Peer(self.listener.accept()[0])

    async def disconnect(self) -> None:
        self.listener.close()


class TestTwistedClientTCP(_Dialling):
    def endpoint(self, port: int) -> Any:
        return TCP4ClientEndpoint(reactor, "127.0.0.1", port, timeout=None)


class TestDialledTCP(_Dialling):
    def endpoint(self, port: int) -> Any:
        return SocketEndpoint(reactor, socket.AF_INET, ("127.0.0.1", port))
