"""Circles over real sockets, with relays in one process, on both transports.

What an operator can write down is refused at start (`tests/operating/test_cycles.py`);
what is left are names, programs that embed relays, and the clients of proxies.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    UNIXServerEndpoint,
)
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory

from relayd.core.hops import datagrams, streams
from relayd.core.observers import Observer
from relayd.core.session import Session
from relayd.datagrams.endpoint import UdpListener
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import Dialer, NameEndpoint
from relayd.net.listening import TCPListenerEndpoint, UNIXListenerEndpoint
from relayd.net.resolving import Resolver
from relayd.net.transports import reset_on_close
from relayd.operating.endpoints import watcher
from relayd.plane.endpoints import (
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from relayd.preludes.socks4 import Command, write_request
from relayd.socks.destinations import ProxyPolicy
from relayd.socks4 import Socks4Factory
from relayd.stream.factory import StreamFactory
from relayd.tcp import RelayFactory
from relayd.udp_nat import Server, UdpNat
from relayd.upstreams.pool import Pool
from tests.conftest import pause
from tests.support.contracts import Recorder, until

DGRAM = socket.SOCK_DGRAM

KINDS = {
    "plane": (PlaneTCPListenerEndpoint, PlaneSocketEndpoint),
    "twisted": (TCPListenerEndpoint, SocketEndpoint),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """What listens, and what dials."""
    return KINDS[request.param]


class Endings(Observer):
    """Wants no log; the factory counts how its sessions end."""


async def listen(kind: Any, host: str | None, port: int, factory: Any) -> Any:
    """Open a listener."""
    port_: IListeningPort = await kind[0](reactor, host, port, 128).listen(factory)
    return port_


async def say(kind: Any, host: str, port: int, data: bytes) -> Recorder:
    """Connect, say something, and wait until the connection is over."""
    protocol = Recorder()
    factory: Any = Factory.forProtocol(lambda: protocol)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = (host, port, 0, 0) if ":" in host else (host, port)
    await kind[1](reactor, family, address).connect(factory)
    protocol.transport.write(data)
    await until(lambda: "lost" in protocol.events or "eof" in protocol.events)
    protocol.transport.abortConnection()
    await until(lambda: "lost" in protocol.events)
    return protocol


async def over(*factories: StreamFactory) -> None:
    """Wait until no session of these lives, and no hop is noted."""
    for factory in factories:
        await until(lambda factory=factory: not factory.sessions)
    assert not streams.hops


def relay_to(kind: Any, host: str = "", port: int = 0) -> RelayFactory:
    """A relay; where it leads to may be said once its own port is known."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = (host, port, 0, 0) if ":" in host else (host or "127.0.0.1", port)
    return RelayFactory(kind[1](reactor, family, address), observer=Endings())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("wildcard", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_relay_to_itself(
    kind: tuple[Any, Any], host: str, wildcard: bool
) -> None:
    """Ends after a round or two; the client sees its connection end."""
    relay = relay_to(kind)
    opened = await listen(kind, None if wildcard else host, 0, relay)
    port = opened.getHost().port
    relay.pool = relay_to(kind, host, port).pool
    await say(kind, host, port, b"round and round")
    await opened.stopListening()
    await over(relay)
    assert relay.endings["loop"] == 1
    assert sum(relay.endings.values()) <= 4, relay.endings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::ffff:127.0.0.1", "127.0.0.2"])
@pytest_twisted.ensureDeferred
async def test_a_relay_to_itself_in_other_words(
    kind: tuple[Any, Any], host: str
) -> None:
    """The two ends of a connection may have been told of different addresses."""
    relay = relay_to(kind)
    opened = await listen(kind, None, 0, relay)
    port = opened.getHost().port
    relay.pool = relay_to(kind, host, port).pool
    await say(kind, "127.0.0.1", port, b"round and round")
    await opened.stopListening()
    await over(relay)
    assert relay.endings["loop"] == 1
    assert relay.endings.total() == 2, relay.endings


def found_at(*hosts: str) -> Resolver:
    """Any name has these addresses."""
    found = [
        (
            socket.AF_INET6 if ":" in host else socket.AF_INET,
            socket.SOCK_STREAM,
            6,
            "",
            (host, 0, 0, 0) if ":" in host else (host, 0),
        )
        for host in hosts
    ]
    return Resolver(reactor, lambda host: found)


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("named", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_relay_to_itself_by_an_address_that_is_no_loopback(
    kind: tuple[Any, Any], named: bool
) -> None:
    """The connection is accepted before it is known to stand."""
    relay = relay_to(kind)
    opened = await listen(kind, None, 0, relay)
    port = opened.getHost().port
    relay.pool = relay_to(kind, "127.0.0.1", port).pool
    if named:
        resolver = found_at("127.0.0.1", "::1")
        relay.pool = Pool.of(NameEndpoint(reactor, "a.name", port, resolver, kind[1]))
    for number in range(1, 11):
        await say(kind, "127.0.0.1", port, b"round and round")
        assert relay.endings["loop"] == number
    await opened.stopListening()
    await over(relay)
    assert relay.endings.total() == 20, relay.endings


@pytest.mark.usefixtures("far")
@pytest_twisted.ensureDeferred
async def test_clients_of_a_ring_that_are_gone_at_once(kind: tuple[Any, Any]) -> None:
    """What they have set going comes to an end."""
    relays = [relay_to(kind) for _ in range(2)]
    opened = [await listen(kind, "127.0.0.1", 0, relay) for relay in relays]
    ports = [port.getHost().port for port in opened]
    for relay, there in zip(relays, reversed(ports), strict=True):
        relay.pool = relay_to(kind, "127.0.0.1", there).pool
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", ports[0])) as client:
            reset_on_close(client)
    await until(lambda: sum(relays[0].endings.values()) >= 10)
    await over(*relays)
    await pause(0.1)
    await over(*relays)
    for each in opened:
        await each.stopListening()
    made = [relay.endings.total() for relay in relays]
    assert made[0] <= 20, made
    assert made[1] <= 10, made


@pytest_twisted.ensureDeferred
async def test_a_relay_to_a_name_that_is_itself(kind: tuple[Any, Any]) -> None:
    """Nobody knows where the name leads until it is looked up."""
    resolver = found_at("127.0.0.1")
    relay = relay_to(kind)
    opened = await listen(kind, "127.0.0.1", 0, relay)
    port = opened.getHost().port
    relay.pool = Pool.of(NameEndpoint(reactor, "a.name", port, resolver, kind[1]))
    await say(kind, "127.0.0.1", port, b"who is it?")
    await opened.stopListening()
    await over(relay)
    assert relay.endings["loop"] == 1


def unix_listener(kind: tuple[Any, Any], path: str) -> Any:
    """Ours, on the transport that is tried."""
    ours = {
        PlaneTCPListenerEndpoint: PlaneUNIXListenerEndpoint,
        TCPListenerEndpoint: UNIXListenerEndpoint,
    }
    return ours[kind[0]](reactor, path, 128)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names for this")
@pytest.mark.parametrize("foreign", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_ring_through_a_unix_socket(
    kind: tuple[Any, Any], tmp_socket: Path, foreign: bool
) -> None:
    """Its clients have no names, but for those of the process that listens."""
    heard: list[str] = []

    class Clients(Observer):
        def opened(self, session: Session) -> None:
            heard.append(session.client)

    path = str(tmp_socket)
    first = relay_to(kind)
    first.pool = Pool.of(kind[1](reactor, socket.AF_UNIX, path))
    tcp = await listen(kind, "127.0.0.1", 0, first)
    port = tcp.getHost().port
    resolver = found_at("127.0.0.1")
    back = NameEndpoint(reactor, "a.name", port, resolver, kind[1])
    second = RelayFactory(back, observer=Clients())
    unix = await (
        UNIXServerEndpoint(reactor, path) if foreign else unix_listener(kind, path)
    ).listen(second)
    for _ in range(3):
        await say(kind, "127.0.0.1", port, b"round")
    for each in (tcp, unix):
        await each.stopListening()
    await over(first, second)
    assert first.endings["loop"] + second.endings["loop"] == 3
    # A foreign listener is known by its first client: one round more.
    assert [first.endings.total(), second.endings.total()] == [6, 3 + foreign]
    for client in heard[-2:]:
        assert client.startswith(r"unix:\x00relayd-")
        assert client.isprintable()
    if not foreign:
        assert not streams.files


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names for this")
@pytest_twisted.ensureDeferred
async def test_a_unix_socket_to_itself(kind: tuple[Any, Any], tmp_socket: Path) -> None:
    path, link = str(tmp_socket), tmp_socket.with_name("link")
    link.symlink_to(tmp_socket)
    relay = RelayFactory(
        kind[1](reactor, socket.AF_UNIX, str(link)), observer=Endings()
    )
    opened = await unix_listener(kind, path).listen(relay)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        await until(lambda: relay.endings["loop"])
    await opened.stopListening()
    await over(relay)
    assert relay.endings["loop"] == 1
    assert next(relay.ordinals) == 1, "the second was turned away"


@pytest_twisted.ensureDeferred
async def test_other_clients_of_unix_sockets_have_no_names(
    kind: tuple[Any, Any], tmp_socket: Path
) -> None:
    """A UNIX socket of another process is dialled as ever."""
    server = tmp_socket.with_name("server")
    relay = RelayFactory(
        kind[1](reactor, socket.AF_UNIX, str(server)), observer=Endings()
    )
    opened = await unix_listener(kind, str(tmp_socket)).listen(relay)
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.bind(str(server))
        listener.listen()
        client.connect(str(tmp_socket))
        await until(lambda: any(each.bridge for each in relay.sessions.values()))
        accepted, name = listener.accept()
        accepted.close()
        assert not name
        assert not streams.hops
    await opened.stopListening()
    await over(relay)


@pytest_twisted.ensureDeferred
async def test_a_ring_of_three(kind: tuple[Any, Any]) -> None:
    relays = [relay_to(kind) for _ in range(3)]
    opened = [await listen(kind, "127.0.0.1", 0, relay) for relay in relays]
    ports = [port.getHost().port for port in opened]
    for relay, there in zip(relays, (*ports[1:], ports[0]), strict=True):
        relay.pool = relay_to(kind, "127.0.0.1", there).pool
    await say(kind, "127.0.0.1", ports[0], b"hello")
    for each in opened:
        await each.stopListening()
    await over(*relays)
    assert [relay.endings["loop"] for relay in relays] == [1, 0, 0]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("foreign", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_ring_by_endpoints_that_tell_late(
    kind: tuple[Any, Any], count: int, foreign: bool
) -> None:
    """Twisted's tell of a connection when the next relay has accepted it."""
    relays = [relay_to(kind) for _ in range(count)]
    opened: list[Any] = []
    for relay in relays:
        if foreign:
            here = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
            opened.append(await here.listen(relay))
        else:
            opened.append(await listen(kind, "127.0.0.1", 0, relay))
    ports = [port.getHost().port for port in opened]
    for relay, there in zip(relays, (*ports[1:], ports[0]), strict=True):
        relay.pool = Pool.of(TCP4ClientEndpoint(reactor, "127.0.0.1", there))
    client = socket.create_connection(("127.0.0.1", ports[0]))
    await until(lambda: sum(relay.endings["loop"] for relay in relays) > 0)
    await pause(0.1)
    ended = [dict(relay.endings) for relay in relays]
    assert sum(sum(each.values()) for each in ended) <= 6 * count, ended
    # Nothing goes on.
    await pause(0.1)
    assert [dict(relay.endings) for relay in relays] == ended
    assert sum(len(relay.sessions) for relay in relays) <= 3 * count
    client.close()
    for each in opened:
        await each.stopListening()
    await over(*relays)


def proxy(kind: tuple[Any, Any]) -> Socks4Factory:
    """One that lets its clients go to this machine."""
    return Socks4Factory(
        reactor,
        dialer=Dialer(reactor, kind[1]),
        policy=ProxyPolicy(guarded=False),
        observer=Endings(),
    )


@pytest_twisted.ensureDeferred
async def test_a_proxy_that_is_asked_for_itself(kind: tuple[Any, Any]) -> None:
    """Is one refused session, by address or by name; others go on."""
    socks = proxy(kind)
    opened = await listen(kind, "127.0.0.1", 0, socks)
    port = opened.getHost().port
    for host in ("127.0.0.1", "localhost"):
        await say(kind, "127.0.0.1", port, write_request(Command.CONNECT, host, port))
        await over(socks)
    assert socks.endings["loop"] == 2
    await opened.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_relay_to_a_proxy_of_the_same_process(kind: tuple[Any, Any]) -> None:
    """Is a chain that ends, and goes on to end."""
    site: Any = Factory.forProtocol(Recorder)
    site_port = await listen(kind, "127.0.0.1", 0, site)
    where = site_port.getHost().port
    socks = proxy(kind)
    socks_port = await listen(kind, "127.0.0.1", 0, socks)
    relay = RelayFactory(
        kind[1](reactor, socket.AF_INET, ("127.0.0.1", socks_port.getHost().port)),
        observer=Endings(),
    )
    opened = await listen(kind, "127.0.0.1", 0, relay)
    for _ in range(3):
        protocol = Recorder()
        factory: Any = Factory.forProtocol(lambda protocol=protocol: protocol)
        await kind[1](
            reactor, socket.AF_INET, ("127.0.0.1", opened.getHost().port)
        ).connect(factory)
        protocol.transport.write(write_request(Command.CONNECT, "127.0.0.1", where))
        await until(lambda protocol=protocol: protocol.data)
        assert protocol.data[:2] == b"\0\x5a"
        protocol.transport.abortConnection()
        await until(lambda protocol=protocol: "lost" in protocol.events)
    for each in (opened, socks_port, site_port):
        await each.stopListening()
    await over(relay, socks)
    assert not relay.endings["loop"]
    assert not socks.endings["loop"]


class Datagrams:
    """Relays of datagrams in this process, each on a port of its own.

    :param transport: who watches their sockets.
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.nats: list[UdpNat] = []

    async def listen(self, host: str | None = "127.0.0.1", **options: Any) -> int:
        """Open another; its port.  Where it leads to is said later."""
        nat = UdpNat(
            reactor,
            [Server("127.0.0.1", 9)],
            watcher=watcher(reactor, self.transport),
            **options,
        )
        opened: Any = await UdpListener(host, 0).listen(nat)
        self.nats.append(nat)
        port: int = opened.getHost().port
        return port

    def lead(self, number: int, host: str, port: int) -> None:
        """Say where one leads to."""
        self.nats[number].servers = [Server(host, port)]

    def dropped(self, reason: str) -> int:
        """How many datagrams all of them have dropped for that."""
        return sum(nat.counters.dropped[reason] for nat in self.nats)

    @property
    def flows(self) -> int:
        """How many live."""
        return sum(len(nat.table) for nat in self.nats)

    def close(self) -> None:
        """Close them all."""
        for nat in self.nats:
            nat.close()
        assert not datagrams.hops
        assert not datagrams.ports


@pytest.fixture(params=["plane", "twisted"])
def udp(request: pytest.FixtureRequest) -> Iterator[Datagrams]:
    """Relays of datagrams."""
    relays = Datagrams(request.param)
    yield relays
    relays.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("wildcard", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_relay_of_datagrams_to_itself(
    udp: Datagrams, host: str, wildcard: bool
) -> None:
    """Has the client's flow, and drops what comes round."""
    port = await udp.listen(None if wildcard else host)
    udp.lead(0, host, port)
    with socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, DGRAM
    ) as client:
        for number in (1, 2, 3):
            client.sendto(b"round", (host, port))
            await until(lambda number=number: udp.dropped("loop") == number)
    assert udp.flows == 1


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("there", ["::ffff:127.0.0.1", "0.0.0.0", "::"])
@pytest_twisted.ensureDeferred
async def test_a_relay_of_datagrams_to_itself_by_another_spelling(
    udp: Datagrams, monkeypatch: pytest.MonkeyPatch, there: str, told: bool
) -> None:
    """Of an address; and where the kernel does not say what was spoken to."""
    if not told:
        refused = OSError(errno.EPERM, "Operation not permitted")
        monkeypatch.setattr(
            "relayd.datagrams.listener.ask_for_local_address", lambda _: refused
        )
    port = await udp.listen(None)
    server = Server("name.example", port)
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    where: Any = (there, port, 0, 0) if ":" in there else (there, port)
    server.address, server.addresses = (family, where), [(family, where)]
    # Whose addresses are known already.
    udp.nats[0].pool.stop()
    udp.nats[0].servers = [server]
    with socket.socket(socket.AF_INET, DGRAM) as client:
        for number in (1, 2, 3):
            client.sendto(b"round", ("127.0.0.1", port))
            await until(lambda number=number: udp.dropped("loop") == number)
    assert udp.flows == 1


@pytest_twisted.ensureDeferred
async def test_a_ring_of_relays_of_datagrams(udp: Datagrams) -> None:
    ports = [await udp.listen() for _ in range(3)]
    for number in range(3):
        udp.lead(number, "127.0.0.1", ports[(number + 1) % 3])
    with socket.socket(socket.AF_INET, DGRAM) as client:
        client.sendto(b"round", ("127.0.0.1", ports[0]))
        await until(lambda: udp.dropped("loop") == 1)
        client.sendto(b"and round", ("127.0.0.1", ports[0]))
        await until(lambda: udp.dropped("loop") == 2)
    assert udp.flows == 3


@pytest_twisted.ensureDeferred
async def test_a_chain_of_relays_of_datagrams(udp: Datagrams) -> None:
    """Ends, and is answered."""
    ports = [await udp.listen() for _ in range(2)]
    udp.lead(0, "127.0.0.1", ports[1])
    with (
        socket.socket(socket.AF_INET, DGRAM) as client,
        socket.socket(socket.AF_INET, DGRAM) as server,
    ):
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        client.setblocking(False)
        udp.lead(1, *server.getsockname())
        for _ in range(3):
            client.sendto(b"?", ("127.0.0.1", ports[0]))
            _, there = await received(server)
            server.sendto(b"!", there)
            assert (await received(client))[0] == b"!"
    assert udp.flows == 2
    assert not udp.dropped("loop")
    udp.nats[0].abort_all()
    assert not datagrams.hops


@pytest.mark.parametrize("wildcard", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_source_that_is_another_relays_listener(
    udp: Datagrams, wildcard: bool
) -> None:
    """What is forged so would be answered to that relay, and relayed on for ever."""
    one, two = await udp.listen(), await udp.listen(None if wildcard else "127.0.0.1")
    for number, nat in enumerate(udp.nats):
        assert nat.loops.leads_back(("127.0.0.1", one)), number
        assert nat.loops.leads_back(("127.0.0.1", two)), number
        assert nat.loops.leads_back(("127.0.0.2", two)) == wildcard
        assert not nat.loops.leads_back(("127.0.0.2", one))
        assert not nat.loops.leads_back(("192.0.2.7", two))
    udp.nats[1].close()
    assert not udp.nats[0].loops.leads_back(("127.0.0.1", two))


async def received(sock: socket.socket) -> tuple[bytes, Any]:
    """The next datagram, and where from."""
    got: list[tuple[bytes, Any]] = []

    def arrived() -> bool:
        with suppress(BlockingIOError):
            got.append(sock.recvfrom(100))
        return bool(got)

    await until(arrived)
    return got[0]
