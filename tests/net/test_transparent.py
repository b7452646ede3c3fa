"""Sockets that are bound to the address of the client that is relayed."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import sys
from typing import Any

import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import error, reactor
from twisted.internet.protocol import Factory
from zope.interface import implementer

from relayd.core.errors import SHORTAGE
from relayd.core.interfaces import IOnBehalf
from relayd.net import dial_options, transparent
from relayd.net.dial_options import DialOptions, is_transparent, set_transparent
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import NameEndpoint
from relayd.net.resolving import Resolver
from relayd.net.transparent import be_client, client_of
from relayd.net.with_options import having
from relayd.plane.endpoints import PlaneSocketEndpoint
from tests.conftest import descriptors
from tests.support import rights
from tests.support.contracts import Recorder
from tests.support.dials import failed, making, over
from tests.support.process import Server, own_host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")

IPV4, IPV6 = socket.AF_INET, socket.AF_INET6
OPTIONS = DialOptions(transparent=True)

HOSTS = st.ip_addresses().map(str) | st.sampled_from(
    ["127.0.0.1", "0.0.0.0", "0.1.2.3", "127.255.255.255", "255.255.255.255"]
)


@implementer(IOnBehalf)
class OnBehalf(Factory):
    """A factory for one protocol, and for a client."""

    noisy = False

    def __init__(self, host: str, protocol: Any = None) -> None:
        self.host, self.made = host, protocol or Recorder()

    def buildProtocol(self, addr: Any) -> Any:
        return self.made

    def client_host(self) -> str:
        return self.host

    def original(self) -> tuple[int, Any]:
        raise AssertionError("nobody asks")

    def goes_to(self, endpoint: Any) -> None:
        raise AssertionError("nobody tells")


@pytest.fixture(params=[SocketEndpoint, PlaneSocketEndpoint])
def kind(request: pytest.FixtureRequest) -> type[SocketEndpoint]:
    """Who dials."""
    return request.param  # type: ignore[no-any-return]


# -- which addresses


def refusal(host: str, server: Any, sock: Any = None) -> OSError:
    with pytest.raises(OSError, match="^") as found:
        be_client(sock, server, host)
    assert found.value.errno in SHORTAGE, "the server would be blamed"
    assert "\n" not in found.value.strerror
    return found.value


@pytest.mark.parametrize(
    ("host", "server", "said"),
    [
        ("", "192.0.2.9", "the client has no address"),
        ("192.0.2.1", "2001:db8::9", "192.0.2.1 is IPv4, and the server's IPv6"),
        ("2001:db8::1", "192.0.2.9", "2001:db8::1 is IPv6, and the server's IPv4"),
        ("0.0.0.0", "192.0.2.9", "0.0.0.0 is not that of one host"),
        ("::", "2001:db8::9", ":: is not that of one host"),
        ("0.1.2.3", "192.0.2.9", "0.1.2.3 is not that of one host"),
        ("224.0.0.5", "192.0.2.9", "224.0.0.5 is not that of one host"),
        ("ff02::1", "2001:db8::9", "ff02::1 is not that of one host"),
        ("255.255.255.255", "192.0.2.9", "255.255.255.255 is not that of one host"),
        ("127.255.255.255", "127.0.0.1", "127.255.255.255 is not that of one host"),
        ("127.0.0.1", "198.51.100.9", "127.0.0.1 never leaves this machine"),
        ("::1", "2001:db8::9", "::1 never leaves this machine"),
        ("198.51.100.9", "198.51.100.9", "198.51.100.9 is the server's own"),
        ("fe80::1%lo", "2001:db8::9", "fe80::1%lo is known on its link only"),
    ],
)
def test_addresses_that_servers_can_t_be_dialled_from(
    host: str, server: str, said: str
) -> None:
    """Of some of them the kernel would take its own in their place."""
    where = (server, 80, 0, 0) if ":" in server else (server, 80)
    problem = refusal(host, where)
    assert problem.errno == errno.EADDRNOTAVAIL
    assert problem.strerror.startswith("transparent: the client")
    assert problem.strerror.endswith(said)


@given(host=HOSTS, server=st.sampled_from([("192.0.2.9", 80), ("2001:db8::9", 80, 0)]))
def test_any_address_is_bound_or_refused(host: str, server: Any) -> None:
    """In a word of ours, and nothing else is raised."""

    class Bound:
        at: Any = None

        def setsockopt(self, *_: Any) -> None: ...

        def bind(self, address: Any) -> None:
            self.at = address

    sock = Bound()
    try:
        be_client(sock, server, host)
    except OSError as problem:
        assert problem.errno == errno.EADDRNOTAVAIL
        assert problem.strerror.startswith("transparent: ")
        assert sock.at is None
        return
    here = ipaddress.ip_address(host)
    assert sock.at == (str(getattr(here, "ipv4_mapped", None) or here), 0)
    assert (":" in sock.at[0]) == (":" in server[0])


@rights.transparent
@given(host=HOSTS)
def test_the_kernel_takes_no_other_address(host: str) -> None:
    """For one that is fit."""
    is_ipv6 = ":" in host and ipaddress.IPv6Address(host).ipv4_mapped is None
    server: Any = ("::1", 9, 0, 0) if is_ipv6 else ("127.0.0.1", 9)
    family = IPV6 if is_ipv6 else IPV4
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        set_transparent(sock, family)
        try:
            be_client(sock, server, host)
            sock.connect(server)
        except OSError:
            return
        bound = sock.getsockname()[0].partition("%")[0]
        assert ipaddress.ip_address(bound) in (
            ipaddress.ip_address(host),
            getattr(ipaddress.ip_address(host), "ipv4_mapped", None),
        )


def test_an_address_that_needs_its_interface() -> None:
    problem = refusal("fe80::1%nowhere0", ("fe80::2", 80, 0, 1))
    assert "not from the client's address fe80::1%nowhere0: " in problem.strerror


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EADDRINUSE, "transparent: not from the client's address 192.0.2.1: no"),
        (errno.EACCES, "transparent: not from the client's address 192.0.2.1: no"),
        (errno.ENOBUFS, "no"),
    ],
)
def test_a_kernel_that_refuses_it(number: int, said: str) -> None:
    class Refusing:
        def setsockopt(self, *_: Any) -> None: ...

        def bind(self, _: Any) -> None:
            raise OSError(number, "no")

    problem = refusal("192.0.2.1", ("192.0.2.9", 80), Refusing())
    assert problem.strerror == said
    assert problem.errno == (number if number in SHORTAGE else errno.EADDRNOTAVAIL)


def test_who_dials_for_nobody() -> None:
    with pytest.raises(OSError, match="transparent: it is dialled for no client"):
        client_of(object())
    assert client_of(OnBehalf("192.0.2.1")) == "192.0.2.1"


# -- options


def test_the_option_is_of_the_family() -> None:
    calls: list[Any] = []

    class Sock:
        def setsockopt(self, *call: Any) -> None:
            calls.append(call)

    OPTIONS.prepare(Sock(), IPV4)
    OPTIONS.prepare_stream(Sock(), IPV6)
    OPTIONS.prepare(Sock(), socket.AF_UNIX)
    assert calls == [(0, 19, 1), (41, 75, 1)], "ip(7), linux/in.h, linux/in6.h"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EPERM, "transparent takes the right CAP_NET_RAW"),
        (errno.ENOPROTOOPT, "transparent: as the system calls it"),
    ],
)
def test_a_right_that_is_missing(
    number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sock(socket.socket):
        def setsockopt(self, *_: Any) -> None:
            raise OSError(number, "as the system calls it")

    monkeypatch.setattr(socket, "socket", Sock)
    with pytest.raises(OSError, match="^") as found:
        OPTIONS.check()
    assert (found.value.errno, found.value.strerror) == (number, said)


def test_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_options, "_LINUX", False)
    with pytest.raises(OSError, match="transparent needs Linux"):
        OPTIONS.prepare(None, IPV4)


def test_it_is_one_address_or_the_other() -> None:
    with pytest.raises(ValueError, match="leave out source"):
        DialOptions(transparent=True, source4="127.0.0.2")
    with pytest.raises(ValueError, match="leave out source"):
        DialOptions(transparent=True, source6="::1")


@rights.transparent
@pytest.mark.parametrize("family", [IPV4, IPV6])
def test_it_can_be_told(family: int) -> None:
    OPTIONS.check()
    with socket.socket(family) as sock:
        assert not is_transparent(sock)
        OPTIONS.prepare(sock, family)
        assert is_transparent(sock)
    with socket.socket(socket.AF_UNIX) as sock:
        assert not is_transparent(sock)


def test_the_class_of_its_sockets(kind: Any) -> None:
    made = having(kind, OPTIONS)
    assert made is having(kind, DialOptions(transparent=True))
    assert made is not having(kind, DialOptions(mark=7))
    assert issubclass(made, kind)


# -- dials


@rights.transparent
@pytest.mark.parametrize(
    ("family", "host"), [(IPV4, "127.0.0.5"), (IPV4, "127.9.8.7"), (IPV6, "::1")]
)
@pytest_twisted.ensureDeferred
async def test_the_server_sees_the_client(kind: Any, family: int, host: str) -> None:
    with Server(family) as server:
        made = having(kind, OPTIONS)
        factory = OnBehalf(host)
        where = made(reactor, family, server.socket.getsockname())
        await where.connect(factory)
        with server.accept() as peer:
            assert peer.getpeername()[0] == host
            assert is_transparent(factory.made.transport.getHandle())
            ours = factory.made.transport.getHost()
            assert (ours.host, ours.port) == peer.getpeername()[:2]
        await over(factory.made)


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_two_servers_may_have_the_same_port_of_a_client(kind: Any) -> None:
    """It is chosen as a socket is connected, not before: ip(7)."""
    with Server() as server:
        factory = OnBehalf("127.0.0.5")
        where = having(kind, OPTIONS)(reactor, IPV4, server.socket.getsockname())
        await where.connect(factory)
        with server.accept():
            sock = factory.made.transport.getHandle()
            assert sock.getsockopt(socket.IPPROTO_IP, 24)
        await over(factory.made)


@rights.transparent
@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("2001:db8::1", "is IPv6, and the server's IPv4"),
        ("", "the client has no address"),
        ("127.255.255.255", "is not that of one host"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_dial_that_is_not_possible(kind: Any, host: str, said: str) -> None:
    """Says why, is no fault of the server's, and leaves nothing."""
    with Server() as server:
        before = descriptors()
        where = having(kind, OPTIONS)(reactor, IPV4, server.socket.getsockname())
        problem = await failed(where.connect(OnBehalf(host)))
        assert isinstance(problem, error.ConnectError)
        assert said in str(problem)
        assert problem.osError == errno.EADDRNOTAVAIL
        assert descriptors() == before


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_client_all_of_whose_ports_are_taken(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that the kernel may choose for this server."""
    with Server() as server, socket.socket() as other:
        there = server.socket.getsockname()
        other.bind(("127.0.0.5", 0))
        other.connect(there)
        server.accept().close()
        port = other.getsockname()[1]
        made = having(kind, OPTIONS)
        prepare = made.prepare

        def one_port(self: Any, sock: Any, caller: Any) -> None:
            # IP_LOCAL_PORT_RANGE, ip(7): the lowest and the highest.
            both = struct.pack("=HH", port, port)
            sock.setsockopt(socket.IPPROTO_IP, 51, both)
            prepare(self, sock, caller)

        monkeypatch.setattr(made, "prepare", one_port)
        problem = await failed(
            made(reactor, IPV4, there).connect(OnBehalf("127.0.0.5"))
        )
        assert isinstance(problem, error.ConnectError)
        assert problem.osError == errno.EADDRNOTAVAIL
        said = f"transparent: the client has no port free for {server.address}"
        assert problem.args[0] == said


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_program_without_a_client(kind: Any) -> None:
    with Server() as server:
        where = having(kind, OPTIONS)(reactor, IPV4, server.socket.getsockname())
        problem = await failed(where.connect(making(Recorder())))
        assert "it is dialled for no client" in str(problem)


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_of_a_name_the_client_s_family_is_dialled(kind: Any) -> None:
    with Server(IPV6) as other, Server() as server:
        found = [
            (int(each.socket.family), 0, 0, "", each.socket.getsockname())
            for each in (other, server)
        ]
        resolver = Resolver(reactor, lambda _: found)
        factory = OnBehalf("127.0.0.5")
        port = server.socket.getsockname()[1]
        where = NameEndpoint(reactor, "db", port, resolver, having(kind, OPTIONS))
        await where.connect(factory)
        with server.accept() as peer:
            assert peer.getpeername()[0] == "127.0.0.5"
        await over(factory.made)


@rights.transparent
@pytest.mark.parametrize("turn", [1, -1])
@pytest_twisted.ensureDeferred
async def test_a_server_that_refuses_is_told_of(kind: Any, turn: int) -> None:
    """Whichever address was tried last: that one was not possible says less."""
    gone = (IPV4, (own_host(), 9)), (IPV6, ("::1", 9, 0, 0))
    found = [(int(family), 0, 0, "", where) for family, where in gone[::turn]]
    resolver = Resolver(reactor, lambda _: found)
    where = NameEndpoint(reactor, "db", 9, resolver, having(kind, OPTIONS))
    problem = await failed(where.connect(OnBehalf("127.0.0.5")))
    assert isinstance(problem, error.ConnectionRefusedError)


def test_nothing_of_it_is_remembered_without_bounds() -> None:
    assert transparent.check_host.cache_info().maxsize == transparent.REMEMBERED
