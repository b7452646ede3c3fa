"""A socket that has connected to itself is no connection.

The kernel gives a socket that asks for none a port of its own range.  If that is the
port that is being dialled, and nobody listens there, the socket meets itself.  Here the
port is chosen, so that it happens at once and not after some thousand dials.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error, reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory

from relayd.core import ports
from relayd.net import dialing
from relayd.net.dialing import SocketEndpoint
from relayd.plane.endpoints import PlaneSocketEndpoint
from relayd.tcp import RelayFactory
from tests.support.contracts import Recorder, until
from tests.support.fakes import FakeTransport
from tests.support.process import Server

FAMILIES = [socket.AF_INET, socket.AF_INET6]


def to_itself(kind: type[SocketEndpoint], family: int, *, near: bool) -> SocketEndpoint:
    """What dials a port where nobody listens, from that very port."""

    class FromThere(kind):  # type: ignore[misc,valid-type]
        def open_socket(self, caller: Any) -> Any:
            sock = super().open_socket(caller)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self.address)
            return sock

    with Server(family) as server:
        where: SocketEndpoint = FromThere(reactor, family, server.socket.getsockname())
    where.is_near = near
    return where


@pytest.fixture(params=[SocketEndpoint, PlaneSocketEndpoint])
def kind(request: pytest.FixtureRequest) -> type[SocketEndpoint]:
    """Who dials."""
    made: type[SocketEndpoint] = request.param
    return made


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest_twisted.ensureDeferred
async def test_it_is_refused(
    kind: type[SocketEndpoint], family: int, near: bool
) -> None:
    """As by a port where nobody listens; whether it is watched or answered at once."""
    where = to_itself(kind, family, near=near)
    protocol = Recorder()
    factory: Any = Factory.forProtocol(lambda: protocol)
    with pytest.raises(error.ConnectionRefusedError):
        await where.connect(factory)
    assert not protocol.events


@pytest.mark.parametrize("family", FAMILIES)
@pytest_twisted.ensureDeferred
async def test_the_server_can_start_afterwards(
    kind: type[SocketEndpoint], family: int
) -> None:
    """Its port is not kept for the minute that a polite close takes."""
    where = to_itself(kind, family, near=True)
    factory: Any = Factory.forProtocol(Recorder)
    with pytest.raises(error.ConnectionRefusedError):
        await where.connect(factory)
    with socket.socket(family, socket.SOCK_STREAM) as server:
        # Without SO_REUSEADDR, to which a port that lingers would be free.
        server.bind(where.address)


@pytest.mark.parametrize("family", FAMILIES)
@pytest_twisted.ensureDeferred
async def test_a_server_there_is_reached(
    kind: type[SocketEndpoint], family: int
) -> None:
    """Ports of the kernel's range are served like any other."""
    with Server(family) as server:
        where = kind(reactor, family, server.socket.getsockname())
        protocol = Recorder()
        factory: Any = Factory.forProtocol(lambda: protocol)
        await where.connect(factory)
        assert protocol.events == ["made"]
        protocol.transport.abortConnection()
        await until(lambda: "lost" in protocol.events)


@pytest.mark.cost
def test_a_port_outside_the_ephemeral_range_is_not_checked(
    kind: type[SocketEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of cost.  That saves such dials a system call."""
    monkeypatch.setattr(dialing, "may_be_handed_out", lambda port: port >= 32768)
    asks: Callable[[int], bool] = lambda port: (  # noqa: E731
        kind(reactor, socket.AF_INET, ("127.0.0.1", port))._may_self_connect
    )
    assert not asks(80)
    assert asks(40000)
    assert not kind(reactor, socket.AF_UNIX, "/nowhere")._may_self_connect


@pytest_twisted.ensureDeferred
async def test_an_embedders_endpoint_that_is_self_connected() -> None:
    """Twisted's own have no such test: it is made when they have connected."""
    with Server() as server:
        there = server.socket.getsockname()
    endpoint = TCP4ClientEndpoint(reactor, *there, bindAddress=there)
    clock: Any = reactor
    relay = RelayFactory(endpoint, clock=clock)
    client: Any = relay.buildProtocol(None)
    near = FakeTransport()
    near.connect(client)
    session = client.session
    await until(lambda: session.ending is not None)
    assert session.ending.word == "connect_refused"
    assert "itself" in session.detail
    near.lose()
    await relay.drain(0)
    relay.stopFactory()


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What was remembered of the kernel's range is another test's."""
    ports.may_be_handed_out.cache_clear()
    yield
    ports.may_be_handed_out.cache_clear()


@pytest.mark.parametrize(
    ("text", "there", "not_there"),
    [
        ("32768\t60999\n", (32768, 60999), (32767, 61000)),
        ("1024 65535", (1024, 65535), (80,)),
        # It does not say: any may be.
        ("", (1, 80, 40000, 65535), ()),
        ("none", (1, 80), ()),
    ],
)
def test_the_ports_that_the_kernel_hands_out(
    text: str,
    there: tuple[int, ...],
    not_there: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    """As its setting says."""
    setting = tmp_path / "range"
    setting.write_text(text)
    monkeypatch.setattr(ports, "PORT_RANGE", setting)
    assert all(map(ports.may_be_handed_out, there))
    assert not any(map(ports.may_be_handed_out, not_there))
