"""Listening sockets: what they open, what they replace, and what can't stop them."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
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
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

import relayd.listening
from relayd.errors import ListenError
from relayd.interfaces import IMakesRoom
from relayd.listening import (
    ACCEPTS_PER_TURN,
    PAUSE,
    RESERVE,
    Listener,
    Listeners,
    TCPListenerEndpoint,
    UNIXListenerEndpoint,
    _Exhaustion,
)
from relayd.transports import TCPConnection, UNIXConnection
from tests.conftest import LoggedFailures, descriptors
from tests.contracts import Recorder, turns, until
from tests.process import connect, reset
from tests.test_plane_poller import refuse

#: What a sandbox says to accept4(2).
REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EACCES]

_GONE = Failure(CONNECTION_DONE)


class Greeter(Recorder):
    """Says hello and hangs up; keeps what its transport said of itself."""

    def connectionMade(self) -> None:
        super().connectionMade()
        self.local, self.remote = self.transport.getHost(), self.transport.getPeer()
        self.options = self.transport.getTcpNoDelay(), self.transport.getTcpKeepAlive()
        descriptor = self.transport.fileno()
        self.blocks_or_is_inherited = (
            os.get_blocking(descriptor),
            os.get_inheritable(descriptor),
        )
        self.transport.write(b"hello")
        self.transport.loseConnection()


class Greeters(Factory):
    """Serves each client with a Greeter, and counts its starts and stops."""

    noisy = False

    def __init__(self) -> None:
        self.addresses: list[Any] = []
        self.served: list[Any] = []
        self.running = 0

    def startFactory(self) -> None:
        self.running += 1

    def stopFactory(self) -> None:
        self.running -= 1

    def buildProtocol(self, addr: Any) -> Any:
        self.addresses.append(addr)
        self.served.append(Greeter())
        return self.served[-1]


async def greeted(address: Any) -> bool:
    """Whether a client that connects there is served."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if family == socket.AF_INET and ":" in address[0]:
        family = socket.AF_INET6
    with closing(socket.socket(family)) as client:
        client.connect(address)
        return await answer(client) == b"hello"


async def answer(client: socket.socket) -> bytes:
    """What the client is sent until its connection ends."""
    client.setblocking(False)
    got = bytearray()

    def ended() -> bool:
        with suppress(BlockingIOError):
            part = client.recv(100)
            got.extend(part)
            return not part
        return False

    await until(ended, "the end of a connection")
    return bytes(got)


def refuses(address: Any) -> bool:
    """Whether nobody listens there."""
    with closing(
        socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    ) as client:
        return client.connect_ex(address) == errno.ECONNREFUSED


def where(port: Any) -> tuple[str, int]:
    """The address of a listening port, to connect to."""
    host = port.getHost()
    return host.host, host.port


async def listen_tcp(host: str | None, factory: Any, port: int = 0) -> Any:
    """Listen with our own endpoint."""
    return await TCPListenerEndpoint(reactor, host, port, 16).listen(factory)


async def refusal(endpoint: Any) -> str:
    """What an endpoint says that can't listen."""
    with pytest.raises(ListenError) as caught:
        await endpoint.listen(Greeters())
    return str(caught.value)


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
async def test_stopping_again_does_nothing() -> None:
    """It may come from the service and from the reactor as it stops."""
    factory, closed = Greeters(), []
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    port = Listener(reactor, sock, factory, lambda: closed.append(sock.fileno()))
    port.startListening()
    await port.stopListening()
    await port.stopListening()
    port.connectionLost(_GONE)
    assert factory.running == 0
    # What is done once the socket is closed, is done once.
    assert closed == [-1]
    assert not port.connected


@pytest_twisted.ensureDeferred
async def test_it_is_what_twisted_calls_a_port() -> None:
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
async def test_what_a_client_of_a_wildcard_reached_is_asked_of_its_socket() -> None:
    """`0.0.0.0` is nowhere; the log says where the client connected to."""
    factory = Greeters()
    port = await listen_tcp("0.0.0.0", factory)
    with connect(port.getHost().port, "127.0.0.2") as client:
        assert await answer(client) == b"hello"
        [greeter] = factory.served
        assert greeter.local == IPv4Address("TCP", *client.getpeername())
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_each_wildcard_leaves_the_other_family_alone() -> None:
    """`[::]` is IPv6 only: `0.0.0.0` can be another relay's on the same port."""
    for tries_left in range(15, -1, -1):
        v6 = await listen_tcp("::", Greeters())
        number = v6.getHost().port
        try:
            v4 = await listen_tcp("0.0.0.0", Greeters(), number)
        except ListenError:
            # Another program may have that port, which was free in IPv6 only.
            assert tries_left
            await v6.stopListening()
        else:
            break
    await v6.stopListening()
    assert await greeted(("127.0.0.1", number))
    await v4.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_name_is_listened_on_at_every_address() -> None:
    """Each once, all on the same port."""
    factory = Greeters()
    port = await listen_tcp("localhost", factory)
    ports = port.ports if isinstance(port, Listeners) else [port]
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    assert {where(each)[0] for each in ports} == {item[4][0] for item in found}
    assert len(ports) == len({where(each)[0] for each in ports})
    assert len({where(each)[1] for each in ports}) == 1
    for each in ports:
        assert await greeted(where(each))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_name_with_the_same_address_twice_is_listened_on_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As hosts files have it; a second socket would find the port in use."""
    really = socket.getaddrinfo

    def twice(host: str, *args: Any, **keywords: Any) -> Any:
        found = really("127.0.0.1", *args, **keywords)
        return found * 2 if host == "twice.example" else found

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", twice)
        port = await listen_tcp("twice.example", Greeters())
    assert type(port) is Listener
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_name_without_an_address_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which says the name and what the resolver said."""

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", unknown)
        says = await refusal(TCPListenerEndpoint(reactor, "no.invalid", 80, 16))
    assert says == "can't listen on no.invalid:80: Name or service not known"


@pytest_twisted.ensureDeferred
async def test_an_interface_that_is_not_there_is_an_error() -> None:
    """Named with its scope."""
    says = await refusal(TCPListenerEndpoint(reactor, "fe80::1%no-such-if", 80, 16))
    assert says.startswith("can't listen on [fe80::1%no-such-if]:80: ")


@pytest_twisted.ensureDeferred
async def test_a_port_that_is_taken_is_an_error() -> None:
    """On one address, and on one of all; nothing stays open."""
    before = descriptors()
    with closing(socket.socket(socket.AF_INET6)) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        says = await refusal(TCPListenerEndpoint(reactor, "::1", number, 16))
        assert says == f"can't listen on [::1]:{number}: Address already in use"
        says = await refusal(TCPListenerEndpoint(reactor, None, number, 16))
        assert says == (
            f"can't listen on port {number} of all addresses: Address already in use"
        )
        assert refuses(("127.0.0.1", number))
    assert descriptors() == before


@pytest_twisted.ensureDeferred
async def test_an_address_that_is_not_local_is_an_error() -> None:
    """192.0.2.1 is nobody's (RFC 5737)."""
    says = await refusal(TCPListenerEndpoint(reactor, "192.0.2.1", 80, 16))
    assert says == "can't listen on 192.0.2.1:80: Cannot assign requested address"


@pytest_twisted.ensureDeferred
async def test_a_broadcast_address_is_an_error() -> None:
    """The kernel would let us listen where nobody can connect."""
    says = await refusal(TCPListenerEndpoint(reactor, "127.255.255.255", 0, 16))
    assert says.startswith("can't listen on 127.255.255.255:0: it is a broadcast addr")


@contextmanager
def failing_v6(
    monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> Iterator[list[int]]:
    """Let IPv6 sockets fail to bind `times` times; yields the ports that were tried."""
    tried: list[int] = []
    really = relayd.listening._bind_tcp

    def bind(host: str, port: int, backlog: int) -> socket.socket:
        if ":" in host:
            tried.append(port)
            if len(tried) <= times:
                raise OSError(number, os.strerror(number))
        return really(host, port, backlog)

    with monkeypatch.context() as patched:
        patched.setattr(relayd.listening, "_bind_tcp", bind)
        yield tried


@pytest_twisted.ensureDeferred
async def test_a_free_port_must_be_free_in_both_families(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's choice for one family may be taken in the other: choose again."""
    with failing_v6(monkeypatch, errno.EADDRINUSE, 3) as tried:
        ports = await listen_tcp(None, Greeters())
    assert len(tried) == 4
    assert len({where(each)[1] for each in ports.ports}) == 1
    await ports.stopListening()


@pytest_twisted.ensureDeferred
async def test_no_port_that_is_free_in_both_families_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not tried for ever, and not at all for a port that was asked for."""
    before = descriptors()
    with failing_v6(monkeypatch, errno.EADDRINUSE, 10_000) as tried:
        says = await refusal(TCPListenerEndpoint(reactor, None, 0, 16))
        assert says == "can't listen on port 0 of all addresses: Address already in use"
        assert 1 < len(tried) < 100
    with closing(socket.socket()) as sock:
        # Bound for as long, so that no other test's connection gets the port.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        number = sock.getsockname()[1]
        with failing_v6(monkeypatch, errno.EADDRINUSE, 10_000) as tried:
            where = TCPListenerEndpoint(reactor, None, number, 16)
            assert "in use" in await refusal(where)
            assert tried == [number]
    assert descriptors() == before


@pytest_twisted.ensureDeferred
async def test_a_machine_without_ipv6_listens_on_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All addresses are those that there are; one that is named must be there."""
    for number in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
        with failing_v6(monkeypatch, number, 10):
            port = await listen_tcp(None, Greeters())
            assert type(port) is Listener
            assert port.getHost().host == "0.0.0.0"
            await port.stopListening()
            says = await refusal(TCPListenerEndpoint(reactor, "::1", 0, 16))
            assert says == f"can't listen on [::1]:0: {os.strerror(number)}"


# -- UNIX


def unix(path: Path) -> UNIXListenerEndpoint:
    """What listens at `path`."""
    return UNIXListenerEndpoint(reactor, str(path), 16)


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


@pytest_twisted.ensureDeferred
async def test_a_stale_unix_socket_is_replaced(tmp_socket: Path) -> None:
    """One that a process left behind which had no time to remove it."""
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(tmp_socket))
        dead.listen()
    assert tmp_socket.is_socket()
    port: Any = await unix(tmp_socket).listen(Greeters())
    assert await greeted(str(tmp_socket))
    await port.stopListening()
    assert not tmp_socket.exists()


@pytest_twisted.ensureDeferred
async def test_a_live_unix_socket_is_left_alone(tmp_socket: Path) -> None:
    """Two relays can't have the same one; the first goes on."""
    first: Any = await unix(tmp_socket).listen(Greeters())
    says = await refusal(unix(tmp_socket))
    assert says == f"can't listen on unix:{tmp_socket}: Address already in use"
    # What asked whether anybody listens was a client of the first, and is gone.
    assert await greeted(str(tmp_socket))
    await first.stopListening()


@pytest_twisted.ensureDeferred
async def test_another_kind_of_file_is_left_alone(tmp_socket: Path) -> None:
    """A typing error must not cost anyone a file."""
    tmp_socket.write_text("precious")
    says = await refusal(unix(tmp_socket))
    assert says == f"can't listen on unix:{tmp_socket}: Address already in use"
    assert tmp_socket.read_text() == "precious"
    tmp_socket.unlink()
    tmp_socket.mkdir()
    assert "in use" in await refusal(unix(tmp_socket))
    assert tmp_socket.is_dir()


@pytest_twisted.ensureDeferred
async def test_a_datagram_socket_is_left_alone(tmp_socket: Path) -> None:
    """It is somebody's, though no stream can be opened to it."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as other:
        other.bind(str(tmp_socket))
        assert "in use" in await refusal(unix(tmp_socket))
        assert tmp_socket.is_socket()


@pytest_twisted.ensureDeferred
async def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """The folder is the operator's to make."""
    says = await refusal(unix(tmp_path / "no" / "s"))
    assert says == f"can't listen on unix:{tmp_path}/no/s: No such file or directory"


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_that_is_not_ready_leaves_no_file(
    tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound, but then something failed: as if it had never been."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "chmod", refuse)
        assert "not permitted" in await refusal(unix(tmp_socket))
    assert descriptors() == before
    assert not tmp_socket.exists()


@pytest_twisted.ensureDeferred
async def test_another_socket_in_its_place_is_not_removed(tmp_socket: Path) -> None:
    """A relay that was started anew has taken the path over."""
    old: Any = await unix(tmp_socket).listen(Greeters())
    tmp_socket.unlink()
    new: Any = await unix(tmp_socket).listen(Greeters())
    await old.stopListening()
    assert await greeted(str(tmp_socket))
    await new.stopListening()
    assert not tmp_socket.exists()


@pytest_twisted.ensureDeferred
async def test_a_socket_that_was_removed_is_not_missed(tmp_socket: Path) -> None:
    """Somebody tidied up before us."""
    factory = Greeters()
    port: Any = await unix(tmp_socket).listen(factory)
    tmp_socket.unlink()
    with capturedLogs() as events:
        await port.stopListening()
    assert events == []
    assert factory.running == 0


@pytest_twisted.ensureDeferred
async def test_a_socket_that_can_not_be_removed_stops_nothing_else(
    tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the relay has given up the rights that it made the file with."""
    factory = Greeters()
    port: Any = await unix(tmp_socket).listen(factory)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        patched.setattr(os, "remove", refuse)
        with capturedLogs() as events:
            await port.stopListening()
    assert factory.running == 0
    # Whoever wonders why the file is still there finds the reason.
    assert [event for event in events if str(tmp_socket) in formatEvent(event)]


# -- clients that can't be served


class Faulty(Greeters):
    """Fails for its first client in the way that it is told."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def buildProtocol(self, addr: Any) -> Any:
        if not self.addresses:
            self.addresses.append(addr)
            return self.how()
        return super().buildProtocol(addr)


class Unconnectable(Recorder):
    """Can't be connected."""

    def connectionMade(self) -> None:
        raise ZeroDivisionError("of the protocol")


@pytest_twisted.ensureDeferred
async def test_a_factory_that_raises_costs_one_client(
    logged_failures: LoggedFailures,
) -> None:
    """That client is closed, the traceback is logged, and the next is served."""
    port = await listen_tcp("127.0.0.1", Faulty(lambda: 1 // 0))
    with connect(port.getHost().port) as client:
        assert await answer(client) == b""
    assert "in buildProtocol" in logged_failures.take("ZeroDivisionError")
    assert await greeted(where(port))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_factory_that_declines_closes_the_client() -> None:
    """As Twisted's ports do, and without a word."""
    port = await listen_tcp("127.0.0.1", Faulty(lambda: None))
    with connect(port.getHost().port) as client:
        assert await answer(client) == b""
    assert await greeted(where(port))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_protocol_that_raises_costs_one_client(
    logged_failures: LoggedFailures,
) -> None:
    """It is reset, and its protocol hears that it is gone."""
    protocol = Unconnectable()
    port = await listen_tcp("127.0.0.1", Faulty(lambda: protocol))
    with connect(port.getHost().port) as client, pytest.raises(ConnectionResetError):
        await answer(client)
    assert protocol.events == ["lost"]
    assert "in connectionMade" in logged_failures.take("ZeroDivisionError")
    assert await greeted(where(port))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_listener_that_is_stopped_by_a_client_accepts_no_more() -> None:
    """Others that wait in the same turn are not served by a port that is closed."""
    factory = Faulty(lambda: port.stopListening() and None)
    port = await listen_tcp("127.0.0.1", factory)
    with connect(port.getHost().port) as first, connect(port.getHost().port) as second:
        assert await answer(first) == b""
        with suppress(ConnectionResetError):
            assert await answer(second) == b""
    assert len(factory.addresses) == 1


# -- descriptors run out


class Watcher(Clock):
    """A reactor that watches what it is told to, and does nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.addReader = self.readers.add
        self.removeReader = self.readers.discard
        self.removeWriter = self.addWriter = lambda _: None


class Scripted(socket.socket):
    """A listening socket whose accept fails as often as the script says."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[int] = []
        self.asked = 0
        self.bind(("127.0.0.1", 0))
        self.listen()

    def accept(self) -> tuple[socket.socket, Any]:
        self.asked += 1
        if self.script:
            number = self.script.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


@contextmanager
def scripted() -> Iterator[tuple[Listener, Scripted, Watcher, Greeters]]:
    """A listener on a socket with a script and a reactor that stands still."""
    watcher, factory = Watcher(), Greeters()
    with closing(Scripted()) as sock:
        listener = Listener(watcher, sock, factory)
        listener.startListening()
        assert watcher.readers == {listener}
        yield listener, sock, watcher, factory
        listener.stopListening()
        assert not watcher.getDelayedCalls()


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
)
def test_a_listener_without_descriptors_pauses(number: int) -> None:
    """The clients stay in the kernel's queue, and are served after a moment."""
    with scripted() as (listener, sock, watcher, factory):
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            sock.script = [number]
            with capturedLogs() as events:
                listener.doRead()
            assert watcher.readers == set()
            assert listener.pauses == 1
            [event] = events
            assert event["log_level"] is LogLevel.warn
            assert os.strerror(number) in formatEvent(event)
            assert f"127.0.0.1:{sock.getsockname()[1]}" in formatEvent(event)
            watcher.advance(PAUSE * 0.99)
            assert watcher.readers == set()
            watcher.advance(PAUSE * 0.02)
            assert watcher.readers == {listener}
            assert not watcher.getDelayedCalls()
            listener.doRead()
            [protocol] = factory.served
            protocol.transport.connectionLost(_GONE)


def test_a_listener_waits_until_there_are_descriptors_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks by itself, as no event tells, and pauses again if there are none."""
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.EMFILE]
        listener.doRead()

        def none_left(_: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patched:
            patched.setattr(os, "dup", none_left)
            for pauses in (2, 3, 4):
                watcher.advance(PAUSE)
                assert listener.pauses == pauses
                assert watcher.readers == set()
                assert len(watcher.getDelayedCalls()) == 1
        with monkeypatch.context() as patched:
            # There is one, but it is one of the last.
            patched.setattr(resource, "getrlimit", lambda _: (8, 8))
            watcher.advance(PAUSE)
            assert (listener.pauses, watcher.readers) == (5, set())
        before = descriptors()
        watcher.advance(PAUSE)
        assert watcher.readers == {listener}
        assert descriptors() == before


def test_who_can_make_room_is_asked_at_each_pause(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails to does not keep the listener from looking again."""
    asked = []

    @implementer(IMakesRoom)
    class Roomy(Greeters):
        def make_room(self) -> None:
            asked.append(listener.pauses)
            raise ZeroDivisionError

    with closing(Scripted()) as sock:
        watcher = Watcher()
        listener = Listener(watcher, sock, Roomy())
        listener.startListening()
        for pauses in (1, 2):
            sock.script = [errno.EMFILE]
            listener.doRead()
            assert asked[-1] == pauses
            logged_failures.take("no room could be made")
            watcher.advance(PAUSE)
            assert watcher.readers == {listener}
        # For what is refused, room is none.
        monkeypatch.setattr("relayd.listening.accept", refuse(errno.EPERM))
        sock.script = [errno.EPERM]
        listener.doRead()
        assert (listener.pauses, asked) == (3, [1, 2])
        listener.stopListening()


def test_a_listener_that_pauses_can_be_stopped() -> None:
    """It does not come back."""
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.EMFILE]
        listener.doRead()
        listener.stopListening()
        assert not watcher.getDelayedCalls()
        watcher.advance(10 * PAUSE)
        assert watcher.readers == set()


def test_a_listener_pauses_before_the_last_descriptor_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client is served; dialling a server for it needs one more."""
    with scripted() as (listener, _, watcher, factory):
        port = listener.getHost().port  # type: ignore[attr-defined]
        with connect(port), connect(port):
            monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
            with capturedLogs() as events:
                listener.doRead()
            monkeypatch.undo()
            assert len(factory.served) == 1
            assert watcher.readers == set()
            assert listener.pauses == 1
            assert "hardly any file descriptor is left" in formatEvent(events[-1])
            watcher.advance(PAUSE)
            listener.doRead()
            assert len(factory.served) == 2
            for protocol in factory.served:
                protocol.transport.connectionLost(_GONE)


def test_a_listener_that_is_stopped_by_its_last_client_stays_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No timer goes on for a socket that is closed."""
    with scripted() as (listener, _, watcher, factory):
        factory.buildProtocol = lambda _: listener.stopListening() and None  # type: ignore[method-assign, func-returns-value]
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
            listener.doRead()
            monkeypatch.undo()
        assert not watcher.getDelayedCalls()
        assert watcher.readers == set()


@pytest_twisted.ensureDeferred
async def test_clients_outlast_a_full_descriptor_table() -> None:
    """For real: the kernel refuses descriptors, then has some again."""
    factory = Greeters()
    port: Any = await listen_tcp("127.0.0.1", factory)
    clients = [connect(port.getHost().port) for _ in range(3)]
    pauses = port.pauses
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    with capturedLogs() as events:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            await until(lambda: port.pauses >= pauses + 2, "two pauses")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert factory.served == []
    for client in clients:
        assert await answer(client) == b"hello"
        client.close()
    [event] = [each for each in events if each["log_level"] is LogLevel.warn]
    assert "Too many open files; clients wait until a session ends" in formatEvent(
        event
    )
    await port.stopListening()


def test_a_full_table_is_logged_once_a_second() -> None:
    """However many listeners' pauses there are; the line says how many."""
    clock = Clock()
    exhaustion = _Exhaustion(clock)
    with capturedLogs() as events:
        for _ in range(30):
            exhaustion.log("127.0.0.1:80", "Too many open files")
            clock.advance(0.125)
    assert exhaustion.pauses == 30
    assert [event["pauses"] for event in events] == [1, 9, 17, 25]
    assert formatEvent(events[1]) == (
        "127.0.0.1:80: Too many open files; clients wait until a session ends"
        " (paused 9 times so far; raise the limit with ulimit -n)"
    )


def test_the_reserve_is_a_part_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed number, but no more than a quarter of a small table."""
    for limit, first in ((1024, 1024 - RESERVE), (64, 64 - RESERVE), (20, 15), (4, 3)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=limit: (n, 10_000))
        exhaustion = _Exhaustion(Clock())
        assert exhaustion.reached(first)
        assert not exhaustion.reached(first - 1)


def test_a_limit_that_was_raised_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exhaustion, limit = _Exhaustion(Clock()), [100]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit[0], 10_000))
    assert exhaustion.reached(90)
    limit[0] = 1000
    assert not exhaustion.reached(90)
    assert not exhaustion.reached(900)
    assert exhaustion.reached(990)


def test_the_listeners_of_a_reactor_pause_and_log_together() -> None:
    """They share the descriptors, and the line a second."""
    watcher, closed = Watcher(), Greeters()
    with closing(Scripted()) as one, closing(Scripted()) as two:
        listeners = [Listener(watcher, sock, closed) for sock in (one, two)]
        with capturedLogs() as events:
            for sock, listener in zip((one, two), listeners, strict=True):
                listener.startListening()
                sock.script = [errno.EMFILE]
                listener.doRead()
        assert [listener.pauses for listener in listeners] == [2, 2]
        assert len([each for each in events if each["log_level"] is LogLevel.warn]) == 1
        for listener in listeners:
            listener.stopListening()


def test_a_client_that_the_reactor_can_not_watch_is_turned_away(
    logged_failures: LoggedFailures,
) -> None:
    """The kernel is short of something; that client is closed, the listener goes on."""
    with scripted() as (listener, _, watcher, factory):

        def full(_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        watcher.addReader = full  # type: ignore[method-assign]
        with connect(listener.getHost().port) as client:  # type: ignore[attr-defined]
            listener.doRead()
            assert client.recv(1) == b""
        assert os.strerror(errno.ENOSPC) in logged_failures.take("addReader")
        assert factory.served[0].events == []
        assert listener.connected


def test_clients_that_left_are_skipped() -> None:
    """They were gone before they were accepted; those behind them are served."""
    with scripted() as (listener, sock, watcher, factory):
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            sock.script = [errno.ECONNABORTED, errno.EPROTO]
            with capturedLogs() as events:
                listener.doRead()
            assert not events
            assert (len(factory.served), listener.pauses) == (1, 0)
            assert watcher.readers == {listener}
            factory.served[0].transport.connectionLost(_GONE)


def test_a_flood_of_clients_leaves_others_their_turn() -> None:
    """So many accepts, then whoever else has something to do."""
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.ECONNABORTED] * 1000
        listener.doRead()
        assert sock.asked == ACCEPTS_PER_TURN
        assert watcher.readers == {listener}


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
@pytest_twisted.ensureDeferred
async def test_an_accept_that_is_refused_is_made_in_the_plain_way(
    family: int, number: int, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client's connection is as any other: what it is, and what it is known by."""
    factory = Greeters()
    if family == socket.AF_UNIX:
        port: Any = await UNIXListenerEndpoint(reactor, str(tmp_socket), 16).listen(
            factory
        )
        address: Any = str(tmp_socket)
    else:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        port = await listen_tcp(host, factory)
        address = where(port)
    monkeypatch.setattr(port, "_accept", refuse(number))
    pauses = port.pauses
    with closing(socket.socket(family)) as client:
        client.connect(address)
        assert await answer(client) == b"hello"
        [greeter] = factory.served
        assert greeter.blocks_or_is_inherited == (False, False)
        if family != socket.AF_UNIX:
            assert greeter.options == (True, True)
            assert (greeter.remote.host, greeter.remote.port) == client.getsockname()[
                :2
            ]
    # Nobody waits, which is no reason to pause.
    port.doRead()
    assert port.pauses == pauses
    await port.stopListening()


def test_a_client_that_left_before_it_was_accepted_plainly_is_skipped() -> None:
    """accept(2) alone does not say its name, and then nobody knows it."""
    with scripted() as (listener, sock, _, factory):
        reset(connect(listener.getHost().port))  # type: ignore[attr-defined]
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            sock.script = [errno.EPERM] * 3
            before = descriptors()
            with capturedLogs() as events:
                listener.doRead()
                assert descriptors() == before
                listener.doRead()
            assert not events
            assert (len(factory.served), listener.pauses) == (1, 0)
            factory.served[0].transport.connectionLost(_GONE)


@pytest.mark.parametrize("number", [*REFUSALS, errno.EIO])
def test_an_accept_that_is_refused_in_every_way_is_no_busy_loop(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client stays in the queue, and would be reported again and again.

    One line, and not for each time.
    """
    with scripted() as (listener, sock, watcher, _):
        sock.script = [number] * 2
        monkeypatch.setattr("relayd.listening.accept", refuse(number))
        with capturedLogs() as events:
            listener.doRead()
            assert watcher.readers == set()
            watcher.advance(PAUSE)
            assert watcher.readers == {listener}
            listener.doRead()
        assert watcher.readers == set()
        [line] = [formatEvent(event) for event in events]
        assert line.endswith(
            f": accept failed: {os.strerror(number)}; clients wait"
            " (paused 1 times so far; tried again after 0.1 s)"
        )
        watcher.advance(PAUSE)
        assert watcher.readers == {listener}


def test_a_table_that_is_full_for_the_plain_way_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.EPERM]
        monkeypatch.setattr("relayd.listening.accept", refuse(errno.EMFILE))
        with capturedLogs() as events:
            listener.doRead()
        assert "raise the limit with ulimit -n" in formatEvent(events[0])
        watcher.advance(PAUSE)


def test_a_limit_that_is_not_told_is_found_out_by_accept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """getrlimit(2) is refused: the table counts as large enough."""
    exhaustion = _Exhaustion(Clock())
    monkeypatch.setattr(resource, "getrlimit", refuse(errno.EPERM))
    assert not exhaustion.reached(1 << 20)


@pytest_twisted.ensureDeferred
async def test_a_turn_without_clients_does_nothing() -> None:
    """A client may be gone between the event and the accept."""
    port = await listen_tcp("127.0.0.1", Greeters())
    pauses = port.pauses
    port.doRead()
    await turns(2)
    assert port.pauses == pauses
    assert await greeted(where(port))
    await port.stopListening()
