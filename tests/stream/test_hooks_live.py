"""What a program that embeds a relay may put in the place of our methods.

A relay has short ways for what is done most: a protocol made of a client's name, bytes
that pass the legs by, two connections closed in one call.  None of them may pass by a
method that somebody has overridden: in a subclass, by a mixin, in an object as it is
made, or on one that a factory hands out.  Here all of that is tried over real sockets,
on each kind of connections.
"""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.net.dialing import SocketEndpoint
from relayd.net.listening import TCPListenerEndpoint
from relayd.stream.attempt import UpstreamLeg
from relayd.tcp import RelayFactory, RelayProtocol
from tests.conftest import LoggedFailures
from tests.support.contracts import Peer, turns, until
from tests.support.process import TRANSPORTS

if "plane" in TRANSPORTS:
    from relayd.plane.endpoints import PlaneSocketEndpoint, PlaneTCPListenerEndpoint
    from relayd.plane.poller import Plane
    from relayd.plane.transport import PlaneTransport

#: Enough to be spliced.
DATA = random.Random(8).randbytes(1_000_000)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

Hook = Callable[..., Any]


def spying(name: str, heard: list[Any], done: Hook) -> Hook:
    """What notes that it was called, and does what it stands for."""

    def spy(*args: Any) -> Any:
        heard.append(name)
        return done(*args)

    return spy


# How a program may override a method of a class: each makes what stands in for it.


def in_a_subclass(kind: Any, name: str, heard: list[Any]) -> Any:
    return type("Own", (kind,), {name: spying(name, heard, getattr(kind, name))})


def by_a_mixin(kind: Any, name: str, heard: list[Any]) -> Any:
    mixin = type("Mixin", (), {name: spying(name, heard, getattr(kind, name))})
    return type("Own", (mixin, kind), {})


def as_it_is_made(kind: Any, name: str, heard: list[Any]) -> Any:
    class Own(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            setattr(self, name, spying(name, heard, getattr(self, name)))

    return Own


def by_a_function(kind: Any, name: str, heard: list[Any]) -> Any:
    """In the place of the class."""

    def make(*args: Any, **options: Any) -> Any:
        made = kind(*args, **options)
        setattr(made, name, spying(name, heard, getattr(made, name)))
        return made

    return make


HOW = [in_a_subclass, by_a_mixin, as_it_is_made, by_a_function]


class Witness(Observer):
    """Keeps the sessions."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def opened(self, session: Session) -> None:
        self.sessions.append(session)


class Relay:
    """A relay in this process, between a listening socket and what it accepts."""

    def __init__(self, kind: str, server: socket.socket, made: Any) -> None:
        plane = kind == "plane"
        dials: Any = PlaneSocketEndpoint if plane else SocketEndpoint
        listens: Any = PlaneTCPListenerEndpoint if plane else TCPListenerEndpoint
        self.server = server
        self.witness = Witness()
        upstream = dials(reactor, socket.AF_INET, server.getsockname())
        clock: Any = reactor
        self.factory = made(upstream, clock=clock, observer=self.witness)
        self.endpoint = listens(reactor, "127.0.0.1", 0, 16)
        self.port: Any = None

    def client(self) -> Peer:
        return Peer(socket.create_connection(("127.0.0.1", self.port.getHost().port)))

    async def accepted(self) -> Peer:
        """The server's end of a session."""
        await until(lambda: len(self.witness.sessions))
        found: list[socket.socket] = []

        def there() -> bool:
            try:
                found.append(self.server.accept()[0])
            except BlockingIOError:
                return False
            return True

        await until(there, "a connection to the server")
        return Peer(found[0])

    async def session(self, data: bytes = DATA, *, servers_first: bool = False) -> None:
        """One that has this to say both ways, and ends well.

        :param servers_first: it is the server whose end of data comes first.
        """
        client = self.client()
        server = await self.accepted()
        ways = [(client, server), (server, client)]
        for near, far in ways[::-1] if servers_first else ways:
            rest = memoryview(data)

            def sent(near: Peer = near, far: Peer = far) -> bool:
                nonlocal rest
                far.take()
                try:
                    rest = rest[near.socket.send(rest) :]
                except BlockingIOError:
                    return False
                return not rest

            await until(sent, "all is sent")
            near.end()
            assert await far.read_all() == data
        client.socket.close()
        server.socket.close()
        [session] = self.witness.sessions
        await until(lambda: session.ended_at is not None, "the end of the session")
        assert session.ending is Ending.DONE
        assert session.up.read == session.down.read == len(data)


@asynccontextmanager
async def relaying(kind: str, made: Any = RelayFactory) -> AsyncIterator[Relay]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        relay = Relay(kind, server, made)
        relay.port = await relay.endpoint.listen(relay.factory)
        try:
            yield relay
        finally:
            await relay.port.stopListening()
            await relay.factory.drain(0)
            await turns()


def with_protocol(made: Any) -> Hook:
    """A relay whose clients' protocols are made in this way."""

    def factory(*args: Any, **options: Any) -> RelayFactory:
        relay = RelayFactory(*args, **options)
        relay.protocol = made
        return relay

    return factory


def with_objects(name: str, heard: list[Any], *, servers: bool) -> Hook:
    """A relay that puts its method on each object that our classes have made.

    :param servers: on the server's leg, or else on the client's.
    """

    class Placing(RelayProtocol):
        @staticmethod
        def upstream_leg(direction: Any) -> UpstreamLeg:  # type: ignore[override]
            leg = UpstreamLeg(direction)
            setattr(leg, name, spying(name, heard, getattr(leg, name)))
            return leg

    class Factory(RelayFactory):
        def buildProtocol(self, addr: Any) -> Any:
            made = super().buildProtocol(addr)
            setattr(made, name, spying(name, heard, getattr(made, name)))
            return made

    return with_protocol(Placing) if servers else Factory


#: What a leg is told of: in which session, and how often at least and at most.  After a
#: small one both connections may be closed in one call; a large one may be spliced.
TOLD = {
    "makeConnection": (b"hello", 1, 1),
    "connectionMade": (b"hello", 1, 1),
    "dataReceived": (DATA, 2, 1000),
    "readConnectionLost": (DATA, 1, 1),
    "writeConnectionLost": (DATA, 1, 1),
    "connectionLost": (b"hello", 1, 1),
}


def was_told(name: str, heard: list[Any]) -> bool:
    _, least, most = TOLD[name]
    return least <= len(heard) <= most


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", TOLD)
@pytest_twisted.ensureDeferred
async def test_a_protocol_with_a_method_of_its_own_is_told(
    name: str, how: Any, kind: str
) -> None:
    heard: list[Any] = []
    made = with_protocol(how(RelayProtocol, name, heard))
    async with relaying(kind, made) as relay:
        # A write side is shut alone behind the other end's end only.
        shut = name == "writeConnectionLost"
        await relay.session(TOLD[name][0], servers_first=shut)
    assert was_told(name, heard)


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("servers", [False, True])
@pytest.mark.parametrize("name", TOLD)
@pytest_twisted.ensureDeferred
async def test_an_object_with_a_method_of_its_own_is_told(
    name: str, servers: bool, kind: str
) -> None:
    """Either leg: one that our own classes have made."""
    heard: list[Any] = []
    shut = name == "writeConnectionLost"
    async with relaying(kind, with_objects(name, heard, servers=servers)) as relay:
        await relay.session(TOLD[name][0], servers_first=shut and not servers)
    assert was_told(name, heard)


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("how", HOW[:3])
@pytest_twisted.ensureDeferred
async def test_a_factory_that_checks_its_clients_sees_each(how: Any, kind: str) -> None:
    """And turns one away: nothing is dialled for it."""
    seen: list[Any] = []

    def admits(*args: Any) -> Any:
        seen.append(args[-1])
        return None

    made = how(RelayFactory, "buildProtocol", [])
    if how is as_it_is_made:

        def factory(*args: Any, **options: Any) -> Any:
            relay = made(*args, **options)
            relay.buildProtocol = admits
            return relay

    else:
        # Where it is found, whichever class that is.
        owner = made.__mro__[how is by_a_mixin]
        assert "buildProtocol" in vars(owner)
        owner.buildProtocol = admits
        factory = made
    async with relaying(kind, factory) as relay:
        for number in (1, 2):
            client = relay.client()
            address, port = client.socket.getsockname()
            await until(lambda number=number: len(seen) == number)
            assert (seen[-1].host, seen[-1].port) == (address, port)
            await until(client.take, "the end of a connection")
            client.socket.close()
        assert not relay.witness.sessions


@pytest.mark.skipif("plane" not in TRANSPORTS, reason="Linux's")
@pytest_twisted.ensureDeferred
async def test_a_factory_may_get_its_method_while_it_listens_elsewhere() -> None:
    """What a listener does is decided as it opens."""
    async with relaying("plane") as relay:
        await relay.session()
        seen: list[Any] = []
        relay.factory.buildProtocol = seen.append
        another = await relay.endpoint.listen(relay.factory)
        peer = Peer(socket.create_connection(("127.0.0.1", another.getHost().port)))
        await until(peer.take, "the end of a connection")
        assert [each.port for each in seen] == [peer.socket.getsockname()[1]]
        peer.socket.close()
        await another.stopListening()


@pytest.mark.cost
@pytest.mark.skipif("plane" not in TRANSPORTS, reason="Linux's")
@pytest.mark.parametrize("how", [None, in_a_subclass, as_it_is_made])
@pytest_twisted.ensureDeferred
async def test_what_needs_no_method_of_a_leg_goes_past_it(
    how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of cost.

    Our own legs, and those of a class that only decides something else.
    """
    closed: list[bool] = []
    really = PlaneTransport.close_both

    def close_both(transport: Any, *protocols: Any) -> bool:
        closed.append(really(transport, *protocols))
        return closed[-1]

    monkeypatch.setattr(PlaneTransport, "close_both", close_both)
    made: Any = RelayFactory
    if how is not None:
        made = with_protocol(how(RelayProtocol, "decide", []))
    async with relaying("plane", made) as relay:
        client = relay.client()
        server = await relay.accepted()
        for near, far in ((client, server), (server, client)):
            await near.send(b"hello")
            assert await far.read(5) == b"hello"
            near.end()
            await far.read_all()
        client.socket.close()
        server.socket.close()
        [session] = relay.witness.sessions
        await until(lambda: session.ended_at is not None)
    assert closed == [True]
    assert Plane.of(reactor).fileno() == -1


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest_twisted.ensureDeferred
async def test_a_protocol_that_fails_as_it_is_connected_costs_itself(
    kind: str, logged_failures: Any
) -> None:
    class Failing(RelayProtocol):
        def connectionMade(self) -> None:
            raise ZeroDivisionError

    async with relaying(kind, with_protocol(Failing)) as relay:
        client = relay.client()
        with pytest.raises(ConnectionError):
            await until(client.take, "the end of a connection")
        client.socket.close()
        logged_failures.take("could not be opened")
        relay.factory.protocol = RelayProtocol
        await relay.session()


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("servers", [False, True])
@pytest_twisted.ensureDeferred
async def test_an_override_that_raises_before_it_tells_of_a_loss_keeps_no_session(
    servers: bool, kind: str, logged_failures: LoggedFailures
) -> None:
    """Either leg's: the session ends as any other, it is logged, and a drain ends."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("lost, and not told")

    class Failing(RelayProtocol):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if not servers:
                self.connectionLost = fail  # type: ignore[method-assign]

        @staticmethod
        def upstream_leg(direction: Any) -> UpstreamLeg:  # type: ignore[override]
            leg = UpstreamLeg(direction)
            if servers:
                leg.connectionLost = fail  # type: ignore[method-assign]
            return leg

    async with relaying(kind, with_protocol(Failing)) as relay:
        await relay.session(b"hello")
        logged_failures.take("connectionLost of")
        assert not relay.factory.sessions
        drained: list[Any] = []
        relay.factory.drain(60).addCallback(drained.append)
        assert drained == [None]
