"""The last segment of a dial's handshake travels with the first bytes.

A relay on the plane of a reactor that stands still: a client connects and sends before
the relay has its turn, so that it is certain what it has said by then.  The server's
kernel counts the segments that it has received (TCP_INFO); they are compared with those
of a client that talks to it directly, whose handshake ends with a segment of its own.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed

from relayd.core.pauses import ASKED
from relayd.core.session import Ending, Session
from relayd.net import handshake_ack
from relayd.net.happy_eyeballs import Dialer, NameEndpoint
from relayd.plane.endpoints import (
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from relayd.plane.poller import Plane
from relayd.plane.transport import PlaneTransport
from relayd.preludes.socks4 import REPLY_SIZE, Command, write_request
from relayd.socks4 import Socks4Factory
from relayd.stream.attempt import UpstreamLeg
from relayd.tcp import RelayFactory, RelayProtocol
from tests.support.dials import closed_server
from tests.support.live_relays import full_backlog
from tests.support.plane_listeners import answered, now
from tests.support.policies import policy
from tests.support.process import PATIENCE, Server, read_exactly, reset
from tests.support.relays import Witness
from tests.support.segments import directly, segments
from tests.support.standing import Still, refuse, still

__all__ = ["still"]

#: Seconds: an ACK that waits for bytes waits for 40 ms, or for 200.
SOON = 0.02

#: Tries, of which the quickest counts: the machine may be busy.
TRIES = 5


def endpoint(still: Still, server: Server) -> PlaneSocketEndpoint:
    """What dials a server."""
    sock = server.socket
    return PlaneSocketEndpoint(still, sock.family, sock.getsockname())


class Running:
    """A relay on the plane.

    :param upstream: what it dials.
    """

    def __init__(
        self,
        still: Still,
        upstream: Any,
        listener: Any,
        observer: Any = None,
        **options: Any,
    ) -> None:
        self.still = still
        self.witness: Witness = observer or Witness()
        options["observer"] = self.witness
        self.factory: Any = (
            RelayFactory(upstream, clock=still, **options)
            if upstream is not None
            else Socks4Factory(still, **options)
        )
        if listener is None:
            listener = PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16)
        self.port = now(listener.listen(self.factory))

    def connect(self, said: bytes = b"") -> socket.socket:
        """A client that has said this before the relay has its turn."""
        here = self.port.getHost()
        if hasattr(here, "name"):
            client = socket.socket(socket.AF_UNIX)
            client.connect(here.name)
        else:
            client = socket.create_connection((here.host, here.port), PATIENCE)
        client.settimeout(PATIENCE)
        client.sendall(said)
        return client

    @property
    def session(self) -> Session:
        [session] = self.witness.sessions
        return session

    def heard(self, what: str) -> bool:
        """Whether that is the last that was heard."""
        return self.witness.heard[-1:] != [] and self.witness.heard[-1].startswith(what)

    def close(self) -> None:
        self.port.stopListening()
        self.factory.abort_all()
        self.still.settle()
        assert not self.factory.sessions


@contextmanager
def relaying(
    still: Still, upstream: Any, listener: Any = None, **options: Any
) -> Iterator[Running]:
    """A relay for the length of a block."""
    if isinstance(upstream, Server):
        upstream = endpoint(still, upstream)
    with closing(Running(still, upstream, listener, **options)) as running:
        yield running


@contextmanager
def proxying(still: Still, **options: Any) -> Iterator[Running]:
    """A SOCKS4 proxy, likewise."""
    dialer = Dialer(still, PlaneSocketEndpoint)
    options = {"policy": policy(guarded=False), **options}
    with relaying(still, None, dialer=dialer, **options) as running:
        yield running


def connect_to(server: Server) -> bytes:
    """A SOCKS4 request for a server."""
    port = server.socket.getsockname()[1]
    return write_request(Command.CONNECT, "127.0.0.1", port, b"joe")


@contextmanager
def session(still: Still, server: Server, client: socket.socket) -> Iterator[Any]:
    """The server's end of a session, which the server ends after the block."""
    still.until(lambda: select.select([server.socket], [], [], 0)[0])
    with closing(client):
        with closing(server.accept()) as peer:
            yield peer
        answered(still, client)
    still.settle()


def held_back(still: Still, server: Server, client: socket.socket) -> bool:
    """Whether the ACK came with the request; ends the session."""
    with session(still, server, client) as peer:
        assert read_exactly(peer, 7) == b"request"
        missing = directly(server) - segments(peer)
    assert missing in (0, 1)
    return bool(missing)


# -- with the first bytes


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_request_comes_with_the_handshakes_ack(family: int, still: Still) -> None:
    """One segment less than of a client that connects and then sends."""
    with Server(family) as server, relaying(still, server) as running:
        assert held_back(still, server, running.connect(b"request"))
        assert running.session.ending is Ending.DONE
        assert (running.session.up.read, running.session.up.written) == (7, 7)


def test_of_an_ipv6_client(still: Still) -> None:
    listener = PlaneTCPListenerEndpoint(still, "::1", 0, 16)
    with Server() as server, relaying(still, server, listener) as running:
        assert held_back(still, server, running.connect(b"request"))


@pytest.mark.usefixtures("far")
def test_where_the_dial_takes_time(still: Still) -> None:
    """What was read meanwhile is held, and goes with it."""
    with Server() as server, relaying(still, server) as running:
        assert held_back(still, server, running.connect(b"request"))


def test_bytes_behind_a_socks_request(still: Still) -> None:
    """They were read with it, and are held."""
    with Server() as server, proxying(still) as running:
        client = running.connect(connect_to(server) + b"request")
        assert held_back(still, server, client)


def test_bytes_that_come_while_a_socks_request_is_judged(still: Still) -> None:
    """They are not read before the server is dialled."""
    clients: list[socket.socket] = []

    class Slow:
        def admit(self, user_id: bytes, session: Session) -> None:
            """Anybody."""

        def permit(self, *_: Any) -> None:
            clients[0].sendall(b"request")

    with Server() as server, proxying(still, policy=Slow()) as running:
        clients.append(running.connect(connect_to(server)))
        assert held_back(still, server, clients[0])


def test_an_address_behind_one_that_refuses(still: Still) -> None:
    """Each attempt at a name's addresses asks anew."""
    gone = closed_server().socket.getsockname()
    with Server() as server:
        addresses = [(socket.AF_INET, gone), (2, server.socket.getsockname())]

        class Found:
            def addresses(self, *_: Any) -> Deferred[list[Any]]:
                return succeed(list(addresses))

        resolver: Any = Found()
        where = NameEndpoint(still, "a.example", 1, resolver, PlaneSocketEndpoint)
        with relaying(still, where) as running:
            assert held_back(still, server, running.connect(b"request"))
    assert not still.getDelayedCalls()


def test_more_than_a_read_takes(still: Still) -> None:
    """The rest follows by its events."""
    data = bytes(range(256)) * 2000
    with Server() as server, relaying(still, server) as running:
        client = running.connect(data[:200_000])
        with session(still, server, client) as peer:
            peer.setblocking(False)
            client.setblocking(False)
            sent, got = 200_000, bytearray()

            def moved() -> bool:
                nonlocal sent
                if select.select([], [client], [], 0)[1] and sent < len(data):
                    sent += client.send(data[sent:])
                if select.select([peer], [], [], 0)[0]:
                    got.extend(peer.recv(1 << 20))
                return len(got) == len(data)

            still.until(moved)
            assert got == data


def test_an_end_behind_them(still: Still) -> None:
    """Which the same read can't see: its event reports it."""
    with Server() as server, relaying(still, server) as running:
        client = running.connect(b"request")
        client.shutdown(socket.SHUT_WR)
        with session(still, server, client) as peer:
            assert read_exactly(peer, 7) == b"request"
            still.until(lambda: select.select([peer], [], [], 0)[0])
            assert peer.recv(1) == b""
            peer.sendall(b"response")
            still.until(lambda: running.session.down.read == 8)
            assert read_exactly(client, 8) == b"response"
        assert running.session.ending is Ending.DONE


def test_nothing_but_an_end(still: Still) -> None:
    """A client that only listens: the server is told at once."""
    with Server() as server, relaying(still, server) as running:
        client = running.connect()
        client.shutdown(socket.SHUT_WR)
        still.turn()
        with session(still, server, client) as peer:
            still.until(lambda: select.select([peer], [], [], 0)[0])
            assert peer.recv(1) == b""
            peer.sendall(b"banner")
            still.until(lambda: running.session.down.read == 6)
            assert read_exactly(client, 6) == b"banner"


def test_an_urgent_byte_among_them(still: Still) -> None:
    """A read stops before it: what is behind comes by its event."""
    with Server() as server, relaying(still, server) as running:
        client = running.connect(b"before")
        client.send(b"!", socket.MSG_OOB)
        client.send(b"behind")
        with session(still, server, client) as peer:
            still.until(lambda: running.session.up.written == 13)
            assert read_exactly(peer, 13) == b"before!behind"


def test_a_reset_behind_them(still: Still) -> None:
    """They are delivered, and then the server is reset."""
    with Server() as server, relaying(still, server) as running:
        reset(running.connect(b"request"))
        still.until(lambda: running.heard("closed"))
        with closing(server.accept()) as peer:
            assert read_exactly(peer, 7) == b"request"
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
        assert running.session.ending is Ending.DOWNSTREAM_RESET


# -- without delay


def soon(attempt: Callable[[], float]) -> None:
    """The quickest of several attempts did not wait for a timer."""
    assert min(attempt() for _ in range(TRIES)) < SOON


def took(condition: Callable[[], bool]) -> float:
    """Seconds until it is true, without the relay having a turn."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + PATIENCE
        time.sleep(0.0005)
    return time.monotonic() - began


@pytest.fixture
def dials_held_back(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The dials whose ACK was held back."""
    found: list[Any] = []

    def hold_back(sock: socket.SocketType) -> None:
        found.append(sock.fileno())
        handshake_ack.hold_back(sock)

    monkeypatch.setattr("relayd.net.dialing.hold_back", hold_back)
    return found


@pytest.mark.parametrize("kind", ["relay", "proxy"])
def test_a_server_that_speaks_first_knows_at_once(
    kind: str, still: Still, dials_held_back: list[Any]
) -> None:
    """Its client has sent nothing to it: nothing is held back."""
    proxies = kind == "proxy"
    with (
        Server() as server,
        proxying(still) if proxies else relaying(still, server) as running,
    ):

        def attempt() -> float:
            client = running.connect(connect_to(server) if proxies else b"")
            still.until(lambda: running.heard("connected"))
            waited = took(lambda: bool(select.select([server.socket], [], [], 0)[0]))
            with session(still, server, client) as peer:
                assert segments(peer) == directly(server, b"")
                peer.sendall(b"banner")
                still.turn()
                if proxies:
                    read_exactly(client, REPLY_SIZE)
                assert read_exactly(client, 6) == b"banner"
            return waited

        soon(attempt)
    assert dials_held_back == []


@pytest.mark.parametrize("when", ["opened", "dialing", "connected"])
def test_a_client_that_is_paused(when: str, still: Still) -> None:
    """What it has sent is not read: the server hears of the connection all the same."""

    def pause(session: Session) -> None:
        [protocol] = running.factory.sessions.values()
        protocol.pause(ASKED)

    witness = Witness()
    setattr(witness, when, pause)
    with Server() as server, relaying(still, server, observer=witness) as running:

        def attempt() -> float:
            client = running.connect(b"request")
            still.turn()
            waited = took(lambda: bool(select.select([server.socket], [], [], 0)[0]))
            [protocol] = running.factory.sessions.values()
            assert protocol.session.up.read == 0
            protocol.resume(ASKED)
            with session(still, server, client) as peer:
                still.until(lambda: protocol.session.up.written == 7)
                assert read_exactly(peer, 7) == b"request"
            return waited

        soon(attempt)


@pytest.mark.parametrize("dial", ["near", "far"])
def test_a_server_that_answers_in_two_writes(
    dial: str, still: Still, request: pytest.FixtureRequest
) -> None:
    """With Nagle's algorithm the second waits for the ACK of the first."""
    if dial == "far":
        request.getfixturevalue("far")
    with Server() as server, relaying(still, server) as running:

        def attempt() -> float:
            client = running.connect(b"request")
            with session(still, server, client) as peer:
                assert read_exactly(peer, 7) == b"request"
                peer.send(b"head")
                peer.send(b"body")
                return took(lambda: at_relay(running, client) == b"headbody")

        soon(attempt)


def at_relay(running: Running, client: socket.socket) -> bytes:
    """What a client has got so far."""
    running.still.turn()
    try:
        return client.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


# -- where it is of no use


def test_a_unix_server(still: Still, tmp_socket: Path) -> None:
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        with relaying(still, server) as running:
            with session(still, server, running.connect(b"request")) as peer:
                still.until(lambda: running.session.up.written == 7)
                assert read_exactly(peer, 7) == b"request"


def test_a_unix_client(
    still: Still, tmp_socket: Path, dials_held_back: list[Any]
) -> None:
    """Its kernel does not say whether it has sent something."""
    listener = PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16)
    with Server() as server, relaying(still, server, listener) as running:
        with session(still, server, running.connect(b"request")) as peer:
            still.until(lambda: running.session.up.written == 7)
            assert read_exactly(peer, 7) == b"request"
    assert dials_held_back == []


def test_a_system_without_the_option(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake_ack, "QUICKACK", None)
    with Server() as server, relaying(still, server) as running:
        assert not held_back(still, server, running.connect(b"request"))


def test_what_is_refused_is_done_without(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel or a sandbox, each with an errno of its own."""

    class Refusing:
        """A socket whose options are refused."""

        getsockopt = setsockopt = staticmethod(refuse(errno.EPERM))

    sock: Any = Refusing()
    handshake_ack.hold_back(sock)
    handshake_ack.go_on(sock)
    made = PlaneTransport(Plane.of(still), sock, None, None, None)
    assert not made.has_unread()


@pytest.mark.parametrize("whose", ["client", "server"])
def test_a_program_that_reads_the_bytes(
    whose: str, still: Still, dials_held_back: list[Any]
) -> None:
    """It need not pass them on at once, nor in the call that brings them."""
    seen: list[bytes] = []

    class Reading:
        def dataReceived(self, data: bytes) -> None:
            seen.append(data)
            super().dataReceived(data)  # type: ignore[misc]

    class Client(Reading, RelayProtocol):
        """One whose bytes are read."""

    class Answered(RelayProtocol):
        upstream_leg = type("Reader", (Reading, UpstreamLeg), {})

    with Server() as server, relaying(still, server) as running:
        running.factory.protocol = Client if whose == "client" else Answered
        with session(still, server, running.connect(b"request")) as peer:
            still.until(lambda: running.session.up.written == 7)
            assert read_exactly(peer, 7) == b"request"
            peer.send(b"response")
            still.until(lambda: running.session.down.written == 8)
    assert seen == [b"request" if whose == "client" else b"response"]
    assert dials_held_back == []


# -- dials that come to nothing


def test_a_server_that_refuses(still: Still) -> None:
    gone = closed_server().socket.getsockname()
    where = PlaneSocketEndpoint(still, socket.AF_INET, gone)
    with relaying(still, where) as running:
        with closing(running.connect(b"request")) as client:
            assert answered(still, client) == b""
        assert running.session.ending is Ending.CONNECT_REFUSED


@pytest.mark.parametrize("end", ["leaves", "waits"])
def test_a_server_that_does_not_answer(end: str, still: Still) -> None:
    """The dial is over when its client has left, or its time is over."""
    with full_backlog() as address:
        host, _, port = address.rpartition(":")
        where = PlaneSocketEndpoint(still, socket.AF_INET, (host, int(port)))
        with relaying(still, where, connect_timeout=5) as running:
            client = running.connect(b"request")
            still.until(lambda: running.heard("dialing"))
            if end == "leaves":
                reset(client)
                still.until(lambda: running.heard("closed"))
                assert running.session.ending is Ending.CLIENT_LEFT
            else:
                still.settle()
                still.pump([1.0] * 8)
                assert answered(still, client) == b""
                client.close()
                assert running.session.ending is Ending.CONNECT_TIMEOUT
