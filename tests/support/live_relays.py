"""What the tests of a real TCP relay share: chains of relays, and servers that fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from relayd.core.names import host_port
from tests.support.process import (
    TRANSPORTS,
    RelayProcess,
    Server,
    own_host,
    read_exactly,
    relay,
)

#: Long enough never to be reached by a test that does not mean to.
NEVER = "1000"


#: For a test that need not run on each kind of connections.
once = pytest.mark.parametrize("connections_of", TRANSPORTS[:1], indirect=True)

#: For a test that takes long: on other kinds of connections only with the system tests.
seldom = pytest.mark.parametrize(
    "connections_of",
    [
        TRANSPORTS[0],
        *(pytest.param(each, marks=pytest.mark.system) for each in TRANSPORTS[1:]),
    ],
    indirect=True,
)


@contextmanager
def chain(
    server: Server, length: int, *options: str, **how: Any
) -> Iterator[RelayProcess]:
    """Relays in one process, each in front of the next; the last one of `server`."""
    with ExitStack() as held:
        # Ports that are free now: each relay's is the one before's destination.
        free = [held.enter_context(socket.socket()) for _ in range(length - 1)]
        for sock in free:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((own_host(), 0))
        hops = [host_port(*sock.getsockname()) for sock in free]
    listeners = ["127.0.0.1:0", *hops]
    args = []
    for listener, destination in zip(listeners, [*hops, server.address], strict=True):
        args += ["--listen", listener, "--dest", destination]
    with relay(*options, *args, **how) as running:
        running.listening(length)
        yield running


def echo_once(server: Server, client: socket.socket, data: bytes) -> socket.socket:
    """Send through the relay, echo at the server, and return the server's end."""
    client.sendall(data)
    upstream = server.accept()
    upstream.sendall(read_exactly(upstream, len(data)))
    assert read_exactly(client, len(data)) == data
    return upstream


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


@contextmanager
def full_backlog() -> Iterator[str]:
    """An address that neither accepts nor refuses: its backlog is full."""
    with ExitStack() as held:
        listening = held.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        where = listening.getsockname()
        for _ in range(4):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(where)
        yield f"127.0.0.1:{where[1]}"


def refused_address() -> str:
    """An address that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((own_host(), 0))
        return host_port(*sock.getsockname())
