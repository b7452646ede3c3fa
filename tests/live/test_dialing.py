"""How a real relay dials: from which address, of streams and of datagrams."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from relayd.preludes.socks4 import REPLY_SIZE, Code, Command, read_reply, write_request
from tests.support.process import (
    PATIENCE,
    START,
    Server,
    UdpServer,
    command,
    connect,
    read_all,
    read_exactly,
    relay,
)

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux", reason="others have one address of loopback"
    ),
    pytest.mark.usefixtures("nothing_left_behind", "connections_of"),
]

SOURCE = ("--source", "127.0.0.2")


def test_a_server_sees_the_source(server: Server) -> None:
    """And the relay works as ever: what is sent, the ends, the log."""
    with relay("-l", "127.0.0.1:0", "-d", server.address, *SOURCE) as running:
        with connect(running.port) as client, server.accept() as upstream:
            assert upstream.getpeername()[0] == "127.0.0.2"
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b"hello"
            upstream.sendall(b"bye")
            upstream.close()
            assert read_all(client) == b"bye"
        running.ended("done")


def test_of_a_name_the_family_with_a_source_is_dialled() -> None:
    """localhost is ::1 first on most machines."""
    with Server() as server:
        port = server.socket.getsockname()[1]
        args = ("-l", "127.0.0.1:0", "-d", f"localhost:{port}")
        with relay(*args, *SOURCE) as running, connect(running.port):
            with server.accept() as upstream:
                assert upstream.getpeername()[0] == "127.0.0.2"


def test_a_server_of_the_other_family_is_not_dialled() -> None:
    """From whatever address that would be; it is the only one that listens."""
    with Server(socket.AF_INET6) as server:
        port = server.socket.getsockname()[1]
        args = ("-l", "127.0.0.1:0", "-d", f"localhost:{port}", "--retries", "0")
        with relay(*args, *SOURCE) as running, connect(running.port) as client:
            assert read_all(client) == b""
            running.ended("connect_refused")
        server.socket.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_proxy_s_destinations_see_it(server: Server) -> None:
    host, port = server.socket.getsockname()
    with relay("-l", "127.0.0.1:0", *SOURCE, plugin="socks4") as running:
        with connect(running.port) as client:
            client.sendall(write_request(Command.CONNECT, host, port, b""))
            reply = read_reply(read_exactly(client, REPLY_SIZE))
            assert reply is not None
            assert reply.code == Code.GRANTED
            with server.accept() as upstream:
                assert upstream.getpeername()[0] == "127.0.0.2"


def test_datagrams_are_sent_from_it() -> None:
    server = UdpServer()
    args = ("-l", "udp:127.0.0.1:0", "-d", server.address, *SOURCE)
    with relay(*args) as running, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", running.port))
        client.send(b"hello")
        data, peer = server.receive()
        assert (data, peer[0]) == (b"hello", "127.0.0.2")
        server.send(b"bye", peer)
        assert client.recv(10) == b"bye"
    server.socket.close()


@pytest.mark.parametrize("protocol", ["", "udp:"])
def test_what_is_not_possible_is_told_before_anything_listens(protocol: str) -> None:
    args = ("-l", f"{protocol}127.0.0.1:0", "-d", f"{protocol}127.0.0.1:9")
    started = subprocess.run(
        [*command(), "relayd", *args, "--source", "192.0.2.77"],
        capture_output=True,
        text=True,
        check=False,
        timeout=START,
    )
    assert started.returncode == 1
    said = started.stdout + started.stderr
    assert said.strip() == "relayd: source '192.0.2.77' is no address of this machine"
