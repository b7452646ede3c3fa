"""A filter closes sessions whose peers both send: what it has passed on arrives whole.

A connection that is closed with something unread is reset, and what is under way to its
peer is lost.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.live.test_tls import pem, root, tls_client, tls_relay
from tests.support.certificates import Authority
from tests.support.live_relays import in_thread
from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    read_all,
    relay,
)

__all__ = ["pem", "root"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")

#: How many bytes pass: more than kernels buffer for a slow reader.
LIMIT = 1_000_000

_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Ends = tuple[RelayProcess, socket.socket, socket.socket]


class Joined:
    """Opens sessions of a kind: over TCP, UNIX sockets, or with TLS of the client."""

    def __init__(self, kind: str, pem: Path, root: Authority, path: Path) -> None:
        self.kind, self.pem, self.root, self.path = kind, pem, root, path

    @contextmanager
    def session(self, *options: str) -> Iterator[Ends]:
        with ExitStack() as stack:
            if self.kind == "unix":
                where = f"{self.path}.r"
                server = stack.enter_context(Server(socket.AF_UNIX, str(self.path)))
                words = ("-l", f"unix:{where}", "-d", server.address, *options)
                running = stack.enter_context(relay(*words))
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(PATIENCE)
                client.connect(where)
            elif self.kind == "tls":
                server = stack.enter_context(Server())
                running = stack.enter_context(tls_relay(self.pem, server, *options))
                client = tls_client(running, self.root)
            else:
                server = stack.enter_context(Server())
                words = ("-l", "127.0.0.1:0", "-d", server.address, *options)
                running = stack.enter_context(relay(*words))
                client = connect(running.port)
            with client, server.accept() as upstream:
                yield running, client, upstream


@pytest.fixture(params=["tcp", "unix", "tls"])
def joined(
    request: pytest.FixtureRequest, pem: Path, root: Authority, tmp_socket: Path
) -> Joined:
    return Joined(request.param, pem, root, tmp_socket)


def read_while_sending(sock: socket.socket) -> int:
    """Read slowly until the end, and send as much as goes; how much was read."""
    sock.setblocking(False)
    got, until = 0, time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(*_NOT_NOW):
            sock.send(bytes(65536))
        time.sleep(0.0005)
        try:
            part = sock.recv(16384)
        except _NOT_NOW:
            continue
        if not part:
            return got
        got += len(part)
    raise AssertionError(f"no end after {got} bytes")


def both_ways(
    running: RelayProcess, client: socket.socket, server: socket.socket
) -> tuple[dict[str, int], dict[str, str]]:
    """What has arrived each way of a session that is filtered, and its line."""
    counts: dict[str, int] = {}

    def serve() -> None:
        counts["up"] = read_while_sending(server)
        server.close()

    serving = in_thread(serve)
    counts["down"] = read_while_sending(client)
    client.close()
    serving.join()
    [line] = running.ended("filtered")
    return counts, line


@pytest.mark.parametrize("half_close", ["on", "off"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_limit(joined: Joined, direction: str, half_close: str) -> None:
    """Of one way; the other one is spliced."""
    fault = f"limit_data:{LIMIT},direction={direction}"
    options = ("--filter", fault, "--half-close", half_close)
    with joined.session(*options) as ends:
        counts, line = both_ways(*ends)
    assert counts[direction] == LIMIT
    other = "down" if direction == "up" else "up"
    assert counts[other] == int(line[other])


def test_a_limit_of_a_session_that_is_paced(joined: Joined) -> None:
    options = ("--filter", f"limit_data:{LIMIT}", "--bandwidth-per-session", "4MB")
    with joined.session(*options) as ends:
        counts, line = both_ways(*ends)
    assert counts["down"] == LIMIT
    assert counts["up"] == int(line["up"])


def test_a_timeout(joined: Joined) -> None:
    """What has passed the other way is delivered, and no more of it is read."""
    with joined.session("--filter", "timeout:300,direction=up") as ends:
        counts, line = both_ways(*ends)
    assert counts == {"up": 0, "down": int(line["down"])}
    assert counts["down"] > 0


def test_one_that_goes_on_is_reset_in_time() -> None:
    """It has everything by then, and what it sends does not count."""
    options = ("--filter", "limit_data:5", "--half-close-timeout", "0.3")
    with (
        Server() as server,
        relay("-l", "127.0.0.1:0", "-d", server.address, *options) as running,
        connect(running.port) as client,
        server.accept() as upstream,
    ):
        upstream.sendall(b"hello world")
        assert read_all(client) == b"hello"
        with pytest.raises(OSError, match=r"reset|pipe"):
            for _ in range(int(PATIENCE / 0.01)):
                client.sendall(bytes(1000))
                time.sleep(0.01)
        [line] = running.ended("filtered")
        assert line["up"] == "0"
