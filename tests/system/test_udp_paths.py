"""Datagrams on the way: a path that takes smaller ones than the relay's own network.

The relay is on the machine that the others call the client's; between it and the
server is a router, whose link to the server is narrow.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.process import PATIENCE, RelayProcess, relay
from tests.system.namespaces import OUTSIDE, PROXY, SERVER, Machines, machines
from tests.system.programs import program, run

pytestmark = pytest.mark.system

#: Bytes that the narrow link takes at once.
NARROW = 1000

#: Of what a client sends at once; each is too large, and fits in fragments.
SIZES = (1300, 1250, 1200, 1200, 1200)

_SERVER = f"""
import socket
with socket.socket(type=socket.SOCK_DGRAM) as sock:
    sock.bind(("{SERVER}", 0))
    print(sock.getsockname()[1], flush=True)
    sock.settimeout({PATIENCE})
    while True:
        print(len(sock.recv(65536)), flush=True)
"""

_CLIENT = """
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as sock:
    sock.connect(("127.0.0.1", int(sys.argv[1])))
    for size in sys.argv[2:]:
        sock.send(bytes(int(size)))
"""


@contextmanager
def narrow_path() -> Iterator[Machines]:
    ip = program("ip")
    with machines() as three:
        for machine in (three.proxy, three.server):
            link = ("link", "set", "outside", "mtu", str(NARROW))
            run(ip, "-n", machine.name, *link)
        run(ip, "-n", three.client.name, "route", "add", "default", "via", PROXY)
        run(ip, "-n", three.server.name, "route", "add", "default", "via", OUTSIDE)
        forward = "open('/proc/sys/net/ipv4/ip_forward', 'w').write('1')"
        run(*three.proxy.runs(sys.executable, "-c", forward))
        yield three


@pytest.mark.parametrize("transport", ["plane", "twisted"])
def test_what_is_too_large_for_the_path_costs_no_other_datagram(transport: str) -> None:
    """The first is dropped by the router, which says so; the rest go in fragments."""
    with narrow_path() as net:
        listening = net.server.runs(sys.executable, "-c", _SERVER)
        with subprocess.Popen(listening, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = int(server.stdout.readline())
                options = ("--dest", f"udp:{SERVER}:{port}", "--transport", transport)
                options = (
                    "--listen",
                    "udp:127.0.0.1:0",
                    *options,
                    "--drain-timeout",
                    "0.1",
                )
                with relay(*options, twistd=net.client.twistd) as running:
                    send_at_once(net, running)
                    arrived = [int(server.stdout.readline()) for _ in SIZES[1:]]
                    running.signal()
                    running.wait()
                    [line] = running.wait_for(r"datagrams relay=.*")
            finally:
                server.kill()
    # What is one run may leave before the single ones are through.
    assert sorted(arrived) == sorted(SIZES[1:])
    assert f" received={len(SIZES)} sent={len(SIZES)} " in line[0]
    assert " dropped=- " in line[0]
    assert " icmp_errors=1 " in line[0]


def send_at_once(net: Machines, running: RelayProcess) -> None:
    """Send all of them while the relay can't read: it has them in one batch."""
    port = running.port
    running.process.send_signal(signal.SIGSTOP)
    client = (sys.executable, "-c", _CLIENT, str(port), *map(str, SIZES))
    subprocess.run(net.client.runs(*client), check=True, timeout=PATIENCE)
    running.process.send_signal(signal.SIGCONT)
