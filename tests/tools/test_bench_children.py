"""The benchmark's child processes: ports, CPU, and what is missing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from bench import children
from bench.children import CannotMeasure
from bench.figures import MANY
from tests.support.process import START


def test_a_udp_port_is_bound_when_a_socket_receives_there() -> None:
    """A connected one has a port, too, and takes them from one peer only."""
    with (
        socket.socket(type=socket.SOCK_DGRAM) as bound,
        socket.socket(type=socket.SOCK_DGRAM) as connected,
    ):
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        connected.connect(("127.0.0.1", port))
        found = children.bound_udp(os.getpid())
        assert port in found
        assert connected.getsockname()[1] not in found
    assert port not in children.bound_udp(os.getpid())


def test_the_addresses_of_udp_sockets() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as one:
        one.bind(("127.41.42.43", 0))
        assert "127.41.42.43" in children.udp_addresses(os.getpid())
    assert "127.41.42.43" not in children.udp_addresses(os.getpid())


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_is_not_free(
    kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below those that the kernel hands out, where nobody's connection takes them.
    ports = [children.free_port() for _ in range(2)]
    with socket.socket(type=kind) as taken:
        taken.bind(("127.0.0.1", ports[0]))
        monkeypatch.setattr("bench.children._ports", iter(ports))
        assert children.free_port() == ports[1]


def test_the_cpu_of_live_children_is_counted() -> None:
    """Dante's processes: the parent of one that is busy has used next to nothing."""
    busy = "while time.process_time() < 0.3: pass"
    program = f"""\
import os, sys, time
if not os.fork():
    {busy}
    print(flush=True)
    time.sleep({START})
time.sleep({START})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"\n"
            alone = children.cpu(parent.pid)
            assert children.cpu(parent.pid, forks=True) >= alone + 0.3
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(CannotMeasure) as caught:
        children.program("h2load")
    assert str(caught.value) == (
        "h2load is not installed: it is in Debian's package nghttp2-client;"
        " `make system-deps` installs it"
    )


def test_too_few_open_files_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 9000))
    with pytest.raises(CannotMeasure, match="needs 18000 open files .* limit is 9000"):
        children.allow_descriptors(2 * MANY + 2000)
