"""Real clients wait for a peer by way of the proxy: SOCKS4's BIND.

An FTP client that was written for no proxy does it for each transfer, under Dante's
`socksify`: in active mode the server connects to where the client says.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.process import PATIENCE, RelayProcess, read_all
from tests.system.namespaces import (
    CLIENT,
    OUTSIDE,
    PROXY,
    SERVER,
    SERVERS,
    Machine,
    Machines,
    machines,
)
from tests.system.programs import LIMIT, WebServer, module, program
from tests.system.socks4 import all_sessions, assert_said, npm_socks, socks4
from tests.system.test_http import noise, sha256

pytestmark = pytest.mark.system

MIB = 1 << 20


# -- Dante and FTP


@pytest.fixture(scope="module")
def network() -> Iterator[Machines]:
    with machines() as three:
        yield three


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the FTP server serves, and where it stores."""
    path = tmp_path / "served"
    path.mkdir()
    return path


def ftp_server(machine: Machine, folder: Path) -> WebServer:
    """pyftpdlib, on a free port of the server's machine, for a user joe."""
    module("pyftpdlib")
    return WebServer(
        *("--interface", SERVER, "--port", "0", "--directory", str(folder)),
        *("--username", "joe", "--password", "secret", "--write"),
        command=machine.runs(sys.executable, "-m", "pyftpdlib"),
        saying=r">>> starting FTP server on [\d.]+:(\d+), ",
    )


def socksified(
    machine: Machine, config: Path, proxy: str, *command: str, script: str
) -> str:
    """Run an interactive program, with Dante, on a machine; what it printed.

    :param config: where Dante's configuration shall be.
    :param proxy: the proxy's address and port.
    :param script: what is typed.
    """
    host, port = proxy.split(":")
    config.write_text(
        # It looks nothing up.
        "resolveprotocol: fake\n"
        "route {\n"
        f"  from: 0.0.0.0/0 to: 0.0.0.0/0 via: {host} port = {port}\n"
        "  proxyprotocol: socks_v4\n"
        "  protocol: tcp\n"
        "  command: connect bind\n"
        "}\n"
    )
    # `env` tells Dante alone.  Unless told so, it takes no proxy to the networks
    # that the machine is in.
    done = subprocess.run(
        machine.runs(
            *(program("env"), f"SOCKS_CONF={config}"),
            *("SOCKS_AUTOADD_LANROUTES=no", program("socksify"), *command),
        ),
        input=script,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("where", ["another machine", "the proxy's machine"])
def test_ftp(network: Machines, folder: Path, tmp_path: Path, where: str) -> None:
    """A listing and a file each way, over connections that the server makes.

    From another machine, as a guarded proxy's client: there is no way but through the
    proxy.  On the proxy's own, as the client of one that serves no other.
    """
    served, sent = noise(folder / "served.bin", MIB), noise(tmp_path / "sent.bin", MIB)
    if where == "another machine":
        machine, client = network.client, CLIENT
        options = ["--listen", f"{PROXY}:0", "--allow-client", CLIENT]
        options += ["--allow-dest", SERVERS]
    else:
        machine, client, options = network.proxy, "127.0.0.1", []
    with (
        ftp_server(network.server, folder) as server,
        socks4(*options, "--verbose", twistd=network.proxy.twistd) as proxy,
    ):
        at = f"{SERVER}:{server.port}"
        said = socksified(
            *(machine, tmp_path / "socks.conf", proxy.listening()[0]),
            # Active mode, no login by itself, and what the server says.
            *(program("tnftp"), "-A", "-n", "-v", SERVER, str(server.port)),
            script=(
                "user joe secret\n"
                "binary\n"
                "ls\n"
                f"get served.bin {tmp_path / 'got.bin'}\n"
                f"put {sent} stored.bin\n"
                "quit\n"
            ),
        )
        assert re.search(rf"^-rw\S+ .* {MIB} .* served\.bin$", said, re.MULTILINE)
        assert sha256(tmp_path / "got.bin") == sha256(served)
        assert sha256(folder / "stored.bin") == sha256(sent)
        # The server has connected to the address that the proxy named, which is the
        # one that faces it.
        bound = proxy.wait_for(
            r"\] dialing session=\d+ relay=\S+ upstream=bind:(\S+)$", 3
        )
        assert {match[1].partition(":")[0] for match in bound} == {OUTSIDE}

        sessions = all_sessions(proxy, 4)
        control, listing, got, put = sessions
        for session in sessions:
            # Dante asks for the last server that it has connected to.
            assert_said(session, requested=at)
            assert session["client"].partition(":")[0] == client
        assert_said(control, command="connect", upstream=at)
        for session in (listing, got, put):
            assert_said(session, command="bind")
            assert re.fullmatch(rf"{SERVER}:\d+", session["upstream"])
        assert listing["up"] == "0"
        assert int(listing["down"]) > len("served.bin")
        assert (got["up"], got["down"]) == ("0", str(MIB))
        assert (put["up"], put["down"]) == (str(MIB), "0")


# -- the npm package, on 127.0.0.1


@contextmanager
def waiting(
    running: RelayProcess, host: str, question: Path
) -> Iterator[tuple[subprocess.Popen[bytes], tuple[str, int]]]:
    """A client that waits for a peer; the address that it was told."""
    with (
        question.open("rb") as file,
        subprocess.Popen(
            # As its documentation has it: who waits can't know the peer's port.
            npm_socks("bind", str(running.port), host, "0", "joe"),
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as client,
    ):
        try:
            assert client.stderr is not None
            said = client.stderr.readline().decode()
            told = re.fullmatch(r"bound ([\d.]+):(\d+)\n", said)
            assert told, said
            yield client, (told[1], int(told[2]))
        finally:
            client.kill()


def come(to: tuple[str, int], source: str = "127.0.0.1") -> socket.socket:
    """A peer, from an address of this machine."""
    peer = socket.create_connection(to, PATIENCE, (source, 0))
    peer.settimeout(PATIENCE)
    return peer


@pytest.mark.parametrize("expected", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_npm_socks(expected: str, tmp_path: Path) -> None:
    """The expected peer, by address or by name, or whoever comes: 1 MiB each way."""
    question = noise(tmp_path / "question", MIB)
    answer = noise(tmp_path / "answer", MIB).read_bytes()
    options = ["--bind-any"] if expected == "0.0.0.0" else []
    with (
        socks4(*options) as running,
        waiting(running, expected, question) as (client, told),
        come(told) as peer,
    ):
        assert read_all(peer) == question.read_bytes()
        peer.sendall(answer)
        peer.shutdown(socket.SHUT_WR)
        got, said = client.communicate(timeout=PATIENCE)
        host, port = peer.getsockname()
        assert said.decode() == f"peer {host}:{port}\n"
        assert got == answer
        assert client.returncode == 0
        assert told[0] == "127.0.0.1"
        [session] = running.sessions()
        assert_said(
            session,
            command="bind",
            user="'joe'",
            requested=f"{expected}:0",
            upstream=f"{host}:{port}",
            up=MIB,
            down=MIB,
        )


def test_the_wrong_peer(tmp_path: Path) -> None:
    """Somebody else comes: both are turned away, and nobody can come after him."""
    question = noise(tmp_path / "question", 1000)
    with (
        socks4() as running,
        waiting(running, "127.0.0.1", question) as (client, told),
        closing(come(told, "127.0.0.2")) as stranger,
    ):
        # Closed, with a reset or without.
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        _, said = client.communicate(timeout=PATIENCE)
        assert client.returncode == 1
        assert "rejected incoming bound connection - (Failed)" in said.decode()
        with pytest.raises(ConnectionRefusedError):
            come(told)
        [session] = running.sessions()
        assert_said(
            session,
            command="bind",
            ending="wrong_peer",
            code=session["code"],
            reply=91,
            up=0,
            down=0,
        )
        running.wait_for(r"detail='127\.0\.0\.2:\d+ came instead of 127\.0\.0\.1'$")


def test_whoever_comes_takes_an_option(tmp_path: Path) -> None:
    """Without --bind-any, 0.0.0.0 is refused before anything listens."""
    with socks4() as running:
        done = subprocess.run(
            npm_socks("bind", str(running.port), "0.0.0.0", "9"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert "rejected connection - (Failed)" in done.stderr
        [session] = running.sessions()
        assert_said(
            session, command="bind", ending="denied", code=session["code"], reply=91
        )
