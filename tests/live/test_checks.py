"""`--check` in a process of its own."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support.live_relays import once, refused_address
from tests.support.process import RelayProcess, Server, connect, eventually, relay

pytestmark = pytest.mark.usefixtures("connections_of")

FAST = ("--check-every", "50ms", "--retries", "0", "-l", "127.0.0.1:0")


@contextmanager
def greeting() -> Iterator[str]:
    """A server that greets whoever comes: its address."""
    with Server() as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with server.accept() as connection, suppress(OSError):
                        connection.sendall(b"hi")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.address
        server.socket.shutdown(socket.SHUT_RDWR)
        thread.join()


def is_greeted(running: RelayProcess) -> bool:
    """Whether a client comes to a server that is there."""
    try:
        with connect(running.port) as client:
            return client.recv(2) == b"hi"
    except ConnectionResetError:
        return False


def test_no_session_goes_to_a_server_that_is_down() -> None:
    """Though every other one would, in turn."""
    dead = refused_address()
    with greeting() as address:
        with relay("--check", "tcp", *FAST, "-d", dead, "-d", address) as running:
            eventually(lambda: is_greeted(running) and is_greeted(running))
            assert all(is_greeted(running) for _ in range(10))
            running.signal(signal.SIGTERM)
            assert running.wait() == 0


@once
def test_a_check_that_can_t_be_imported() -> None:
    running = RelayProcess("--check", "python:no_such:f", *FAST, "-d", "1")
    assert running.wait() == 1
    assert running.lines[-1] == (
        "relayd: can't import the check python:no_such:f: ModuleNotFoundError:"
        " No module named 'no_such'"
    )
    running.stop()
