"""The limits of a real UDP relay: floods, full tables, replies, a sandbox."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from relayd.datagrams.table import IN_USE_AFTER
from tests.support.live_udp import (
    LISTEN,
    Stage,
    balanced,
    exchange,
    name,
    nothing_came,
    seldom,
    server,
    stage,
)
from tests.support.process import (
    DATAGRAM,
    PATIENCE,
    UdpServer,
    connect,
    eventually,
    udp_client,
)

__all__ = ["server", "stage"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


#: Python's allocator takes memory in arenas of a mebibyte, and what lives keeps whole
#: arenas: a relay that leaves nothing behind may grow by about this all the same.
ALLOCATOR = 1 << 21

_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)


def be_in_use(server: UdpServer, *clients: socket.socket) -> list[tuple[str, int]]:
    """Have flows that count as in use; that takes two seconds, by their definition."""
    peers = [exchange(client, server, b"a", b"A") for client in clients]
    time.sleep(IN_USE_AFTER + 0.1)
    again = [exchange(client, server, b"b", b"B") for client in clients]
    assert again == peers
    return peers


def answered(client: socket.socket, server: UdpServer, request: bytes) -> Any:
    """The same, in a flood of others' datagrams, which the server leaves alone."""
    client.send(request)
    while (got := server.receive())[0] != request:
        assert got[0] == b"spoofed"
    server.send(b"answer", got[1])
    assert client.recv(DATAGRAM) == b"answer"
    return got[1]


def send_as(sock: socket.socket, source: int, data: bytes, port: int) -> None:
    """Send to the relay from an address of 127.0.0.0/8, which all are this machine's.

    The source of one datagram, by ip(7): a flood of them needs one socket, no root.
    """
    own = struct.pack("=I4s4s", 0, (0x7F000000 | source).to_bytes(4, "big"), bytes(4))
    extra = [(socket.IPPROTO_IP, _IP_PKTINFO, own)]
    sock.sendmsg([data], extra, 0, ("127.0.0.1", port))


# -- bounds


@seldom
@pytest.mark.parametrize(
    "sources", [1_000, pytest.param(50_000, marks=pytest.mark.system)]
)
def test_a_spoofed_flood_beside_an_established_flow(
    stage: Stage, server: UdpServer, sources: int
) -> None:
    each_time, most = 250, 50
    options = ("--max-flows", str(most), "--quiet")
    options = (*LISTEN, "-d", server.address, *options)
    with balanced(*options, fresh=True) as running:
        # Asked for once: it is looked for in the log, which is about to grow.
        port = running.port
        with udp_client(port) as client, socket.socket(type=2) as spoofing:
            [peer] = be_in_use(server, client)
            descriptors, arrived, memory = running.descriptors, 0, 0
            for start in range(0, sources, each_time):
                for source in range(start, start + each_time):
                    send_as(spoofing, 0x10000 + source, b"spoofed", port)
                # The relay reads it after all of those: none waits, none is lost.
                client.send(b"kept %d" % start)
                while (got := server.receive())[1] != peer:
                    assert got[0] == b"spoofed"
                    arrived += 1
                assert got[0] == b"kept %d" % start
                server.send(b"yes, %d" % start, peer)
                assert client.recv(DATAGRAM) == b"yes, %d" % start
                if not memory:
                    memory = running.rss
            assert running.descriptors <= descriptors + most
            # Nor was any of the spoofed ones: each had its flow, for a moment.
            assert arrived == sources
            # No flow is left, and no entry of a table: at least 100 bytes of each.
            if sources * 100 > 2 * ALLOCATOR:
                assert running.rss < memory + sources * 50
            assert not [line for line in running.lines if name(client) in line]


def test_a_flood_of_two_listeners_with_few_descriptors(server: UdpServer) -> None:
    """By default, what one relay may have is not another's, nor what TCP needs."""

    def low_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))

    udp = (*LISTEN, "-d", server.address)
    tcp = ("-l", "127.0.0.1:0", "-d", server.address.removeprefix("udp:"))
    with balanced(*udp, *udp, *tcp, preexec_fn=low_limit) as running:
        ports = [int(each.rpartition(":")[2]) for each in running.listening(3)]
        with ExitStack() as stack:
            clients = [stack.enter_context(udp_client(port)) for port in ports[:2]]
            spoofing = stack.enter_context(socket.socket(type=2))
            peers = [exchange(each, server, b"first", b"yes") for each in clients]
            for start in range(0, 2000, 100):
                for source in range(start, start + 100):
                    for port in ports[:2]:
                        send_as(spoofing, 0x10000 + source, b"spoofed", port)
                # Those who were there, and those who come, are served.
                for client, peer in zip(clients, peers, strict=True):
                    assert answered(client, server, b"more") == peer
                for port in ports[:2]:
                    with udp_client(port) as new:
                        answered(new, server, b"new")
            # Nobody listens there, but the relay could ask.
            with connect(ports[2]) as stream:
                assert stream.recv(1) == b""
            running.ended("connect_refused")


def test_a_flood_of_empty_datagrams_beside_another_listener(server: UdpServer) -> None:
    flood = (
        "import socket, sys\n"
        "sock = socket.socket(type=socket.SOCK_DGRAM)\n"
        "sock.connect(('127.0.0.1', int(sys.argv[1])))\n"
        "while True: sock.send(b'')\n"
    )
    with UdpServer() as flooded:
        args = (*LISTEN, "-d", flooded.address, *LISTEN, "-d", server.address)
        with balanced(*args, "--udp-rcvbuf", "200000") as running:
            ports = [int(each.rpartition(":")[2]) for each in running.listening(2)]
            with udp_client(ports[1]) as client:
                argv = [sys.executable, "-c", flood, str(ports[0])]
                with subprocess.Popen(argv) as flooding:
                    try:
                        # It comes faster than the relay can read.
                        eventually(lambda: kernel_drops(ports[0]), "an overflow")
                        for number in range(100):
                            data = b"%d" % number
                            exchange(client, server, data, data)
                        seen = kernel_drops(ports[0])
                        eventually(lambda: kernel_drops(ports[0]) > seen, "still")
                    finally:
                        flooding.kill()
            assert flooded.receive()[0] == b""


def kernel_drops(port: int) -> int:
    """What the kernel has dropped of an IPv4 listener's datagrams (proc(5))."""
    found: list[int] = []

    def look() -> bool:
        # The list misses some while others on this machine open and close theirs.
        lines = Path("/proc/net/udp").read_text().splitlines()[1:]
        each = (line.split() for line in lines)
        found[:] = [int(x[12]) for x in each if x[1].endswith(f":{port:04X}")]
        return bool(found)

    eventually(look, f"somebody listens on {port}")
    return found[0]


def fill_table(
    many: socket.socket, server: UdpServer, port: int, sources: range
) -> None:
    """A flow for each of these addresses, which is asked, and answered."""
    for start in range(0, len(sources), 100):
        some = sources[start : start + 100]
        for source in some:
            send_as(many, source, b"%d" % source, port)
        for data, peer in [server.receive() for _ in some]:
            server.send(data, peer)
        assert {many.recv(DATAGRAM) for _ in some} == {b"%d" % each for each in some}


@seldom
@pytest.mark.parametrize(
    ("most", "timeout"),
    [(1500, "5"), pytest.param(8000, "6", marks=pytest.mark.system)],
)
def test_thousands_of_flows_and_nothing_left_of_them(
    server: UdpServer, most: int, timeout: str
) -> None:
    """Each is answered; when they have expired, their sockets and memory are free."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # select(2) has no number above 1,023.
    count = 400 if os.environ.get("RELAYD_TEST_REACTOR") == "select" else most
    if limit != resource.RLIM_INFINITY:
        count = min(count, (limit - 1500) // 100 * 100)

    def high_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    options = ("--udp-timeout", timeout, "--udp-unreplied-timeout", timeout, "--quiet")
    options = (*LISTEN, "-d", server.address, *options)
    with balanced(*options, preexec_fn=high_limit) as running:
        port = running.port
        with udp_client(port) as client, socket.socket(type=2) as many:
            many.bind(("", 0))
            many.settimeout(PATIENCE)
            exchange(client, server, b"warm", b"up")
            descriptors = running.descriptors
            fill_table(many, server, port, range(0x20000, 0x20000 + count))
            # All at once: the first have not expired yet.
            assert running.descriptors >= descriptors + count - 1
            memory = running.rss
            # One that nobody answers is told of, even quietly; the others are not.
            with udp_client(port) as unheard:
                exchange(unheard, server, b"unheard")
                [flow] = running.flows(like="ending=unreplied")
                assert flow["client"] == name(unheard)
            # The first client's own has expired as well.
            eventually(lambda: running.descriptors < descriptors, "all have expired")
            # Python keeps some of the memory, and needs no more for as many others.
            # What they leave behind would be twice this: a kilobyte each.
            fill_table(many, server, port, range(0x30000, 0x30000 + count))
            # The look for huge pages, and its thread, may come in between.
            assert running.rss < memory + 768 * most
        assert not [line for line in running.lines if "ending=expired" in line]


@seldom
def test_flows_are_bounded_and_those_in_use_are_kept(server: UdpServer) -> None:
    """Of one client host, and in all; refusals are logged once a second at most."""
    listen = (*LISTEN, "-d", server.address)
    with ExitStack() as held:
        own = held.enter_context(balanced(*listen, "--max-flows-per-client", "3"))
        most = ("--max-flows", "2", "--max-flows-per-client", "2")
        whole = held.enter_context(balanced(*listen, *most))
        clients = [held.enter_context(udp_client(own.port)) for _ in range(4)]
        other = held.enter_context(udp_client(own.port, own=("127.0.0.2", 0)))
        one, two, three = (
            held.enter_context(udp_client(whole.port, own=(host, 0)))
            for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")
        )
        # One that was answered makes room as one that was not.
        exchange(clients[3], server, b"asked", b"answered")
        peers = be_in_use(server, *clients[:3], one, two)
        [flow] = own.flows()
        assert (flow["client"], flow["ending"]) == (name(clients[3]), "evicted")
        assert flow["by"] == name(clients[2])
        # Those in use do not, and another host has flows of its own.
        clients[3].send(b"too many")
        exchange(other, server, b"another host", b"welcome")
        began = time.monotonic()
        for _ in range(100):
            three.send(b"3")
        # Read after them all; had one been let in, the server would have it first.
        again = [
            exchange(each, server, b"c", b"C") for each in (*clients[:3], one, two)
        ]
        took = time.monotonic() - began
        assert again == peers
        own.wait_for(r"the flow table is full: no flow for 127\.0\.0\.1 \(1 datagrams")
        refused = whole.wait_for("the flow table is full: no flow for 127.0.0.3")
        assert len(refused) <= 1 + took
        assert not [line for line in whole.lines if "ending=" in line]


def test_replies_are_capped(server: UdpServer) -> None:
    with balanced(*LISTEN, "-d", server.address, "--reply-cap", "2") as running:
        with udp_client(running.port) as client:
            client.send(bytes(100))
            _, peer = server.receive()
            # 150 of 200 bytes; then 51 would be too many, and 50 are not.
            for size in (150, 51, 50, 1):
                server.send(bytes(size), peer)
            assert [len(client.recv(DATAGRAM)) for _ in range(2)] == [150, 50]
            # Another byte from the client is worth two.
            client.send(b"!")
            assert server.receive() == (b"!", peer)
            for size in (3, 2):
                server.send(bytes(size), peer)
            assert len(client.recv(DATAGRAM)) == 2
            nothing_came(client)


# -- a sandbox


def refusing(number: int, *calls: int) -> Any:
    """What makes a process, and those that come of it, get an error for some calls.

    :param number: the error.
    :param calls: numbers of system calls; seccomp(2).
    """
    # The call's number; a jump for each that is refused; allowed; refused.
    code = [(0x20, 0, 0, 0)]
    code += [(0x15, len(calls) - n, 0, call) for n, call in enumerate(calls)]
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50000 | number)]
    program = b"".join(struct.pack("=HBBI", *each) for each in code)
    held = ctypes.create_string_buffer(program)
    described = struct.pack("@HP", len(code), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)

    def refuse() -> None:
        no_new_privileges, seccomp, by_filter = 38, 22, 2
        if libc.prctl(no_new_privileges, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        if libc.prctl(seccomp, by_filter, described):
            raise OSError(ctypes.get_errno(), f"prctl, with {len(held)} bytes")

    return refuse


#: recvmmsg and sendmmsg, by machine.
BATCH_CALLS = {"x86_64": (299, 307), "aarch64": (243, 269)}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in BATCH_CALLS,
    reason="knows the numbers of system calls of two machines",
)
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_sandbox_without_the_calls_for_batches(
    server: UdpServer, number: int
) -> None:
    """The same is done one by one."""
    options = (*LISTEN, "-d", server.address, "-l", "udp:0", "-d", server.address)
    refused = refusing(number, *BATCH_CALLS[platform.machine()])
    with balanced(*options, preexec_fn=refused) as running:
        for line in running.listening(2):
            with udp_client(int(line.rpartition(":")[2])) as client:
                for size in (0, 1, 65507):
                    exchange(client, server, bytes(size), b"yes", bytes(size))
