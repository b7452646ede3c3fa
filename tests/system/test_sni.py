"""openssl, curl and Chromium get to the server that they name, past `--sni`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.process import RelayProcess, relay
from tests.support.tls_servers import TlsServer
from tests.system.programs import LIMIT, program, run
from tests.system.test_http import command as curl_command

pytestmark = pytest.mark.system

#: What the servers are called by their certificates, and are asked for.
NAME, OTHER = "www.example.com", "a.example.org"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("sni"))


@contextmanager
def site(root: Authority, *, others: bool) -> Iterator[RelayProcess]:
    """A relay to a server for `NAME`, and to one for all others."""
    with ExitStack() as stack:
        www = stack.enter_context(TlsServer("www", root.issue(NAME)))
        other = stack.enter_context(TlsServer("other", root.issue(OTHER)))
        options = ["--sni", f"{NAME}={www.address}"]
        if others:
            options += ["--sni", f"={other.address}"]
        yield stack.enter_context(relay("-l", "127.0.0.1:0", *options))


def s_client(
    running: RelayProcess, root: Authority, *options: str
) -> subprocess.CompletedProcess[str]:
    """openssl says a line, and ends when the server does."""
    where = ("-connect", f"127.0.0.1:{running.port}", "-CAfile", str(root.file))
    return subprocess.run(
        [program("openssl"), "s_client", "-quiet", *where, *options],
        input="who?\n",
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def curl(running: RelayProcess, root: Authority, name: str) -> list[str | Path]:
    port = running.port
    return [
        *curl_command("--cacert", root.file),
        *("--resolve", f"{name}:{port}:127.0.0.1", f"https://{name}:{port}/"),
    ]


def test_openssl(root: Authority) -> None:
    right = ("-verify_return_error", "-verify_hostname")
    with site(root, others=True) as running:
        for options in (("-tls1_2",), ("-tls1_3",), ("-alpn", "h2,http/1.1")):
            for name, server in ((NAME, "www"), (OTHER, "other")):
                done = s_client(
                    running, root, "-servername", name, *right, name, *options
                )
                assert done.stdout.endswith(f"{server} 5\n"), done.stderr
        done = s_client(running, root, "-noservername", *right, OTHER)
        assert done.stdout.endswith("other 5\n"), done.stderr


def test_curl(root: Authority) -> None:
    with site(root, others=True) as running:
        assert run(*curl(running, root, NAME)).startswith("www ")
        assert run(*curl(running, root, OTHER)).startswith("other ")
        sessions = running.ended("done", 2)
        assert [each["sni"] for each in sessions] == [NAME, OTHER]


def test_who_names_no_server_is_told_so(root: Authority) -> None:
    with site(root, others=False) as running:
        for options in (("-servername", OTHER, "-tls1_2"), ("-noservername",)):
            done = s_client(running, root, *options)
            assert done.returncode
            assert "unrecognized name" in done.stderr
        failed = subprocess.run(
            curl(running, root, OTHER),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert failed.returncode == 35
        assert "unrecognized name" in failed.stderr
        running.ended("denied", 3)


def test_chromium(root: Authority, tmp_path: Path) -> None:
    """With its post-quantum key, its ECH and its extensions in any order."""
    browser = (
        *(program("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu"),
        *("--ignore-certificate-errors", f"--user-data-dir={tmp_path}"),
    )
    with site(root, others=True) as running:
        for name, server in ((NAME, "www"), (OTHER, "other")):
            to = f"--host-resolver-rules=MAP {name} 127.0.0.1:{running.port}"
            page = run(*browser, to, "--dump-dom", f"https://{name}/")
            assert f"{server} " in page
