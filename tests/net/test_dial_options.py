"""What is set on sockets before they are connected, and what can't be."""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.internet import error, reactor

from relayd.core.names import check_interface
from relayd.net import dial_options
from relayd.net.dial_options import DialOptions, check_source
from relayd.net.dialing import SocketEndpoint
from relayd.net.happy_eyeballs import NameEndpoint
from relayd.net.keepalive import Keepalive
from relayd.net.resolving import Resolver
from relayd.net.with_options import having
from relayd.plane.endpoints import PlaneSocketEndpoint
from tests.conftest import descriptors
from tests.support.contracts import Recorder
from tests.support.dials import failed, making, over
from tests.support.process import Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")

IPV4, IPV6 = socket.AF_INET, socket.AF_INET6

#: IP_BIND_ADDRESS_NO_PORT, ip(7).
NO_PORT = (socket.IPPROTO_IP, 24, 1)


class Refusing:
    """A socket that notes what is set, and refuses one option or to be bound."""

    def __init__(self, option: int | None = None, number: int = 0) -> None:
        self.refused, self.number = option, number
        self.calls: list[Any] = []

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self.calls.append((level, option, value))
        if option == self.refused:
            raise OSError(self.number, "what the system calls it")

    def bind(self, address: Any) -> None:
        self.calls.append(address)
        if self.refused is None and self.number:
            raise OSError(self.number, "what the system calls it")


@pytest.fixture(params=[SocketEndpoint, PlaneSocketEndpoint])
def kind(request: pytest.FixtureRequest) -> type[SocketEndpoint]:
    """Who dials."""
    return request.param  # type: ignore[no-any-return]


# -- values


@pytest.mark.parametrize(
    "text", ["192.0.2.1", "127.0.0.2", "2001:db8::1", "::1", "fe80::1%lo"]
)
def test_addresses_that_can_be_one(text: str) -> None:
    assert check_source(text) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", ""),
        ("db", ""),
        ("10.0.0.5:80", ""),
        ("[::1]", ""),
        ("10.0.0.0/8", ""),
        ("0.0.0.0", ": it is not that of one host"),
        ("::", ": it is not that of one host"),
        ("224.0.0.1", ": it is not that of one host"),
        ("ff02::1", ": it is not that of one host"),
        ("255.255.255.255", ": it is not that of one host"),
        ("::ffff:10.0.0.5", ": this one is 10.0.0.5"),
    ],
)
def test_and_those_that_can_t(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="expected an address of this machine") as said:
        check_source(text)
    assert str(said.value).endswith(f"2001:db8::1{why}")


@pytest.mark.parametrize("name", ["eth1", "lo", "br-0123456789ab", "wg0.100", "é"])
def test_names_of_interfaces(name: str) -> None:
    assert check_interface(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "a b", "eth0:1", ".", "..", "a" * 16, "é" * 8, "a\n", "%d"]
)
def test_no_interface_has_such_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="expected the name of an interface"):
        check_interface(name)


@pytest.mark.parametrize(
    "values",
    [
        {"source4": "::1"},
        {"source6": "127.0.0.1"},
        {"source4": "0.0.0.0"},
        {"interface": "a/b"},
        {"mark": 0},
        {"mark": 1 << 32},
        {"user_timeout": -1},
    ],
    ids=str,
)
def test_values_that_can_t_be_are_refused_when_it_is_made(
    values: dict[str, Any],
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - attrs says some of them
        DialOptions(**values)


def test_addresses_of_either_family() -> None:
    assert DialOptions.of(["::1", "127.0.0.1"], "lo", 7) == DialOptions(
        source4="127.0.0.1", source6="::1", interface="lo", mark=7
    )
    assert DialOptions.of() == DialOptions()


# -- on a socket


def test_all_of_them_are_set_before_it_is_bound() -> None:
    sock = Refusing()
    options = DialOptions.of(["127.0.0.2"], "lo", 0xFFFF_FFFF)
    options.prepare(sock, IPV4)
    assert sock.calls == [
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0"),
        (socket.SOL_SOCKET, socket.SO_MARK, b"\xff\xff\xff\xff"),
        NO_PORT,
        ("127.0.0.2", 0),
    ]


def test_each_family_has_its_own_address() -> None:
    options = DialOptions.of(["127.0.0.2", "::1"])
    sock = Refusing()
    options.prepare(sock, IPV6)
    assert sock.calls == [NO_PORT, ("::1", 0)]


def test_a_link_local_address_has_its_scope() -> None:
    sock = Refusing()
    DialOptions(source6="fe80::1%lo").prepare(sock, IPV6)
    assert sock.calls[-1] == ("fe80::1", 0, 0, socket.if_nametoindex("lo"))


def test_a_family_without_an_address_is_not_dialled() -> None:
    """And not from whatever address the kernel would take."""
    for given, other, said in (("127.0.0.2", IPV6, "IPv6"), ("::1", IPV4, "IPv4")):
        options = DialOptions.of([given])
        with pytest.raises(OSError, match=f"no source is an {said} address"):
            options.prepare(Refusing(), other)
    assert DialOptions(mark=7).source(IPV4) is None


def test_unix_sockets_have_none() -> None:
    sock = Refusing()
    everything = DialOptions.of(["127.0.0.2"], "lo", 7)
    everything = attrs.evolve(everything, keepalive=Keepalive(), user_timeout=30.0)
    one, other = socket.socketpair()
    with one, other:
        everything.prepare_stream(one, socket.AF_UNIX)
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    everything.prepare(sock, socket.AF_UNIX)
    assert sock.calls == []


def test_a_kernel_without_late_ports_binds_all_the_same() -> None:
    """Before Linux 4.2, or in a sandbox."""
    sock = Refusing(24, errno.ENOPROTOOPT)
    DialOptions(source4="127.0.0.2").prepare(sock, IPV4)
    assert sock.calls[-1] == ("127.0.0.2", 0)


@pytest.mark.parametrize(
    ("options", "refused", "number", "said"),
    [
        (
            DialOptions(mark=7),
            *(socket.SO_MARK, errno.EPERM),
            "mark 7 takes the right CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17",
        ),
        (
            DialOptions(interface="eth1"),
            *(socket.SO_BINDTODEVICE, errno.EPERM),
            "interface 'eth1' takes the right CAP_NET_RAW before Linux 5.7",
        ),
        (
            DialOptions(interface="eth1"),
            *(socket.SO_BINDTODEVICE, errno.ENODEV),
            "interface 'eth1': there is none of that name",
        ),
        (
            DialOptions(mark=7),
            *(socket.SO_MARK, errno.ENOPROTOOPT),
            "mark 7: what the system calls it",
        ),
        (
            DialOptions(source4="192.0.2.1"),
            *(None, errno.EADDRNOTAVAIL),
            "source '192.0.2.1' is no address of this machine",
        ),
        (
            DialOptions(source4="192.0.2.1"),
            *(None, errno.EADDRINUSE),
            "source '192.0.2.1': what the system calls it",
        ),
    ],
)
def test_what_is_not_possible_is_named(
    options: DialOptions, refused: int | None, number: int, said: str
) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        options.prepare(Refusing(refused, number), IPV4)
    assert (caught.value.errno, caught.value.strerror) == (number, said)


def test_a_scope_that_does_not_exist() -> None:
    with pytest.raises(OSError, match="source 'fe80::1%nowhere0'"):
        DialOptions(source6="fe80::1%nowhere0").check()


def test_other_systems_lack_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_options, "_MARK", None)
    with pytest.raises(OSError, match="mark 7 needs Linux"):
        DialOptions(mark=7).check()


def test_a_check_tries_them_and_leaves_nothing() -> None:
    before = descriptors()
    DialOptions.of(["127.0.0.2", "::1"], "lo").check()
    DialOptions().check()
    for options in (DialOptions(source4="192.0.2.1"), DialOptions(interface="no-such")):
        with pytest.raises(OSError, match="no address of|none of that name"):
            options.check()
    assert descriptors() == before


# -- endpoints


def test_without_options_there_is_no_class_of_its_own(kind: Any) -> None:
    """And so nothing to ask for each dial."""
    assert kind.options is None
    assert having(kind, None) is kind
    assert having(kind, DialOptions()) is kind


def test_servers_with_the_same_options_share_a_class(kind: Any) -> None:
    made = having(kind, DialOptions(source4="127.0.0.2"))
    assert made is having(kind, DialOptions(source4="127.0.0.2"))
    assert made is not having(kind, DialOptions(source4="127.0.0.3"))
    assert issubclass(made, kind)
    assert made.__name__ == f"{kind.__name__}WithOptions"


@pytest.mark.parametrize(
    ("family", "source"), [(IPV4, "127.0.0.2"), (IPV6, "::1"), (IPV4, "127.9.9.9")]
)
@pytest_twisted.ensureDeferred
async def test_a_server_sees_the_source(kind: Any, family: int, source: str) -> None:
    options = DialOptions.of([source])
    with Server(family) as server:
        protocol = Recorder()
        where = having(kind, options)(reactor, family, server.socket.getsockname())
        await where.connect(making(protocol))
        with server.accept() as peer:
            assert peer.getpeername()[0] == source
            ours = protocol.transport.getHost()
            assert (ours.host, ours.port) == peer.getpeername()[:2]
        await over(protocol)


@pytest_twisted.ensureDeferred
async def test_a_connection_has_its_options(kind: Any) -> None:
    """From its beginning."""
    options = DialOptions(
        interface="lo", keepalive=Keepalive(7, 8, 9), user_timeout=30.5
    )
    with Server() as server:
        protocol = Recorder()
        made = having(kind, options)
        where = made(reactor, IPV4, server.socket.getsockname())
        await where.connect(making(protocol))
        sock, tcp = protocol.transport.getHandle(), socket.IPPROTO_TCP
        assert sock.getsockopt(tcp, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(tcp, socket.TCP_KEEPIDLE) == 7
        assert sock.getsockopt(tcp, socket.TCP_KEEPINTVL) == 8
        assert sock.getsockopt(tcp, socket.TCP_KEEPCNT) == 9
        assert sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 30_500
        device = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
        assert device.rstrip(b"\0") == b"lo"
        server.accept().close()
        await over(protocol)


@pytest.mark.parametrize(
    ("options", "family", "said"),
    [
        (DialOptions(source4="192.0.2.1"), IPV4, "'192.0.2.1' is no address of this"),
        (DialOptions(source4="127.0.0.2"), IPV6, "no source is an IPv6 address"),
        (DialOptions(interface="no-such"), IPV4, "there is none of that name"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_dial_that_is_not_possible_says_why(
    kind: Any, options: DialOptions, family: int, said: str
) -> None:
    """An address may go while the relay runs; its socket is closed."""
    with Server(family) as server:
        before = descriptors()
        where = having(kind, options)(reactor, family, server.socket.getsockname())
        problem = await failed(where.connect(making(Recorder())))
        assert isinstance(problem, error.ConnectError)
        assert said in str(problem)
        assert descriptors() == before


@pytest_twisted.ensureDeferred
async def test_of_a_name_the_addresses_with_a_source_are_dialled(kind: Any) -> None:
    """At once: that one can't be dialled is known without a packet."""
    with Server(IPV6) as other, Server() as server:
        found = [
            (int(each.socket.family), 0, 0, "", each.socket.getsockname())
            for each in (other, server)
        ]
        port = server.socket.getsockname()[1]
        resolver = Resolver(reactor, lambda _: found)
        protocol = Recorder()
        made = having(kind, DialOptions(source4="127.0.0.2"))
        where = NameEndpoint(reactor, "db", port, resolver, made)
        await where.connect(making(protocol))
        with server.accept() as peer:
            assert peer.getpeername()[0] == "127.0.0.2"
        await over(protocol)


@pytest_twisted.ensureDeferred
async def test_a_unix_server_is_dialled_without(kind: Any, tmp_socket: Path) -> None:
    with Server(socket.AF_UNIX, str(tmp_socket)) as server:
        protocol = Recorder()
        made = having(kind, DialOptions(source4="192.0.2.1", user_timeout=30.0))
        await made(reactor, socket.AF_UNIX, str(tmp_socket)).connect(making(protocol))
        server.accept().close()
        await over(protocol)
