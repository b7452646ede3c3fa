"""Listening and dialling on the plane, on a reactor that stands still.

What they share with those on Twisted's transports is tested with those, in
`tests/net/test_listener.py` and `tests/net/test_dialing.py`; here is what the plane has
to do for it, and what may go wrong between them.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error, reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, _SystemdParser
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.python.systemd import ListenFDs
from zope.interface.verify import verifyObject

from relayd.core.errors import ListenError
from relayd.core.interfaces import INamedClients
from relayd.net.descriptors import PAUSE
from relayd.net.dialing import RETRY
from relayd.net.listener import ACCEPTS_PER_TURN
from relayd.net.listening import ListenerEndpoint
from relayd.operating.endpoints import (
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.plane.endpoints import (
    AdoptedListenerEndpoint,
    PlaneListener,
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from relayd.plane.poller import BATCHES_PER_TURN, Plane
from relayd.plane.transport import PlaneTransport, PlaneUNIXTransport
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures, descriptors
from tests.support.contracts import Recorder, until
from tests.support.dials import (
    BrokenFactory,
    BrokenProtocol,
    NoProtocol,
    full_unix_server,
    making,
    problem_of,
)
from tests.support.listeners import (
    REFUSALS,
    Faulty,
    Greeters,
    Unconnectable,
    answer,
    scripted,
)
from tests.support.process import (
    TWISTD,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    reset,
)
from tests.support.standing import Still, refuse, still

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")

__all__ = ["still"]

_LOST = Failure(CONNECTION_LOST)


def now(deferred: Deferred[Any]) -> Any:
    """The result of a Deferred that has one."""
    results: list[Any] = []
    deferred.addCallback(results.append)
    [result] = results
    return result


def refusal(endpoint: ListenerEndpoint) -> str:
    """What an endpoint says that can't listen."""
    problem = problem_of(endpoint.listen(Greeters()))
    assert type(problem) is ListenError
    return str(problem)


def greeted(still: Still, address: Any) -> bool:
    """Whether a client that connects there is served."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if family == socket.AF_INET and ":" in address[0]:
        family = socket.AF_INET6
    with closing(socket.socket(family)) as client:
        client.connect(address)
        return answered(still, client) == b"hello"


def answered(still: Still, client: socket.socket) -> bytes:
    """What a client is sent until its connection ends."""
    client.setblocking(False)
    got = bytearray()

    def ended() -> bool:
        with suppress(BlockingIOError):
            part = client.recv(100)
            got.extend(part)
            return not part
        return False

    still.until(ended, "the end of a connection")
    return bytes(got)


class Listening:
    """A listener on the plane of a reactor that stands still, and its factory."""

    def __init__(
        self, still: Still, endpoint: ListenerEndpoint, factory: Any = None
    ) -> None:
        self.still = still
        self.factory = factory or Greeters()
        self.port: Any = now(endpoint.listen(self.factory))

    @property
    def number(self) -> int:
        return int(self.port.getHost().port)

    def connect(self) -> socket.socket:
        return connect(self.number)

    def stop(self) -> None:
        self.port.stopListening()
        assert self.factory.running == 0


@contextmanager
def listening(still: Still, factory: Any = None) -> Iterator[Listening]:
    """Listens on a port of its own."""
    endpoint = PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16)
    made = Listening(still, endpoint, factory)
    try:
        yield made
    finally:
        made.stop()


# -- listening


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


# -- what the kernel is short of


class Short(socket.socket):
    """A listening socket whose accept fails as often as the script says."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.script: list[Exception] = []
        self.asked = 0

    def _accept(self) -> Any:
        self.asked += 1
        if self.script:
            raise self.script.pop(0)
        return super()._accept()  # type: ignore[misc]


def failing(number: int) -> OSError:
    """The error of a system call."""
    return OSError(number, os.strerror(number))


@contextmanager
def short(still: Still) -> Iterator[tuple[Listening, Short]]:
    """A listener whose socket may be told to fail."""
    sock = Short()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    endpoint = PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16)
    endpoint.bind = lambda: [(sock, lambda: None)]  # type: ignore[method-assign]
    made = Listening(still, endpoint)
    try:
        yield made, sock
    finally:
        made.stop()
    assert sock.fileno() == -1


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
)
def test_a_listener_without_descriptors_pauses(number: int, still: Still) -> None:
    """It is not watched meanwhile, or its client would be reported again and again."""
    with short(still) as (made, sock), made.connect() as client:
        pauses = made.port.pauses
        sock.script = [failing(number)]
        with capturedLogs() as events:
            still.turn()
        assert (sock.asked, made.port.pauses) == (1, pauses + 1)
        assert os.strerror(number) in formatEvent(events[-1])
        # Nobody else is there, so not even the plane.
        assert still.readers == set()
        still.settle()
        still.advance(PAUSE * 0.99)
        assert sock.asked == 1
        still.advance(PAUSE * 0.02)
        assert len(still.readers) == 1
        assert answered(still, client) == b"hello"


def test_a_listener_that_pauses_can_be_stopped(still: Still) -> None:
    with short(still) as (made, sock):
        sock.script = [failing(errno.EMFILE)]
        with made.connect():
            still.turn()
            made.port.stopListening()
        assert not still.getDelayedCalls()
        still.advance(10 * PAUSE)
        assert still.readers == set()


def test_a_listener_that_pauses_may_not_be_the_only_one(still: Still) -> None:
    """Its descriptor is not watched, though the plane is."""
    with short(still) as (made, sock), listening(still) as other:
        with made.connect() as client, closing(connect(other.number)) as another:
            sock.script = [failing(errno.EMFILE)]
            still.until(lambda: sock.asked)
            assert answered(still, another) == b"hello"
            assert sock.asked == 1
            still.advance(PAUSE)
            assert answered(still, client) == b"hello"


def test_a_listener_pauses_before_the_last_descriptor_is_taken(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client is served; dialling a server for it needs one more."""
    with listening(still) as made, made.connect(), made.connect():
        pauses = made.port.pauses
        with monkeypatch.context() as patched:
            patched.setattr(resource, "getrlimit", lambda _: (8, 8))
            still.turn()
            assert len(made.factory.served) == 1
            assert made.port.pauses == pauses + 1
            # And again, as long as there are so few.
            still.advance(PAUSE)
            assert made.port.pauses == pauses + 2
            still.turn()
            assert len(made.factory.served) == 1
        still.advance(PAUSE)
        still.until(lambda: len(made.factory.served) == 2)
        still.until(lambda: all("lost" in each.events for each in made.factory.served))


def test_an_error_that_nobody_knows_does_not_close_a_listener(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """It is logged with its traceback, and accepting goes on in a moment."""
    with short(still) as (made, sock), made.connect() as client:
        sock.script = [MemoryError()]
        still.turn()
        assert still.readers == set()
        logged_failures.take("MemoryError")
        still.advance(PAUSE)
        assert answered(still, client) == b"hello"


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", None])
def test_an_accept_that_is_refused_is_made_in_the_plain_way(
    host: str | None,
    number: int,
    still: Still,
    tmp_socket: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client's connection is as any other: what it is, and what it is known by."""
    made = Listening(
        still,
        PlaneTCPListenerEndpoint(still, host, 0, 16)
        if host
        else PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16),
    )
    monkeypatch.setattr(made.port, "_accept", refuse(number))
    pauses = made.port.pauses
    if host:
        client = connect(made.number, host)
    else:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_socket))
    with client:
        assert answered(still, client) == b"hello"
        [greeter] = made.factory.served
        assert greeter.blocks_or_is_inherited == (False, False)
        if host:
            kind = IPv6Address if ":" in host else IPv4Address
            assert greeter.remote == kind("TCP", *client.getsockname()[:2])
            assert greeter.options == (True, True)
    # Nobody waits, which is no reason to pause.
    made.port.doRead()
    assert made.port.pauses == pauses
    made.stop()


def test_an_accept_that_is_refused_in_every_way_is_no_busy_loop(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client stays in the queue, and its event would come again and again."""
    with listening(still) as made, made.connect() as client:
        pauses = made.port.pauses
        with monkeypatch.context() as patched:
            patched.setattr("relayd.net.listener.accept", refuse(errno.EPERM))
            patched.setattr(made.port, "_accept", refuse(errno.EPERM))
            with capturedLogs() as events:
                still.turn()
                assert still.readers == set()
                still.advance(PAUSE)
                still.turn()
            assert made.port.pauses == pauses + 2
        [line] = [formatEvent(event) for event in events]
        assert line.endswith(
            "accept failed: Operation not permitted; clients wait"
            f" (paused {pauses + 1} times so far; tried again after 0.1 s)"
        )
        still.advance(PAUSE)
        assert answered(still, client) == b"hello"


def test_a_client_that_the_plane_can_not_watch_is_turned_away(
    still: Still, logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is short of something; its socket is closed, the listener goes on."""
    with listening(still) as made:
        before = descriptors()
        with made.connect() as client:
            with monkeypatch.context() as patched:
                patched.setattr(Plane, "watch", refuse(errno.ENOSPC))
                still.turn()
            assert client.recv(1) == b""
        assert os.strerror(errno.ENOSPC) in logged_failures.take("could not be served")
        assert made.factory.served[0].events == []
        assert descriptors() == before
        assert greeted(still, ("127.0.0.1", made.number))


def test_a_listener_that_can_not_be_watched_is_an_error(
    still: Still, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the Deferred; nothing is left, not even the socket's file."""
    before = descriptors()
    unix = PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16)
    both = PlaneTCPListenerEndpoint(still, None, 0, 16)
    for endpoint, where in ((unix, f"unix:{tmp_socket}"), (both, "port 0 of all")):
        with monkeypatch.context() as patched:
            patched.setattr(select, "epoll", refuse(errno.EMFILE))
            says = refusal(endpoint)
        assert says.startswith(f"can't listen on {where}")
        assert says.endswith(os.strerror(errno.EMFILE))
    assert descriptors() == before
    assert not tmp_socket.exists()
    made = Listening(still, unix)
    assert greeted(still, str(tmp_socket))
    made.stop()


def test_a_listener_that_can_not_be_watched_again_waits_longer(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause; else it would be deaf from then on."""
    with short(still) as (made, sock), made.connect() as client:
        sock.script = [failing(errno.EMFILE)]
        still.turn()
        with monkeypatch.context() as patched:
            patched.setattr(select, "epoll", refuse(errno.EMFILE))
            still.advance(PAUSE)
            assert still.readers == set()
            assert len(still.getDelayedCalls()) == 1
        still.advance(PAUSE)
        assert answered(still, client) == b"hello"


@pytest_twisted.ensureDeferred
async def test_clients_outlast_a_full_descriptor_table() -> None:
    """For real: the kernel refuses descriptors, then has some again."""
    factory = Greeters()
    port: Any = await PlaneTCPListenerEndpoint(reactor, "127.0.0.1", 0, 16).listen(
        factory
    )
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
    assert [each for each in events if each["log_level"] is LogLevel.warn]
    await port.stopListening()


def test_twisteds_listener_outlasts_a_reactor_that_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same, without the plane."""
    with scripted() as (listener, sock, watcher, factory):
        sock.script = [errno.EMFILE]
        listener.doRead()
        with monkeypatch.context() as patched:
            patched.setattr(watcher, "addReader", refuse(errno.ENOSPC))
            watcher.advance(PAUSE)
            assert watcher.readers == set()
        watcher.advance(PAUSE)
        assert watcher.readers == {listener}
        assert factory.served == []


# -- adopted sockets


@contextmanager
def bound(family: int, address: Any) -> Iterator[socket.socket]:
    """A socket that listens, as systemd would pass it on."""
    with closing(socket.socket(family)) as sock:
        sock.bind(address)
        sock.listen(16)
        yield sock


ADOPTED = [
    (socket.AF_INET, ("127.0.0.1", 0)),
    (socket.AF_INET6, ("::1", 0)),
    (socket.AF_UNIX, "s"),
]


@pytest.mark.parametrize(("family", "address"), ADOPTED)
def test_a_socket_that_listens_already_is_adopted(
    family: int, address: Any, still: Still, tmp_path: Path
) -> None:
    """It stays its owner's: it goes on listening, and can be adopted again."""
    if family == socket.AF_UNIX:
        address = str(tmp_path / address)
    with bound(family, address) as sock:
        where = sock.getsockname()
        endpoint = AdoptedListenerEndpoint(still, sock.fileno())
        assert verifyObject(IStreamServerEndpoint, endpoint)
        for _ in range(2):
            before = descriptors()
            made = Listening(still, endpoint)
            assert greeted(still, where if family == socket.AF_UNIX else where[:2])
            tcp = family != socket.AF_UNIX
            [greeter] = made.factory.served
            assert type(greeter.transport) is (
                PlaneTransport if tcp else PlaneUNIXTransport
            )
            assert greeter.options == (tcp, tcp)
            made.stop()
            assert descriptors() == before
            # Whoever connects now waits for the next that adopts it.
            with closing(socket.socket(family)) as waiting:
                waiting.connect(where)
                made = Listening(still, endpoint)
                assert answered(still, waiting) == b"hello"
                made.stop()
        if family == socket.AF_UNIX:
            assert Path(address).exists()


def test_a_descriptor_that_can_not_be_listened_on_is_an_error(still: Still) -> None:
    """Nothing, a file, a socket that does not listen: said at once, and not leaked."""
    before = descriptors()
    with open(__file__) as file, closing(socket.socket()) as idle:
        for number, why in (
            (5000, os.strerror(errno.EBADF)),
            (file.fileno(), os.strerror(errno.ENOTSOCK)),
            (idle.fileno(), "it is a socket that does not listen"),
        ):
            says = refusal(AdoptedListenerEndpoint(still, number))
            assert says == f"can't listen on descriptor {number}: {why}"
    assert descriptors() == before


def test_a_systemd_endpoint_gets_the_planes_connections(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its index or its name; with Twisted's connections it is Twisted's own."""
    with bound(socket.AF_INET, ("127.0.0.1", 0)) as sock:
        environ = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "web",
        }
        passed = ListenFDs.fromEnvironment(environ, start=sock.fileno())
        monkeypatch.setattr(_SystemdParser, "_sddaemon", passed)
        for text in ("systemd:domain=INET:index=0", "systemd:domain=INET:name=web"):
            monkeypatch.setattr("relayd.operating.endpoints.obstacle", lambda _: "")
            endpoint: Any = listening_endpoint(parse_listener(text), still)
            assert type(endpoint) is AdoptedListenerEndpoint
            made = Listening(still, endpoint)
            assert greeted(still, sock.getsockname())
            made.stop()
            for transport, problem in (("twisted", ""), ("auto", "there is none")):
                monkeypatch.setattr(
                    "relayd.operating.endpoints.obstacle",
                    lambda _, problem=problem: problem,
                )
                theirs = listening_endpoint(
                    parse_listener(text),
                    still,
                    transport=transport,  # type: ignore[arg-type]
                )
                assert type(theirs) is AdoptedStreamServerEndpoint


#: Puts the descriptor that it is told of where systemd has it, and becomes the rest.
_AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_relay_serves_the_socket_that_systemd_passes_on() -> None:
    """In a process of its own, as the environment says."""
    with bound(socket.AF_INET, ("127.0.0.1", 0)) as sock, Server() as server:
        passed = sock.fileno()
        running = RelayProcess(
            *("--listen", "systemd:domain=INET:name=web", "--dest", server.address),
            twistd=(
                *(sys.executable, "-c", _AS_SYSTEMD, str(passed)),
                *(TWISTD, "-n", "--pidfile="),
            ),
            env={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"},
            pass_fds=[passed],
        )
        try:
            assert running.port == sock.getsockname()[1]
            with connect(running.port) as client, server.accept() as peer:
                client.sendall(b"request")
                assert read_exactly(peer, 7) == b"request"
                peer.sendall(b"response")
                peer.close()
                assert read_all(client) == b"response"
            running.ended("done")
            running.signal()
            assert running.wait() == 0
        finally:
            running.stop()
        # The next one gets it as it was: it was never closed.
        with connect(sock.getsockname()[1]):
            pass


# -- dialling


def dialling(
    still: Still, server: Server, factory: Factory | Protocol | None = None
) -> Deferred[Any]:
    """A dial of `server`."""
    if not isinstance(factory, Factory):
        factory = making(factory or Recorder())
    where = server.socket.getsockname()
    return PlaneSocketEndpoint(still, server.socket.family, where).connect(factory)


def ended(still: Still, protocol: Recorder) -> None:
    """Wait for the peer's end of data, and close."""
    still.until(lambda: "eof" in protocol.events)
    protocol.transport.loseConnection()
    assert protocol.lost


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


# -- by their addresses


def test_short_forms_are_the_planes(
    still: Still, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what people write to bytes that move, both TCP and UNIX."""
    monkeypatch.setattr("relayd.operating.endpoints.obstacle", lambda _: "")
    unix: Callable[..., Any] = lambda: parse_listener(f"unix:{tmp_socket}")  # noqa: E731
    for where in (parse_listener("127.0.0.1:0"), unix()):
        endpoint: Any = listening_endpoint(where, still)
        made = Listening(still, endpoint)
        host = made.port.getHost()
        text = f"unix:{tmp_socket}" if hasattr(host, "name") else f":{host.port}"
        protocol = Recorder()
        dialing = dialing_endpoint(parse_destination(text), still).connect(
            making(protocol)
        )
        still.until(lambda: protocol.data == b"hello")  # noqa: B023
        assert now(dialing) is protocol
        ended(still, protocol)
        assert isinstance(protocol.transport, PlaneTransport)
        still.until(lambda: made.factory.served[0].lost)  # noqa: B023
        made.stop()
