"""Datagrams whose source is forged so that what is answered comes back.

Raw sockets write the headers themselves, which takes root.  The server answers with
what it gets: a relay that lets one of these in would go round with it for ever.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.support.process import TRANSPORTS, UdpServer, relay, udp_client
from tests.system.programs import lacking

pytestmark = pytest.mark.system

UDP = socket.IPPROTO_UDP


def _sum(data: bytes) -> int:
    """The checksum of the internet: RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def forge(source: tuple[str, int], to: tuple[str, int], data: bytes) -> None:
    """Send a datagram that says that it is from `source`."""
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    ends = socket.inet_pton(family, source[0]) + socket.inet_pton(family, to[0])
    size = 8 + len(data)
    head = struct.pack(">HHH", source[1], to[1], size)
    pseudo = ends + struct.pack(">IxxxB", size, UDP)
    body = head + struct.pack(">H", _sum(pseudo + head + bytes(2) + data)) + data
    if family == socket.AF_INET:
        packet = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, UDP, 0)
    else:
        packet = struct.pack(">IHBB", 6 << 28, size, UDP, 64)
    raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with closing(raw):
        raw.sendto(packet + ends + body, (to[0], 0))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_forged_source_makes_a_loop(host: str, transport: str) -> None:
    """Neither a listener's own, nor a server's, nor nobody's; on a wildcard as well."""
    if os.geteuid() != 0:
        lacking("raw sockets take root")
    with ExitStack() as held:
        server = held.enter_context(UdpServer(host))
        listen = ("-l", f"udp:[{host}]:0" if ":" in host else f"udp:{host}:0")
        both = (*listen, "-d", server.address, "-l", "udp:0", "-d", server.address)
        options = ("--transport", transport, "--drain-timeout", "0.1")
        running = held.enter_context(relay(*both, *options))
        ports = [int(each.rpartition(":")[2]) for each in running.listening(3)]
        for port in ports[:2]:
            sources: list[Any] = [(host, port), (host, server.port)]
            if ":" in host:
                # Of IPv4, the kernel drops these itself.
                sources.append(("::", 4000))
            for source in sources:
                forge(source, (host, port), b"round and round")
            # Read after those: none of them has come before it.
            with udp_client(port, host) as client:
                client.send(b"honest")
                data, peer = server.receive()
                assert data == b"honest"
                server.send(data, peer)
                assert client.recv(100) == b"honest"
        running.signal()
        running.wait()
        lines = running.wait_for(r"datagrams relay=.*", 2)
        for line in lines:
            assert f" dropped=source_loops:{len(sources)} " in line[0]
            assert " sent=1 " in line[0]
