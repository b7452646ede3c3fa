"""The programs in `examples/` for gateways, each on the three machines of one."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.process import PATIENCE, read_all, read_exactly
from tests.system.gateway import V4, Gateway, accepted, asking, listening
from tests.system.programs import program

pytestmark = pytest.mark.system

EXAMPLES = Path(__file__).parents[2] / "examples"

#: The rules that the programs need, as a file of settings.
RULES = """
[tcp.gateway]
listen = "16001"
intercept = "192.168.0.0/24:80"
dest = "original"
transparent = true

[udp.dns]
listen = "192.168.0.2:53"
dest = "192.168.0.1:53"
transparent = true
"""


def python(name: str) -> tuple[str, str]:
    """The command that runs a program."""
    return sys.executable, str(EXAMPLES / name)


@contextmanager
def example(network: Gateway, name: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """The program, on the gateway, once it listens."""
    words = network.relay.runs(*python(name), *args)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline()
            assert re.match(r"listening on port \d+", line)
            yield running
        finally:
            running.terminate()
            running.wait(PATIENCE)


@contextmanager
def rules(network: Gateway, folder: Path) -> Iterator[None]:
    file = folder / "relayd.toml"
    file.write_text(RULES)
    network.relayctl("netfilter", "apply", "--config", file)
    try:
        yield
    finally:
        network.relayctl("netfilter", "remove", "--config", file)


@pytest.mark.parametrize(
    ("args", "asked", "host"),
    [
        # Where the client meant to go, and to one host.
        (("16001",), V4.server, V4.server),
        (("16001", V4.other), V4.asked, V4.other),
    ],
)
def test_transparent_gateway(
    network: Gateway, args: tuple[str, ...], asked: str, host: str, tmp_path: Path
) -> None:
    with (
        rules(network, tmp_path),
        listening(network, host) as server,
        example(network, "transparent_gateway.py", *args),
        asking(network, asked) as client,
    ):
        client.sendall(b"question")
        upstream, seen = accepted(server)
        with upstream:
            assert seen.rpartition(":")[0] == V4.client
            assert read_exactly(upstream, 8) == b"question"
            upstream.sendall(b"answer")
        assert read_all(client) == b"answer"


def test_transparent_dns(network: Gateway, tmp_path: Path) -> None:
    with network.server.inside():
        server = socket.socket(type=socket.SOCK_DGRAM)
    with network.client.inside():
        client = socket.socket(type=socket.SOCK_DGRAM)
    with (
        server,
        client,
        rules(network, tmp_path),
        example(
            network, "transparent_dns.py", V4.asked, "53", V4.server, "53"
        ) as running,
    ):
        for sock in (server, client):
            sock.settimeout(PATIENCE)
        server.bind((V4.server, 53))
        client.connect((V4.asked, 53))
        client.send(b"question")
        data, seen = server.recvfrom(100)
        assert (data, seen) == (b"question", client.getsockname())
        server.sendto(b"answer", seen)
        assert client.recv(100) == b"answer"
        running.terminate()
        output, _ = running.communicate(timeout=PATIENCE)
        mine = f"{V4.client}:{seen[1]}"
        assert f"{mine} as {mine} -> {V4.server}:53" in output
        assert "dropped: {}" in output


@pytest.mark.parametrize("name", ["transparent_gateway.py", "transparent_dns.py"])
def test_without_the_right(network: Gateway, name: str) -> None:
    args = {
        "transparent_gateway.py": ("16001",),
        "transparent_dns.py": (V4.asked, "53", V4.server, "53"),
    }[name]
    rights = ("--inh-caps=-all", "--bounding-set=-all")
    for words, says in (
        ((), f"usage: {name}"),
        (args, f"{name.removesuffix('.py')}: transparent takes the right CAP_NET_RAW"),
    ):
        done = subprocess.run(
            network.relay.runs(program("setpriv"), *rights, *python(name), *words),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith(says)
