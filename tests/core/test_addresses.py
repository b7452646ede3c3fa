"""Addresses are called one way everywhere, and at both ends of a connection."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from twisted.internet.address import (
    HostnameAddress,
    IPv4Address,
    IPv6Address,
    UNIXAddress,
)

from relayd.core.addresses import (
    address_name,
    client_key,
    host_of,
    host_port,
    is_loopback,
    numeric_host,
    socket_address,
    socket_name,
)


@pytest.mark.parametrize(
    ("family", "address", "name"),
    [
        (socket.AF_INET, ("192.0.2.1", 80), "192.0.2.1:80"),
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0), "[2001:db8::1]:80"),
        (socket.AF_INET6, ("::ffff:192.0.2.1", 80, 0, 0), "192.0.2.1:80"),
        (socket.AF_INET6, ("::ffff:1", 80, 0, 0), "[::ffff:1]:80"),
        (socket.AF_INET6, ("fe80::1", 80, 0, 1), "[fe80::1%lo]:80"),
        (socket.AF_UNIX, "/run/x", "unix:/run/x"),
        (socket.AF_UNIX, "/run/a b", "unix:/run/a\\x20b"),
        (socket.AF_UNIX, b"\0abstract", "unix:\\x00abstract"),
        (socket.AF_UNIX, "", "unix:"),
    ],
)
def test_an_address_has_one_name_in_either_form(
    family: int, address: Any, name: str
) -> None:
    """As the socket module has it, and as Twisted does."""
    assert socket_name(address) == name
    assert address_name(socket_address(family, address)) == name


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("", ""),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_whose_limit_a_client_counts_towards(host: str, key: str) -> None:
    assert client_key(host) == key


# -- addresses as text


def test_host_and_port_as_text() -> None:
    """Brackets stand where the host has colons of its own."""
    assert host_port("127.0.0.1", 80) == "127.0.0.1:80"
    assert host_port("::1", 80) == "[::1]:80"
    assert host_port("localhost", 80) == "localhost:80"


def test_the_name_of_an_address() -> None:
    """An IPv4 client of a dual-stack socket goes by its IPv4 address."""
    for address, name in (
        (IPv4Address("TCP", "192.0.2.1", 80), "192.0.2.1:80"),
        (IPv6Address("TCP", "2001:db8::1", 80), "[2001:db8::1]:80"),
        (IPv6Address("TCP", "fe80::1%eth0", 80), "[fe80::1%eth0]:80"),
        (IPv6Address("TCP", "::ffff:192.0.2.1", 80), "192.0.2.1:80"),
        (IPv6Address("TCP", "::ffff:0", 80), "[::ffff:0]:80"),
        (IPv4Address("UDP", "192.0.2.1", 80), "udp:192.0.2.1:80"),
        (IPv6Address("UDP", "2001:db8::1", 80), "udp:[2001:db8::1]:80"),
        (UNIXAddress("/run/x"), "unix:/run/x"),
        (UNIXAddress("/run/é"), "unix:/run/é"),
        (UNIXAddress("/run/a b"), "unix:/run/a\\x20b"),
        (UNIXAddress("/run/\udcff"), "unix:/run/\\xff"),
        (UNIXAddress(b"\0hidden"), "unix:\\x00hidden"),
        (UNIXAddress("/run/a b\nc"), "unix:/run/a\\x20b\\nc"),
        (UNIXAddress(None), "unix:"),
        (None, "-"),
    ):
        assert address_name(address) == name


def test_an_address_of_another_kind_is_named_somehow() -> None:
    """An endpoint of somebody else's may have any."""
    address = HostnameAddress(b"example.com", 80)
    assert address_name(address) == str(address)


def test_socket_addresses_become_twisteds() -> None:
    """With the family's own class, and a scope by the name of its interface."""
    index, interface = socket.if_nameindex()[0]
    v6 = socket_address(socket.AF_INET6, ("fe80::1", 80, 0, index))
    assert v6 == IPv6Address("TCP", f"fe80::1%{interface}", 80, 0, index)
    assert socket_address(socket.AF_INET6, ("::1", 80, 0, 0)) == IPv6Address(
        "TCP", "::1", 80
    )
    assert socket_address(socket.AF_INET, ("192.0.2.1", 80)) == IPv4Address(
        "TCP", "192.0.2.1", 80
    )
    assert socket_address(socket.AF_UNIX, "/run/x") == UNIXAddress("/run/x")
    assert socket_address(socket.AF_UNIX, "") == UNIXAddress(None)
    assert numeric_host(("fe80::1", 80, 0, index)) == f"fe80::1%{interface}"


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (IPv4Address("TCP", "192.0.2.1", 50000), "192.0.2.1"),
        (IPv6Address("TCP", "2001:db8::1", 50000), "2001:db8::1"),
        (IPv6Address("TCP", "::ffff:192.0.2.1", 50000), "192.0.2.1"),
        (IPv6Address("TCP", "fe80::1%eth0", 50000), "fe80::1"),
        (UNIXAddress(b"/run/a:1"), ""),
        (UNIXAddress(b""), ""),
        (UNIXAddress(None), ""),
        (None, ""),
    ],
)
def test_a_clients_address(address: Any, host: str) -> None:
    """From its name, as any of our listeners gives it."""
    assert host_of(address_name(address)) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.0.3", "::1"])
def test_loopback_is_near(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "12.7.0.1", "128.0.0.1", "::", "::ffff:127.0.0.1", "fe80::1"]
)
def test_other_addresses_are_far(host: str) -> None:
    """A mapped one is loopback, too, but costs nothing to be watched for."""
    assert not is_loopback(host)
