"""Relays in this process over real sockets, and what becomes of their sessions."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import attrs
from twisted.internet import reactor
from twisted.internet.interfaces import IListeningPort

from relayd.core.hops import streams
from relayd.core.session import Session
from relayd.net.dial_options import DialOptions
from relayd.net.dialing import SocketEndpoint
from relayd.net.listening import TCPListenerEndpoint, UNIXListenerEndpoint
from relayd.net.with_options import having
from relayd.plane.endpoints import (
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from relayd.tcp import RelayFactory
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server as PoolServer
from tests.support.contracts import until
from tests.support.process import Server
from tests.support.relays import Witness

TRANSPARENT = DialOptions(transparent=True)


@attrs.frozen
class Kind:
    """A kind of connections: what listens, and what dials."""

    listens: Any
    dials: Any
    unix: Any

    @property
    def transparent(self) -> Any:
        return having(self.dials, TRANSPARENT)


KINDS = {
    "plane": Kind(
        PlaneTCPListenerEndpoint, PlaneSocketEndpoint, PlaneUNIXListenerEndpoint
    ),
    "twisted": Kind(TCPListenerEndpoint, SocketEndpoint, UNIXListenerEndpoint),
}


class Relay:
    """A relay that listens, and what becomes of its sessions."""

    def __init__(self, kind: Kind, *endpoints: Any, **options: Any) -> None:
        self.kind = kind
        self.servers = [
            PoolServer(each, f"server{number}") for number, each in enumerate(endpoints)
        ]
        self.pool = Pool(self.servers)
        self.witness = Witness()
        self.factory = RelayFactory(self.pool, observer=self.witness, **options)
        self.opened: list[Any] = []

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Open; where."""
        listening: IListeningPort = await self.kind.listens(
            reactor, host, port, 128
        ).listen(self.factory)
        self.opened.append(listening)
        address: Any = listening.getHost()
        return address.host, address.port

    async def over(self) -> list[Session]:
        """Wait for the end of all sessions, and close."""
        await until(lambda: not self.factory.sessions)
        for each in self.opened:
            await each.stopListening()
        assert not streams.hops
        assert not any(each.sessions for each in self.servers)
        return self.witness.sessions

    def stop(self) -> None:
        """End what is left, if a test has failed."""
        for each in self.opened:
            each.stopListening()
        self.factory.abort_all()

    @property
    def fails(self) -> list[int]:
        """What counts against its servers."""
        return [each.fails for each in self.servers]


def client_at(host: str, where: Any, data: bytes = b"") -> socket.socket:
    """A client, connected."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.bind((host, 0))
    sock.connect(where)
    if data:
        sock.sendall(data)
    sock.setblocking(False)
    return sock


def at(server: Server) -> tuple[int, Any]:
    return int(server.socket.family), server.socket.getsockname()


async def accepted(server: Server) -> socket.socket:
    """The connection that the server gets next."""
    server.socket.setblocking(False)
    got: list[Any] = []

    def came() -> bool:
        with suppress(BlockingIOError):
            got.append(server.socket.accept())
        return bool(got)

    await until(came, "a connection to the server")
    sock: socket.socket = got[0][0]
    sock.setblocking(False)
    return sock


async def read(sock: socket.socket, size: int = 1 << 16) -> bytes:
    """Its next bytes; empty at their end, or if it is reset."""
    got: list[bytes] = []

    def came() -> bool:
        with suppress(BlockingIOError):
            try:
                got.append(sock.recv(size))
            except ConnectionResetError:
                got.append(b"")
        return bool(got)

    await until(came, "bytes, or an end")
    return got[0]
