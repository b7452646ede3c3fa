"""Relays whose kernel says no: system calls that a sandbox refuses.

gVisor, a container's seccomp profile and systemd's SystemCallFilter refuse what is not
on their list, each with an errno of its own.  relayd can do without whatever makes it
fast: nothing is lost then, and nobody is blamed.  Each relay here is a process behind
such a filter (`sandbox`), and is held to the same few things.
"""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support import sandbox
from tests.support.process import (
    TRANSPORTS,
    RelayProcess,
    Server,
    UdpServer,
    command,
    connect,
    read_all,
    read_exactly,
    relay,
    reset,
    transport,
    udp_client,
)

#: No part of it comes twice.
DATA = random.Random(14).randbytes(3_000_000)

pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.skipif(not sandbox.AVAILABLE, reason="a seccomp filter is Linux's"),
]

#: What is refused, and how: by a name that a test can have.
REFUSALS = {
    f"{name} {errno.errorcode[number]}": {name: number}
    for name, numbers in {
        "splice": (
            *(errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EOPNOTSUPP),
            errno.EIO,
        ),
        "pipe2 O_NONBLOCK": (errno.EPERM, errno.ENOSYS),
        "F_SETPIPE_SZ": (errno.EPERM,),
        "accept4": (errno.EPERM, errno.ENOSYS, errno.EACCES),
        "prlimit64": (errno.EPERM,),
        "SIOCOUTQ": (errno.EPERM,),
        "MSG_MORE": (errno.EINVAL,),
        "TCP_NODELAY": (errno.EACCES,),
        "TCP_QUICKACK": (errno.EACCES, errno.ENOPROTOOPT),
        "SO_MEMINFO": (errno.EPERM, errno.ENOPROTOOPT),
        "TCP_INFO": (errno.EPERM, errno.ENOPROTOOPT),
        "SO_KEEPALIVE": (errno.EACCES,),
        "SO_OOBINLINE": (errno.ENOPROTOOPT,),
        "SO_LINGER": (errno.EACCES,),
        "timerfd_create": (errno.EPERM, errno.ENOSYS),
    }.items()
    for number in numbers
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as listening:
        yield listening


@contextmanager
def sent(connection: socket.socket, data: bytes) -> Iterator[None]:
    """Send this while the block runs, and then the end of data."""

    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def hold_to(running: RelayProcess, server: Server) -> None:
    """Bulk each way, half-closed first and last, a word, a reset from each side."""
    with connect(running.port) as client, server.accept() as upstream:
        with sent(client, DATA):
            assert read_all(upstream) == DATA
        with sent(upstream, DATA):
            assert read_all(client) == DATA
        running.ended("done")
    with connect(running.port) as client:
        # An end that is there before the last bytes are read.
        client.sendall(b"a word")
        client.shutdown(socket.SHUT_WR)
        with server.accept() as upstream:
            assert read_all(upstream) == b"a word"
        assert read_all(client) == b""
        running.ended("done", 2)
    for ending in ("downstream_reset", "upstream_reset"):
        with connect(running.port) as client, server.accept() as upstream:
            ends = client, upstream
            near, far = ends if ending == "downstream_reset" else ends[::-1]
            # Enough for splicing, and all of it is read before the reset.
            near.sendall(DATA[:1_000_000])
            assert read_exactly(far, 1_000_000) == DATA[:1_000_000]
            near.sendall(b"last words")
            assert read_exactly(far, 10) == b"last words"
            reset(near)
            with pytest.raises(ConnectionResetError):
                far.recv(1)
            running.ended(ending)
    assert not [line for line in running.lines if "Traceback" in line]


#: Twisted's transports don't splice.
OF_SPLICING = ("splice", "pipe2 O_NONBLOCK", "F_SETPIPE_SZ")


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (refusal, kind)
        for refusal in REFUSALS
        for kind in TRANSPORTS
        if kind == "plane" or not refusal.startswith(OF_SPLICING)
    ],
)
def test_a_relay_can_do_without(refusal: str, kind: str, server: Server) -> None:
    with transport(kind):
        addresses = ("-l", "127.0.0.1:0", "-d", server.address)
        with relay(*addresses, refusing=REFUSALS[refusal]) as running:
            hold_to(running, server)


@pytest.mark.parametrize("reactor", ["poll", "select"])
@pytest.mark.parametrize("call", ["epoll_create1", "epoll_ctl"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_relay_without_epoll_has_twisteds_connections(
    number: int, call: str, reactor: str, server: Server
) -> None:
    """It is told apart from a kernel that has one by trying it, before it is needed."""
    addresses = ("-l", "127.0.0.1:0", "-d", server.address)
    how: dict[str, Any] = {"twistd": command(reactor), "refusing": {call: number}}
    with relay(*addresses, **how) as running:
        hold_to(running, server)


@pytest.mark.parametrize("call", ["epoll_create1", "epoll_ctl"])
def test_a_plane_that_was_asked_for_and_is_refused_is_one_line(call: str) -> None:
    running = RelayProcess(
        *("--transport", "plane", "-l", "127.0.0.1:0", "-d", "127.0.0.1:9"),
        twistd=command("poll"),
        refusing={call: errno.EPERM},
    )
    try:
        assert running.wait() == 1
        [line] = [line for line in running.lines if "epoll" in line]
        assert line == (
            "relayd: transport plane needs Linux, epoll, and a reactor that watches"
            " descriptors; epoll is refused (Operation not permitted): leave it out"
        )
        assert not [line for line in running.lines if "Traceback" in line]
    finally:
        running.stop()


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_listener_that_may_not_accept_does_not_spin(kind: str) -> None:
    """Neither accept4(2) nor accept(2): a line in the log, and next to no CPU."""
    refused = {"accept4": errno.EPERM, "accept": errno.EPERM}
    with transport(kind), Server() as server:
        addresses = ("-l", "127.0.0.1:0", "-d", server.address)
        with relay(*addresses, refusing=refused) as running:
            with connect(running.port), connect(running.port):
                running.wait_for("accept failed: Operation not permitted; clients wait")
                before = running.cpu
                time.sleep(0.5)
                assert running.cpu - before < 0.2
            assert not [line for line in running.lines if "Traceback" in line]


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize(
    "refusal",
    [
        {"recvmmsg": errno.EPERM},
        {"sendmmsg": errno.EPERM},
        {"recvmmsg": errno.ENOSYS, "sendmmsg": errno.ENOSYS},
    ],
    ids=lambda refusal: " ".join(refusal),
)
def test_datagrams_do_without(refusal: dict[str, int], kind: str) -> None:
    with transport(kind), UdpServer() as server:
        addresses = ("-l", "udp:127.0.0.1:0", "-d", server.address)
        with relay(*addresses, refusing=refusal) as running:
            with udp_client(running.port) as client:
                for number in range(10):
                    client.send(b"%d" % number)
                    data, relayed = server.receive()
                    server.send(data, relayed)
                    assert client.recv(100) == b"%d" % number
            assert not [line for line in running.lines if "Traceback" in line]
