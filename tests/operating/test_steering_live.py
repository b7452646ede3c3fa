"""What is told of, and done to, sessions and flows over real sockets, of each kind."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.control.schemas import SCHEMAS
from relayd.control.steering import FlowQuery, SessionQuery
from relayd.core.addresses import socket_name
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.net.dialing import SocketEndpoint
from relayd.net.listening import TCPListenerEndpoint
from relayd.operating.killing import kill
from relayd.operating.limits_listing import Process, limits
from relayd.operating.listing import Shown, sessions
from relayd.operating.listing_flows import flows, nat
from relayd.operating.listing_servers import servers
from relayd.operating.server_words import ServerWords
from relayd.tcp import RelayFactory
from relayd.udp_nat import FlowServer, UdpNat
from relayd.udp_nat import Server as Where
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.support.contracts import turns, until
from tests.support.process import TRANSPORTS
from tests.support.shown import whole

if "plane" in TRANSPORTS:
    from relayd.plane.endpoints import PlaneSocketEndpoint, PlaneTCPListenerEndpoint

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def fits(answer: Any, schema: str) -> Any:
    """An answer that is as its description says."""
    jsonschema.validate(
        answer,
        {
            "$ref": f"#/components/schemas/{schema}",
            "components": {"schemas": SCHEMAS},
        },
    )
    return answer


class Witness(Observer):
    """Keeps how sessions have ended."""

    def __init__(self) -> None:
        self.ended: list[Session] = []

    def closed(self, session: Session) -> None:
        self.ended.append(session)


class Relay:
    """A relay in this process to a listening socket."""

    def __init__(self, kind: str, server: socket.socket, **options: Any) -> None:
        plane = kind == "plane"
        dials: Any = PlaneSocketEndpoint if plane else SocketEndpoint
        listens: Any = PlaneTCPListenerEndpoint if plane else TCPListenerEndpoint
        there = dials(reactor, socket.AF_INET, server.getsockname())
        self.there, self.witness = server, Witness()
        name = socket_name(server.getsockname())
        self.server = Server(there, f"a/{name}", label="a")
        clock: Any = reactor
        self.factory = RelayFactory(
            Pool([self.server]),
            clock=clock,
            observer=self.witness,
            name="web",
            **options,
        )
        self.endpoint = listens(reactor, "127.0.0.1", 0, 64)
        self.port: Any = None
        self.sockets: list[socket.socket] = []

    @property
    def shown(self) -> Shown:
        return Shown("web", "tcp", [self.factory], pools=[self.factory.pool])

    async def session(self, said: bytes = b"") -> tuple[socket.socket, socket.socket]:
        """One that is relayed: the client's end, and the server's."""
        before = len(self.factory.registry)
        client = socket.create_connection(("127.0.0.1", self.port.getHost().port))
        client.sendall(said)

        def relayed() -> bool:
            living = self.factory.registry.living()
            return len(living) > before and all(each.bridge for each in living)

        await until(relayed, "a session")
        server, _ = self.there.accept()
        self.sockets += (client, server)
        return client, server


@asynccontextmanager
async def relaying(kind: str, **options: Any) -> AsyncIterator[Relay]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        relay = Relay(kind, server, **options)
        relay.port = await relay.endpoint.listen(relay.factory)
        try:
            yield relay
        finally:
            for each in relay.sockets:
                each.close()
            await relay.port.stopListening()
            await relay.factory.drain(0)
            await turns()


def was_reset(sock: socket.socket) -> bool:
    sock.settimeout(5)
    try:
        return bool(sock.recv(10)) and was_reset(sock)
    except ConnectionResetError:
        return True


def arrived(sock: socket.socket, into: list[bytes]) -> bool:
    """Whether something has; it is put `into`."""
    try:
        into.append(sock.recv(10))
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest_twisted.ensureDeferred
async def test_the_table_has_the_relays_own_port(kind: str) -> None:
    async with relaying(kind) as relay:
        client, server = await relay.session(b"hello")
        [living] = relay.factory.registry.living()
        await until(lambda: living.session.up.read == 5, "what it says")
        [told] = fits(whole(nat([relay.shown], FlowQuery())), "Nat")["entries"]
        assert told["client"] == socket_name(client.getsockname())
        assert told["listener"] == socket_name(client.getpeername())
        assert told["port"] == socket_name(server.getpeername())
        assert told["server"] == "a/" + socket_name(server.getsockname())
        assert told["bytes_up"] == 5
        found = fits(
            whole(sessions([relay.shown], SessionQuery(server="a"))), "Sessions"
        )
        assert found["sessions"][0]["stage"] == "relaying"
        process = Process(reactor=reactor)
        fits(whole(limits([relay.shown], process)), "Limits")
        [told] = fits(whole(servers([relay.shown])), "Servers")["servers"]
        assert told["sessions"] == 1
        assert told["address"] == socket_name(server.getsockname())


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest_twisted.ensureDeferred
async def test_who_is_killed_sees_a_reset(kind: str) -> None:
    async with relaying(kind) as relay:
        both = [await relay.session() for _ in range(2)]
        first = min(relay.factory.sessions)
        assert whole(kill([relay.shown], sessions=[first])) == {"killed": 1}
        await until(lambda: relay.witness.ended, "its end")
        assert [each.ending for each in relay.witness.ended] == [Ending.KILLED]
        assert all(was_reset(each) for each in both[0])
        # The other goes on.
        client, server = both[1]
        client.sendall(b"on")
        server.setblocking(False)
        heard: list[bytes] = []
        await until(lambda: arrived(server, heard), "what the other says")
        assert heard == [b"on"]


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest_twisted.ensureDeferred
async def test_a_server_is_taken_out_and_back(kind: str) -> None:
    async with relaying(kind, cut=True) as relay:
        words = ServerWords(relay.factory.clock, lambda name: relay.shown)
        kept = await relay.session()
        words.say(relay.shown, "a", "drain", None)
        with socket.create_connection(
            ("127.0.0.1", relay.port.getHost().port)
        ) as refused:
            await until(lambda: relay.witness.ended, "its end")
            assert relay.witness.ended[0].ending is Ending.NO_UPSTREAM
            refused.settimeout(5)
            assert refused.recv(1) == b""
        assert len(relay.factory.registry) == 1
        words.say(relay.shown, "a", "down", None)
        await until(lambda: len(relay.witness.ended) == 2, "the end of the other")
        assert relay.witness.ended[1].ending is Ending.UPSTREAM_DOWN
        assert was_reset(kept[0])
        words.say(relay.shown, "a", None, None)
        await relay.session()
        words.stop()


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest_twisted.ensureDeferred
async def test_a_list_is_made_while_sessions_come_and_go(kind: str) -> None:
    async with relaying(kind) as relay:
        for _ in range(20):
            await relay.session(b"hello")
        ids = set(relay.factory.sessions)
        work = nat([relay.shown], FlowQuery(sort="bytes"))
        next(work)
        for each in relay.sockets[:10]:
            each.close()
        await until(lambda: len(relay.witness.ended) == 5, "the ends of five")
        await relay.session()
        answer = fits(whole(work), "Nat")
        assert len(answer["entries"]) == 15
        assert ids - set(relay.factory.sessions) == {
            each.id for each in relay.witness.ended
        }


def _bound() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


class Endings:
    """Hears how flows end."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def ended(self, flow: Any, facts: Any) -> None:
        self.words.append(facts.ending)

    def closed(self, *_: object) -> None:
        """Not of interest."""


@pytest_twisted.ensureDeferred
async def test_flows_are_told_and_killed_and_leave_a_server() -> None:
    there = [_bound() for _ in range(2)]
    pool = Pool(
        [
            FlowServer.at(Where(*each.getsockname()), label=label)
            for each, label in zip(there, "ab", strict=True)
        ]
    )
    endings, listener = Endings(), _bound()
    relay = UdpNat(reactor, pool, observer=endings, name="dns")
    relay.listen([listener])
    own = Shown("dns", "udp", [relay], pools=[pool])
    words = ServerWords(relay.clock, lambda name: own)
    address, client = listener.getsockname(), _bound()
    words.say(own, "a", "down", None)
    try:
        client.sendto(b"asks", address)
        await until(lambda: len(relay.table), "a flow")
        [told] = fits(whole(flows([own], FlowQuery(server="b"))), "Flows")["flows"]
        data, port = there[1].recvfrom(10)
        assert (data, told["port"]) == (b"asks", socket_name(port))
        assert told["client"] == socket_name(client.getsockname())
        fits(whole(nat([own], FlowQuery())), "Nat")
        fits(whole(servers([own])), "Servers")
        fits(whole(limits([own], Process(reactor=reactor))), "Limits")
        assert whole(kill([own], server="b")) == {"killed": 1}
        assert endings.words == ["killed"]
        words.say(own, "b", "drain", None)
        words.say(own, "a", None, None)
        client.sendto(b"again", address)
        await until(lambda: len(relay.table), "another")
        assert there[0].recv(10) == b"again"
    finally:
        words.stop()
        await relay.drain(0)
        for each in (*there, client):
            each.close()
