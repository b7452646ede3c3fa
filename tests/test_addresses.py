"""Addresses are called one way everywhere, and at both ends of a connection."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from relayd.addresses import address_name, client_key, socket_address, socket_name


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
