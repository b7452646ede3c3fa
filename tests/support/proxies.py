"""The SOCKS4 proxy on fakes.

`Proxy` is a factory whose dialer, listener, resolver, policy and clock stand still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IAddress, IStreamClientEndpoint
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import globalLogPublisher
from zope.interface import implementer

from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease, IProxyPolicy
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.net.resolving import SocketAddress
from relayd.observing.session_log import VerboseSessionLog
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.socks4 import Socks4Factory, Socks4Session
from tests.support.fakes import (
    FakeEndpoint,
    FakePort,
    FakeResolver,
    FakeServerEndpoint,
    FakeTransport,
)

SERVER = "198.51.100.7"


#: A request for it, and its name.
CONNECT = write_request(Command.CONNECT, SERVER, 80, b"joe")


CONNECT_BY_NAME = write_request(Command.CONNECT, "example.com", 80, b"joe")


BIND = write_request(Command.BIND, SERVER, 80, b"joe")


BIND_BY_NAME = write_request(Command.BIND, "example.com", 80, b"joe")


BIND_ANY = write_request(Command.BIND, "0.0.0.0", 80, b"joe")


REJECTED = write_reply(Code.REJECTED)


#: What a joined upstream's FakeTransport says of itself.
GRANTED = write_reply(Code.GRANTED, SERVER, 80)


class Witness(Observer):
    """Keeps the sessions that it hears of, and what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.sessions: list[Socks4Session] = []

    def opened(self, session: Session) -> None:
        assert isinstance(session, Socks4Session)
        self.sessions.append(session)

    def dialing(self, session: Session) -> None:
        self.heard.append(f"dialing {session.upstream}")

    def connected(self, session: Session) -> None:
        self.heard.append(f"connected {session.upstream}")

    def closed(self, session: Session) -> None:
        assert session.ending is not None
        self.heard.append(f"closed {session.ending.word}")


@implementer(IGate, ILease)
class Counter:
    """Counts those who were let in and have not left."""

    inside = 0

    def enter(self, session: Session) -> ILease:
        self.inside += 1
        return self

    def release(self) -> None:
        self.inside -= 1


@implementer(IProxyPolicy)
class Porter:
    """A policy that writes down what it is asked.

    :ivar against: the addresses that it refuses.
    :ivar problem: what it raises instead of an answer.
    """

    def __init__(self) -> None:
        self.users: list[bytes] = []
        self.asked: list[tuple[str, int, str]] = []
        self.against: set[str] = set()
        self.unwanted: set[bytes] = set()
        self.problem: Exception | None = None

    def admit(self, user_id: bytes, session: Session) -> None:
        self.users.append(user_id)
        if user_id in self.unwanted:
            raise Refused("an unwanted user")

    def permit(self, address: str, port: int, name: str, session: Session) -> None:
        self.asked.append((address, port, name))
        if self.problem is not None:
            raise self.problem
        if address in self.against:
            raise Refused(f"{address} is out of bounds")


class Proxy:
    """A proxy on fakes.

    :param opens: BIND's listeners are open at once.
    """

    def __init__(self, *, opens: bool = True, **options: Any) -> None:
        self.clock: Any = MemoryReactorClock()
        self.servers: list[FakeEndpoint] = []
        self.dialled: list[list[SocketAddress]] = []
        self.listeners: list[FakeServerEndpoint] = []
        self.ports: list[FakePort] = []
        self.resolver = FakeResolver()
        self.policy = Porter()
        self.witness = Witness()
        self.gate = Counter()
        self._opens = opens
        given: dict[str, Any] = {
            "dialer": self._dialer,
            "listener": self._listener,
            "resolver": self.resolver,
            "policy": self.policy,
            "observer": self.witness,
            "gate": self.gate,
        }
        self.factory = Socks4Factory(self.clock, **(given | options))

    def _dialer(self, addresses: Sequence[SocketAddress]) -> IStreamClientEndpoint:
        self.dialled.append(list(addresses))
        self.servers.append(FakeEndpoint(self.clock))
        return self.servers[-1]

    def _listener(self, host: str) -> Any:
        made = FakeServerEndpoint(host, self.clock)
        self.listeners.append(made)
        if self._opens:
            listen = made.listen

            def open_at_once(factory: Any) -> Any:
                listening = listen(factory)
                self.ports.append(made.open())
                return listening

            made.listen = open_at_once  # type: ignore[method-assign]
        return made

    def client(
        self,
        data: bytes = b"",
        host: str = "192.0.2.1",
        *,
        peer: IAddress | None = None,
        facing: IAddress | None = None,
    ) -> FakeTransport:
        """A client connects and sends `data`.

        :param peer: its address, if it is not `host`'s.
        :param facing: the address that it has connected to.
        """
        transport = FakeTransport(clock=self.clock)
        transport.peer = peer or IPv4Address("TCP", host, 50000)
        transport.host = facing or transport.host
        protocol = self.factory.buildProtocol(transport.peer)
        assert protocol is not None
        transport.connect(protocol)
        if data:
            transport.receive(data)
        return transport

    def joined(self) -> tuple[FakeTransport, FakeTransport]:
        """A client that has been granted its CONNECT, and its server."""
        client = self.client(CONNECT)
        server = self.server.dial.connect()
        client.take()
        client.taken = b""
        return client, server

    def bound(self, data: bytes = BIND) -> tuple[FakeTransport, FakePort]:
        """A client that waits for a peer, and what that has to connect to."""
        client = self.client(data)
        client.take()
        client.taken = b""
        return client, self.port

    @property
    def server(self) -> FakeEndpoint:
        """The only one that was dialled."""
        [server] = self.servers
        return server

    @property
    def port(self) -> FakePort:
        """The only one that was opened."""
        [port] = self.ports
        return port

    @property
    def session(self) -> Socks4Session:
        [session] = self.witness.sessions
        return session

    def identd(self) -> tuple[Any, StringTransport]:
        """The client's identd is connected: the question's protocol, its transport."""
        [(_, _, factory, *_)] = self.clock.tcpClients
        question = factory.buildProtocol(None)
        transport = StringTransport()
        question.makeConnection(transport)
        return question, transport

    def over(self, ending: Ending) -> None:
        """The only session has ended this way, and nothing is left of it."""
        session = self.session
        assert session.ending is ending
        assert session.ended_at is not None
        assert self.witness.heard[-1] == f"closed {ending.word}"
        self.nothing_left()

    def nothing_left(self) -> None:
        factory = self.factory
        assert not factory.sessions
        assert not len(factory.handshakes)
        assert not len(factory.binds)
        assert not len(factory.wheel)
        assert self.gate.inside == 0
        assert not any(port.is_open for port in self.ports)
        factory.stopFactory()
        assert self.clock.getDelayedCalls() == []


def refused(client: FakeTransport, code: Code = Code.REJECTED) -> None:
    """The client got a refusal and nothing else, and was closed politely."""
    client.take()
    assert client.taken == write_reply(code)
    assert client.log[-1] == "close"
    assert not client.connected


def line(proxy: Proxy) -> str:
    """The line of the only session."""
    events: list[Any] = []
    publisher: Any = globalLogPublisher
    publisher.addObserver(events.append)
    try:
        # Which tells of those that never asked, too.
        VerboseSessionLog().closed(proxy.session)
    finally:
        publisher.removeObserver(events.append)
    [event] = events
    assert event["command"] == proxy.session.command
    text: str = event["line"]
    return text
