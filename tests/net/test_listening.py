"""Endpoints that listen: on hosts and ports, and on UNIX sockets."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import (
    IListeningPort,
    IReadDescriptor,
    IStreamServerEndpoint,
)
from zope.interface.verify import verifyObject

from relayd.net.listener import Listener, Listeners
from relayd.net.listening import (
    AdoptedListenerEndpoint,
    TCPListenerEndpoint,
    UNIXListenerEndpoint,
)
from relayd.net.transports import TCPConnection, UNIXConnection
from tests.support.dials import problem_of
from tests.support.listeners import (
    Greeters,
    answer,
    greeted,
    listen_tcp,
    refuses,
    unix,
    where,
)
from tests.support.process import connect

# -- TCP


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest_twisted.ensureDeferred
async def test_an_address_is_listened_on(host: str) -> None:
    """Until stopped, and the factory is told of both."""
    factory = Greeters()
    port = await listen_tcp(host, factory)
    assert type(port) is Listener
    assert port.getHost().host == host
    assert factory.running == 1
    assert await greeted(where(port))
    assert factory.addresses[0].host == host
    await port.stopListening()
    assert factory.running == 0
    assert refuses(where(port))


@pytest_twisted.ensureDeferred
async def test_it_provides_ilisteningport() -> None:
    """The interfaces of Twisted's own ports, and of what a reactor watches."""
    endpoint = TCPListenerEndpoint(reactor, "127.0.0.1", 0, 16)
    assert verifyObject(IStreamServerEndpoint, endpoint)
    assert verifyObject(IStreamServerEndpoint, UNIXListenerEndpoint(reactor, "/s", 1))
    port: Any = await endpoint.listen(Greeters())
    assert verifyObject(IListeningPort, port)
    assert verifyObject(IReadDescriptor, port)
    assert verifyObject(IListeningPort, Listeners([port]))
    assert port.logPrefix() == "relayd listener"
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_client_gets_our_connection_and_its_options() -> None:
    """No delay and keepalive come with the socket, and so does what it reached."""
    factory = Greeters()
    port = await listen_tcp("127.0.0.1", factory)
    with connect(port.getHost().port) as client:
        assert await answer(client) == b"hello"
        [greeter] = factory.served
        assert type(greeter.transport) is TCPConnection
        assert greeter.options == (True, True)
        assert greeter.local is port.getHost()
        assert greeter.remote == IPv4Address("TCP", *client.getsockname())
        assert repr(greeter.transport) == "<TCPConnection #0>"
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_without_a_host_both_families_are_listened_on() -> None:
    """On the same port, though it was left to the kernel, and as one port to stop."""
    factory = Greeters()
    ports = await listen_tcp(None, factory)
    assert type(ports) is Listeners
    (v4, v6), number = ports.ports, ports.getHost().port
    assert where(v4) == ("0.0.0.0", number)
    assert where(v6) == ("::", number)
    assert number
    assert factory.running == 1
    assert await greeted(("127.0.0.1", number))
    assert await greeted(("::1", number))
    # Which of the machine's addresses a client reached, only its socket knows.
    assert factory.addresses[0].host == "127.0.0.1"
    assert factory.addresses[1].host == "::1"
    await ports.stopListening()
    assert factory.running == 0
    assert refuses(("127.0.0.1", number))
    assert refuses(("::1", number))


@pytest_twisted.ensureDeferred
async def test_the_local_address_on_a_wildcard_is_read_from_the_socket() -> None:
    """`0.0.0.0` is nowhere; the log says where the client connected to."""
    factory = Greeters()
    port = await listen_tcp("0.0.0.0", factory)
    with connect(port.getHost().port, "127.0.0.2") as client:
        assert await answer(client) == b"hello"
        [greeter] = factory.served
        assert greeter.local == IPv4Address("TCP", *client.getpeername())
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_is_made_and_removed(tmp_socket: Path) -> None:
    """Anyone who can reach the file may connect, as with Twisted's own."""
    factory = Greeters()
    port: Any = await unix(tmp_socket).listen(factory)
    assert port.getHost() == UNIXAddress(str(tmp_socket))
    assert tmp_socket.stat().st_mode & 0o777 == 0o666
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(tmp_socket))
        assert await answer(client) == b"hello"
        [greeter] = factory.served
        assert type(greeter.transport) is UNIXConnection
        assert greeter.local == UNIXAddress(str(tmp_socket))
        # A client's socket has no name unless it asked for one.
        assert factory.addresses == [greeter.remote] == [UNIXAddress(None)]
    await port.stopListening()
    assert not tmp_socket.exists()
    assert factory.running == 0


# -- sockets that listen already


@pytest_twisted.ensureDeferred
async def test_sockets_that_listen_already(tmp_socket: Path) -> None:
    """As one port; they stay their owner's, and can be listened on again."""
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as tcp,
        closing(socket.socket(socket.AF_UNIX)) as local,
    ):
        local.bind(str(tmp_socket))
        local.listen()
        endpoint = AdoptedListenerEndpoint(reactor, [tcp.fileno(), local.fileno()])
        for _ in range(2):
            factory = Greeters()
            port: Any = await endpoint.listen(factory)
            assert await greeted(tcp.getsockname())
            assert await greeted(str(tmp_socket))
            kinds = [type(each.transport) for each in factory.served]
            assert kinds == [TCPConnection, UNIXConnection]
            await port.stopListening()
        assert tmp_socket.exists()
        with connect(tcp.getsockname()[1]):
            pass


def test_what_can_not_be_adopted_is_an_error() -> None:
    """And what was adopted before it is given back."""
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as tcp,
        closing(socket.socket()) as idle,
        open(__file__) as file,
    ):
        for number, why in (
            (idle.fileno(), "it is a socket that does not listen"),
            (file.fileno(), "Socket operation on non-socket"),
            (5000, "Bad file descriptor"),
        ):
            both = [tcp.fileno(), number]
            endpoint = AdoptedListenerEndpoint(reactor, both, "systemd:web")
            says = problem_of(endpoint.listen(Greeters()))
            assert str(says) == f"can't listen on systemd:web: {why}"
