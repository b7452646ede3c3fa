"""Dialling addresses, and what is special about the connections that come of it.

What every stream transport must do is in `tests/contracts.py`; here is what ours
do sooner than Twisted's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error, reactor
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IStreamClientEndpoint, IWriteDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import optionsForClientTLS
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from relayd.addresses import is_loopback
from relayd.bridge import unsent
from relayd.dialing import (
    HEAD_START,
    RETRY,
    NameEndpoint,
    SocketEndpoint,
    dial_first,
)
from relayd.resolving import Resolver
from relayd.transports import (
    PeerVanished,
    TCPConnection,
    UNIXConnection,
    connection_class,
)
from tests.conftest import descriptors, pause
from tests.contracts import Peer, Producer, Recorder, turns, until
from tests.process import PATIENCE, Server, read_all, read_exactly, reset
from tests.test_plane_poller import refuse

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


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


class Descriptors(Clock):
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


# -- dialling


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest_twisted.ensureDeferred
async def test_a_tcp_server_is_reached(family: int) -> None:
    """The Deferred has the factory's protocol, connected to the server."""
    with Server(family) as server:
        protocol = Recorder()
        assert await dial(server, protocol) is protocol
        transport = protocol.transport
        with server.accept() as peer:
            ours, theirs = transport.getHost(), transport.getPeer()
            assert (ours.host, ours.port) == peer.getpeername()[:2]
            assert (theirs.host, theirs.port) == server.socket.getsockname()[:2]
        assert type(transport) is TCPConnection
        assert transport.getTcpNoDelay()
        assert not transport.getTcpKeepAlive()
        await over(protocol)


@pytest_twisted.ensureDeferred
async def test_a_unix_server_is_reached(tmp_socket: Path) -> None:
    """At once: the kernel connects UNIX sockets without waiting."""
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        protocol = Recorder()
        dialing = dial(server, protocol)
        assert dialing.called
        assert await dialing is protocol
        assert type(protocol.transport) is UNIXConnection
        assert protocol.transport.getPeer() == UNIXAddress(str(tmp_socket))
        await over(protocol)


@pytest_twisted.ensureDeferred
async def test_the_factory_is_told_the_address_and_nothing_else() -> None:
    """It is neither started nor stopped for one connection."""
    told: list[Any] = []

    class Telling(Factory):
        def doStart(self) -> None:
            told.append("start")

        def doStop(self) -> None:
            told.append("stop")

        def buildProtocol(self, addr: Any) -> Any:
            told.append(addr)
            return protocol

    protocol = Recorder()
    with Server() as server:
        await endpoint(server).connect(Telling())
        assert told == [IPv4Address("TCP", *server.socket.getsockname())]
        await over(protocol)
    assert len(told) == 1


@pytest_twisted.ensureDeferred
async def test_a_closed_port_refuses() -> None:
    """As Twisted's own endpoints say it."""
    with Server() as server:
        address = server.socket.getsockname()
    dialing = SocketEndpoint(reactor, socket.AF_INET, address).connect(
        making(Recorder())
    )
    assert isinstance(await failed(dialing), error.ConnectionRefusedError)


@pytest_twisted.ensureDeferred
async def test_a_missing_unix_socket_is_named_by_its_errno(tmp_socket: Path) -> None:
    """And one that nobody listens on refuses."""
    where = SocketEndpoint(reactor, socket.AF_UNIX, str(tmp_socket))
    problem = await failed(where.connect(making(Recorder())))
    assert isinstance(problem, error.ConnectError)
    assert problem.osError == errno.ENOENT
    assert os.strerror(errno.ENOENT) in str(problem)
    with Server(socket.AF_UNIX, str(tmp_socket)):
        pass
    problem = await failed(where.connect(making(Recorder())))
    assert isinstance(problem, error.ConnectionRefusedError)


@pytest_twisted.ensureDeferred
async def test_a_full_unix_backlog_is_waited_for(tmp_socket: Path) -> None:
    """The server is busy, not gone: it gets the connection when it accepts again."""
    with full_unix_server(tmp_socket) as (server, _):
        protocol = Recorder()
        dialing = dial(server, protocol)
        await pause(2.5 * RETRY)
        assert not dialing.called
        server.accept().close()
        assert await dialing is protocol
        server.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                server.socket.accept()[0].close()
        await until(lambda: "eof" in protocol.events)
        await over(protocol)


def test_a_full_unix_backlog_is_tried_again_a_few_times_a_second(
    tmp_socket: Path,
) -> None:
    """Not in a busy loop; and a dial that is cancelled meanwhile leaves nothing."""
    clock = Descriptors()
    with full_unix_server(tmp_socket) as (server, _):
        before = descriptors()
        dialing = endpoint(server, clock).connect(making(Recorder()))
        for _ in range(3):
            assert [call.time for call in clock.getDelayedCalls()] == [
                clock.seconds() + RETRY
            ]
            clock.advance(RETRY)
        assert not dialing.called
        dialing.cancel()
        assert isinstance(problem_of(dialing), CancelledError)
        clock.advance(0)
        assert not clock.getDelayedCalls()
        assert descriptors() == before


def test_a_cancelled_dial_closes_its_socket() -> None:
    """The client has left: nothing waits, and the server's side is not kept open.

    But not before the next turn: the reactor may have an event for it at hand.
    """
    clock = Descriptors()
    with Server() as server:
        before = descriptors()
        dialing = endpoint(server, clock).connect(making(Recorder()))
        [descriptor] = clock.writers
        dialing.cancel()
        assert isinstance(problem_of(dialing), CancelledError)
        assert clock.writers == set()
        assert descriptor.fileno() != -1
        clock.advance(0)
        assert descriptors() == before
        with server.accept() as peer:
            assert read_all(peer) == b""


# -- loopback, where the kernel answers within the call


@pytest.fixture
def near(far: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on loopback are dialled as what they are."""
    monkeypatch.setattr("relayd.dialing.is_loopback", is_loopback)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_server_on_loopback_is_reached_at_once(near: None, family: int) -> None:
    """There is nothing to be watched."""
    clock, protocol = Descriptors(), Recorder()
    with Server(family) as server:
        dialing = endpoint(server, clock).connect(making(protocol))
        assert dialing.called
        assert not clock.writers
        with server.accept() as peer:
            protocol.transport.write(b"hello")
            protocol.transport.doWrite()
            assert read_exactly(peer, 5) == b"hello"
        protocol.transport.connectionLost(Failure(CONNECTION_DONE))


def test_a_closed_port_on_loopback_refuses_at_once(near: None) -> None:
    clock, before = Descriptors(), descriptors()
    with Server() as server:
        where = endpoint(server, clock)
    problem = problem_of(where.connect(making(Recorder())))
    assert isinstance(problem, error.ConnectionRefusedError)
    assert not clock.writers
    clock.advance(0)
    assert descriptors() == before


def test_a_server_on_loopback_with_a_full_backlog_is_waited_for(near: None) -> None:
    clock = Descriptors()
    with Server() as server:
        server.socket.listen(0)
        with socket.create_connection(server.socket.getsockname()):
            dialing = endpoint(server, clock).connect(making(Recorder()))
            assert not dialing.called
            assert len(clock.writers) == 1
            dialing.cancel()
            assert isinstance(problem_of(dialing), CancelledError)
            clock.advance(0)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
@pytest_twisted.ensureDeferred
async def test_no_socket_is_a_failed_dial(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session says why it failed; nothing is raised from `connect`."""
    where = SocketEndpoint(reactor, socket.AF_INET, ("127.0.0.1", 1))

    def none_left(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", none_left)
        dialing = where.connect(making(Recorder()))
    problem = await failed(dialing)
    assert isinstance(problem, error.ConnectError)
    assert problem.osError == number


def test_a_dial_that_the_reactor_ends_fails() -> None:
    """As the reactor stops, or where it reports a refused connect by itself."""
    clock = Descriptors()
    before = descriptors()
    with Server() as server:
        address = server.socket.getsockname()
        stopping = endpoint(server, clock).connect(making(Recorder()))
        [descriptor] = clock.writers
        assert descriptor.logPrefix() == "relayd dial"
        descriptor.connectionLost(Failure(CONNECTION_DONE))
    gone = SocketEndpoint(clock, socket.AF_INET, address).connect(making(Recorder()))
    [descriptor] = clock.writers
    descriptor.connectionLost(Failure(CONNECTION_DONE))
    assert clock.writers == set()
    problem = problem_of(stopping)
    assert type(problem) is error.ConnectError
    assert problem.osError == errno.ECONNABORTED
    assert type(problem_of(gone)) is error.ConnectionRefusedError
    clock.advance(0)
    assert descriptors() == before


@pytest.mark.parametrize("report", ["doWrite", "connectionLost"])
def test_what_a_server_said_before_it_reset_is_not_lost(report: str) -> None:
    """It answered and reset before the reactor looked: both are there to be read."""
    clock, protocol = Descriptors(), Recorder()
    with Server() as server:
        dialing = endpoint(server, clock).connect(making(protocol))
        with server.accept() as peer:
            peer.sendall(b"go away")
            reset(peer)
        [descriptor] = clock.writers
        if report == "doWrite":
            descriptor.doWrite()
        else:
            descriptor.connectionLost(Failure(CONNECTION_DONE))
        assert dialing.result is protocol
        [transport] = clock.readers
        assert transport.doRead() is None
        assert protocol.data == b"go away"
        lost = transport.doRead()
        assert isinstance(lost, error.ConnectionLost)
        transport.connectionLost(Failure(lost))


def test_a_server_that_only_resets_is_a_failed_dial() -> None:
    """With the errno that tells it from one that refuses."""
    clock = Descriptors()
    with Server() as server:
        dialing = endpoint(server, clock).connect(making(Recorder()))
        reset(server.accept())
        [descriptor] = clock.writers
        descriptor.doWrite()
        problem = problem_of(dialing)
        assert isinstance(problem, error.ConnectError)
        assert problem.osError == errno.ECONNRESET
        clock.advance(0)


def test_an_address_that_the_kernel_does_not_take_is_a_failed_dial() -> None:
    """And so is a reactor that can't watch another socket; neither is raised."""
    clock = Descriptors()
    before = descriptors()
    too_long = SocketEndpoint(clock, socket.AF_UNIX, "/" * 200)
    assert "too long" in str(problem_of(too_long.connect(making(Recorder()))))

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    clock.addWriter = full  # type: ignore[assignment]
    with Server() as server:
        problem = problem_of(endpoint(server, clock).connect(making(Recorder())))
        assert problem.errno == errno.ENOSPC
    assert descriptors() == before


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


@pytest.mark.parametrize(
    ("factory", "kind"),
    [
        (NoProtocol(), error.NoProtocol),
        (BrokenFactory(), ZeroDivisionError),
        (making(BrokenProtocol()), ZeroDivisionError),
    ],
    ids=["none", "factory", "protocol"],
)
def test_a_factory_that_fails_is_a_failed_dial(
    factory: Factory, kind: type[Exception]
) -> None:
    """The connection is closed, and the reactor watches nothing of it any more.

    Else it would take the next descriptor of that number for this one.
    """
    clock = Descriptors()
    with Server() as server:
        before = descriptors()
        dialing = endpoint(server, clock).connect(factory)
        with server.accept() as peer:
            [descriptor] = clock.writers
            descriptor.doWrite()
            clock.advance(0)
            assert type(problem_of(dialing)) is kind
            assert (clock.readers, clock.writers) == (set(), set())
            with suppress(ConnectionResetError):
                assert peer.recv(1) == b""
        assert descriptors() == before


# -- names


@contextmanager
def a_race(*servers: Server) -> Iterator[tuple[Descriptors, Recorder, Deferred[Any]]]:
    """A dial to several servers, on a reactor that stands still."""
    clock, protocol = Descriptors(), Recorder()
    before = descriptors()
    found = [(each.socket.family, each.socket.getsockname()) for each in servers]
    dialing = dial_first(clock, found, making(protocol))
    yield clock, protocol, dialing
    if protocol.transport is not None:
        protocol.transport.connectionLost(Failure(CONNECTION_DONE))
    clock.advance(0)
    assert not clock.getDelayedCalls()
    assert (clock.readers, clock.writers) == (set(), set())
    assert descriptors() == before


def test_the_first_address_that_answers_in_time_is_the_only_one() -> None:
    """The others are not dialled at all."""
    with Server() as first, Server() as second:
        with a_race(first, second) as (clock, protocol, dialing):
            [descriptor] = clock.writers
            descriptor.doWrite()
            assert dialing.result is protocol
            assert not clock.getDelayedCalls()
        second.socket.settimeout(0)
        with pytest.raises(BlockingIOError):
            second.accept()
        first.accept().close()


def test_an_address_that_does_not_answer_is_overtaken() -> None:
    """After a head start the next is tried as well; who connects first has won."""
    with Server() as slow, Server() as quick:
        with a_race(slow, quick) as (clock, protocol, dialing):
            [waiting] = clock.writers
            clock.advance(HEAD_START * 0.99)
            assert clock.writers == {waiting}
            clock.advance(HEAD_START * 0.02)
            [overtaking] = clock.writers - {waiting}
            overtaking.doWrite()
            assert dialing.result is protocol
            port = quick.socket.getsockname()[1]
            assert protocol.transport.getPeer().port == port
        with slow.accept() as left:
            assert read_all(left) == b""
        quick.accept().close()


def test_an_address_that_had_its_head_start_may_win_yet() -> None:
    """The later one is given up."""
    with Server() as first, Server() as second:
        with a_race(first, second) as (clock, protocol, dialing):
            [waiting] = clock.writers
            clock.advance(HEAD_START)
            waiting.doWrite()
            assert dialing.result is protocol
            port = first.socket.getsockname()[1]
            assert protocol.transport.getPeer().port == port
        with second.accept() as left:
            assert read_all(left) == b""
        first.accept().close()


def closed_server() -> Server:
    """One that refuses, though its address can still be asked for."""
    server = Server()
    name = server.socket.getsockname()
    server.close()
    refusing: Any = server
    refusing.socket = FakeName(name)
    return server


class FakeName:
    """A socket's name, without the socket."""

    family = socket.AF_INET

    def __init__(self, name: Any) -> None:
        self.getsockname = lambda: name


def test_an_address_that_refuses_gives_way_at_once() -> None:
    """No head start for one that has failed."""
    with (
        Server() as second,
        a_race(closed_server(), second) as (clock, protocol, dialing),
    ):
        [descriptor] = clock.writers
        descriptor.doWrite()
        [descriptor] = clock.writers
        assert not dialing.called
        descriptor.doWrite()
        assert dialing.result is protocol
        second.accept().close()


def test_an_address_that_fails_within_the_call_gives_way_as_well() -> None:
    """A link-local address without its interface is refused by the kernel itself."""
    bad: Any = (socket.AF_INET6, ("fe80::1", 9, 0, 0))
    clock, protocol = Descriptors(), Recorder()
    with Server() as server:
        good = (socket.AF_INET, server.socket.getsockname())
        dialing = dial_first(clock, [bad, bad, good], making(protocol))
        [descriptor] = clock.writers
        descriptor.doWrite()
        assert dialing.result is protocol
        protocol.transport.connectionLost(Failure(CONNECTION_DONE))
    problem = problem_of(dial_first(clock, [bad, bad], making(protocol)))
    assert problem.osError == errno.EINVAL
    clock.advance(0)
    assert not clock.getDelayedCalls()


def test_the_last_failure_is_the_dials() -> None:
    """When no address is left."""
    with a_race(closed_server(), closed_server()) as (clock, _, dialing):
        clock.advance(HEAD_START)
        for descriptor in list(clock.writers):
            assert not dialing.called
            descriptor.doWrite()
        assert type(problem_of(dialing)) is error.ConnectionRefusedError


def test_a_cancelled_dial_of_several_addresses_closes_them_all() -> None:
    """Those under way, and the timer of those to come."""
    with Server() as first, Server() as second, Server() as third:
        with a_race(first, second, third) as (clock, _, dialing):
            clock.advance(HEAD_START)
            assert len(clock.writers) == 2
            dialing.cancel()
            assert isinstance(problem_of(dialing), CancelledError)


@pytest_twisted.ensureDeferred
async def test_a_name_is_dialled_at_its_addresses() -> None:
    """They are looked up for this connection; the first here is nobody's."""
    asked: list[str] = []
    with Server() as server, Server() as closed:
        port = server.socket.getsockname()[1]
        closed.close()

        def look_up(host: str) -> list[Any]:
            asked.append(host)
            kind = (socket.SOCK_STREAM, 0, "")
            return [
                (socket.AF_INET6, *kind, ("::1", 0, 0, 0)),
                (socket.AF_INET, *kind, ("127.0.0.1", 0)),
            ]

        where = NameEndpoint(reactor, "db.example", port, Resolver(reactor, look_up))
        assert verifyObject(IStreamClientEndpoint, where)
        for _ in range(2):
            protocol: Any = await where.connect(making(Recorder()))
            assert protocol.transport.getPeer() == IPv4Address("TCP", "127.0.0.1", port)
            await over(protocol)
    assert asked == ["db.example", "db.example"]


@pytest_twisted.ensureDeferred
async def test_a_name_without_addresses_is_a_failed_look_up() -> None:
    """Named, with what the resolver said."""

    def look_up(host: str) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    where = NameEndpoint(reactor, "no.example", 80, Resolver(reactor, look_up))
    problem = await failed(where.connect(making(Recorder())))
    assert isinstance(problem, error.DNSLookupError)
    assert "no.example: Name or service not known" in str(problem)


# -- connections that need no turn of the reactor


@pytest_twisted.ensureDeferred
async def test_a_write_is_sent_at_once() -> None:
    """The peer has it before the reactor gets another turn."""
    async with connection() as (_, transport, peer):
        transport.write(b"")
        transport.write(b"now")
        assert read_exactly(peer, 3) == b"now"
        assert not unsent(transport)


@pytest_twisted.ensureDeferred
async def test_what_the_kernel_does_not_take_follows_in_order() -> None:
    """Partly sent, then buffered; what is written meanwhile comes after it."""
    async with connection() as (_, transport, peer):
        transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pieces = [bytes([n]) * 30_000 for n in range(40)]
        for piece in pieces[:20]:
            transport.write(piece)
        buffered = unsent(transport)
        assert 0 < buffered < 20 * 30_000
        transport.writeSequence(pieces[20:25])
        assert unsent(transport) == buffered + 5 * 30_000
        # One that is written while the rest drains waits its turn, too.
        got = bytearray()
        peer.setblocking(False)
        expected = b"".join(pieces)
        late = pieces[25:]
        while len(got) < len(expected):
            with suppress(BlockingIOError):
                got += peer.recv(20_000)
            if late:
                transport.write(late.pop(0))
            await pause(0)
        assert got == expected
        assert not unsent(transport)
        transport.write(b"and now at once")
        assert peer.recv(100) == b"and now at once"


@pytest_twisted.ensureDeferred
async def test_a_partial_write_pauses_the_producer() -> None:
    """A full buffer is one, however much of the last write was sent at once."""
    async with connection() as (_, transport, _):
        producer = Producer()
        transport.registerProducer(producer, True)
        while not producer.asked:
            transport.write(bytes(1 << 18))
        assert producer.asked == ["pause"]
        assert unsent(transport) > transport.bufferSize
        transport.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_text_is_no_data() -> None:
    """A caller's mistake is the caller's, and the connection lives."""
    async with connection() as (_, transport, peer):
        with pytest.raises(TypeError):
            transport.write("text")
        transport.write(b"data")
        assert read_exactly(peer, 4) == b"data"


@pytest_twisted.ensureDeferred
async def test_a_half_close_is_passed_on_at_once() -> None:
    """Once: the protocol hears of it before the call returns, and never again."""
    async with connection() as (protocol, transport, peer):
        transport.write(b"all")
        transport.loseWriteConnection()
        assert protocol.events == ["made", "shut"]
        assert read_all(peer) == b"all"
        transport.write(b"more")
        transport.writeSequence([b"more"])
        await turns()
        assert protocol.events == ["made", "shut"]
        assert peer.recv(10) == b""
        peer.sendall(b"answer")
        await until(lambda: protocol.data == b"answer")


@pytest_twisted.ensureDeferred
async def test_a_reset_whose_event_says_hung_up_only_is_no_end_of_data() -> None:
    """As epoll reports one that arrives at that moment; Twisted takes it for an end."""
    async with connection() as (protocol, transport, peer):
        reset(peer)
        event = select.poll()
        event.register(transport.fileno(), 0)
        assert event.poll(PATIENCE * 1000)
        # What Twisted's reactors do then.
        transport.stopReading()
        transport.readConnectionLost(Failure(CONNECTION_DONE))
        assert protocol.lost
        assert isinstance(protocol.reason.value, error.ConnectionLost)
        assert "eof" not in protocol.events


#: How the kernel says that a peer can't be reached any more; it is not asked here.
VANISHED = [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN]


class Unreachable:
    """A socket that can be closed; other calls fail with what it is told."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.recv = self.send = refuse(number)
        self.shutdown, self.close = sock.shutdown, sock.close


@pytest.mark.parametrize("number", VANISHED)
@pytest.mark.parametrize("how", ["read", "hung up", "write"])
@pytest_twisted.ensureDeferred
async def test_a_peer_that_vanished_is_told_apart_from_a_reset(
    how: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connection() as (protocol, transport, peer):
        real = transport.socket
        with monkeypatch.context() as patched:
            patched.setattr(transport, "socket", Unreachable(real, number))
            if how == "hung up":
                transport.stopReading()
                transport.readConnectionLost(Failure(CONNECTION_DONE))
                lost = protocol.reason.value
            elif how == "read":
                lost = transport.doRead()
            else:
                lost = transport.writeSomeData(b"x")
        assert type(lost) is PeerVanished
        assert isinstance(lost, error.ConnectionLost)
        assert str(lost) == os.strerror(number)
        if how == "write":
            # The kernel has said so once: what comes later is not what it was.
            patched.setattr(transport, "socket", Unreachable(real, errno.EPIPE))
            assert transport.writeSomeData(b"x") is lost
            patched.undo()
            peer.close()
            transport.write(b"x")
            assert transport._read_to_the_loss() is lost


@pytest_twisted.ensureDeferred
async def test_an_end_of_data_whose_event_says_hung_up_only_is_one() -> None:
    async with connection() as (protocol, transport, peer):
        for ends in (False, True):
            if ends:
                peer.shutdown(socket.SHUT_WR)
            # With nothing to read, and then with the end to be read.
            transport.stopReading()
            transport.readConnectionLost(Failure(CONNECTION_DONE))
            assert not protocol.lost
            assert protocol.events[-1] == "eof"


@pytest_twisted.ensureDeferred
async def test_a_half_close_waits_for_what_is_buffered() -> None:
    """And for a producer, which may have more to say."""
    async with connection() as (protocol, transport, peer):
        producer = Producer()
        transport.registerProducer(producer, True)
        transport.loseWriteConnection()
        assert "shut" not in protocol.events
        transport.unregisterProducer()
        written = 0
        while not unsent(transport):
            transport.write(bytes(1 << 18))
            written += 1 << 18
        transport.loseWriteConnection()
        assert "shut" not in protocol.events
        assert len(await Peer(peer).read_all()) == written
        assert protocol.events == ["made", "shut"]


class Closing(Recorder):
    """Closes as soon as the peer has ended its side."""

    def readConnectionLost(self) -> None:
        super().readConnectionLost()
        self.transport.loseConnection()
        self.events.append("closed")


@pytest_twisted.ensureDeferred
async def test_a_close_after_the_end_of_data_is_immediate() -> None:
    """Even within the call that tells of it; politely, and once."""
    async with connection(Closing()) as (protocol, transport, peer):
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        assert protocol.events == ["made", "eof", "lost", "closed"]
        assert protocol.reason is not None
        assert protocol.reason.check(error.ConnectionDone)
        assert read_all(peer) == b""
        transport.loseConnection()
        transport.abortConnection()
        transport.write(b"nobody listens")
        await turns()


@pytest_twisted.ensureDeferred
async def test_a_close_with_data_buffered_delivers_it() -> None:
    """The end of data was read, the peer is slow: it gets all of it, then the end."""
    async with connection() as (protocol, transport, peer):
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        written = 0
        while not unsent(transport):
            transport.write(bytes(1 << 18))
            written += 1 << 18
        transport.loseConnection()
        assert "lost" not in protocol.events
        assert len(await Peer(peer).read_all()) == written


@pytest_twisted.ensureDeferred
async def test_a_close_before_the_end_of_data_is_left_to_the_reactor() -> None:
    """Whoever calls may be in the middle of things.

    What is written before the reactor closes is still sent, as with Twisted's own.
    """
    async with connection() as (protocol, transport, peer):
        transport.loseConnection()
        assert "lost" not in protocol.events
        transport.write(b"last words")
        await until(lambda: "lost" in protocol.events)
        assert read_all(peer) == b"last words"


@pytest_twisted.ensureDeferred
async def test_a_close_waits_for_a_paused_producer_after_the_end_of_data_too() -> None:
    """It has promised more; without one the connection closes when all is sent."""
    async with connection() as (protocol, transport, peer):
        peer.shutdown(socket.SHUT_WR)
        await until(lambda: "eof" in protocol.events)
        producer = Producer()
        transport.registerProducer(producer, True)
        written = 0
        while not producer.asked:
            transport.write(bytes(1 << 18))
            written += 1 << 18
        transport.loseConnection()
        far = Peer(peer)
        await far.read(written)
        await until(lambda: producer.asked == ["pause", "resume"])
        transport.loseConnection()
        await turns()
        assert "lost" not in protocol.events
        transport.unregisterProducer()
        await until(lambda: "lost" in protocol.events)
        assert len(await far.read_all()) == written


@pytest_twisted.ensureDeferred
async def test_a_write_to_a_peer_that_is_gone_is_reported_later() -> None:
    """`write` never calls back into its caller's protocol."""
    async with connection() as (protocol, transport, peer):
        transport.pauseProducing()
        reset(peer)
        for _ in range(3):
            transport.write(b"to nobody")
        assert protocol.events == ["made"]
        await until(lambda: "lost" in protocol.events)
        assert protocol.reason is not None
        assert protocol.reason.check(error.ConnectionLost)


@pytest_twisted.ensureDeferred
async def test_starting_tls_leaves_nothing_in_the_clear() -> None:
    """The transport provides ITLSTransport, so what is written after is encrypted."""
    async with connection() as (_, transport, peer):
        transport.startTLS(optionsForClientTLS("example.com"), False)
        far = Peer(peer)
        # A TLS record: the client's handshake, which the peer does not answer.
        assert (await far.read(5))[0] == 22
        transport.write(b"the password")
        transport.writeSequence([b"the password"])
        await turns()
        far.take()
        assert b"the password" not in far.data


# -- how connections are told apart


def test_a_connection_has_a_name_for_logs(tmp_socket: Path) -> None:
    """Twisted's own repr needs a Twisted port, which ours don't have."""
    for family, where, kind in (
        (socket.AF_INET, None, "TCPConnection"),
        (socket.AF_UNIX, str(tmp_socket), "UNIXConnection"),
    ):
        with Server(family, where) as server, closing(socket.socket(family)) as client:
            client.connect(server.socket.getsockname())
            with server.accept() as accepted:
                made: Any = connection_class(family)(
                    accepted, Recorder(), client.getsockname(), None, 7, Descriptors()
                )
                assert repr(made) == f"<{kind} #7>"
                assert made.logPrefix().startswith("Recorder,7,")


def test_a_local_address_that_is_known_is_not_asked_for() -> None:
    """A listener on one address tells its connections; the peer's is the socket's."""
    with Server() as server, closing(socket.socket()) as client:
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            made = TCPConnection(
                accepted, Recorder(), client.getsockname(), None, 1, Descriptors()
            )
            assert made.getPeer() == IPv4Address("TCP", *client.getsockname())
            assert made.getHost() == IPv4Address("TCP", *server.socket.getsockname())
            known = IPv4Address("TCP", "192.0.2.1", 80)
            made.local = known
            assert made.getHost() is known


def test_a_dial_is_a_write_descriptor() -> None:
    """What the reactor asks of it is there."""
    clock = Descriptors()
    with Server() as server:
        where = endpoint(server, clock)
        assert verifyObject(IStreamClientEndpoint, where)
        dialing = where.connect(making(Recorder()))
        [descriptor] = clock.writers
        assert verifyObject(IWriteDescriptor, descriptor)
        dialing.cancel()
        assert isinstance(problem_of(dialing), CancelledError)
        clock.advance(0)
