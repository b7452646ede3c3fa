"""Kinds of addresses, and urgent data, through a real TCP relay.

Each test runs on each kind of connections that relayd has (`process`), but for those
marked `once`: what they look at does not depend on it.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from tests.support.live_relays import chain, echo_once, in_thread, once
from tests.support.process import (
    PATIENCE,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "connections_of")


# -- urgent data


@pytest.mark.parametrize("listen", ["[::1]:0", "tcp:0:interface=127.0.0.1"])
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_an_urgent_byte_arrives_in_its_place(
    size: int, way: str, listen: str, server: Server
) -> None:
    """Telnet's interrupt: among what came before and after, spliced or not."""
    data = random.Random(5).randbytes(size)
    with relay("-l", listen, "-d", server.address) as running:
        host = "::1" if listen.startswith("[") else "127.0.0.1"
        with connect(running.port, host) as client, server.accept() as upstream:
            ends = [client, upstream]
            near, far = ends if way == "up" else ends[::-1]

            def send() -> None:
                for _ in range(3):
                    near.sendall(data)
                    near.send(b"!", socket.MSG_OOB)
                near.sendall(data)
                near.shutdown(socket.SHUT_WR)

            sender = in_thread(send)
            assert read_all(far) == b"!".join([data] * 4)
            sender.join()


def test_an_urgent_byte_alone_is_not_kept_back(server: Server) -> None:
    with chain(server, 2) as running, connect(running.port) as client:
        upstream = echo_once(server, client, b"hello")
        for near, far in ((client, upstream), (upstream, client)):
            near.send(b"!", socket.MSG_OOB)
            assert far.recv(10) == b"!"
        upstream.close()


def test_an_urgent_byte_may_be_the_first(server: Server) -> None:
    """It is there before the server's connection is."""
    with chain(server, 2) as running, connect(running.port) as client:
        client.send(b"!", socket.MSG_OOB)
        client.send(b"and more")
        upstream = server.accept()
        assert read_exactly(upstream, 9) == b"!and more"
        upstream.close()


@pytest.fixture(scope="module")
def urgent_unix_bytes() -> None:
    """For tests that need a kernel that has MSG_OOB for UNIX sockets."""
    one, other = socket.socketpair()
    with one, other:
        try:
            one.send(b"!", socket.MSG_OOB)
        except OSError:
            pytest.skip("this kernel has no MSG_OOB for UNIX sockets")


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("size", [10, 3_000_000])
@pytest.mark.usefixtures("urgent_unix_bytes")
def test_an_urgent_byte_arrives_in_its_place_on_unix_sockets(
    size: int, way: str, tmp_path: Path
) -> None:
    data = random.Random(5).randbytes(size)
    listen, there = str(tmp_path / "listen"), str(tmp_path / "server")
    with (
        Server(socket.AF_UNIX, there) as server,
        relay("-l", f"unix:{listen}", "-d", server.address),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(PATIENCE)
        client.connect(listen)
        # Before there is anybody to relay it to.
        client.send(b"!", socket.MSG_OOB)
        with server.accept() as upstream:
            assert upstream.recv(10) == b"!"
            ends = [client, upstream]
            near, far = ends if way == "up" else ends[::-1]

            def send() -> None:
                for _ in range(3):
                    near.sendall(data)
                    near.send(b"!", socket.MSG_OOB)
                near.sendall(data)
                near.shutdown(socket.SHUT_WR)

            sender = in_thread(send)
            assert read_all(far) == b"!".join([data] * 4)
            sender.join()


# -- kinds of addresses


def test_ipv6() -> None:
    with Server(socket.AF_INET6) as server:
        options = ("-l", "[::1]:0", "-d", server.address)
        with relay(*options) as running, connect(running.port, "::1") as client:
            echo_once(server, client, b"six").close()
            client.close()
            [line] = running.sessions()
            assert line["client"].startswith("[::1]:")
            assert line["upstream"] == server.address


@once
def test_a_listener_without_a_host_takes_both_families(server: Server) -> None:
    with relay("-l", "0", "-d", server.address) as running:
        four, six = running.listening(2)
        assert four == f"0.0.0.0:{running.port}"
        assert six == f"[::]:{running.port}"
        for host in ("127.0.0.1", "::1"):
            with connect(running.port, host) as client:
                echo_once(server, client, b"hello").close()
        lines = running.sessions(2)
        assert {line["listener"].rpartition(":")[0] for line in lines} == {
            "127.0.0.1",
            "[::1]",
        }


def test_unix_to_unix(tmp_path: Path) -> None:
    listener, destination = tmp_path / "listener", tmp_path / "destination"
    with Server(socket.AF_UNIX, str(destination)) as server:
        options = ("-l", f"unix:{listener}", "-d", f"unix:{destination}")
        with relay(*options) as running:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(PATIENCE)
            client.connect(str(listener))
            upstream = echo_once(server, client, b"no network at all")
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b""
            upstream.sendall(b"an answer")
            upstream.close()
            assert read_all(client) == b"an answer"
            client.close()
            [line] = running.ended("done")
            assert line["upstream"] == f"unix:{destination}"
            running.signal()
            assert running.wait() == 0
            assert not listener.exists()


@once
def test_twisted_endpoint_strings(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    options = (
        *("-l", "tcp:0:interface=127.0.0.1"),
        *("-d", f"tcp:host=127.0.0.1:port={port}"),
    )
    with relay(*options) as running, connect(running.port) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        upstream = server.accept()
        assert read_all(upstream) == b"question"
        upstream.sendall(b"answer")
        upstream.close()
        assert read_all(client) == b"answer"
        running.ended("done")


@once
def test_several_servers_take_turns() -> None:
    with Server() as one, Server() as two:
        options = ("-l", "127.0.0.1:0", "-d", one.address, "-d", two.address)
        with relay(*options) as running:
            for server in (one, two, one):
                with connect(running.port) as client:
                    echo_once(server, client, b"x").close()
