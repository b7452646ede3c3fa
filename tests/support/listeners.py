"""Listeners to try, with factories and clients, and reactors that stand still."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from relayd.core.errors import ListenError
from relayd.net.listener import Listener
from relayd.net.listening import TCPListenerEndpoint, UNIXListenerEndpoint
from tests.support.contracts import Recorder, until

#: What a sandbox says to accept4(2).
REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EACCES]

_GONE = Failure(CONNECTION_DONE)


class Greeter(Recorder):
    """Says hello and hangs up; keeps what its transport said of itself."""

    def connectionMade(self) -> None:
        super().connectionMade()
        self.local, self.remote = self.transport.getHost(), self.transport.getPeer()
        self.options = self.transport.getTcpNoDelay(), self.transport.getTcpKeepAlive()
        descriptor = self.transport.fileno()
        self.blocks_or_is_inherited = (
            os.get_blocking(descriptor),
            os.get_inheritable(descriptor),
        )
        self.transport.write(b"hello")
        self.transport.loseConnection()


class Greeters(Factory):
    """Serves each client with a Greeter, and counts its starts and stops."""

    noisy = False

    def __init__(self) -> None:
        self.addresses: list[Any] = []
        self.served: list[Any] = []
        self.running = 0

    def startFactory(self) -> None:
        self.running += 1

    def stopFactory(self) -> None:
        self.running -= 1

    def buildProtocol(self, addr: Any) -> Any:
        self.addresses.append(addr)
        self.served.append(Greeter())
        return self.served[-1]


async def greeted(address: Any) -> bool:
    """Whether a client that connects there is served."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if family == socket.AF_INET and ":" in address[0]:
        family = socket.AF_INET6
    with closing(socket.socket(family)) as client:
        client.connect(address)
        return await answer(client) == b"hello"


async def answer(client: socket.socket) -> bytes:
    """What the client is sent until its connection ends."""
    client.setblocking(False)
    got = bytearray()

    def ended() -> bool:
        with suppress(BlockingIOError):
            part = client.recv(100)
            got.extend(part)
            return not part
        return False

    await until(ended, "the end of a connection")
    return bytes(got)


def refuses(address: Any) -> bool:
    """Whether nobody listens there."""
    with closing(
        socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    ) as client:
        return client.connect_ex(address) == errno.ECONNREFUSED


def where(port: Any) -> tuple[str, int]:
    """The address of a listening port, to connect to."""
    host = port.getHost()
    return host.host, host.port


async def listen_tcp(host: str | None, factory: Any, port: int = 0) -> Any:
    """Listen with our own endpoint."""
    return await TCPListenerEndpoint(reactor, host, port, 16).listen(factory)


async def refusal(endpoint: Any) -> str:
    """What an endpoint says that can't listen."""
    with pytest.raises(ListenError) as caught:
        await endpoint.listen(Greeters())
    return str(caught.value)


def unix(path: Path) -> UNIXListenerEndpoint:
    """What listens at `path`."""
    return UNIXListenerEndpoint(reactor, str(path), 16)


class Faulty(Greeters):
    """Fails for its first client in the way that it is told."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def buildProtocol(self, addr: Any) -> Any:
        if not self.addresses:
            self.addresses.append(addr)
            return self.how()
        return super().buildProtocol(addr)


class Unconnectable(Recorder):
    """Can't be connected."""

    def connectionMade(self) -> None:
        raise ZeroDivisionError("of the protocol")


class Watcher(Clock):
    """A reactor that watches what it is told to, and does nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.addReader = self.readers.add
        self.removeReader = self.readers.discard
        self.removeWriter = self.addWriter = lambda _: None


class Scripted(socket.socket):
    """A listening socket whose accept fails as often as the script says."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[int] = []
        self.asked = 0
        self.bind(("127.0.0.1", 0))
        self.listen()

    def accept(self) -> tuple[socket.socket, Any]:
        self.asked += 1
        if self.script:
            number = self.script.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


@contextmanager
def scripted() -> Iterator[tuple[Listener, Scripted, Watcher, Greeters]]:
    """A listener on a socket with a script and a reactor that stands still."""
    watcher, factory = Watcher(), Greeters()
    with closing(Scripted()) as sock:
        listener = Listener(watcher, sock, factory)
        listener.startListening()
        assert watcher.readers == {listener}
        yield listener, sock, watcher, factory
        listener.stopListening()
        assert not watcher.getDelayedCalls()
