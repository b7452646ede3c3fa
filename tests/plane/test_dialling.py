"""Dialling on the plane, and what becomes of a dial as the reactor stops.

What it shares with dialling on Twisted's transports is tested with that, in
`tests/net/test_dialing.py`.
"""

from __future__ import annotations

import errno
import select
import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Factory, Protocol

from relayd.net.dialing import RETRY
from relayd.net.factory_caller import FactoryCaller
from relayd.plane.endpoints import PlaneDial, PlaneSocketEndpoint
from relayd.plane.poller import Plane
from relayd.plane.transport import PlaneTransport, PlaneUNIXTransport
from tests.conftest import descriptors
from tests.support.contracts import Recorder
from tests.support.dials import (
    BrokenFactory,
    BrokenProtocol,
    NoProtocol,
    full_unix_server,
    making,
    problem_of,
)
from tests.support.plane_listeners import _LOST, ended, now
from tests.support.process import Server, read_all, read_exactly, reset
from tests.support.standing import Still, refuse, still

__all__ = ["still"]

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


# -- dialling


def dialling(
    still: Still, server: Server, factory: Factory | Protocol | None = None
) -> Deferred[Any]:
    """A dial of `server`."""
    if not isinstance(factory, Factory):
        factory = making(factory or Recorder())
    where = server.socket.getsockname()
    return PlaneSocketEndpoint(still, server.socket.family, where).connect(factory)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_tcp_server_is_reached(family: int, still: Still) -> None:
    """Its options are set before, and it is registered with the kernel once."""
    with Server(family) as server:
        protocol = Recorder()
        dialing = dialling(still, server, protocol)
        assert not dialing.called
        with server.accept() as peer:
            still.until(lambda: dialing.called)
            assert now(dialing) is protocol
            transport = protocol.transport
            assert type(transport) is PlaneTransport
            assert transport.getTcpNoDelay()
            assert not transport.getTcpKeepAlive()
            address = server.socket.getsockname()
            kind = IPv6Address if family == socket.AF_INET6 else IPv4Address
            assert transport.getPeer() == kind("TCP", *address)
            assert transport.getHost() == kind("TCP", *peer.getpeername())
            transport.write(b"request")
            assert read_exactly(peer, 7) == b"request"
            peer.sendall(b"response")
            still.until(lambda: protocol.data == b"response")
        ended(still, protocol)


def test_unreachable_is_not_connected(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error alone is reported while it connects, maybe one that is over."""
    told = [None, errno.EHOSTUNREACH]
    monkeypatch.setattr(PlaneDial, "told_on_the_way", lambda self: told.pop(0))
    with Server() as server:
        done: Deferred[Any] = Deferred()
        address = server.socket.getsockname()
        where = PlaneSocketEndpoint(still, socket.AF_INET, address)
        made = socket.socket()
        dial = PlaneDial(where, made, FactoryCaller(making(Recorder()), done))
        dial.wait(errno.EINPROGRESS)
        dial.ready(select.EPOLLERR)
        assert not done.called
        dial.ready(select.EPOLLERR)
        problem = problem_of(done)
        assert isinstance(problem, error.ConnectError)
        assert problem.osError == errno.EHOSTUNREACH
        still.until(lambda: made.fileno() == -1)


def test_a_unix_server_is_reached_at_once(still: Still, tmp_socket: Path) -> None:
    """There is nothing to wait for, and nothing was watched before."""
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        protocol = Recorder()
        assert now(dialling(still, server, protocol)) is protocol
        assert type(protocol.transport) is PlaneUNIXTransport
        assert protocol.transport.getPeer() == UNIXAddress(str(tmp_socket))
        with server.accept() as peer:
            peer.sendall(b"hello")
            still.until(lambda: protocol.data == b"hello")
        ended(still, protocol)


def test_a_full_unix_backlog_is_tried_again(still: Still, tmp_socket: Path) -> None:
    """A few times a second; the socket is nobody's event meanwhile."""
    with full_unix_server(tmp_socket) as (server, _):
        protocol = Recorder()
        dialing = dialling(still, server, protocol)
        for _ in range(3):
            assert len(still.getDelayedCalls()) == 1
            assert still.readers == set()
            still.advance(RETRY)
        assert not dialing.called
        server.accept().close()
        still.advance(RETRY)
        assert now(dialing) is protocol
        assert not still.getDelayedCalls()
        server.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                server.socket.accept()[0].close()
        ended(still, protocol)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_cancelled_dial_leaves_nothing(
    waiting: bool, still: Still, tmp_socket: Path
) -> None:
    """Its socket is closed at once: the plane knows which events are still for it."""
    before = descriptors()
    with full_unix_server(tmp_socket) as (full, _), Server() as server:
        open_now = descriptors()
        dialing = dialling(still, full if waiting else server)
        assert descriptors() != open_now
        dialing.cancel()
        assert descriptors() == open_now
        assert isinstance(problem_of(dialing), CancelledError)
        assert not still.getDelayedCalls()
        if not waiting:
            with server.accept() as peer:
                assert read_all(peer) == b""
        still.settle()
    assert descriptors() == before


def test_a_dial_that_is_cancelled_in_the_same_batch_is_not_connected(
    still: Still,
) -> None:
    """The client has left, and the server has answered."""
    with Server() as server:
        plane, dials = Plane.of(still), [dialling(still, server) for _ in range(2)]
        peers = [server.accept(), server.accept()]
        answers: list[object] = []
        for dial, other in (dials, dials[::-1]):

            def cancel(result: Any, other: Deferred[Any] = other) -> Any:
                answers.append(result)
                other.cancel()
                return result

            dial.addCallbacks(cancel, lambda reason: reason.trap(CancelledError))
        still.settle()
        # Whichever was first has cancelled the other.
        [protocol] = answers
        assert isinstance(protocol, Recorder)
        assert plane.fileno() != -1
        for peer in peers:
            peer.close()
        ended(still, protocol)


def test_a_closed_port_refuses(still: Still) -> None:
    before = descriptors()
    with Server() as server:
        pass
    address = ("127.0.0.1", connectable(server))
    where = PlaneSocketEndpoint(still, socket.AF_INET, address)
    dialing = where.connect(making(Recorder()))
    still.until(lambda: dialing.called)
    assert type(problem_of(dialing)) is error.ConnectionRefusedError
    assert descriptors() == before


def connectable(_: Server) -> int:
    """A port that nobody listens on."""
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_missing_unix_socket_is_named_by_its_errno(
    still: Still, tmp_socket: Path
) -> None:
    """Within the call: there is nothing to wait for here either."""
    before = descriptors()
    where = PlaneSocketEndpoint(still, socket.AF_UNIX, str(tmp_socket))
    problem = problem_of(where.connect(making(Recorder())))
    assert isinstance(problem, error.ConnectError)
    assert problem.osError == errno.ENOENT
    assert descriptors() == before


def test_what_a_server_said_before_it_reset_is_not_lost(still: Still) -> None:
    """It answered and reset before anyone looked: both are there to be read."""
    with Server() as server:
        protocol = Recorder()
        dialing = dialling(still, server, protocol)
        with server.accept() as peer:
            peer.sendall(b"go away")
            reset(peer)
        still.until(lambda: dialing.called)
        assert now(dialing) is protocol
        still.until(lambda: protocol.lost)
        assert protocol.data == b"go away"
        assert protocol.events == ["made", "lost"]


def test_what_a_server_said_before_it_ended_is_not_lost(still: Still) -> None:
    """Its end of data is told behind it, though no event follows."""
    with Server() as server:
        protocol = Recorder()
        dialing = dialling(still, server, protocol)
        with server.accept() as peer:
            peer.sendall(b"hello")
        still.until(lambda: dialing.called)
        still.until(lambda: protocol.events == ["made", "eof"])
        assert protocol.data == b"hello"
        ended(still, protocol)
        now(dialing)


def test_a_server_that_only_resets_is_a_failed_dial(still: Still) -> None:
    """With the errno that tells it from one that refuses."""
    before = descriptors()
    with Server() as server:
        dialing = dialling(still, server)
        reset(server.accept())
        still.until(lambda: dialing.called)
        problem = problem_of(dialing)
        assert isinstance(problem, error.ConnectError)
        assert problem.osError == errno.ECONNRESET
    assert descriptors() == before


@pytest.mark.parametrize(
    ("name", "number"),
    [("socket", errno.EMFILE), ("epoll", errno.EMFILE), ("watch", errno.ENOSPC)],
)
def test_a_dial_that_the_kernel_refuses_fails(
    name: str, number: int, still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket, no epoll, or no memory to watch it with; nothing is raised or left."""
    before = descriptors()
    with Server() as server, monkeypatch.context() as patched:
        if name == "socket":
            patched.setattr(PlaneSocketEndpoint, "open_socket", refuse(number))
        elif name == "epoll":
            patched.setattr(select, "epoll", refuse(number))
        else:
            patched.setattr(Plane, "watch", refuse(number))
        problem = problem_of(dialling(still, server))
        assert getattr(problem, "osError", getattr(problem, "errno", 0)) == number
    assert descriptors() == before


def test_a_unix_dial_that_can_not_be_watched_fails(
    still: Still, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected already; the server sees it closed."""
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        before = descriptors()
        with monkeypatch.context() as patched:
            patched.setattr(Plane, "watch", refuse(errno.ENOSPC))
            problem = problem_of(dialling(still, server))
        assert problem.errno == errno.ENOSPC
        with server.accept() as peer:
            assert read_all(peer) == b""
        assert descriptors() == before


def test_an_address_that_the_kernel_does_not_take_is_a_failed_dial(
    still: Still,
) -> None:
    before = descriptors()
    too_long = PlaneSocketEndpoint(still, socket.AF_UNIX, "/" * 200)
    assert "too long" in str(problem_of(too_long.connect(making(Recorder()))))
    assert descriptors() == before


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (NoProtocol(), error.NoProtocol),
        (BrokenFactory(), ZeroDivisionError),
        (making(BrokenProtocol()), ZeroDivisionError),
    ],
    ids=["none", "factory", "protocol"],
)
def test_a_factory_that_fails_is_a_failed_dial(
    factory: Factory,
    problem: type[Exception],
    kind: str,
    still: Still,
    tmp_socket: Path,
) -> None:
    """The connection is closed, and nothing of it is watched any more."""
    where = (socket.AF_UNIX, str(tmp_socket)) if kind == "unix" else ()
    with Server(*where) as server:
        before = descriptors()
        dialing = dialling(still, server, factory)
        with server.accept() as peer:
            still.until(lambda: dialing.called)
            assert type(problem_of(dialing)) is problem
            still.until(lambda: not still.readers)
            with suppress(ConnectionResetError):
                assert read_all(peer) == b""
        assert descriptors() == before


# -- the reactor stops


def test_a_dial_fails_as_the_reactor_stops(still: Still) -> None:
    """One that is connected by then is lost, like any connection."""
    with Server() as server:
        plane, protocol = Plane.of(still), Recorder()
        dialing = dialling(still, server, protocol)
        plane.connectionLost(_LOST)
        problem = problem_of(dialing)
        assert isinstance(problem, error.ConnectError)
        assert problem.osError == errno.ECONNABORTED
        assert protocol.events == []
        assert still.readers == set()


def test_a_dial_that_was_answered_as_the_reactor_stops_is_not_left_open(
    still: Still,
) -> None:
    """It is told that it is connected, and lost; or that it failed."""
    with Server() as server:
        before = descriptors()
        plane, protocol = Plane.of(still), Recorder()
        dialing = dialling(still, server, protocol)
        with server.accept() as peer:
            peer.sendall(b"hello")
            still.until(lambda: select.select([plane], [], [], 0)[0])
            plane.connectionLost(_LOST)
            assert protocol.events in ([], ["made", "lost"])
            if protocol.events:
                assert now(dialing) is protocol
            else:
                assert isinstance(problem_of(dialing), error.ConnectError)
        assert descriptors() == before


def test_a_dial_that_is_cancelled_as_the_reactor_stops_has_one_answer(
    still: Still,
) -> None:
    """The client that it was for is lost first, as it came first."""
    with Server() as server:
        plane = Plane.of(still)
        protocol = Recorder()
        first = dialling(still, server, protocol)
        peer = server.accept()
        still.until(lambda: first.called)
        second = dialling(still, server)
        assert now(first) is protocol
        protocol.on["lost"] = second.cancel
        plane.connectionLost(_LOST)
        assert isinstance(problem_of(second), CancelledError)
        assert protocol.events == ["made", "lost"]
        peer.close()
