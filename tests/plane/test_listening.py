"""Listening on the plane, on a reactor that stands still.

What it shares with listening on Twisted's transports is tested with that, in
`tests/net/test_listener.py`.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from zope.interface.verify import verifyObject

from relayd.core.interfaces import INamedClients
from relayd.net.listener import ACCEPTS_PER_TURN
from relayd.plane.endpoints import (
    PlaneListener,
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from relayd.plane.poller import BATCHES_PER_TURN, Plane
from relayd.plane.transport import PlaneTransport, PlaneUNIXTransport
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures, descriptors
from tests.support.contracts import Recorder
from tests.support.dials import making
from tests.support.listeners import Faulty, Unconnectable
from tests.support.plane_listeners import _LOST, Listening, answered, greeted, listening
from tests.support.process import connect
from tests.support.standing import Still, still

__all__ = ["still"]

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_client_gets_a_connection_of_the_plane(host: str, still: Still) -> None:
    """With its options, which came with the socket, and both of its addresses."""
    endpoint = PlaneTCPListenerEndpoint(still, host, 0, 16)
    assert verifyObject(IStreamServerEndpoint, endpoint)
    made = Listening(still, endpoint)
    assert type(made.port) is PlaneListener
    assert verifyObject(IListeningPort, made.port)
    assert made.factory.running == 1
    with connect(made.number, host) as client:
        assert answered(still, client) == b"hello"
        [greeter] = made.factory.served
        assert type(greeter.transport) is PlaneTransport
        assert greeter.options == (True, True)
        assert greeter.local is made.port.getHost()
        kind = IPv6Address if ":" in host else IPv4Address
        assert greeter.remote == kind("TCP", *client.getsockname())
        assert greeter.remote == made.factory.addresses[0]
        # It can be asked again; nothing was kept.
        assert greeter.transport.getPeer() == greeter.remote
    made.stop()


class Seeing(RelayFactory):
    """A relay that looks at its clients' addresses."""

    def __init__(self, still: Still) -> None:
        super().__init__(
            PlaneSocketEndpoint(still, socket.AF_INET, ("127.0.0.1", 9)), clock=still
        )
        self.seen: list[Any] = []

    def buildProtocol(self, addr: Any) -> None:
        self.seen.append(addr)

    @property
    def running(self) -> int:
        return self.numPorts


def test_a_relay_that_builds_its_protocols_itself_gets_addresses(still: Still) -> None:
    """And not the names that relays get that ask for no more."""
    factory = Seeing(still)
    assert verifyObject(INamedClients, factory)
    assert not factory.takes_names()
    assert RelayFactory(factory.pool, clock=still).takes_names()
    with listening(still, factory) as made, made.connect() as client:
        still.until(lambda: factory.seen)
        assert factory.seen == [IPv4Address("TCP", *client.getsockname())]


def test_what_a_client_of_a_wildcard_reached_is_asked_of_its_socket(
    still: Still,
) -> None:
    made = Listening(still, PlaneTCPListenerEndpoint(still, "0.0.0.0", 0, 16))
    with connect(made.number, "127.0.0.2") as client:
        assert answered(still, client) == b"hello"
        [greeter] = made.factory.served
        assert greeter.local == IPv4Address("TCP", *client.getpeername())
    made.stop()


def test_a_client_of_a_unix_socket_gets_one_too(still: Still, tmp_socket: Path) -> None:
    """Whatever its name is; the socket's file goes when it stops."""
    made = Listening(still, PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16))
    name = b"\0relayd-test-%d" % os.getpid()
    for bound in (None, name, str(tmp_socket.with_name("c"))):
        with closing(socket.socket(socket.AF_UNIX)) as client:
            if bound is not None:
                client.bind(bound)
            client.connect(str(tmp_socket))
            assert answered(still, client) == b"hello"
        greeter = made.factory.served[-1]
        assert type(greeter.transport) is PlaneUNIXTransport
        assert greeter.options[0] is False
        assert greeter.local == UNIXAddress(str(tmp_socket))
        assert greeter.remote == UNIXAddress(bound)
    made.stop()
    assert not tmp_socket.exists()


def test_a_flood_of_clients_leaves_others_their_turn(still: Still) -> None:
    """So many accepts a round; those that wait are reported again, and all served."""
    made = Listening(still, PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 512))
    count = ACCEPTS_PER_TURN * BATCHES_PER_TURN + 10
    with ExitStack() as clients:
        waiting = [clients.enter_context(made.connect()) for _ in range(count)]
        for reader in list(still.readers):
            reader.doRead()
        assert len(made.factory.served) == ACCEPTS_PER_TURN * BATCHES_PER_TURN
        for client in waiting:
            assert answered(still, client) == b"hello"
    made.stop()


@pytest.mark.cost
@pytest.mark.parametrize("kind", ["TCP", "UNIX"])
def test_nobody_is_looked_for_where_nobody_waits(
    kind: str, still: Still, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of cost.  The kernel says how many wait, except of UNIX sockets."""
    accept, found = PlaneListener._accept, list[str]()

    def accepting(self: PlaneListener) -> Any:
        try:
            client = accept(self)
        except BlockingIOError:
            found.append("nobody")
            raise
        found.append("a client")
        return client

    monkeypatch.setattr(PlaneListener, "_accept", accepting)
    endpoint: Any = PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16)
    if kind == "UNIX":
        endpoint = PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16)
    with ExitStack() as clients:
        here = Listening(still, endpoint)
        clients.callback(here.stop)
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX if kind == "UNIX" else socket.AF_INET)
            clients.enter_context(client)
            client.connect(
                str(tmp_socket) if kind == "UNIX" else ("127.0.0.1", here.number)
            )
        still.turn()
        assert found == ["a client"] * 3 + ["nobody"] * (kind == "UNIX")
        for one in here.factory.served:
            one.transport.abortConnection()
        still.settle()


def test_a_factory_that_wants_no_client_has_it_closed(still: Still) -> None:
    before = descriptors()
    with listening(still, Faulty(lambda: None)) as made:
        with made.connect() as client:
            assert answered(still, client) == b""
        assert greeted(still, ("127.0.0.1", made.number))
    assert descriptors() == before


def test_a_protocol_that_fails_is_closed_and_no_other(
    still: Still, logged_failures: LoggedFailures
) -> None:
    with listening(still, Faulty(Unconnectable)) as made:
        with made.connect() as client, pytest.raises(ConnectionResetError):
            answered(still, client)
        logged_failures.take("ZeroDivisionError")
        assert greeted(still, ("127.0.0.1", made.number))


def test_a_listener_that_its_client_stops_accepts_no_more(still: Still) -> None:
    """Within the event that it works on; the next in the batch may be its own."""
    factory = Faulty(lambda: made.port.stopListening() and None)
    made: Listening = Listening(
        still, PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16), factory
    )
    with made.connect() as first, made.connect() as second:
        assert answered(still, first) == b""
        with suppress(ConnectionResetError):
            assert answered(still, second) == b""
    assert len(made.factory.addresses) == 1
    assert still.readers == set()
    made.stop()


def test_the_reactor_stops_and_so_do_listeners_and_clients(still: Still) -> None:
    """All of them, each once."""
    factory: Any = making(Recorder())
    factory.running = 0
    made = Listening(
        still, PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16), factory
    )
    protocol = factory.buildProtocol(None)
    with made.connect() as client:
        still.until(lambda: protocol.events == ["made"])
        plane = Plane.of(still)
        plane.connectionLost(_LOST)
        assert protocol.events == ["made", "lost"]
        assert not made.port.connected
        assert factory.numPorts == 0
        assert (plane.fileno(), still.readers) == (-1, set())
        plane.connectionLost(_LOST)
        assert client.recv(1) == b""
    made.stop()
    assert protocol.events == ["made", "lost"]
