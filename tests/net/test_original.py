"""Where clients meant to go, and endpoints that lead there."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from hypothesis import assume, given
from hypothesis import strategies as st
from twisted.internet import error, reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.errors import LeadsBack
from relayd.core.interfaces import ICaller, IHopListener, IOnBehalf
from relayd.core.names import name_of_original
from relayd.net.dialing import SocketEndpoint
from relayd.net.original import (
    OriginalEndpoint,
    OriginalNameEndpoint,
    destination_of,
    noting,
    original_destination,
    original_name,
    original_of,
)
from relayd.net.resolving import Resolver
from relayd.plane.endpoints import PlaneSocketEndpoint
from tests.conftest import descriptors
from tests.support.contracts import Recorder
from tests.support.dials import failed, making, over
from tests.support.process import Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")

IPV4, IPV6 = int(socket.AF_INET), int(socket.AF_INET6)

PORTS = st.integers(0, 65535)


class Accepted:
    """An accepted socket, and what connection tracking knows of it.

    :param known: by the level of the option; others are refused.
    """

    def __init__(self, family: int, here: Any, **known: bytes) -> None:
        self.family, self.here, self.known = family, here, known
        self.number = errno.ENOENT
        self.peer: Any = ("::ffff:192.0.2.7", 4000, 0, 0)

    def getpeername(self) -> Any:
        return self.peer

    def getsockname(self) -> Any:
        return self.here

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        found = self.known.get({0: "ip", 41: "ip6"}[level])
        if option != 80 or found is None:
            raise OSError(self.number, "no such entry")
        return found[:size]


def in4(host: str, port: int) -> bytes:
    """struct sockaddr_in."""
    packed = socket.inet_aton(host)
    return struct.pack("=H", IPV4) + struct.pack("!H", port) + packed + bytes(8)


def in6(host: str, port: int, scope: int = 0) -> bytes:
    """struct sockaddr_in6."""
    return (
        struct.pack("=H", IPV6)
        + struct.pack("!HI", port, 7)
        + socket.inet_pton(IPV6, host)
        + struct.pack("=I", scope)
    )


# -- what the kernel knows


@given(host=st.ip_addresses(v=4).map(str), port=PORTS)
def test_after_a_redirect(host: str, port: int) -> None:
    sock = Accepted(IPV4, ("192.168.0.2", 16000), ip=in4(host, port))
    assert original_destination(sock) == (IPV4, (host, port))


@given(host=st.ip_addresses(v=6), port=PORTS, scope=st.integers(0, 2**32 - 1))
def test_after_a_redirect_of_ipv6(host: Any, port: int, scope: int) -> None:
    assume(host.ipv4_mapped is None)
    sock = Accepted(IPV6, ("fd00::2", 16000, 0, 0), ip6=in6(str(host), port, scope))
    family, found = original_destination(sock)
    assert family == IPV6
    assert ipaddress.ip_address(found[0]) == host
    assert found[1:] == (port, 0, scope)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOPROTOOPT, errno.EINVAL])
@pytest.mark.parametrize(
    ("family", "here"),
    [(IPV4, ("192.0.2.1", 80)), (IPV6, ("2001:db8::1", 80, 0, 0))],
)
def test_where_nothing_was_changed(family: int, here: Any, number: int) -> None:
    """As under TPROXY; or connection tracking is not there."""
    sock = Accepted(family, here)
    sock.number = number
    assert original_destination(sock) == (family, here)


def test_an_ipv4_client_of_an_ipv6_listener() -> None:
    here = ("::ffff:192.168.0.2", 16000, 0, 0)
    sock = Accepted(IPV6, here, ip=in4("192.0.2.1", 80), ip6=in6("::1", 1))
    assert original_destination(sock) == (IPV4, ("192.0.2.1", 80))
    assert original_destination(Accepted(IPV6, here)) == (IPV4, ("192.168.0.2", 16000))


@given(host=st.ip_addresses(v=4), port=PORTS)
def test_any_of_them(host: ipaddress.IPv4Address, port: int) -> None:
    """As the kernel has its address, and Python writes it."""
    packed = bytes(10) + b"\xff\xff" + host.packed
    here = (socket.inet_ntop(IPV6, packed), port, 0, 0)
    assert original_destination(Accepted(IPV6, here)) == (IPV4, (str(host), port))


@pytest.mark.parametrize("here", ["fd00::2", "::ffff:127.0.0.1"])
def test_nobody_gets_to_this_machine_s_loopback_by_ipv6(here: str) -> None:
    """By REDIRECT, or by TPROXY, a packet of IPv6 to ::ffff:127.0.0.1."""
    told = {"ip6": in6("::ffff:127.0.0.1", 80)} if here == "fd00::2" else {}
    sock = Accepted(IPV6, (here, 80, 0, 0), **told)
    sock.peer = ("2001:db8::7", 4000, 0, 0)
    with pytest.raises(OSError, match="came by IPv6, to .::ffff:127.0.0.1.:80"):
        original_destination(sock)


@given(answer=st.binary(max_size=40))
def test_whatever_it_answers(answer: bytes) -> None:
    for family, here in ((IPV4, ("192.0.2.1", 80)), (IPV6, ("::1", 80, 0, 0))):
        found = original_destination(Accepted(family, here, ip=answer, ip6=answer))
        assert found[0] == family
        assert ipaddress.ip_address(found[1][0])
        assert 0 <= found[1][1] < 65536


def test_a_unix_socket_has_none() -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(OSError, match="by a UNIX socket"):
        original_destination(one)


@pytest.mark.parametrize("family", [IPV4, IPV6])
def test_a_real_socket_that_nobody_has_redirected(family: int) -> None:
    with Server(family) as server, socket.socket(family) as client:
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            there = server.socket.getsockname()
            assert original_destination(accepted) == (family, there)
            assert destination_of(accepted) == (family, there)
        with pytest.raises(OSError, match="Bad file descriptor|its connection is lost"):
            destination_of(accepted)


def test_a_transport_of_ours_that_is_lost() -> None:
    """It has no handle any more, or one that is closed."""
    lost: Any = SimpleNamespace(options_are_set=True, connected=False)
    lost.fileno = lambda: -1
    with pytest.raises(OSError, match="its connection is lost"):
        destination_of(lost)
    held = Accepted(IPV4, ("192.0.2.1", 80))
    kept: Any = SimpleNamespace(options_are_set=True, connected=True)
    kept.getHandle = lambda: held
    assert destination_of(kept) == (IPV4, ("192.0.2.1", 80))


# -- of sessions


def session(destination: str | None) -> Any:
    header = None
    if destination is not None:
        header = SimpleNamespace(destination=destination)
    return SimpleNamespace(header=header)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("192.0.2.1:80", (IPV4, ("192.0.2.1", 80))),
        ("[2001:db8::1]:443", (IPV6, ("2001:db8::1", 443, 0, 0))),
    ],
)
def test_what_a_balancer_says_counts(told: str, found: Any) -> None:
    assert original_of(session(told), None) == found
    assert original_name(session(told), None) == told


@pytest.mark.parametrize("header", [None, ""])
def test_without_a_word_of_a_balancer_the_socket_counts(header: str | None) -> None:
    """Also of its own connections: health checks."""
    with Server() as server, socket.socket() as client:
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            assert original_name(session(header), accepted) == server.address


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("0.0.0.0:80", "0.0.0.0:80 is no destination"),
        ("[::]:80", "[::]:80 is no destination"),
        ("192.0.2.1:0", "192.0.2.1:0 is no destination"),
        ("unix:/run/x", "its PROXY header names unix:/run/x"),
        (None, "its connection is lost, or has no socket"),
    ],
)
def test_what_is_none(told: str | None, said: str) -> None:
    with pytest.raises(OSError, match="^") as found:
        original_of(session(told), None)
    expected = f"where the client meant to go is not known: {said}"
    assert found.value.strerror == expected


# -- endpoints


@implementer(IOnBehalf, IHopListener)
class Client(Factory):
    """A factory for one protocol, and for a client that meant to go somewhere."""

    noisy = False

    def __init__(self, where: Any) -> None:
        self.where = where
        self.made = Recorder()
        self.told: list[str] = []
        self.hops: list[Any] = []

    def buildProtocol(self, addr: Any) -> Any:
        return self.made

    def client_host(self) -> str:
        raise AssertionError("nobody asks")

    def original(self) -> tuple[int, Any]:
        if isinstance(self.where, Exception):
            raise self.where
        return self.where  # type: ignore[no-any-return]

    def goes_to(self, endpoint: Any) -> None:
        self.told.append(getattr(endpoint, "peer_name", "a name"))

    def dial_started(self, sock: Any, address: Any) -> bool:
        self.hops.append(address)
        return False


@implementer(ICaller, IOnBehalf)
class Caller(Client):
    """The same without a Deferred."""

    def __init__(self, where: Any) -> None:
        super().__init__(where)
        self.build_leg = self.buildProtocol
        self.done: Deferred[Any] = Deferred()
        self.leg_connected = self.done.callback
        self.dial_failed = self.done.errback

    def speaks_first(self) -> bool:
        return False


@pytest.fixture(params=[SocketEndpoint, PlaneSocketEndpoint])
def kind(request: pytest.FixtureRequest) -> type[SocketEndpoint]:
    """Who dials."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", [IPV4, IPV6])
@pytest_twisted.ensureDeferred
async def test_where_the_client_meant_to_go(kind: Any, family: int) -> None:
    where = OriginalEndpoint(reactor, kind)
    assert where.peer_name == "original"
    with Server(family) as server:
        for made in (Client, Caller):
            client = made((family, server.socket.getsockname()))
            if isinstance(client, Caller):
                where.dial(client)
                await client.done
            else:
                await where.connect(client)
            assert client.told == [server.address]
            server.accept().close()
            await over(client.made)


@pytest_twisted.ensureDeferred
async def test_a_host_at_the_port_that_was_asked_for(kind: Any) -> None:
    where = OriginalEndpoint(reactor, kind, "127.0.0.1")
    assert where.peer_name == "127.0.0.1:original"
    with Server() as server:
        port = server.socket.getsockname()[1]
        for meant in ((IPV4, ("192.0.2.7", port)), (IPV6, ("2001:db8::7", port, 0, 0))):
            client = Client(meant)
            await where.connect(client)
            assert client.told == [server.address]
            server.accept().close()
            await over(client.made)


@pytest_twisted.ensureDeferred
async def test_a_name_at_the_port_that_was_asked_for(kind: Any) -> None:
    with Server() as server:
        found = [(IPV4, 0, 0, "", server.socket.getsockname())]
        resolver = Resolver(reactor, lambda _: found)
        where = OriginalNameEndpoint(reactor, kind, "db", resolver)
        client = Client((IPV4, ("192.0.2.7", server.socket.getsockname()[1])))
        await where.connect(client)
        assert client.told == ["a name"]
        server.accept().close()
        await over(client.made)


@pytest.mark.parametrize(
    "problem", [LeadsBack("round"), OSError(errno.EADDRNOTAVAIL, "unknown")]
)
@pytest_twisted.ensureDeferred
async def test_a_client_that_meant_to_go_nowhere(kind: Any, problem: Any) -> None:
    before = descriptors()
    resolver = Resolver(reactor, lambda _: [])
    for where in (
        OriginalEndpoint(reactor, kind),
        OriginalNameEndpoint(reactor, kind, "db", resolver),
    ):
        assert await failed(where.connect(Client(problem))) is problem
    caller = Caller(problem)
    assert OriginalEndpoint(reactor, kind).dial(caller) is None
    assert await failed(caller.done) is problem
    assert descriptors() == before


@pytest_twisted.ensureDeferred
async def test_a_program_without_a_client(kind: Any) -> None:
    resolver = Resolver(reactor, lambda _: [])
    for where in (
        OriginalEndpoint(reactor, kind),
        OriginalNameEndpoint(reactor, kind, "db", resolver),
    ):
        problem = await failed(where.connect(making(Recorder())))
        assert "it is dialled for no client" in str(problem)


@pytest_twisted.ensureDeferred
async def test_each_dial_that_takes_time_may_lead_back(kind: Any, far: None) -> None:
    """Whatever its address is."""
    with Server() as server:
        there = server.socket.getsockname()
        client = Client((IPV4, there))
        await OriginalEndpoint(reactor, kind).connect(client)
        assert client.hops == [there]
        server.accept().close()
        await over(client.made)


def test_the_class_that_notes(kind: Any) -> None:
    assert noting(kind) is noting(kind)
    assert issubclass(noting(kind), kind)
    assert noting(kind).__name__ == f"{kind.__name__}Noting"


@pytest.mark.parametrize("host", ["fe80::1%nowhere0", "db", "192.0.2.1:80"])
def test_a_host_that_is_no_address(host: str) -> None:
    with pytest.raises(OSError, match="Name or service not known|nor address"):
        OriginalEndpoint(reactor, SocketEndpoint, host)


def test_a_link_local_host_keeps_its_interface() -> None:
    where = OriginalEndpoint(reactor, SocketEndpoint, "fe80::1%lo")
    client = Client((IPV4, ("192.0.2.7", 80)))
    assert where._lead(client).address[0].startswith("fe80::1")
    assert where._lead(client).address[1:] == (80, 0, socket.if_nametoindex("lo"))


def test_its_names() -> None:
    assert name_of_original() == "original"
    assert name_of_original("192.168.0.10") == "192.168.0.10:original"
    assert name_of_original("2001:db8::1") == "[2001:db8::1]:original"
    assert name_of_original("db.example.com") == "db.example.com:original"


def test_destinations_are_kept_within_bounds() -> None:
    where = OriginalEndpoint(reactor, SocketEndpoint)
    for number in range(2000):
        client = Client((IPV4, (f"10.0.{number // 250}.{number % 250}", 80)))
        where._lead(client)
    assert where._dialer._one.cache_info().currsize == 1024


@pytest_twisted.ensureDeferred
async def test_an_address_that_can_t_be_dialled(kind: Any) -> None:
    caller = Caller((IPV4, ("255.255.255.255", 80)))
    OriginalEndpoint(reactor, kind).dial(caller)
    problem = await failed(caller.done)
    assert isinstance(problem, error.ConnectError)
    assert isinstance(Failure(problem), Failure)
