"""Whether an address is this machine's own: real sockets, and kernels that refuse."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.core.networks import Ip
from relayd.net import own_addresses
from relayd.net.own_addresses import (
    HOSTS_REMEMBERED,
    OWN_FOR,
    OwnHosts,
    address_towards,
    is_own,
)
from relayd.socks.destinations import ProxyPolicy
from tests.support.policies import (
    ANYWHERE,
    refusal,
)

#: RFC 5737 and 3849: these belong to no machine that is set up well.
NOBODYS = (IPv4Address("203.0.113.254"), IPv6Address("2001:db8::dead:beef"))


def addresses_of_this_machine() -> list[Ip]:
    """As far as they can be had: loopback, the kernel's list, the way outside."""
    found: list[Ip] = [IPv4Address("127.0.0.1"), IPv4Address("127.1.2.3")]
    table = Path("/proc/net/if_inet6")
    if table.exists():
        rows = [line.split() for line in table.read_text().splitlines()]
        # 20 is link-local, which takes its scope to be bound to.
        found += [IPv6Address(int(row[0], 16)) for row in rows if row[3] != "20"]
    for address in NOBODYS:
        try:
            found.append(ipaddress.ip_address(address_towards(address)))
        except OSError:
            continue
    return found


def test_own_addresses_are_told_from_others() -> None:
    """Loopback whole, those of the interfaces; not those of nobody."""
    own = addresses_of_this_machine()
    assert own
    assert [address for address in own if not is_own(address)] == []
    others = (*NOBODYS, IPv4Address(ANYWHERE))
    assert [address for address in others if is_own(address)] == []


def binds_anything(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A kernel that takes any address for its own, by its setting."""
    setting = folder / "nonlocal_bind"
    setting.write_text("1\n")
    monkeypatch.setattr(own_addresses, "NONLOCAL_BIND", str(setting))


def test_own_addresses_where_the_kernel_binds_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The way to an own address starts from itself, and to another's does not."""
    own = addresses_of_this_machine()

    class BindsAnything(socket.socket):
        def bind(self, address: Any) -> None:
            """As if it were this machine's."""

    monkeypatch.setattr(socket, "socket", BindsAnything)
    assert is_own(NOBODYS[0]), "the fake is none"
    binds_anything(monkeypatch, tmp_path)
    for text in ("127.0.0.1", "::1"):
        address = ipaddress.ip_address(text)
        # There may be no IPv6 here.
        assert is_own(address) == (address in own)
    for address in NOBODYS:
        assert not is_own(address)


def test_another_form_of_an_own_address_is_refused_here() -> None:
    """With the machine's own answer, not an injected one."""
    for text in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"):
        assert refusal(ProxyPolicy(), text)


#: What the kernel may say when it is asked, and whether that lets a client pass.
NOT_OWN = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


@pytest.mark.parametrize("step", ["socket", "bind"])
def test_any_other_errno_counts_as_own(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """But by those that say that the address is another machine's.

    Who uses up the descriptors, or the ports, must not get past it.
    """

    class Refusing(socket.socket):
        def __init__(self, *args: Any) -> None:
            if step == "socket":
                raise OSError(number, "no")
            super().__init__(*args)

        def bind(self, address: Any) -> None:
            raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    for number in errno.errorcode:
        own = is_own(IPv4Address(ANYWHERE))
        assert own == (number not in NOT_OWN), number
        assert bool(refusal(ProxyPolicy(), ANYWHERE)) == own


def test_any_other_errno_counts_as_own_with_nonlocal_bind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But by the one that says that there is no way to that address."""

    class Refusing(socket.socket):
        def bind(self, address: Any) -> None:
            """As if it were this machine's."""

        def connect(self, address: Any) -> None:
            raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    binds_anything(monkeypatch, tmp_path)
    for number in errno.errorcode:
        assert is_own(IPv4Address(ANYWHERE)) == (number != errno.ENETUNREACH), number


def test_own_addresses_are_asked_for_without_a_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When all ports are used up, the guard still knows; it refuses nobody else."""
    bound: list[Any] = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            bound.append(self.getsockname()[1])

    monkeypatch.setattr(socket, "socket", Watched)
    assert is_own(IPv4Address("127.0.0.1"))
    assert not is_own(IPv4Address(ANYWHERE))
    assert bound == ([0] if sys.platform == "linux" else bound)


def test_own_addresses_without_bind_address_no_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked with a port."""

    class Older(socket.socket):
        def setsockopt(self, *args: Any) -> None:
            raise OSError(errno.ENOPROTOOPT, "no such option")

    monkeypatch.setattr(socket, "socket", Older)
    assert is_own(IPv4Address("127.0.0.1"))
    assert not is_own(IPv4Address(ANYWHERE))


def test_the_local_address_of_a_route() -> None:
    """Starts from an address of this machine; nothing is sent."""
    assert address_towards(IPv4Address("127.0.0.1")) == "127.0.0.1"
    for address in NOBODYS:
        try:
            start = address_towards(address)
        except OSError:
            continue
        assert is_own(ipaddress.ip_address(start))
    # Nothing is sent to everybody without being asked for twice.
    with pytest.raises(OSError, match="denied|unreachable"):
        address_towards(IPv4Address("255.255.255.255"))


def test_whether_the_kernel_binds_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As its setting says; where there is none, it does not."""

    class BindsAnything(socket.socket):
        def bind(self, address: Any) -> None:
            """As if it were this machine's."""

        def connect(self, address: Any) -> None:
            raise OSError(errno.ENETUNREACH, "no way there")

    monkeypatch.setattr(socket, "socket", BindsAnything)
    monkeypatch.setattr(own_addresses, "NONLOCAL_BIND", str(tmp_path / "{}"))
    for address in NOBODYS:
        setting = tmp_path / str(address.version)
        assert is_own(address)
        setting.write_text("0\n")
        assert is_own(address)
        setting.write_text("1\n")
        assert not is_own(address)


def test_hosts_that_are_this_machine_are_remembered_for_a_while() -> None:
    clock, asked = Clock(), []

    def own(address: Ip) -> bool:
        asked.append(str(address))
        return str(address) == "192.0.2.1"

    hosts = OwnHosts(clock.seconds, own)
    for _ in range(3):
        assert hosts("192.0.2.1")
        assert hosts("::ffff:192.0.2.1")
        assert not hosts("192.0.2.2")
    assert asked == ["192.0.2.1", "192.0.2.1", "192.0.2.2"]
    clock.advance(OWN_FOR)
    assert not hosts("192.0.2.2")
    assert len(asked) == 4


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "127.0.0.2", "::1", "::ffff:127.0.0.1", "a.name"]
)
def test_hosts_that_are_this_machine_by_definition(host: str) -> None:
    """Or can't be asked about."""
    assert OwnHosts(Clock().seconds, lambda address: False)(host)


def test_the_cache_of_hosts_is_limited() -> None:
    asked = []

    def own(address: Ip) -> bool:
        asked.append(str(address))
        return False

    hosts = OwnHosts(Clock().seconds, own)
    for number in range(HOSTS_REMEMBERED + 1):
        hosts(str(IPv4Address(number + 0x0A000000)))
    asked.clear()
    hosts("10.0.0.0")
    assert asked == ["10.0.0.0"]
