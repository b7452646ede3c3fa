"""`twistd --chroot` into a folder that has nothing but a file of names.

What is imported or read when the first client comes is not there any more.  Debian's
Python and a resolver that needs no module of its own are all that this asks for.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority, server_context
from tests.support.process import (
    START,
    TRANSPORTS,
    RelayProcess,
    Server,
    UdpServer,
    command,
    connect,
    read_all,
    read_exactly,
    relay,
    transport,
    udp_client,
)
from tests.system.programs import lacking

pytestmark = pytest.mark.system

#: A name that only the jail knows.
NAME = "server.jail"


@pytest.fixture
def jail(tmp_path: Path) -> Path:
    """A folder with a file of names, and nothing else."""
    if os.geteuid() != 0:
        lacking("a jail takes root")
    folder = tmp_path / "jail"
    (folder / "etc").mkdir(parents=True)
    hosts = f"127.0.0.1 localhost {NAME}\n"
    (folder / "etc" / "hosts").write_text(hosts)
    return folder


@contextmanager
def jailed(jail: Path, *args: str, **options: Any) -> Iterator[RelayProcess]:
    twistd = (*command(), f"--chroot={jail}")
    with relay(*args, twistd=twistd, **options) as running:
        root = os.readlink(f"/proc/{running.process.pid}/root")
        assert root == str(jail)
        yield running
        running.signal()
        assert running.wait() == 0
    assert not [line for line in running.lines if "Traceback" in line]


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_names_are_known_in_a_jail(jail: Path, kind: str) -> None:
    """Those of listeners, looked up at start, and those of servers, later."""
    with Server() as server, UdpServer() as datagrams, transport(kind):
        there = f"{NAME}:{server.socket.getsockname()[1]}"
        with jailed(
            jail,
            *("-l", "localhost:0", "-d", there),
            *("-l", "udp:localhost:0", "-d", f"udp:{NAME}:{datagrams.port}"),
        ) as running:
            stream, udp = running.listening(2)
            with connect(int(stream.rpartition(":")[2])) as client:
                with server.accept() as upstream:
                    client.sendall(b"request")
                    assert read_exactly(upstream, 7) == b"request"
                    upstream.sendall(b"response")
                assert read_all(client) == b"response"
            running.ended("done")
            with udp_client(int(udp.rpartition(":")[2])) as sender:
                sender.send(b"question")
                data, relays = datagrams.receive()
                assert data == b"question"
                datagrams.send(b"answer", relays)
                assert sender.recv(100) == b"answer"


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_names_of_4a_are_known_in_a_jail(jail: Path, kind: str) -> None:
    """And one that nobody knows is a refusal."""
    with Server() as server, transport(kind):
        port = server.socket.getsockname()[1].to_bytes(2, "big")
        with jailed(jail, "-l", "localhost:0", plugin="socks4") as running:
            for name, code in ((NAME, 90), ("nobody.invalid", 91)):
                with connect(running.port) as client:
                    client.sendall(b"\4\1" + port + b"\0\0\0\1\0" + name.encode())
                    client.sendall(b"\0")
                    assert read_exactly(client, 8)[1] == code
            server.accept().close()
            running.ended("unresolved")


def test_tls_in_a_jail(jail: Path, tmp_path: Path) -> None:
    """On both sides; and a server that is another is refused in words.

    Twisted's own listeners keep a descriptor of /dev/null, for when there are no more;
    the refusal names it.
    """
    root = Authority(tmp_path)
    pem = root.issue("localhost")
    listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    twistd = (*command(), f"--chroot={jail}")
    refused = RelayProcess("-l", listener, "-d", "80", twistd=twistd)
    refused.wait_for(
        "can't listen on ssl:0:.*: /dev/null: No such file", patience=START
    )
    assert refused.wait() == 1
    refused.stop()
    (jail / "dev").mkdir()
    (jail / "dev" / "null").touch()
    for names, ending in ((("localhost",), "done"), ((), "connect_failed")):
        context = server_context(root.issue(*names))
        with Server() as server:
            there = server.socket.getsockname()[1]
            with jailed(
                jail,
                *("-l", listener),
                *("-d", f"tls:localhost:{there}:trustRoots={root.folder}"),
            ) as running:
                trusting = ssl.create_default_context(cafile=str(root.file))
                raw = connect(running.port)
                with trusting.wrap_socket(raw, server_hostname="localhost") as client:
                    upstream: socket.socket = server.accept()
                    try:
                        upstream = context.wrap_socket(upstream, server_side=True)
                    except ssl.SSLError:
                        assert not names
                    else:
                        assert names
                        client.sendall(b"request")
                        assert read_exactly(upstream, 7) == b"request"
                        upstream.unwrap()
                    upstream.close()
                    client.close()
                running.ended(ending)
