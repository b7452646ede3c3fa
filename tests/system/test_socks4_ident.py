"""The proxy asks a real identd, on the client's machine, whose connection it is."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.process import RelayProcess, eventually
from tests.system.namespaces import (
    CLIENT,
    PROXY,
    SERVER,
    SERVERS,
    Machine,
    Machines,
    machines,
)
from tests.system.programs import LIMIT, WebServer, program
from tests.system.socks4 import assert_said, socks4, storing_server
from tests.system.test_http import command as curl_command

pytestmark = pytest.mark.system

PORT = 113

#: The reply to a client whose identd has told on it, and what curl says of it.
WHY = {
    92: "cannot connect to identd",
    93: "report different user-ids",
}


@pytest.fixture(scope="module")
def network() -> Iterator[Machines]:
    with machines() as three:
        yield three


@pytest.fixture
def server(network: Machines, tmp_path: Path) -> Iterator[WebServer]:
    """A web server with one file, beyond the proxy."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "greeting").write_text("hello\n")
    with storing_server(folder, SERVER, network.server.runs) as running:
        yield running


@contextmanager
def identd(machine: Machine, config: Path) -> Iterator[None]:
    """oidentd on port 113 of the client's machine."""
    # Without rules of this machine's, which may hide or rename users.
    config.write_text("")
    with subprocess.Popen(
        machine.runs(
            *(program("oidentd"), "--foreground", "--nosyslog"),
            *("--address", CLIENT, "--config", config),
        )
    ) as running:
        try:
            # It says nothing when it is ready; this is the table of sockets of the
            # machine that it is on, where 0A is a listener.
            table = Path(f"/proc/{running.pid}/net/tcp")
            address = int.from_bytes(socket.inet_aton(CLIENT), sys.byteorder)
            listening = f" {address:08X}:{PORT:04X} 00000000:0000 0A "
            eventually(lambda: listening in table.read_text(), "oidentd listens")
            yield
        finally:
            running.kill()


def asking(network: Machines) -> AbstractContextManager[RelayProcess]:
    """A proxy for the client's machine that asks it."""
    return socks4(
        *("--listen", f"{PROXY}:0", "--allow-client", CLIENT),
        *("--allow-dest", SERVERS, "--ident"),
        twistd=network.proxy.twistd,
    )


def fetch(
    network: Machines, proxy: RelayProcess, server: WebServer, user: str, claimed: str
) -> subprocess.CompletedProcess[str]:
    """curl on the client's machine, run by a user who may claim to be another."""
    return subprocess.run(
        network.client.runs(
            *(program("setpriv"), "--reuid", user, "--clear-groups"),
            *curl_command("--noproxy", "", "--write-out", ""),
            *("--proxy", f"socks4://{claimed}@{PROXY}:{proxy.port}"),
            f"http://{SERVER}:{server.port}/greeting",
        ),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_identd_agrees(
    network: Machines, server: WebServer, tmp_path: Path, user: str
) -> None:
    """Whoever is who he says is served."""
    with identd(network.client, tmp_path / "config"), asking(network) as proxy:
        done = fetch(network, proxy, server, user, user)
        assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
        [session] = proxy.sessions()
        assert_said(session, command="connect", user=f"'{user}'")
        assert session["upstream"] == f"{SERVER}:{server.port}"


@pytest.mark.parametrize(
    ("user", "claimed"), [("nobody", "root"), ("root", "nobody"), ("root", "roo")]
)
def test_identd_disagrees(
    network: Machines, server: WebServer, tmp_path: Path, user: str, claimed: str
) -> None:
    with identd(network.client, tmp_path / "config"), asking(network) as proxy:
        assert_refused(fetch(network, proxy, server, user, claimed), 93)
        assert_logged(proxy, 93, claimed, f"identd says '{user}'")


def test_no_identd(network: Machines, server: WebServer) -> None:
    with asking(network) as proxy:
        assert_refused(fetch(network, proxy, server, "root", "root"), 92)
        assert_logged(proxy, 92, "root", "identd can't be asked: ")


def assert_refused(done: subprocess.CompletedProcess[str], code: int) -> None:
    # Curl's "proxy handshake error".
    assert done.returncode == 97, done.stderr
    assert f"({code})" in done.stderr
    assert WHY[code] in done.stderr


def assert_logged(proxy: RelayProcess, code: int, claimed: str, why: str) -> None:
    [session] = proxy.sessions()
    assert_said(
        session,
        command="connect",
        user=f"'{claimed}'",
        ending="ident_failed",
        code=session["code"],
        reply=code,
        up=0,
        down=0,
    )
    [detail] = proxy.wait_for(r" detail=(.*)$")
    assert why in detail[1]
