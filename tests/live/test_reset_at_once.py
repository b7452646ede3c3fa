"""A server that accepts and resets is followed by another: a real relay, real sockets.

Each test runs on each kind of connections that relayd has.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.live.test_metrics import METRICS, Samples
from tests.live.test_tls import pem, root, tls_client
from tests.support.certificates import Authority
from tests.support.process import (
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
    reset,
)

__all__ = ["pem", "root"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")


@contextmanager
def pool(
    *options: str, first: str = "", second: str = "", listen: str = "127.0.0.1:0"
) -> Iterator[tuple[RelayProcess, Server, Server]]:
    """A relay to the servers a and b; whoever comes first goes to a."""
    with Server() as a, Server() as b:
        to = ("-d", f"{a.address},name=a{first}", "-d", f"{b.address},name=b{second}")
        with relay("-l", listen, "--verbose", *to, *options) as running:
            yield running, a, b


@contextmanager
def stopped(running: RelayProcess) -> Iterator[None]:
    """What happens in this block, the relay hears of together, in this order."""
    running.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        running.signal(signal.SIGCONT)


def joined(running: RelayProcess, server: Server, number: int = 1) -> socket.socket:
    """The server's end of so manieth session to have one, once the relay knows it."""
    upstream = server.accept()
    running.wait_for(r" connected session=", number)
    return upstream


def serves(client: socket.socket, server: Server, said: bytes = b"") -> None:
    """It is this server's client now, and had said that before."""
    with server.accept() as upstream:
        assert read_exactly(upstream, len(said)) == said
        client.sendall(b"more")
        assert read_exactly(upstream, 4) == b"more"
        upstream.sendall(b"answer")
        upstream.close()
        assert read_all(client) == b"answer"


def test_a_client_that_has_said_nothing_gets_another_server() -> None:
    with pool(*METRICS) as (running, a, b):
        with connect(running.port) as client:
            reset(joined(running, a))
            serves(client, b)
        [line] = running.sessions()
        assert (line["upstream"], line["attempts"]) == (f"b/{b.address}", "2")
        assert line["ending"] == "done"
        said = Samples(running)
        assert said("relayd_upstream_retries_total", relay="relay1") == 1


def test_what_was_said_as_the_reset_came_goes_to_the_next_server() -> None:
    """The relay reads the request first, and meets the reset as it writes it."""
    with pool() as (running, a, b):
        with connect(running.port) as client:
            upstream = joined(running, a)
            with stopped(running):
                client.sendall(b"request ")
                reset(upstream)
            serves(client, b, b"request ")
        [line] = running.sessions()
        assert (line["attempts"], line["up"]) == ("2", "12")


def test_so_it_does_with_its_end_of_data() -> None:
    """A client that has said all, and ended its side, gets its answer."""
    with pool() as (running, a, b), connect(running.port) as client:
        upstream = joined(running, a)
        with stopped(running):
            client.sendall(b"request")
            client.shutdown(socket.SHUT_WR)
            reset(upstream)
        with b.accept() as another:
            assert read_all(another) == b"request"
            another.sendall(b"answer")
        assert read_all(client) == b"answer"


def test_a_long_request_is_whole_at_the_next_server() -> None:
    """What one read has brought was refused; the rest was not read yet."""
    sent = bytes(range(256)) * 8192
    with pool() as (running, a, b), connect(running.port) as client:
        upstream = joined(running, a)
        with stopped(running):
            client.setblocking(False)
            count = client.send(sent)
            client.settimeout(10)
            reset(upstream)
        with b.accept() as another:
            client.sendall(sent[count:])
            assert read_exactly(another, len(sent)) == sent
            another.sendall(b"answer")
            assert read_exactly(client, 6) == b"answer"


@pytest.mark.parametrize("speaks", [True, False])
def test_a_client_behind_tls(pem: Path, root: Authority, speaks: bool) -> None:
    """Its bytes pass through the relay, whatever its server is."""
    listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    with pool(listen=listener) as (running, a, b), tls_client(running, root) as client:
        upstream = joined(running, a)
        said = b"request " if speaks else b""
        with stopped(running):
            client.sendall(said)
            reset(upstream)
        with b.accept() as another:
            client.sendall(b"more")
            assert read_exactly(another, len(said) + 4) == said + b"more"
            another.sendall(b"answer")
            assert read_exactly(client, 6) == b"answer"


def test_a_header_is_each_server_s_own() -> None:
    with pool(first=",send-proxy=v1", second=",send-proxy=v1") as (running, a, b):
        with connect(running.port) as client:
            header = b"PROXY TCP4 127.0.0.1 127.0.0.1"
            with a.accept() as upstream:
                assert read_exactly(upstream, 30) == header
                reset(upstream)
            with b.accept() as another:
                assert read_exactly(another, 30) == header
                client.sendall(b"request")
                client.shutdown(socket.SHUT_WR)
                assert read_all(another).endswith(b"\r\nrequest")


def test_a_reset_that_is_found_while_the_server_is_not_read() -> None:
    """All clients together have used up their bandwidth; a check finds it."""
    options = ("--bandwidth", "down=1000", "--handshake-timeout", "0.8")
    with pool(*options) as (running, a, b), connect(running.port) as greedy:
        with a.accept() as source:
            source.sendall(bytes(100_000))
            assert read_exactly(greedy, 100)
            with connect(running.port) as client:
                reset(joined(running, b, 2))
                with a.accept() as upstream:
                    client.sendall(b"request")
                    assert read_exactly(upstream, 7) == b"request"


@pytest.mark.parametrize("how", ["written", "spoke", "ended"])
def test_what_is_not_tried_again(how: str) -> None:
    with pool() as (running, a, b):
        with connect(running.port) as client:
            upstream = joined(running, a)
            if how == "written":
                client.sendall(b"request")
                assert read_exactly(upstream, 7) == b"request"
                reset(upstream)
            elif how == "spoke":
                upstream.sendall(b"hello")
                assert read_exactly(client, 5) == b"hello"
                reset(upstream)
            else:
                upstream.close()
                assert client.recv(1) == b""
                client.sendall(b"request")
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
            # The next one is b's first.
            with connect(running.port) as other:
                serves(other, b)
        for line in running.sessions(2):
            assert line["attempts"] == "1"


def test_a_server_that_resets_each_request_is_taken_out() -> None:
    """These can't be tried again; those that are silent are."""
    with pool("--max-fails", "2") as (running, a, b):
        for _ in range(2):
            with connect(running.port) as client:
                client.sendall(b"request")
                with a.accept() as upstream:
                    assert read_exactly(upstream, 7) == b"request"
                    reset(upstream)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
            with connect(running.port) as other, b.accept() as upstream:
                upstream.sendall(b"hello")
                assert read_exactly(other, 5) == b"hello"
        running.wait_for("relay1: a/.* is out: 2 dials have failed")
        for _ in range(3):
            with connect(running.port) as client:
                serves(client, b)
