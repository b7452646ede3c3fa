"""A filter of one's own, packaged and installed as its example says."""

from __future__ import annotations

import re
import shutil
import socket
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.process import Server, connect, read_all, relay
from tests.system.programs import run

pytestmark = pytest.mark.system

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_filter.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, which pip has built and installed."""
    source = tmp_path_factory.mktemp("louder")
    shutil.copy(EXAMPLE, source)
    found = re.search(r"(?:^    .*\n)+", EXAMPLE.read_text(), re.MULTILINE)
    assert found
    (source / "pyproject.toml").write_text(textwrap.dedent(found[0]))
    target = tmp_path_factory.mktemp("installed")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--target", target, source),
    )
    return target


def test_it_works_from_the_command_line(installed: Path) -> None:
    assert {each.name for each in installed.iterdir()} >= {
        "own_filter.py",
        "louder-1.0.dist-info",
    }
    env = {"PYTHONPATH": str(installed)}
    with (
        Server() as server,
        relay(
            *("-l", "127.0.0.1:0", "-d", server.address, "--filter", "louder:by=5"),
            env=env,
        ) as running,
        connect(running.port) as client,
    ):
        client.sendall(b"hello!")
        client.shutdown(socket.SHUT_WR)
        with server.accept() as upstream:
            assert read_all(upstream) == b"hello!"
            upstream.sendall(b"you!")
        assert read_all(client) == b"you!!!!!"
        running.ended("done")
