"""The SOCKS4 proxy on fakes: what is said, in which order, at every moment.

`Proxy` is a factory whose dialer, listener, resolver, policy and clock stand still;
the MOMENTS are the stages that a client goes through before it is joined to a server,
each with what is under way then.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import (
    IAddress,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyClass, verifyObject

from relayd.core.errors import ListenError, Refused
from relayd.core.interfaces import (
    IGate,
    ILease,
    IProxyPolicy,
    IShedsClients,
)
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import Dialer
from relayd.net.resolving import Resolver, SocketAddress
from relayd.observing.session_log import SessionLog
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.rules import parse_rule
from relayd.socks4 import LONG_HANDSHAKE, SHED_AT_ONCE, Socks4Factory, Socks4Session
from relayd.stream.bridge import HOLD_LIMIT
from relayd.stream.session import LEFT_GRACE
from tests.conftest import LoggedFailures
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


# -- CONNECT


def test_connect_from_accept_to_end() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT)
    assert client.dataBuffer == b"", "the reply waits for the connection"
    proxy.clock.advance(0.5)
    server = proxy.server.dial.connect()
    client.take()
    assert client.taken == GRANTED
    client.receive(b"question")
    server.take()
    assert server.taken == b"question"
    server.receive(b"an answer")
    client.take()
    assert client.taken == GRANTED + b"an answer"
    client.receive_eof()
    assert server.write_shut
    assert client.connected
    server.receive_eof()
    session = proxy.session
    assert session.connected_at == 0.5
    assert (session.up.read, session.down.read) == (8, 9)
    assert session.reply == 90
    assert proxy.dialled == [[(socket.AF_INET, (SERVER, 80))]]
    assert proxy.policy.users == [b"joe"]
    assert proxy.policy.asked == [(SERVER, 80, "")]
    assert proxy.witness.heard == [
        f"dialing {SERVER}:80",
        "connected 192.0.2.1:9000",
        "closed done",
    ]
    proxy.over(Ending.DONE)


@pytest.mark.parametrize("request_", [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME])
def test_a_request_in_single_bytes_with_data_behind_it(request_: bytes) -> None:
    proxy = Proxy()
    client = proxy.client()
    for byte in request_:
        assert not proxy.dialled
        assert not proxy.listeners
        client.receive(bytes([byte]))
    for byte in b"more":
        client.receive(bytes([byte]))
    if request_ in (CONNECT_BY_NAME, BIND_BY_NAME):
        proxy.resolver.answer(SERVER)
    if request_ in (CONNECT, CONNECT_BY_NAME):
        server = proxy.server.dial.connect()
    else:
        server = proxy.port.accept(SERVER)
    server.take()
    assert server.taken == b"more"
    assert proxy.session.up.read == 4
    client.lose()


def test_data_with_the_request_after_it_and_after_the_reply_keeps_its_order() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT + b"one ")
    client.receive(b"two ")
    server = proxy.server.dial.connect()
    client.receive(b"three")
    server.take()
    assert server.taken == b"one two three"
    assert proxy.session.up.read == 13
    client.lose()


def test_a_server_that_speaks_first_is_heard_behind_the_reply() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT)
    server = proxy.server.dial.connect()
    server.receive(b"220 ready")
    client.take()
    assert client.taken == GRANTED + b"220 ready"
    assert proxy.session.down.read == 9
    client.lose()


def test_what_looks_like_a_request_is_data_after_the_first() -> None:
    proxy = Proxy()
    client, server = proxy.joined()
    client.receive(CONNECT)
    server.take()
    assert server.taken == CONNECT
    client.lose()


def test_the_reply_carries_the_address_that_was_asked_for() -> None:
    # Also where the connection itself says another, as behind a NAT of its own.
    proxy = Proxy()
    client = proxy.client(CONNECT)
    proxy.server.dial.connect(IPv4Address("TCP", "203.0.113.1", 8080))
    client.take()
    assert client.taken == GRANTED
    client.lose()


def test_a_name_is_looked_up_once_and_its_address_is_in_the_reply() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    assert proxy.resolver.asked == [("example.com", 80)]
    proxy.resolver.answer(SERVER)
    assert proxy.dialled == [[(socket.AF_INET, (SERVER, 80))]]
    proxy.server.dial.connect(IPv4Address("TCP", SERVER, 80))
    client.take()
    assert client.taken == GRANTED
    assert proxy.policy.asked == [(SERVER, 80, "example.com")]
    assert proxy.session.upstream == f"{SERVER}:80"
    assert len(proxy.resolver.asked) == 1
    client.lose()


@pytest.mark.parametrize(
    "peer",
    [
        IPv6Address("TCP", "2001:db8::7", 80, 0, 0),
        # As the kernel writes one that nothing but its notation is IPv4.
        IPv6Address("TCP", "::198.51.100.7", 80, 0, 0),
        IPv6Address("TCP", "::ffff:c633:6407", 80, 0, 0),
    ],
)
def test_a_reply_can_not_name_an_ipv6_address(peer: IPv6Address) -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, peer.host, 80))
    assert proxy.resolver.asked == [], "it is no name"
    assert proxy.dialled == [[(socket.AF_INET6, (peer.host, 80, 0, 0))]]
    assert proxy.policy.asked == [(peer.host, 80, "")]
    server = proxy.server.dial.connect(peer)
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "0.0.0.0", 80)
    client.receive(b"goes through")
    server.take()
    assert server.taken == b"goes through"
    client.lose()


def test_a_mapped_address_is_named_by_what_it_stands_for() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, f"::ffff:{SERVER}", 80))
    proxy.server.dial.connect(IPv6Address("TCP", f"::ffff:{SERVER}", 80, 0, 0))
    client.take()
    assert client.taken == GRANTED
    client.lose()


def test_an_address_as_a_name_is_not_looked_up() -> None:
    proxy = Proxy()
    client = proxy.client(b"\4\1\0\x50\0\0\0\1joe\0" + SERVER.encode() + b"\0")
    assert proxy.resolver.asked == []
    assert proxy.policy.asked == [(SERVER, 80, "")]
    assert proxy.dialled == [[(socket.AF_INET, (SERVER, 80))]]
    client.lose()


def test_every_address_of_a_name_is_asked_about_and_those_permitted_are_dialled() -> (
    None
):
    proxy = Proxy()
    proxy.policy.against = {"2001:db8::1", "192.0.2.66"}
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer("2001:db8::1", SERVER, "192.0.2.66", "2001:db8::2")
    assert [address for address, *_ in proxy.policy.asked] == [
        *("2001:db8::1", SERVER, "192.0.2.66", "2001:db8::2")
    ]
    assert proxy.dialled == [
        [
            (socket.AF_INET, (SERVER, 80)),
            (socket.AF_INET6, ("2001:db8::2", 80, 0, 0)),
        ]
    ]
    client.lose()


def test_a_name_whose_addresses_are_all_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {"192.0.2.66", "192.0.2.67"}
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer("192.0.2.66", "192.0.2.67")
    assert proxy.dialled == []
    refused(client)
    assert proxy.session.detail == "192.0.2.66 is out of bounds"
    proxy.over(Ending.DENIED)


def test_an_address_that_is_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {SERVER}
    client = proxy.client(CONNECT)
    assert proxy.dialled == []
    refused(client)
    assert proxy.session.detail == f"{SERVER} is out of bounds"
    proxy.over(Ending.DENIED)


def test_a_user_who_is_not_admitted() -> None:
    proxy = Proxy()
    proxy.policy.unwanted = {b"joe"}
    client = proxy.client(CONNECT)
    assert proxy.policy.asked == []
    refused(client)
    assert proxy.session.detail == "an unwanted user"
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("request_", [CONNECT_BY_NAME, BIND_BY_NAME])
@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.DNSLookupError("example.com: no such name"), Ending.UNRESOLVED),
        # A resolver that gives up by itself; nobody has asked it to.
        (CancelledError(), Ending.CONNECT_FAILED),
    ],
)
def test_a_name_that_does_not_resolve(
    request_: bytes, problem: Exception, ending: Ending
) -> None:
    proxy = Proxy()
    client = proxy.client(request_)
    proxy.resolver.fail(problem)
    refused(client)
    assert proxy.session.detail
    proxy.over(ending)


@pytest.mark.parametrize("request_", [CONNECT_BY_NAME, BIND_BY_NAME])
def test_a_resolver_with_a_bug_ends_its_session_only(
    request_: bytes, logged_failures: LoggedFailures
) -> None:
    proxy = Proxy()
    client = proxy.client(request_)
    proxy.resolver.fail(ZeroDivisionError("in the resolver"))
    client.take()
    assert not client.connected
    logged_failures.take("in the resolver")
    proxy.over(Ending.FAILED)


@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.ConnectionRefusedError("no"), Ending.CONNECT_REFUSED),
        (error.TCPTimedOutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.NoRouteError("where"), Ending.CONNECT_FAILED),
        (error.getConnectError((104, "reset")), Ending.UPSTREAM_RESET),
    ],
)
def test_a_dial_that_fails(problem: Exception, ending: Ending) -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT + b"data")
    proxy.server.dial.fail(problem)
    refused(client)
    assert proxy.session.reply == 91
    proxy.over(ending)


def test_a_server_lost_as_soon_as_it_was_connected() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT)
    dial = proxy.server.dial
    leg: Any = dial.factory.buildProtocol(IPv4Address("TCP", SERVER, 80))
    FakeTransport().connect(leg).lose()
    dial.deferred.callback(leg)
    refused(client)
    proxy.over(Ending.CONNECT_FAILED)


def test_a_dialer_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    def broken(addresses: Sequence[SocketAddress]) -> IStreamClientEndpoint:
        raise ZeroDivisionError("in the dialer")

    proxy = Proxy(dialer=broken)
    client = proxy.client(CONNECT)
    assert not client.connected
    logged_failures.take("in the dialer")
    proxy.over(Ending.FAILED)


# -- several addresses, with the proxy's own dialer


def test_the_second_address_of_a_name_is_tried_when_the_first_fails() -> None:
    made: list[tuple[Any, FakeEndpoint]] = []

    class Fake(SocketEndpoint):
        def connect(self, factory: Any) -> Any:
            made.append((self.address, FakeEndpoint(proxy.clock)))
            return made[-1][1].connect(factory)

    clock = MemoryReactorClock()
    proxy = Proxy(dialer=Dialer(clock, Fake))
    client = proxy.client(CONNECT_BY_NAME + b"data")
    proxy.resolver.answer("203.0.113.9", SERVER)
    [(address, first)] = made
    assert address == ("203.0.113.9", 80)
    first.dial.fail(error.ConnectionRefusedError())
    [_, (address, second)] = made
    assert address == (SERVER, 80)
    server = second.dial.connect(IPv4Address("TCP", SERVER, 80))
    client.take()
    assert client.taken == GRANTED
    server.take()
    assert server.taken == b"data"
    assert clock.getDelayedCalls() == []
    client.lose()
    proxy.over(Ending.DOWNSTREAM_RESET)


# -- what is no request


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\5\1\0", "SOCKS5"),
        (b"\6", "version 6"),
        (b"\4\3", "command 3"),
        (b"\4\1\0\0", "port 0"),
        (b"\4\1\0\x50\0\0\0\1\0\0", "empty host name"),
        (b"\4\1\0\x50\0\0\0\1\0\xc3\xa9.example\0", "not ASCII"),
        (b"\4\1\0\x50\1\2\3\4" + b"u" * 256, "user id of more than 255"),
        (b"\4\1\0\x50\0\0\0\1\0" + b"h" * 256, "host name of more than 255"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
def test_a_bad_request_is_rejected_and_named(
    data: bytes, why: str, whole: bool
) -> None:
    proxy = Proxy()
    client = proxy.client()
    for piece in [data] if whole else [bytes([byte]) for byte in data]:
        # It may be refused before it is complete.
        if client.reading:
            client.receive(piece)
    refused(client)
    session = proxy.session
    assert why in session.detail
    assert (session.up.read, session.reply) == (0, 91)
    assert (session.command, session.requested) == ("-", "-")
    proxy.over(Ending.BAD_REQUEST)


def test_nothing_is_read_behind_a_refusal() -> None:
    proxy = Proxy()
    client = proxy.client(b"\5")
    # What had been read before the transport stopped.
    client.protocol.dataReceived(CONNECT)
    assert proxy.dialled == []
    refused(client)


def test_the_longest_request_is_served() -> None:
    name = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, name, 65535, b"u" * 255))
    assert proxy.resolver.asked == [(name, 65535)]
    client.lose()


# -- ident


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_ident_that_agrees(request_: bytes) -> None:
    proxy = Proxy(ident=True, ident_port=1113)
    client = proxy.client(request_ + b"data")
    [(host, port, *_, source)] = proxy.clock.tcpClients
    assert (host, port, source) == ("192.0.2.1", 1113, ("192.0.2.2", 0))
    assert not proxy.dialled
    assert not proxy.ports
    question, transport = proxy.identd()
    assert transport.value() == b"50000, 80\r\n"
    question.dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    assert not len(proxy.factory.handshakes)
    if request_ == CONNECT:
        server = proxy.server.dial.connect()
    else:
        server = proxy.port.accept(SERVER)
    server.take()
    assert server.taken == b"data"
    client.lose()
    proxy.over(Ending.DOWNSTREAM_RESET)


def test_ident_that_names_another() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : eve\r\n")
    refused(client, Code.WRONG_IDENT)
    assert proxy.dialled == []
    assert proxy.session.reply == 93
    assert "'eve'" in proxy.session.detail
    proxy.over(Ending.IDENT_FAILED)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"50000, 80 : ERROR : NO-USER\r\n", "NO-USER"),
        (b"nonsense\r\n", "nonsense"),
        (b"50000, 81 : USERID : UNIX : joe\r\n", "50000, 81"),
        (b"", "left without an answer"),
    ],
)
def test_ident_that_names_nobody(answer: bytes, why: str) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    question, _ = proxy.identd()
    if answer:
        question.dataReceived(answer)
    else:
        question.connectionLost(Failure(error.ConnectionDone()))
    refused(client, Code.NO_IDENT)
    assert proxy.dialled == []
    assert proxy.session.reply == 92
    assert why in proxy.session.detail
    proxy.over(Ending.IDENT_FAILED)


def test_ident_that_can_not_be_asked() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    [(_, _, factory, *_)] = proxy.clock.tcpClients
    [connector] = proxy.clock.connectors
    factory.clientConnectionFailed(connector, Failure(error.ConnectionRefusedError()))
    refused(client, Code.NO_IDENT)
    proxy.over(Ending.IDENT_FAILED)


def test_ident_that_does_not_answer() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT)
    _, transport = proxy.identd()
    proxy.clock.pump([1] * 9)
    assert client.connected
    assert client.dataBuffer == b""
    proxy.clock.pump([1] * 2)
    assert transport.disconnecting
    refused(client, Code.NO_IDENT)
    assert "did not answer in 10 s" in proxy.session.detail
    proxy.over(Ending.IDENT_FAILED)


def test_the_handshake_s_deadline_holds_for_identd_as_well() -> None:
    proxy = Proxy(ident=True, handshake_timeout=4)
    client = proxy.client(CONNECT)
    proxy.clock.pump([0.5] * 10)
    refused(client, Code.NO_IDENT)
    assert "identd" in proxy.session.detail
    assert proxy.clock.connectors[0].stoppedConnecting
    proxy.over(Ending.IDENT_FAILED)


def test_a_unix_client_has_no_identd() -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(CONNECT, peer=UNIXAddress(None), facing=UNIXAddress("/run/x"))
    refused(client, Code.NO_IDENT)
    assert proxy.clock.tcpClients == []
    proxy.over(Ending.IDENT_FAILED)


def test_nobody_is_asked_about_a_user_who_is_not_admitted() -> None:
    proxy = Proxy(ident=True)
    proxy.policy.unwanted = {b"joe"}
    refused(proxy.client(CONNECT))
    assert proxy.clock.tcpClients == []


# -- BIND


def test_bind_from_accept_to_end() -> None:
    proxy = Proxy(bind_address="192.0.2.2")
    client = proxy.client(BIND)
    [listener] = proxy.listeners
    assert listener.host == "192.0.2.2"
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
    assert len(proxy.factory.binds) == 1
    proxy.clock.advance(3)
    peer = proxy.port.accept(SERVER, 20)
    assert not proxy.port.is_open, "one is enough"
    assert len(proxy.factory.binds) == 0
    client.take()
    second = write_reply(Code.GRANTED, SERVER, 20)
    assert client.taken[8:] == second
    peer.receive(b"a file")
    client.take()
    assert client.taken[16:] == b"a file"
    client.receive(b"thanks")
    peer.take()
    assert peer.taken == b"thanks"
    peer.receive_eof()
    assert client.write_shut
    client.receive_eof()
    session = proxy.session
    assert (session.up.read, session.down.read) == (6, 6)
    assert session.connected_at == 3
    assert session.upstream == f"{SERVER}:20"
    assert proxy.witness.heard == [
        "dialing bind:192.0.2.2:7000",
        f"connected {SERVER}:20",
        "closed done",
    ]
    assert proxy.dialled == []
    assert peer.getTcpNoDelay()
    proxy.over(Ending.DONE)


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("politely", [True, False])
def test_an_observer_that_ends_a_bind_is_not_overruled(
    monkeypatch: pytest.MonkeyPatch, opens: bool, politely: bool
) -> None:
    def dialing(_: Witness, session: Session) -> None:
        protocol = proxy.factory.sessions[session.id]
        leave = protocol.end if politely else protocol.abort_session
        leave(Ending.NO_UPSTREAM, "by the observer")

    monkeypatch.setattr(Witness, "dialing", dialing)
    proxy = Proxy(opens=opens)
    client = proxy.client(BIND)
    if not opens:
        [listener] = proxy.listeners
        proxy.ports.append(listener.open())
    if politely:
        refused(client)
    assert not client.connected
    assert proxy.session.reply == (int(Code.REJECTED) if politely else None)
    assert proxy.session.detail == "by the observer"
    proxy.over(Ending.NO_UPSTREAM)


def test_what_a_client_sends_before_the_second_reply_is_kept_for_the_peer() -> None:
    proxy = Proxy()
    client = proxy.client(BIND + b"with it, ")
    client.receive(b"after the first, ")
    peer = proxy.port.accept(SERVER)
    client.receive(b"after the second")
    peer.take()
    assert peer.taken == b"with it, after the first, after the second"
    assert proxy.session.up.read == len(peer.taken)
    client.lose()


def test_another_peer_than_the_expected_is_closed_and_the_client_is_told() -> None:
    proxy = Proxy()
    client, port = proxy.bound()
    stranger = port.accept("203.0.113.13", 1313)
    assert not stranger.connected
    assert not port.is_open
    refused(client)
    assert proxy.session.reply == 91
    assert proxy.session.detail == f"203.0.113.13:1313 came instead of {SERVER}"
    proxy.over(Ending.WRONG_PEER)


def test_a_second_peer_finds_nobody() -> None:
    proxy = Proxy()
    client, port = proxy.bound()
    peer = port.accept(SERVER)
    with pytest.raises(AssertionError, match="nobody listens"):
        port.accept(SERVER)
    # One that was accepted in the same turn as the first.
    assert port.factory.buildProtocol(IPv4Address("TCP", SERVER, 4322)) is None
    client.receive(b"hello")
    peer.take()
    assert peer.taken == b"hello"
    client.lose()


def test_a_named_peer_may_come_from_each_of_its_permitted_addresses() -> None:
    for comes, ending in ((SERVER, None), ("203.0.113.8", None)):
        proxy = Proxy()
        client = proxy.client(BIND_BY_NAME)
        proxy.resolver.answer("2001:db8::1", SERVER, "203.0.113.8")
        assert proxy.policy.asked == [
            (SERVER, 80, "example.com"),
            ("203.0.113.8", 80, "example.com"),
        ]
        proxy.port.accept(comes)
        assert proxy.session.ending is ending
        client.lose()


def test_a_named_peer_may_not_come_from_an_address_that_is_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {SERVER}
    client = proxy.client(BIND_BY_NAME)
    proxy.resolver.answer(SERVER, "203.0.113.8")
    client.take()
    client.taken = b""
    assert not proxy.port.accept(SERVER).connected
    refused(client)
    proxy.over(Ending.WRONG_PEER)


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        (["192.0.2.66"], "out of bounds"),
        (["2001:db8::1"], "no IPv4 address"),
    ],
)
def test_a_named_peer_without_an_address_to_come_from(
    addresses: list[str], why: str
) -> None:
    proxy = Proxy()
    proxy.policy.against = {"192.0.2.66"}
    client = proxy.client(BIND_BY_NAME)
    proxy.resolver.answer(*addresses)
    refused(client)
    assert proxy.listeners == []
    assert why in proxy.session.detail
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("host", [SERVER, "example.com", "0.0.0.0"])
def test_bind_for_a_peer_whose_port_nobody_knows(host: str) -> None:
    """Port 0, as the memo does not forbid it; which port it comes from is no matter."""
    proxy = Proxy(bind_address="192.0.2.2", bind_any=True)
    client = proxy.client(write_request(Command.BIND, host, 0))
    if host == "example.com":
        proxy.resolver.answer(SERVER)
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
    assert proxy.session.requested == f"{host}:0"
    proxy.port.accept(SERVER, 20)
    client.take()
    assert client.taken[8:] == write_reply(Code.GRANTED, SERVER, 20)
    client.lose()


def test_bind_for_a_peer_that_is_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {SERVER}
    refused(proxy.client(BIND))
    assert proxy.listeners == []
    proxy.over(Ending.DENIED)


def test_bind_for_anyone_takes_permission() -> None:
    proxy = Proxy()
    refused(proxy.client(BIND_ANY))
    assert proxy.listeners == []
    assert "--bind-any" in proxy.session.detail
    proxy.over(Ending.DENIED)


def test_bind_for_anyone_with_permission() -> None:
    proxy = Proxy(bind_any=True)
    client = proxy.client(BIND_ANY)
    [listener] = proxy.listeners
    assert listener.host == "0.0.0.0"
    client.take()
    # Not the wildcard: what the client calls this machine.
    assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
    proxy.port.accept("203.0.113.99", 99)
    client.take()
    assert client.taken[8:] == write_reply(Code.GRANTED, "203.0.113.99", 99)
    client.lose()


def test_the_rules_are_for_whoever_comes_too() -> None:
    policy = ProxyPolicy(
        [parse_rule("--deny-dest", "203.0.113.0/24", allow=False)], guarded=False
    )
    proxy = Proxy(bind_any=True, policy=policy)
    client = proxy.client(BIND_ANY)
    client.take()
    proxy.port.accept("203.0.113.99", 99)
    client.take()
    assert client.taken[8:] == write_reply(Code.REJECTED)
    assert "--deny-dest 203.0.113.0/24" in proxy.session.detail
    proxy.over(Ending.DENIED)


def test_bind_that_is_switched_off() -> None:
    proxy = Proxy(bind=False)
    refused(proxy.client(BIND))
    assert proxy.listeners == []
    assert "--no-bind" in proxy.session.detail
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("bind_address", [None, "0.0.0.0", "192.0.2.2"])
def test_the_external_address_is_what_the_reply_names(bind_address: str | None) -> None:
    proxy = Proxy(bind_address=bind_address, external_address="203.0.113.1")
    client = proxy.client(BIND)
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "203.0.113.1", 7000)
    client.lose()


def test_a_wildcard_is_named_by_the_ipv4_address_that_faces_a_mapped_client() -> None:
    proxy = Proxy(bind_address="0.0.0.0")
    facing = IPv6Address("TCP", "::ffff:192.0.2.9", 1080, 0, 0)
    client = proxy.client(BIND, facing=facing)
    assert client.dataBuffer == write_reply(Code.GRANTED, "192.0.2.9", 7000)
    assert proxy.session.upstream == "bind:192.0.2.9:7000"
    client.lose()


@pytest.mark.parametrize(
    "facing", [IPv6Address("TCP", "2001:db8::1", 1080, 0, 0), UNIXAddress("/run/x")]
)
def test_a_wildcard_that_no_reply_can_name(facing: IAddress) -> None:
    proxy = Proxy(bind_address="0.0.0.0")
    client = proxy.client(BIND, facing=facing)
    refused(client)
    assert "--external-address" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


def test_the_listener_is_on_the_way_to_the_peer_unless_told() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.BIND, "127.0.0.1", 80))
    assert [each.host for each in proxy.listeners] == ["127.0.0.1"]
    client.lose()


def test_a_peer_to_whom_there_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_way(address: object) -> str:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("relayd.socks.bind.address_towards", no_way)
    proxy = Proxy()
    refused(proxy.client(BIND))
    assert "Network is unreachable" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


@pytest.mark.parametrize(
    "problem",
    [
        ListenError("can't listen on 192.0.2.2:0: Too many open files"),
        OSError(24, "Too many open files"),
        # What Twisted's own endpoints say.
        error.CannotListenError("192.0.2.2", 0, OSError(24, "Too many open files")),
    ],
)
def test_a_listener_that_can_not_be_opened(problem: Exception) -> None:
    proxy = Proxy(opens=False)
    client = proxy.client(BIND)
    proxy.listeners[0].opened.errback(problem)
    refused(client)
    assert "Too many open files" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


def test_a_listener_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    proxy = Proxy(opens=False)
    client = proxy.client(BIND)
    proxy.listeners[0].opened.errback(ZeroDivisionError("in the listener"))
    client.turn()
    assert not client.connected
    logged_failures.take("in the listener")
    proxy.over(Ending.FAILED)


def test_a_listener_that_opens_too_late_is_closed() -> None:
    proxy = Proxy(opens=False)
    client = proxy.client(BIND)
    client.lose()
    port = proxy.listeners[0].open()
    assert not port.is_open
    proxy.over(Ending.CLIENT_LEFT)


@pytest.mark.parametrize("method", ["write", "registerProducer"])
def test_a_join_that_fails_leaves_neither_connection(
    method: str, logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()
    client, port = proxy.bound()

    def broken(*_: object) -> None:
        raise ZeroDivisionError(f"in {method}")

    monkeypatch.setattr(client, method, broken)
    peer = port.accept(SERVER)
    assert not peer.connected
    assert not client.connected
    logged_failures.take(f"in {method}")
    proxy.over(Ending.FAILED)


# -- at every moment before the Bridge: each side leaves, time is up, the relay stops


@attrs.frozen
class Moment:
    """A client in some stage.

    :ivar name: for the test's.
    :ivar reach: brings a new client there; returns it.
    :ivar released: whether what was under way then has been given up.
    :ivar overdue: how the stage ends when its time is up.
    :ivar code: what the client is told then.
    :ivar replies: what it has been told before.
    """

    name: str
    options: dict[str, Any]
    reach: Callable[[Proxy], FakeTransport]
    released: Callable[[Proxy], bool]
    overdue: Ending
    code: Code = Code.REJECTED
    replies: bytes = b""


def _to_ident(proxy: Proxy) -> FakeTransport:
    client = proxy.client(CONNECT)
    [_] = proxy.clock.connectors
    return client


#: Before it has said what it wants.
DEFAULT_HANDSHAKES = [
    Moment(
        "before a byte",
        {},
        lambda proxy: proxy.client(),
        lambda _: True,
        Ending.HANDSHAKE_TIMEOUT,
    ),
    Moment(
        "in the handshake",
        {},
        lambda proxy: proxy.client(CONNECT[:-1]),
        lambda _: True,
        Ending.HANDSHAKE_TIMEOUT,
    ),
]

#: After that, and before it is joined.
MOMENTS = [
    Moment(
        "identd is being asked",
        {"ident": True},
        _to_ident,
        lambda proxy: proxy.clock.connectors[0].stoppedConnecting,
        Ending.IDENT_FAILED,
        Code.NO_IDENT,
    ),
    Moment(
        "the name is looked up",
        {},
        lambda proxy: proxy.client(CONNECT_BY_NAME),
        lambda proxy: proxy.resolver.cancelled == 1,
        Ending.CONNECT_TIMEOUT,
    ),
    Moment(
        "the server is dialled",
        {},
        lambda proxy: proxy.client(CONNECT),
        lambda proxy: proxy.server.cancelled == 1,
        Ending.CONNECT_TIMEOUT,
    ),
    Moment(
        "the name of BIND is looked up",
        {},
        lambda proxy: proxy.client(BIND_BY_NAME),
        lambda proxy: proxy.resolver.cancelled == 1,
        Ending.CONNECT_TIMEOUT,
    ),
    Moment(
        "BIND's listener is opened",
        {"opens": False},
        lambda proxy: proxy.client(BIND),
        lambda proxy: not proxy.listeners[0].open().is_open,
        Ending.BIND_TIMEOUT,
    ),
    Moment(
        "BIND waits",
        {"bind_address": "192.0.2.2"},
        lambda proxy: proxy.client(BIND),
        lambda proxy: not proxy.port.is_open,
        Ending.BIND_TIMEOUT,
        replies=write_reply(Code.GRANTED, "192.0.2.2", 7000),
    ),
]


def _name(moment: Moment) -> str:
    return moment.name


at_every_moment = pytest.mark.parametrize(
    "moment", DEFAULT_HANDSHAKES + MOMENTS, ids=_name
)
at_every_moment_after = pytest.mark.parametrize("moment", MOMENTS, ids=_name)


def reached(moment: Moment, **options: Any) -> tuple[Proxy, FakeTransport]:
    """A proxy, and its client at that moment."""
    proxy = Proxy(**(moment.options | options))
    client = moment.reach(proxy)
    client.take()
    assert client.taken == moment.replies
    client.taken = b""
    assert client.connected
    return proxy, client


@at_every_moment
def test_the_client_resets(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.lose()
    assert moment.released(proxy)
    assert proxy.session.up.read == 0
    proxy.over(Ending.CLIENT_LEFT)


@pytest.mark.parametrize("moment", DEFAULT_HANDSHAKES, ids=_name)
def test_the_client_ends_its_side_in_the_handshake(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.receive_eof()
    refused(client)
    assert proxy.session.up.read == 0
    assert (
        proxy.session.detail
        == {
            "before a byte": "said nothing",
            "in the handshake": "in the middle of its request",
        }[moment.name]
    )
    proxy.over(Ending.CLIENT_LEFT)


@at_every_moment_after
def test_the_client_ends_its_side_with_nothing_sent(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.receive_eof()
    proxy.clock.advance(LEFT_GRACE / 2)
    assert client.connected
    proxy.clock.pump([0.2] * 10)
    assert moment.released(proxy)
    refused(client)
    proxy.over(Ending.CLIENT_LEFT)


@at_every_moment_after
def test_the_client_ends_its_side_with_the_data_sent(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.receive(b"all that I have")
    client.receive_eof()
    proxy.clock.pump([0.5] * int(LEFT_GRACE * 4))
    assert client.connected, "it waits for its answer"
    server = _go_on(proxy)
    server.take()
    assert server.taken == b"all that I have"
    assert server.write_shut
    server.receive(b"the answer")
    server.receive_eof()
    client.take()
    assert client.taken.endswith(b"the answer")
    proxy.over(Ending.DONE)


def _go_on(proxy: Proxy) -> FakeTransport:
    """What is under way comes to its end; the other side's connection."""
    if proxy.factory.ident:
        proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    if proxy.resolver.asked:
        proxy.resolver.answer(SERVER)
    if proxy.servers:
        return proxy.server.dial.connect()
    port = proxy.ports[0] if proxy.ports else proxy.listeners[0].open()
    transport = port.accept(SERVER)
    assert not port.is_open
    return transport


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_a_client_that_left_during_ident_has_no_more_time_afterwards(
    request_: bytes,
) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(request_)
    client.receive_eof()
    proxy.clock.advance(LEFT_GRACE / 2)
    proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    proxy.clock.pump([0.2] * 10)
    client.take()
    proxy.over(Ending.CLIENT_LEFT)


def test_a_client_that_left_during_a_look_up_gets_no_listener_for_long() -> None:
    proxy = Proxy()
    client = proxy.client(BIND_BY_NAME)
    client.receive_eof()
    proxy.clock.advance(LEFT_GRACE / 2)
    proxy.resolver.answer(SERVER)
    assert proxy.port.is_open
    proxy.clock.pump([0.2] * 10)
    client.take()
    proxy.over(Ending.CLIENT_LEFT)


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_a_client_that_sent_its_data_during_ident_has_its_time(request_: bytes) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(request_ + b"data")
    client.receive_eof()
    proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    proxy.clock.pump([0.5] * int(LEFT_GRACE * 8))
    assert client.connected
    client.lose()
    proxy.over(Ending.CLIENT_LEFT)


TIMES: dict[str, Any] = {
    "handshake_timeout": 3.0,
    "connect_timeout": 4.0,
    "bind_timeout": 5.0,
}

NEVER: dict[str, Any] = dict.fromkeys(TIMES, 0.0)

#: Which of them it is that a session of this ending has run out of.
LIMITS = {
    Ending.HANDSHAKE_TIMEOUT: 3.0,
    Ending.IDENT_FAILED: 3.0,
    Ending.CONNECT_TIMEOUT: 4.0,
    Ending.BIND_TIMEOUT: 5.0,
}


@at_every_moment
def test_its_time_is_up(moment: Moment) -> None:
    proxy, client = reached(moment, **TIMES)
    limit = LIMITS[moment.overdue]
    proxy.clock.pump([0.25] * int(4 * limit - 1))
    assert not client.disconnecting
    proxy.clock.pump([0.25] * 4)
    assert moment.released(proxy)
    refused(client, moment.code)
    assert proxy.session.reply == moment.code
    assert f"{limit:g} s" in proxy.session.detail
    proxy.over(moment.overdue)


def test_a_slow_client_gets_no_more_time_for_each_byte() -> None:
    proxy = Proxy(**TIMES)
    client = proxy.client()
    for byte in CONNECT[:5]:
        client.receive(bytes([byte]))
        proxy.clock.pump([0.25] * 2)
    proxy.clock.pump([0.25] * 4)
    refused(client)
    proxy.over(Ending.HANDSHAKE_TIMEOUT)


@at_every_moment
def test_no_timeout_means_never(moment: Moment) -> None:
    proxy, client = reached(moment, **NEVER)
    # ident's own is not among them.
    proxy.clock.pump([1] * (9 if proxy.factory.ident else 500))
    assert client.connected
    client.lose()
    proxy.over(Ending.CLIENT_LEFT)


@at_every_moment
def test_a_client_that_does_not_take_its_refusal_is_reset(moment: Moment) -> None:
    proxy, client = reached(moment, **TIMES)
    proxy.clock.pump([0.25] * int(4 * LIMITS[moment.overdue] + 3))
    assert client.connected
    assert client.dataBuffer == write_reply(moment.code)
    # It takes no place of those who still may become something.
    assert not len(proxy.factory.handshakes)
    assert not len(proxy.factory.binds)
    proxy.clock.pump([0.25] * 24)
    assert client.log[-1] == "abort"
    proxy.over(moment.overdue)


@at_every_moment
def test_a_drain_waits_and_then_aborts(moment: Moment) -> None:
    proxy, client = reached(moment)
    done: list[None] = []
    proxy.factory.drain(5).addCallback(done.append)
    assert proxy.factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1)) is None
    proxy.clock.advance(4.9)
    assert not done
    assert client.connected
    proxy.clock.advance(0.2)
    assert done == [None]
    assert client.log[-1] == "abort"
    assert moment.released(proxy)
    proxy.over(Ending.DRAINED)


@at_every_moment_after
def test_a_drain_lets_it_finish(moment: Moment) -> None:
    proxy, client = reached(moment)
    done: list[None] = []
    proxy.factory.drain(5).addCallback(done.append)
    server = _go_on(proxy)
    client.receive(b"last words")
    client.receive_eof()
    server.take()
    assert server.taken == b"last words"
    assert not done
    server.receive_eof()
    client.take()
    assert done == [None]
    proxy.over(Ending.DONE)


@at_every_moment_after
def test_what_a_client_sends_meanwhile_is_bounded(moment: Moment) -> None:
    proxy, client = reached(moment)
    sent = 0
    while client.reading:
        client.receive(bytes(10_000))
        sent += 10_000
    assert HOLD_LIMIT <= sent < HOLD_LIMIT + 10_000
    server = _go_on(proxy)
    server.take()
    assert server.taken == bytes(sent)
    assert client.reading, "it is read again"
    client.lose()
    server.take()


# -- each side leaves after they were joined


@pytest.mark.parametrize("by", ["connect", "bind"])
@pytest.mark.parametrize(
    ("who", "ending"),
    [
        ("client", Ending.DOWNSTREAM_RESET),
        ("server", Ending.UPSTREAM_RESET),
    ],
)
def test_a_reset_is_passed_on(by: str, who: str, ending: Ending) -> None:
    proxy = Proxy()
    if by == "connect":
        client, server = proxy.joined()
    else:
        client, port = proxy.bound()
        server = port.accept(SERVER)
        client.take()
    one, other = (client, server) if who == "client" else (server, client)
    one.receive(b"last words")
    other.take()
    one.lose()
    assert other.taken.endswith(b"last words")
    assert other.log[-1] == "abort"
    proxy.over(ending)


# -- bounds


def test_the_oldest_handshake_of_a_client_makes_room_for_its_next() -> None:
    proxy = Proxy(max_handshakes_per_client=2)
    other = proxy.client(host="192.0.2.200")
    first, second = proxy.client(CONNECT[:4]), proxy.client()
    third = proxy.client()
    refused(first)
    assert proxy.witness.sessions[1].ending is Ending.EVICTED
    assert [each.connected for each in (other, second, third)] == [True] * 3
    assert len(proxy.factory.handshakes) == 3
    third.receive(CONNECT)
    assert len(proxy.factory.handshakes) == 2, "its handshake is over"
    proxy.client()
    assert second.connected
    for each in (other, second, third):
        each.lose()


def test_the_oldest_handshake_of_all_makes_room_for_the_next() -> None:
    proxy = Proxy(max_handshakes=2)
    first = proxy.client(host="192.0.2.201")
    second = proxy.client(host="192.0.2.202")
    third = proxy.client(host="192.0.2.203")
    refused(first)
    assert second.connected
    assert third.connected
    second.lose()
    fourth = proxy.client(host="192.0.2.204")
    assert third.connected
    third.lose()
    fourth.lose()
    proxy.nothing_left()


def test_one_whose_identd_is_asked_can_be_evicted() -> None:
    proxy = Proxy(ident=True, max_handshakes=1)
    first = proxy.client(CONNECT)
    second = proxy.client()
    refused(first)
    assert proxy.clock.connectors[0].stoppedConnecting
    second.lose()
    proxy.nothing_left()


def test_without_descriptors_those_go_who_are_long_in_their_handshake() -> None:
    """So many at once; not who has just come, nor who is dialled for."""
    proxy = Proxy()
    assert verifyObject(IShedsClients, proxy.factory)
    served = proxy.client(CONNECT)
    mute = [
        proxy.client(host=f"192.0.2.{number}") for number in range(SHED_AT_ONCE + 2)
    ]

    def shed_clients() -> None:
        # Two listeners may ask in one turn.
        proxy.factory.shed_clients()
        proxy.factory.shed_clients()
        proxy.clock.advance(0)

    proxy.clock.advance(LONG_HANDSHAKE - 0.01)
    shed_clients()
    assert all(client.connected for client in mute)
    late = proxy.client(CONNECT[:4])
    proxy.clock.advance(0.01)
    shed_clients()
    for client in mute[:SHED_AT_ONCE]:
        refused(client)
    assert proxy.witness.sessions[1].ending is Ending.EVICTED
    assert all(client.connected for client in mute[SHED_AT_ONCE:])
    shed_clients()
    for client in mute[SHED_AT_ONCE:]:
        refused(client)
    late.receive(CONNECT[4:])
    assert len(proxy.servers) == 2
    for client in (served, late):
        client.lose()
    proxy.nothing_left()


def test_whose_request_has_arrived_by_then_makes_no_room() -> None:
    """A proxy that was stopped meanwhile has not read it yet."""
    proxy = Proxy()
    speaks, mute = proxy.client(), proxy.client()
    proxy.clock.advance(LONG_HANDSHAKE)
    proxy.factory.shed_clients()
    speaks.receive(CONNECT)
    proxy.clock.advance(0)
    refused(mute)
    assert len(proxy.servers) == 1
    speaks.lose()
    proxy.nothing_left()


def test_a_proxy_with_protocols_of_its_own_sheds_clients_as_well() -> None:
    class Own(Socks4Factory):
        def buildProtocol(self, addr: IAddress | None) -> Any:
            return super().buildProtocol(addr)

    assert IShedsClients.implementedBy(Own)
    assert IProtocolFactory.implementedBy(Own)
    proxy = Proxy()
    own = Own(proxy.clock, dialer=proxy._dialer, listener=proxy._listener)
    assert proxy.factory.takes_names()
    assert not own.takes_names()


def test_those_who_are_dialled_for_shed_for_nobody() -> None:
    proxy = Proxy(max_handshakes=1, max_handshakes_per_client=1)
    clients = [proxy.client(CONNECT) for _ in range(5)]
    assert all(client.connected for client in clients)
    for client in clients:
        client.lose()
    proxy.nothing_left()


@pytest.mark.parametrize("bound", ["max_binds", "max_binds_per_client"])
def test_more_binds_than_may_wait_are_refused(bound: str) -> None:
    options: dict[str, Any] = {bound: 2}
    proxy = Proxy(**options)
    waiting = [proxy.client(BIND), proxy.client(BIND)]
    late = proxy.client(BIND)
    refused(late)
    assert len(proxy.listeners) == 2
    assert proxy.witness.sessions[2].ending is Ending.REFUSED
    assert "2 BINDs" in proxy.witness.sessions[2].detail
    elsewhere = proxy.client(BIND, "192.0.2.200")
    assert elsewhere.disconnecting == (bound == "max_binds")
    # One that was served waits no longer, and nor does one that left.
    proxy.ports[0].accept(SERVER)
    waiting[1].lose()
    again = [proxy.client(BIND), proxy.client(BIND)]
    assert not any(client.disconnecting for client in again)
    for client in (waiting[0], late, elsewhere, *again):
        client.take()
        client.lose()
    proxy.nothing_left()


# -- a policy with a bug


@pytest.mark.parametrize(
    "request_", [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME], ids=str
)
@pytest.mark.parametrize("ident", [False, True], ids=["", "after ident"])
def test_a_policy_with_a_bug_ends_its_session_only(
    request_: bytes, ident: bool, logged_failures: LoggedFailures
) -> None:
    proxy = Proxy(ident=ident)
    other = proxy.client()
    proxy.policy.problem = ZeroDivisionError("in the policy")
    client = proxy.client(request_)
    if ident:
        proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    if proxy.resolver.asked:
        proxy.resolver.answer(SERVER)
    client.take()
    assert not client.connected
    logged_failures.take("in the policy")
    assert proxy.witness.sessions[1].ending is Ending.FAILED
    assert (proxy.dialled, proxy.listeners) == ([], [])
    proxy.policy.problem = None
    assert other.connected
    assert len(proxy.factory.sessions) == 1
    other.lose()
    proxy.nothing_left()


def test_a_policy_with_a_bug_for_whoever_comes_ends_the_session(
    logged_failures: LoggedFailures,
) -> None:
    proxy = Proxy(bind_any=True)
    client = proxy.client(BIND_ANY)
    client.take()
    proxy.policy.problem = ZeroDivisionError("in the policy")
    assert not proxy.port.accept("203.0.113.99").connected
    assert not client.connected
    logged_failures.take("in the policy")
    proxy.over(Ending.FAILED)


def test_an_admission_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("in admit")

    monkeypatch.setattr(proxy.policy, "admit", broken)
    assert not proxy.client(CONNECT).connected
    logged_failures.take("in admit")
    proxy.over(Ending.FAILED)


# -- the log


def line(proxy: Proxy) -> str:
    """The line of the only session."""
    events: list[Any] = []
    publisher: Any = globalLogPublisher
    publisher.addObserver(events.append)
    try:
        SessionLog().closed(proxy.session)
    finally:
        publisher.removeObserver(events.append)
    [event] = events
    assert event["command"] == proxy.session.command
    text: str = event["line"]
    return text


def test_the_log_says_what_was_asked_for_and_answered() -> None:
    proxy = Proxy()
    client, server = proxy.joined()
    client.receive_eof()
    server.receive_eof()
    text = line(proxy)
    assert " ending=done code=-- " in text
    assert text.endswith(f"command=connect user='joe' requested={SERVER}:80 reply=90")


def test_the_log_of_a_bind_by_name() -> None:
    proxy = Proxy()
    client = proxy.client(BIND_BY_NAME)
    proxy.resolver.answer(SERVER)
    proxy.port.accept("203.0.113.13", 1313)
    client.take()
    text = line(proxy)
    assert " upstream=203.0.113.13:1313 " in text
    assert " command=bind user='joe' requested=example.com:80 reply=91 " in text
    assert text.endswith(f" detail='203.0.113.13:1313 came instead of {SERVER}'")


def test_the_log_of_one_who_never_asked() -> None:
    proxy = Proxy()
    proxy.client().lose()
    assert line(proxy).endswith(" command=- user=- requested=- reply=-")


def test_the_log_of_an_ipv6_destination() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, "2001:db8::1", 80))
    client.lose()
    assert " user=- requested=[2001:db8::1]:80 reply=- " in line(proxy) + " "


@pytest.mark.parametrize(
    "user",
    [
        b"joe\r\nsession=1 ending=done",
        b"\x1b[2J",
        b"\xff\xfe",
        "\u202e".encode(),
        b"' reply=90",
    ],
)
def test_a_user_id_can_not_break_the_line(user: bytes) -> None:
    proxy = Proxy()
    proxy.client(b"\4\1\0\x50\1\2\3\4" + user + b"\0").lose()
    text = line(proxy)
    assert text.isascii()
    assert text.isprintable()
    shown = text.partition(" user=")[2].rpartition(" requested=")[0]
    assert shown[0] == shown[-1]
    assert shown[0] in "'\""
    assert shown[0] not in shown[1:-1]


def test_the_detail_names_the_rule() -> None:
    rule = parse_rule("--deny-dest", "198.51.100.0/24:80", allow=False)
    proxy = Proxy(policy=ProxyPolicy([rule], guarded=False))
    refused(proxy.client(CONNECT))
    assert "--deny-dest 198.51.100.0/24:80" in line(proxy)
    guarded = Proxy(policy=ProxyPolicy())
    refused(guarded.client(write_request(Command.CONNECT, "10.1.2.3", 80)))
    assert "--allow-dest 10.0.0.0/8" in line(guarded)


# -- in somebody's program


def test_it_is_embedded_with_a_reactor_and_nothing_else() -> None:
    clock = Clock()
    factory = Socks4Factory(clock)
    assert factory.resolver is Resolver.of(clock)
    assert isinstance(factory.policy, ProxyPolicy)
    assert factory.policy.guarded, "an open proxy is a decision"
    transport = FakeTransport()
    protocol: Any = factory.buildProtocol(transport.peer)
    transport.connect(protocol)
    transport.receive(write_request(Command.CONNECT, "127.0.0.1", 80))
    refused(transport)
    factory.stopFactory()
    assert clock.getDelayedCalls() == []


def test_its_own_listener_is_one_of_relayd_s() -> None:
    factory = Socks4Factory(MemoryReactorClock())
    assert factory.listener("127.0.0.1").where == "127.0.0.1:0"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"handshake_timeout": -1}, "handshake must not be negative"),
        ({"bind_timeout": float("nan")}, "bind_timeout must not be negative"),
        ({"connect_timeout": -1}, "connect must not be negative"),
        ({"max_handshakes": 0}, "max_handshakes must be at least 1"),
        ({"max_handshakes_per_client": 0}, "per_client must be at least 1"),
        ({"max_binds": 0}, "max_binds must be at least 1"),
        ({"max_binds_per_client": -5}, "per_client must be at least 1"),
        ({"bind_address": "::1"}, "::1"),
        ({"external_address": "example.com"}, "example.com"),
    ],
)
def test_what_can_not_be_meant(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Socks4Factory(Clock(), **options)


def test_the_fakes_are_what_is_asked_for() -> None:
    assert verifyClass(IProxyPolicy, Porter)
    assert verifyObject(IGate, Counter())
