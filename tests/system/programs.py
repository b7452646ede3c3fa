"""What the system tests run: programs that end, and web servers that don't."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest

from tests.support.process import RelayProcess

#: Seconds that a program which ends by itself may take.
LIMIT = 300.0


def program(name: str) -> str:
    """The path of a program.

    Without it the test that asks is skipped, or fails (see `lacking`).
    """
    found = shutil.which(name)
    if found is None:
        lacking(f"{name} is not on PATH; `make system-deps` installs it")
    return found


def module(name: str) -> Any:
    """A module of the `system` extra.

    It is imported when a test asks for it, as this folder is collected where
    the extra is not installed, too.  Without it: as for a program.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        lacking(f"{problem}; `make system-test` installs it")


def listens(port: int) -> bool:
    """Whether a program listens on this port, for IPv4; nobody connects to see."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ends = [line.split()[1:4:2] for line in lines]
    return any(end.endswith(f":{port:04X}") and state == "0A" for end, state in ends)


def lacking(what: str) -> NoReturn:
    """Skip the test, as something that it needs is missing.

    Where the environment says RELAYD_TESTS_STRICT=1 the test fails instead: this
    machine is meant to have everything.
    """
    if os.environ.get("RELAYD_TESTS_STRICT") == "1":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def run(*command: str | Path, env: dict[str, str] | None = None, **popen: Any) -> str:
    """Run a program that must succeed; what it printed.

    :param env: variables beyond this process's own.
    """
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, **(env or {})},
        **popen,
    )
    assert done.returncode == 0, (
        f"{command[0]} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


class WebServer:
    """A web server in a process of its own, for the length of a block.

    :param args: what follows the command.
    :param command: the program that serves.
    :param saying: the line that it prints once it listens, with its port.
    """

    def __init__(
        self, *args: str, command: tuple[str, ...], saying: str, **options: Any
    ) -> None:
        # Until its log is read as one, nothing in RelayProcess is about relays.
        *first, last = command
        self.process = RelayProcess(*args, twistd=first, plugin=last, **options)
        try:
            self.port = int(self.process.wait_for(saying)[0][1])
        except BaseException:
            self.process.stop()
            raise

    @property
    def address(self) -> str:
        """What a relay's --dest calls it."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


def http_server(folder: Path, protocol: str = "HTTP/1.0") -> WebServer:
    """`python -m http.server` over a folder; prints a line for each request.

    :param protocol: HTTP/1.0 closes after each response, HTTP/1.1 does not.
    """
    return WebServer(
        *("--bind", "127.0.0.1", "--directory", str(folder)),
        *("--protocol", protocol, "0"),
        command=(sys.executable, "-m", "http.server"),
        saying=r"^Serving HTTP on 127\.0\.0\.1 port (\d+) ",
    )


def twisted_server(folder: Path) -> WebServer:
    """`twist web` over a folder: what http.server can't do.

    It answers range requests, and many clients may wait for it.  http.server
    lets the kernel keep five; those beyond try again for minutes, and some fail.
    """
    return WebServer(
        *("--path", str(folder)),
        *("--listen", "tcp:0:interface=127.0.0.1:backlog=128"),
        command=(sys.executable, "-m", "twisted", "--log-format=text", "web"),
        saying=r"Site starting on (\d+)$",
    )
