"""Dialling one address: what comes of it, and when."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error, reactor
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IStreamClientEndpoint, IWriteDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from relayd.core.addresses import is_loopback
from relayd.net.dialing import RETRY, Dial, SocketEndpoint
from relayd.net.factory_caller import FactoryCaller
from relayd.net.transports import (
    TCPConnection,
    UNIXConnection,
)
from tests.conftest import descriptors, pause
from tests.support.contracts import Recorder, until
from tests.support.dials import (
    BrokenFactory,
    BrokenProtocol,
    NoProtocol,
    StillReactor,
    dial,
    endpoint,
    failed,
    full_unix_server,
    making,
    over,
    problem_of,
)
from tests.support.process import Server, read_all, read_exactly, reset

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


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
async def test_the_factory_only_builds_a_protocol() -> None:
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
    clock = StillReactor()
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
    clock = StillReactor()
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
    monkeypatch.setattr("relayd.net.dialing.is_loopback", is_loopback)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_server_on_loopback_is_reached_at_once(near: None, family: int) -> None:
    """There is nothing to be watched."""
    clock, protocol = StillReactor(), Recorder()
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
    clock, before = StillReactor(), descriptors()
    with Server() as server:
        where = endpoint(server, clock)
    problem = problem_of(where.connect(making(Recorder())))
    assert isinstance(problem, error.ConnectionRefusedError)
    assert not clock.writers
    clock.advance(0)
    assert descriptors() == before


def test_a_server_on_loopback_with_a_full_backlog_is_waited_for(near: None) -> None:
    clock = StillReactor()
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
    clock = StillReactor()
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


class Unreachable:
    """A socket whose peer is unreachable, as ICMP has said within connect(2).

    It is still connecting, for the kernel: a read says to try again.
    """

    def __init__(self, problem: int = errno.EHOSTUNREACH) -> None:
        self.problem = problem

    def recv(self, *_: int) -> bytes:
        raise BlockingIOError(errno.EAGAIN, "try again")

    def getsockopt(self, *what: int) -> int:
        assert what == (socket.SOL_SOCKET, socket.SO_ERROR)
        problem, self.problem = self.problem, 0
        return problem

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("report", ["doWrite", "connectionLost"])
def test_unreachable_is_not_connected(report: str) -> None:
    clock = StillReactor()
    where = SocketEndpoint(clock, socket.AF_INET, ("192.0.2.1", 80))
    done: Deferred[Any] = Deferred()
    sock: Any = Unreachable()
    descriptor = Dial(where, sock, FactoryCaller(making(Recorder()), done))
    descriptor.wait(errno.EINPROGRESS)
    if report == "doWrite":
        descriptor.doWrite()
    else:
        descriptor.connectionLost(Failure(CONNECTION_DONE))
    assert clock.writers == set()
    problem = problem_of(done)
    assert isinstance(problem, error.ConnectError)
    assert problem.osError == errno.EHOSTUNREACH
    clock.advance(0)


@pytest.mark.parametrize("report", ["doWrite", "connectionLost"])
def test_data_from_before_a_reset_is_delivered(report: str) -> None:
    """It answered and reset before the reactor looked: both are there to be read."""
    clock, protocol = StillReactor(), Recorder()
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
    clock = StillReactor()
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
    clock = StillReactor()
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
    clock = StillReactor()
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


def test_a_dial_is_a_write_descriptor() -> None:
    """What the reactor asks of it is there."""
    clock = StillReactor()
    with Server() as server:
        where = endpoint(server, clock)
        assert verifyObject(IStreamClientEndpoint, where)
        dialing = where.connect(making(Recorder()))
        [descriptor] = clock.writers
        assert verifyObject(IWriteDescriptor, descriptor)
        dialing.cancel()
        assert isinstance(problem_of(dialing), CancelledError)
        clock.advance(0)
