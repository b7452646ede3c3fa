"""A SOCKS4 proxy to test, what its log must say, and a server behind it."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from tests.support.process import PATIENCE, RelayProcess, Server, read_all, relay
from tests.system.programs import WebServer, lacking, program


def socks4(*args: str, **options: Any) -> AbstractContextManager[RelayProcess]:
    """`twistd socks4` on a free port of 127.0.0.1, unless `args` name a listener."""
    listener = [] if "--listen" in args else ["--listen", "127.0.0.1:0"]
    return relay(*listener, *args, plugin="socks4", **options)


def assert_said(session: dict[str, str], **facts: object) -> None:
    """The log says this of a session: by default, that it was served and ended well."""
    expected = {"ending": "done", "code": "--", "reply": 90, **facts}
    assert {name: session[name] for name in expected} == {
        name: str(fact) for name, fact in expected.items()
    }, session


def all_sessions(running: RelayProcess, count: int) -> list[dict[str, str]]:
    """The fields of its session lines: exactly `count`, in the order of their begin."""
    found = running.sessions(count)
    assert len(found) == count, running.lines
    return sorted(found, key=lambda session: int(session["session"]))


def storing_server(
    folder: Path,
    address: str = "127.0.0.1",
    runs: Callable[..., tuple[str, ...]] = lambda *command: command,
) -> WebServer:
    """`storing.py`, which serves a folder and stores in it.

    :param runs: makes of a command the one that runs it elsewhere.
    """
    return WebServer(
        *(str(folder), address),
        command=runs(sys.executable, str(Path(__file__).with_name("storing.py"))),
        saying=r"^Serving on port (\d+)$",
    )


def npm_socks(*args: str) -> list[str | Path]:
    """The command that runs `socks4_client.mjs`."""
    here = Path(__file__).parent
    if not (here / "node_modules" / "socks").exists():
        lacking("the npm package socks is missing; `make system-test` installs it")
    return [program("node"), here / "socks4_client.mjs", *args]


class Reverser(Server):
    """Sends to each client what that has sent until its end, last byte first.

    An answer that is right has gone both ways whole and in order, and has survived
    that one direction ended long before the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        # Nobody has come for a while, or `close` has been called.
        with suppress(OSError):
            while True:
                with self.accept() as connection:
                    connection.sendall(read_all(connection)[::-1])

    def close(self) -> None:
        # Closing alone would leave the thread waiting for a client.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        super().close()
