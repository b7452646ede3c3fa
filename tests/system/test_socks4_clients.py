"""Real clients CONNECT through the proxy, and its log agrees with what arrived.

Where a client takes any server, that is a `Reverser`: its answer is right only if
every byte has gone both ways, in order, past the end of one direction.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import random
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import PATIENCE, RelayProcess, Server, read_all
from tests.system.programs import LIMIT, module, program, run, twisted_server
from tests.system.socks4 import (
    Reverser,
    all_sessions,
    assert_said,
    npm_socks,
    socks4,
    storing_server,
)
from tests.system.test_http import command as curl_command
from tests.system.test_http import noise, sha256, url

pytestmark = pytest.mark.system

MIB = 1 << 20

#: What is sent to a Reverser: more than any buffer on the way takes at once.
QUESTION = random.Random("question").randbytes(4 * MIB)
ANSWER = QUESTION[::-1]


def reversed_for(running: RelayProcess, server: Server, **facts: object) -> None:
    """The log's one session was a whole exchange with the Reverser."""
    [session] = running.sessions()
    facts = {"requested": server.address, **facts}
    size = len(QUESTION)
    assert_said(session, command="connect", up=size, down=size, **facts)
    assert session["upstream"] == server.address


def named(server: Server) -> tuple[str, int]:
    """The server by a name, for clients that leave names to the proxy."""
    return "localhost", int(server.address.rpartition(":")[2])


# -- curl


def curl(*args: str | Path) -> list[tuple[int, int]]:
    """curl by way of a proxy; the bytes of each transfer, up and down.

    :param args: where the proxy is, and what curl shall do.
    """
    report = run(*through_proxy(*args))
    return [carried(line) for line in report.splitlines()]


def through_proxy(*args: str | Path) -> list[str | Path]:
    counts = "%{size_request} %{size_upload} %{size_header} %{size_download}\n"
    # No host is exempt from the proxy.
    return [*curl_command("--noproxy", ""), "--write-out", counts, *args]


def carried(line: str) -> tuple[int, int]:
    request, upload, header, download = map(int, line.split())
    return request + upload, header + download


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the web server serves, and where it stores."""
    path = tmp_path / "served"
    path.mkdir()
    return path


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("version", ["socks4", "socks4a"])
def test_curl(version: str, transport: str, folder: Path, tmp_path: Path) -> None:
    """10 MB down and 10 MB up are the same bytes, and as many as curl counts."""
    served, sent = noise(folder / "down", 10 * MIB), noise(tmp_path / "up", 10 * MIB)
    with (
        storing_server(folder) as server,
        socks4("--transport", transport) as running,
    ):
        host = "localhost" if version == "socks4a" else "127.0.0.1"
        proxy = (f"--{version}", f"127.0.0.1:{running.port}")
        at = f"http://{host}:{server.port}"
        [down] = curl(*proxy, "--output", tmp_path / "got", f"{at}/down")
        [up] = curl(*proxy, "--upload-file", sent, f"{at}/stored")
        assert sha256(tmp_path / "got") == sha256(served)
        assert sha256(folder / "stored") == sha256(sent)
        sessions = all_sessions(running, 2)
        for session in sessions:
            assert_said(
                session, command="connect", requested=f"{host}:{server.port}", user="-"
            )
            assert session["upstream"] == server.address
        counted = [(int(each["up"]), int(each["down"])) for each in sessions]
        assert counted == [down, up]


def test_curl_in_parallel(folder: Path, tmp_path: Path) -> None:
    """20 files come over 20 connections at once, and none gets another's bytes."""
    names = [f"file-{number:02}" for number in range(20)]
    for name in names:
        noise(folder / name, MIB // 2)
    with twisted_server(folder) as server, socks4("--verbose") as running:
        # While the server does nothing, every client waits, all at the same time.
        server.process.signal(signal.SIGSTOP)
        with subprocess.Popen(
            through_proxy(
                *("--socks4a", f"127.0.0.1:{running.port}"),
                *("--parallel", "--parallel-immediate", "--parallel-max", "20"),
                *("--output", tmp_path / "file-#1"),
                url(server.port, "file-[00-19]"),
            ),
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            try:
                running.wait_for(r"\] connected session=", len(names))
                server.process.signal(signal.SIGCONT)
                report, _ = client.communicate(timeout=LIMIT)
            finally:
                client.kill()
        assert client.returncode == 0
        got = {name: sha256(tmp_path / name) for name in names}
        assert got == {name: sha256(folder / name) for name in names}
        sessions = all_sessions(running, len(names))
        for session in sessions:
            assert_said(session, command="connect")
        counted = Counter((int(each["up"]), int(each["down"])) for each in sessions)
        assert counted == Counter(map(carried, report.splitlines()))


def test_curl_with_a_user_id(folder: Path) -> None:
    """--userid serves that user; curl tells another that it was rejected."""
    noise(folder / "small", 1000)
    with storing_server(folder) as server, socks4("--userid", "joe") as running:
        small = url(server.port, "small")
        [counted] = curl(
            *("--proxy", f"socks4://joe@127.0.0.1:{running.port}"),
            *("--output", os.devnull, small),
        )
        refused = subprocess.run(
            through_proxy("--proxy", f"socks4://eve@127.0.0.1:{running.port}", small),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        # Curl's "proxy handshake error".
        assert refused.returncode == 97
        assert "(91), request rejected or failed" in refused.stderr
        joe, eve = all_sessions(running, 2)
        up, down = counted
        assert_said(joe, user="'joe'", up=up, down=down)
        assert_said(eve, user="'eve'", ending="denied", code=eve["code"], reply=91)
        assert (eve["up"], eve["down"], eve["upstream"]) == ("0", "0", "-")


def test_proxychains(folder: Path, tmp_path: Path) -> None:
    """A program that knows of no proxy is sent through it."""
    served, got = noise(folder / "large", 4 * MIB), tmp_path / "got"
    with storing_server(folder) as server, socks4() as running:
        config = tmp_path / "proxychains.conf"
        config.write_text(
            f"strict_chain\n[ProxyList]\nsocks4 127.0.0.1 {running.port} joe\n"
        )
        run(
            *(program("proxychains4"), "-q", "-f", config),
            *curl_command("--output", got, url(server.port, "large")),
        )
        assert sha256(got) == sha256(served)
        [session] = running.sessions()
        assert_said(session, command="connect", requested=server.address, user="'joe'")
        assert int(session["down"]) > 4 * MIB


# -- programs and libraries that exchange bytes


@pytest.mark.parametrize("names", ["local", "remote"])
def test_ncat(names: str, tmp_path: Path) -> None:
    """What goes into ncat and what comes out of it has been there and back."""
    question = tmp_path / "question"
    question.write_bytes(QUESTION)
    with Reverser() as server, socks4() as running:
        host, port = named(server)
        if names == "local":
            host = "127.0.0.1"
        got = piped(
            question,
            *(program("ncat"), "--proxy-type", "socks4", "--proxy-dns", names),
            *("--proxy", f"127.0.0.1:{running.port}", host, str(port)),
        )
        assert got == ANSWER
        reversed_for(running, server, requested=f"{host}:{port}", user="-")


def piped(question: Path, *client: str | Path) -> bytes:
    """What a program that must succeed makes of its standard input."""
    with question.open("rb") as file:
        done = subprocess.run(
            client, stdin=file, capture_output=True, timeout=LIMIT, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("version", ["4", "4a"])
def test_pysocks(version: str) -> None:
    socks = module("socks")
    with Reverser() as server, socks4() as running:
        host, port = named(server)
        if version == "4":
            host = "127.0.0.1"
        with socks.socksocket() as client:
            client.settimeout(PATIENCE)
            client.set_proxy(
                *(socks.SOCKS4, "127.0.0.1", running.port),
                rdns=version == "4a",
                username="joe",
            )
            client.connect((host, port))
            assert reversed_by(client) == ANSWER
        reversed_for(running, server, requested=f"{host}:{port}", user="'joe'")


def reversed_by(client: socket.socket) -> bytes:
    """What the server behind a connected socket makes of the question."""
    client.sendall(QUESTION)
    client.shutdown(socket.SHUT_WR)
    return read_all(client)


def python_socks(package: str, port: int, *, names: bool) -> Any:
    """What python-socks connects with; the proxy looks names up, if told to."""
    kind = module("python_socks").ProxyType.SOCKS4
    return module(package).Proxy(kind, "127.0.0.1", port, username="joe", rdns=names)


def blocking(port: int, host: str, to: int) -> bytes:
    proxy = python_socks("python_socks.sync", port, names=host == "localhost")
    with proxy.connect(host, to, timeout=PATIENCE) as client:
        client.settimeout(PATIENCE)
        return reversed_by(client)


def on_asyncio(port: int, host: str, to: int) -> bytes:
    async def exchange() -> bytes:
        # It wants the loop that it will run on.
        package = "python_socks.async_.asyncio"
        proxy = python_socks(package, port, names=host == "localhost")
        connected = await proxy.connect(host, to, timeout=PATIENCE)
        reader, writer = await asyncio.open_connection(sock=connected)
        writer.write(QUESTION)
        writer.write_eof()
        got: bytes = await reader.read()
        writer.close()
        await writer.wait_closed()
        return got

    return asyncio.run(asyncio.wait_for(exchange(), PATIENCE))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("client", [blocking, on_asyncio])
def test_python_socks(client: Callable[[int, str, int], bytes], host: str) -> None:
    with Reverser() as server, socks4() as running:
        _, port = named(server)
        assert client(running.port, host, port) == ANSWER
        reversed_for(running, server, requested=f"{host}:{port}", user="'joe'")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_npm_socks(host: str, tmp_path: Path) -> None:
    question = tmp_path / "question"
    question.write_bytes(QUESTION)
    with Reverser() as server, socks4() as running:
        _, port = named(server)
        got = piped(
            question,
            *npm_socks("connect", str(running.port), host, str(port), "joe"),
        )
        assert got == ANSWER
        reversed_for(running, server, requested=f"{host}:{port}", user="'joe'")


# -- OpenSSH


@contextmanager
def sshd(folder: Path) -> Iterator[Server]:
    """OpenSSH's server on a free port of 127.0.0.1, for whoever has the key `client`.

    It is run once for each connection, as inetd does: no port need be chosen before
    it listens, and each run ends with its connection.
    """
    server_program = program("sshd")
    for name in ("host", "client"):
        run(program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    config = folder / "sshd_config"
    config.write_text(
        f"HostKey {folder / 'host'}\n"
        f"AuthorizedKeysFile {folder / 'client.pub'}\n"
        # It lies below /tmp, which everybody can write to.
        "StrictModes no\n"
        "UsePAM no\n"
        "PasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\n"
    )
    running: list[subprocess.Popen[bytes]] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                with server.accept() as connection:
                    # It takes a descriptor that blocks.
                    connection.settimeout(None)
                    running.append(
                        subprocess.Popen(
                            [server_program, "-i", "-f", config, "-E", folder / "log"],
                            stdin=connection.fileno(),
                            stdout=connection.fileno(),
                        )
                    )

    with privilege_separation(), Server() as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            # Closing alone would leave the thread waiting for a client.
            server.socket.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
            for each in running:
                try:
                    each.wait(PATIENCE)
                finally:
                    each.kill()
                    each.wait()


@contextmanager
def privilege_separation() -> Iterator[None]:
    """The folder that sshd wants if it is root's, and that its service makes."""
    folder = Path("/run/sshd")
    made = os.geteuid() == 0 and not folder.exists()
    if made:
        folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            folder.rmdir()


def test_ssh(tmp_path: Path) -> None:
    """A command's output comes, and 1 MiB goes through a command and back."""
    sent = noise(tmp_path / "sent", MIB)
    with sshd(tmp_path) as server, socks4() as running:
        port = server.address.rpartition(":")[2]
        host_key = (tmp_path / "host.pub").read_text()
        (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
        proxy_command = (
            f"{program('ncat')} --proxy-type socks4"
            f" --proxy 127.0.0.1:{running.port} %h %p"
        )
        settings = {
            "ProxyCommand": proxy_command,
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(tmp_path / "known"),
            "ConnectTimeout": f"{PATIENCE:g}",
        }
        client = (
            *(program("ssh"), "-F", "none", "-T", "-i", str(tmp_path / "client")),
            *(word for each in settings.items() for word in ("-o", "=".join(each))),
            *("-p", port, f"{getpass.getuser()}@127.0.0.1"),
        )
        with Path(os.devnull).open() as nothing:
            said = run(*client, "echo through; id -un; exit 0", stdin=nothing)
        assert said.split() == ["through", getpass.getuser()]
        assert piped(sent, *client, "cat") == sent.read_bytes()
        sessions = all_sessions(running, 2)
        for session in sessions:
            assert_said(session, command="connect", requested=server.address, user="-")
        _, copied = sessions
        assert int(copied["up"]) > MIB
        assert int(copied["down"]) > MIB


# -- Chromium

TEXT = "".join(f"line {number}: the quick brown fox\n" for number in range(30_000))

#: Sends back what it has fetched, and says so: all before the page counts as loaded.
PAGE = """<!doctype html>
<title>A page behind the proxy</title>
<link rel="icon" href="data:,">
<p id="state">Nothing has happened.</p>
<script>
const down = new XMLHttpRequest();
down.open("GET", "text.txt", false);
down.send();
const up = new XMLHttpRequest();
up.open("PUT", "stored.txt", false);
up.send(down.responseText);
document.getElementById("state").textContent = `Stored: ${up.status}.`;
</script>
"""


def test_chromium(folder: Path, tmp_path: Path) -> None:
    """A page whose script fetches a megabyte and sends it back."""
    (folder / "page.html").write_text(PAGE)
    (folder / "text.txt").write_text(TEXT)
    with storing_server(folder) as server, socks4() as running:
        shown = run(
            program("chromium"),
            "--headless",
            # It refuses to run sandboxed as root, and containers have no sandbox.
            "--no-sandbox",
            # Containers have little shared memory.
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            f"--proxy-server=socks4://127.0.0.1:{running.port}",
            # By itself it takes no proxy to this machine.
            "--proxy-bypass-list=<-loopback>",
            # What it does by itself, and where that would go.
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            url(server.port, "page.html"),
        )
        assert "Stored: 201." in shown
        assert (folder / "stored.txt").read_text() == TEXT
        for request in ("GET /page.html", "GET /text.txt", "PUT /stored.txt"):
            server.process.wait_for(rf'"{request} HTTP/1\.1" 20[01] ')
        # How many connections it makes is its own business, and some it leaves
        # without a word.  The others end with the browser, if not before.
        running.signal()
        assert running.wait() == 0
        asked = [each for each in running.sessions() if each["command"] != "-"]
        for session in asked:
            assert_said(session, command="connect", requested=server.address, user="-")
            assert session["upstream"] == server.address
        assert sum(int(each["up"]) for each in asked) > len(TEXT)
        assert sum(int(each["down"]) for each in asked) > len(TEXT) + len(PAGE)
