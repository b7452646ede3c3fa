"""The transport contract, on every kind of transport that a relay may meet."""

from __future__ import annotations

import gc
import socket
import tempfile
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    TCP6ServerEndpoint,
    UNIXServerEndpoint,
)
from twisted.internet.protocol import Factory, Protocol

from relayd.net.dialing import SocketEndpoint
from relayd.net.listening import TCPListenerEndpoint, UNIXListenerEndpoint
from relayd.net.transports import connection_class
from relayd.testing.suite import checked
from tests.support.contracts import (
    Contract,
    Peer,
    Recorder,
    ShortContract,
    turns,
    until,
)


class _Accepting:
    """The transport under test is the accepted end."""

    port: Any = None
    folder: tempfile.TemporaryDirectory[str] | None = None

    def endpoint(self) -> Any:
        raise NotImplementedError

    async def connect(self, protocol: Protocol) -> Peer:
        if self.port is None:
            self.expected: list[Protocol] = []
            factory: Any = Factory.forProtocol(lambda: self.expected.pop(0))
            factory.noisy = False
            self.port = await self.endpoint().listen(factory)
        self.expected.append(protocol)
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


class TestTwistedTCP(_Accepting, Contract):
    def endpoint(self) -> Any:
        return TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")


class TestTwistedTCP6(_Accepting, ShortContract):
    def endpoint(self) -> Any:
        return TCP6ServerEndpoint(reactor, 0, interface="::1")


class TestTwistedUNIX(_Accepting, Contract):
    resets = False

    def endpoint(self) -> Any:
        return UNIXServerEndpoint(reactor, self.path())


class TestAcceptedTCP(_Accepting, Contract):
    def endpoint(self) -> Any:
        return TCPListenerEndpoint(reactor, "127.0.0.1", 0, 16)


class TestAcceptedTCP6(_Accepting, ShortContract):
    def endpoint(self) -> Any:
        return TCPListenerEndpoint(reactor, "::1", 0, 16)


class TestAcceptedUNIX(_Accepting, Contract):
    resets = False

    def endpoint(self) -> Any:
        return UNIXListenerEndpoint(reactor, self.path(), 16)


@contextmanager
def unanswered() -> Iterator[int]:
    """A port that neither accepts nor refuses: its backlog is full."""
    with ExitStack() as held:
        listening = held.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


class _Dialling:
    """The transport under test is the dialled end."""

    listener: socket.socket | None = None
    joined: Callable[[], Awaitable[tuple[Any, Peer]]]

    def endpoint(self, port: int) -> Any:
        raise NotImplementedError

    async def connect(self, protocol: Protocol) -> Peer:
        if self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", 0))
        factory: Any = Factory.forProtocol(lambda: protocol)
        factory.noisy = False
        await self.endpoint(self.listener.getsockname()[1]).connect(factory)
        return Peer(self.listener.accept()[0])

    async def disconnect(self) -> None:
        if self.listener is not None:
            self.listener.close()

    @checked
    async def test_a_dial_hears_nothing_that_was_for_its_numbers_last_owner(
        self,
    ) -> None:
        # Both connections have events in one batch.  The first to be told closes
        # the other at once, as its write side is shut, and dials an address that
        # does not answer.
        dials: list[Any] = []

        def replace(other: Any, port: int) -> None:
            if not dials:
                other.transport.loseConnection()
                factory: Any = Factory.forProtocol(Protocol)
                factory.noisy = False
                dials.append(self.endpoint(port).connect(factory))

        ends = [await self.joined() for _ in range(2)]
        (one, _), (two, _) = ends
        with unanswered() as port:
            one.on["data"] = lambda: replace(two, port)
            two.on["data"] = lambda: replace(one, port)
            for protocol, _ in ends:
                protocol.transport.loseWriteConnection()
                await until(lambda protocol=protocol: "shut" in protocol.events)
            for _, peer in ends:
                peer.socket.send(b"x")
            await until(lambda: bool(dials))
            await turns()
            assert not dials[0].called
            dials[0].addErrback(lambda _: None)
            dials[0].cancel()
        assert one.lost != two.lost


class TestTwistedClientTCP(_Dialling, Contract):
    def endpoint(self, port: int) -> Any:
        return TCP4ClientEndpoint(reactor, "127.0.0.1", port, timeout=None)


class TestDialledTCP(_Dialling, Contract):
    def endpoint(self, port: int) -> Any:
        return SocketEndpoint(reactor, socket.AF_INET, ("127.0.0.1", port))


@pytest.mark.cost
@pytest_twisted.ensureDeferred
async def test_a_connection_whose_write_failed_is_no_cycle_of_references() -> None:
    """A test of cost.

    It is gone with its loss, and does not wait for the collector.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    protocol = Recorder()
    made: Any = connection_class(socket.AF_UNIX)
    connection = made(ours, protocol, "", None, 0, reactor)
    del ours
    theirs.close()
    gc.disable()
    try:
        connection.write(b"to nobody")
        await until(lambda: protocol.lost)
        await turns()
        kept = weakref.ref(connection)
        protocol.transport = None
        del connection
        assert kept() is None
    finally:
        gc.enable()
