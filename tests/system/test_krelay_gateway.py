"""What the kernel module did, by the file that stands for it: on its own topology."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.process import (
    PATIENCE,
    START,
    command,
    eventually,
    read_all,
    read_exactly,
)
from tests.system.gateway import V4, Gateway

pytestmark = pytest.mark.system

FILE = Path(__file__).parents[2] / "contrib" / "krelay.toml"


class Operator:
    """Whoever wrote to the module's files."""

    def __init__(self, network: Gateway, control: Path) -> None:
        self._network = network
        self._control = control

    def __call__(self, *args: str) -> str:
        return self._network.relayctl("--control", self._control, *args)


@contextmanager
def krelay(network: Gateway, folder: Path) -> Iterator[Operator]:
    """The file's relays, as they are there: stopped."""
    control, file = folder / "control.sock", folder / "krelay.toml"
    text = FILE.read_text()
    file.write_text(text.replace("/run/relayd/control.sock", str(control)))
    words = (*command(), "relayd", "--config", str(file))
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(network.relay.runs(*words), stdout=log, stderr=log) as running,
    ):
        try:
            eventually(control.exists, "its control socket", START)
            yield Operator(network, control)
        finally:
            running.terminate()
            try:
                running.wait(2 * PATIENCE)
            finally:
                running.kill()


@contextmanager
def tcp_server(network: Gateway, host: str, port: int) -> Iterator[socket.socket]:
    with network.server.inside():
        server = socket.create_server((host, port))
    with server:
        server.settimeout(PATIENCE)
        yield server


@contextmanager
def udp_server(network: Gateway, host: str, port: int) -> Iterator[socket.socket]:
    with network.server.inside():
        server = socket.socket(type=socket.SOCK_DGRAM)
    with server:
        server.settimeout(PATIENCE)
        server.bind((host, port))
        yield server


def exchange(network: Gateway, server: socket.socket, port: int) -> str:
    """A client asks the gateway for a port, and a server answers: whom it has seen."""
    with network.client.inside():
        client = socket.create_connection((V4.asked, port), PATIENCE)
    with client:
        client.sendall(b"question")
        connection, (host, _) = server.accept()
        with connection:
            assert read_exactly(connection, 8) == b"question"
            connection.sendall(b"answer")
        assert read_all(client) == b"answer"
    return str(host)


def datagrams(network: Gateway, server: socket.socket) -> tuple[bool, str]:
    """Likewise of UDP: whether the server has seen the client's own end, and where the
    answer came from."""
    with network.client.inside():
        client = socket.socket(type=socket.SOCK_DGRAM)
    with client:
        client.settimeout(PATIENCE)
        client.connect((V4.asked, 53))
        client.send(b"question")
        data, source = server.recvfrom(100)
        assert data == b"question"
        server.sendto(b"answer", source)
        data, came_from = client.recvfrom(100)
        assert data == b"answer"
        return source == client.getsockname(), came_from[0]


def refused(network: Gateway, port: int) -> bool:
    try:
        with network.client.inside():
            socket.create_connection((V4.asked, port), PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_file_does_what_the_module_did(network: Gateway, tmp_path: Path) -> None:
    """Its real server, and then another; what nobody started takes no client."""
    before = network.state()
    with (
        krelay(network, tmp_path) as ctl,
        tcp_server(network, V4.other, 80) as web,
        tcp_server(network, V4.other, 443) as secure,
        tcp_server(network, V4.server, 80) as second,
        udp_server(network, V4.other, 53) as dns,
    ):
        assert network.state() == before
        assert refused(network, 80)
        ctl("start", "krelay")
        ctl("start", "krelay-udp")
        for server, port in ((web, 80), (secure, 443)):
            assert exchange(network, server, port) == V4.client
        assert datagrams(network, dns) == (True, V4.asked)
        assert "10.0.0.1:" in ctl("nat")
        ctl("set", "krelay", f"dest={V4.server}:original")
        assert exchange(network, second, 80) == V4.client
        ctl("set", "krelay", "listen=16001")
        assert exchange(network, second, 80) == V4.client
        ctl("stop", "krelay")
        assert refused(network, 80)
        ctl("stop", "krelay-udp", "--cut")
    assert network.state() == before
