"""Addresses are called one way everywhere, and at both ends of a connection."""

from __future__ import annotations

import socket

import pytest

from relayd.addresses import client_key, ends_of


@pytest.mark.parametrize(
    ("host", "called"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::ffff:0.0.0.0", "127.0.0.1"),
    ],
)
def test_the_ends_of_a_connection_are_called_the_same_at_both(
    host: str, called: str
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server(("0.0.0.0", 0)) as listener,
        socket.socket(family) as client,
    ):
        port = listener.getsockname()[1]
        client.bind(("::ffff:127.0.0.1" if ":" in host else "127.0.0.1", 0))
        before = ends_of(client, (host, port, 0, 0) if ":" in host else (host, port))
        client.connect((host, port))
        accepted, _ = listener.accept()
        with accepted:
            assert ends_of(client) == ends_of(accepted)[::-1] == before
        assert before[1] == f"{called}:{port}"


def test_a_socket_that_leads_nowhere_has_no_ends() -> None:
    with socket.socket() as sock, pytest.raises(OSError, match="not connected"):
        ends_of(sock)


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
