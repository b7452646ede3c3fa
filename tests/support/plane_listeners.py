"""A listener of the plane, and clients of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

from relayd.core.errors import ListenError
from relayd.net.listening import ListenerEndpoint
from relayd.plane.endpoints import PlaneTCPListenerEndpoint
from tests.support.contracts import Recorder
from tests.support.dials import problem_of
from tests.support.listeners import Greeters
from tests.support.process import connect
from tests.support.standing import Still, still

__all__ = ["still"]

_LOST = Failure(CONNECTION_LOST)


def now(deferred: Deferred[Any]) -> Any:
    """The result of a Deferred that has one."""
    results: list[Any] = []
    deferred.addCallback(results.append)
    [result] = results
    return result


def refusal(endpoint: ListenerEndpoint) -> str:
    """What an endpoint says that can't listen."""
    problem = problem_of(endpoint.listen(Greeters()))
    assert type(problem) is ListenError
    return str(problem)


def greeted(still: Still, address: Any) -> bool:
    """Whether a client that connects there is served."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if family == socket.AF_INET and ":" in address[0]:
        family = socket.AF_INET6
    with closing(socket.socket(family)) as client:
        client.connect(address)
        return answered(still, client) == b"hello"


def answered(still: Still, client: socket.socket) -> bytes:
    """What a client is sent until its connection ends."""
    client.setblocking(False)
    got = bytearray()

    def ended() -> bool:
        with suppress(BlockingIOError):
            part = client.recv(100)
            got.extend(part)
            return not part
        return False

    still.until(ended, "the end of a connection")
    return bytes(got)


class Listening:
    """A listener on the plane of a reactor that stands still, and its factory."""

    def __init__(
        self, still: Still, endpoint: ListenerEndpoint, factory: Any = None
    ) -> None:
        self.still = still
        self.factory = factory or Greeters()
        self.port: Any = now(endpoint.listen(self.factory))

    @property
    def number(self) -> int:
        return int(self.port.getHost().port)

    def connect(self) -> socket.socket:
        return connect(self.number)

    def stop(self) -> None:
        self.port.stopListening()
        assert self.factory.running == 0


@contextmanager
def listening(still: Still, factory: Any = None) -> Iterator[Listening]:
    """Listens on a port of its own."""
    endpoint = PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16)
    made = Listening(still, endpoint, factory)
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def bound(family: int, address: Any) -> Iterator[socket.socket]:
    """A socket that listens, as systemd would pass it on."""
    with closing(socket.socket(family)) as sock:
        sock.bind(address)
        sock.listen(16)
        yield sock


def ended(still: Still, protocol: Recorder) -> None:
    """Wait for the peer's end of data, and close."""
    still.until(lambda: "eof" in protocol.events)
    protocol.transport.loseConnection()
    assert protocol.lost
