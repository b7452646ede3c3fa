"""Both ends of a real connection have the same names at either of them."""

from __future__ import annotations

import socket

import pytest

from relayd.net.socket_ends import ends_of, is_self_connected


@pytest.mark.parametrize(
    ("host", "called"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::ffff:0.0.0.0", "127.0.0.1"),
    ],
)
def test_the_ends_of_a_connection_have_the_same_names_at_both(
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
            assert not is_self_connected(client)
            assert not is_self_connected(accepted)
        assert before[1] == f"{called}:{port}"


def test_an_unconnected_socket_has_no_ends() -> None:
    with socket.socket() as sock, pytest.raises(OSError, match="not connected"):
        ends_of(sock)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_self_connected_socket(family: int) -> None:
    with socket.socket(family) as sock:
        assert not is_self_connected(sock)
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert is_self_connected(sock)
