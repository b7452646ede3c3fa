"""Relays whose kernel says no: system calls that a sandbox refuses.

gVisor, a container's seccomp profile and systemd's SystemCallFilter refuse what is not
on their list, each with an errno of its own.  relayd can do without whatever makes it
fast: nothing is lost then, and nobody is blamed.  Each relay here is a process behind
such a filter (`tests.sandbox`), and is held to the same few things.
"""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests import sandbox
from tests.process import (
    TRANSPORTS,
    RelayProcess,
    Server,
    connect,
    read_all,
    read_exactly,
    relay,
    reset,
    transport,
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
        "splice": (errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EOPNOTSUPP),
        "pipe2 O_NONBLOCK": (errno.EPERM, errno.ENOSYS),
        "F_SETPIPE_SZ": (errno.EPERM,),
        "SIOCOUTQ": (errno.EPERM,),
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
    """Bulk each way, half-closed both first and last, and a reset from each side."""
    with connect(running.port) as client, server.accept() as upstream:
        with sent(client, DATA):
            assert read_all(upstream) == DATA
        with sent(upstream, DATA):
            assert read_all(client) == DATA
        running.ended("done")
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
