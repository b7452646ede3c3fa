"""Dials to try, with servers, protocols and factories that fail."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from relayd.net.dialing import SocketEndpoint
from tests.support.contracts import Recorder, until
from tests.support.process import Server, own_host


def endpoint(server: Server, where: Any = reactor) -> SocketEndpoint:
    """What dials `server`."""
    return SocketEndpoint(where, server.socket.family, server.socket.getsockname())


def making(protocol: Protocol) -> Factory:
    """A factory for one protocol."""
    factory: Any = Factory.forProtocol(lambda: protocol)
    factory.noisy = False
    return factory  # type: ignore[no-any-return]


def dial(server: Server, protocol: Protocol | None = None) -> Deferred[Any]:
    """Dial `server`."""
    return endpoint(server).connect(making(protocol or Recorder()))


@asynccontextmanager
async def connection(
    protocol: Recorder | None = None,
) -> AsyncIterator[tuple[Recorder, Any, socket.socket]]:
    """A connection: our protocol and its transport, and the server's socket."""
    ours = protocol or Recorder()
    with Server() as server:
        await dial(server, ours)
        with server.accept() as peer:
            transport = ours.transport
            try:
                yield ours, transport, peer
            finally:
                if "lost" not in ours.events:
                    transport.abortConnection()
                await until(lambda: "lost" in ours.events, "the end of a connection")
            assert ours.events.count("lost") == 1


async def over(protocol: Recorder) -> None:
    """Leave nothing of a connection."""
    protocol.transport.abortConnection()
    await until(lambda: "lost" in protocol.events, "the end of a connection")


async def failed(dialing: Deferred[Any]) -> Any:
    """The error that a dial ends with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await dialing
    return caught.value


def problem_of(dialing: Deferred[Any]) -> Any:
    """The error that a dial has ended with."""
    problems: list[Any] = []
    dialing.addErrback(lambda reason: problems.append(reason.value))
    [problem] = problems
    return problem


class StillReactor(Clock):
    """A reactor that does nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()
        self.addReader = self.readers.add
        self.addWriter = self.writers.add
        self.removeReader = self.readers.discard
        self.removeWriter = self.writers.discard


@contextmanager
def full_unix_server(path: Path) -> Iterator[tuple[Server, list[socket.socket]]]:
    """A UNIX server whose backlog is full, and the clients that fill it."""
    clients: list[socket.socket] = []
    with Server(socket.AF_UNIX, str(path)) as server:
        server.socket.listen(0)
        with suppress(BlockingIOError):
            while True:
                client = socket.socket(socket.AF_UNIX)
                clients.append(client)
                client.setblocking(False)
                client.connect(str(path))
        yield server, clients
        for client in clients:
            client.close()


class NoProtocol(Factory):
    """Builds nothing."""

    noisy = False

    def buildProtocol(self, addr: Any) -> Any:
        return None


class BrokenFactory(Factory):
    """Can't build its protocol."""

    noisy = False

    def buildProtocol(self, addr: Any) -> Any:
        raise ZeroDivisionError("of the factory")


class BrokenProtocol(Recorder):
    """Can't be connected."""

    def connectionMade(self) -> None:
        raise ZeroDivisionError("of the protocol")


class FakeName:
    """A socket's name, without the socket."""

    family = socket.AF_INET

    def __init__(self, name: Any) -> None:
        self.getsockname = lambda: name


def closed_server() -> Server:
    """One that refuses, though its address can still be asked for."""
    # Of this process alone: others' servers come and go at 127.0.0.1.
    server = Server(address=(own_host(), 0))
    name = server.socket.getsockname()
    server.close()
    refusing: Any = server
    refusing.socket = FakeName(name)
    return server


#: How the kernel says that a peer can't be reached any more; it is not asked here.
VANISHED = [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN]
