"""Clients of a control socket of this process: real sockets that never block."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import inlineCallbacks

from tests.control.bench import Answer, request
from tests.support.contracts import until


class SocketClient:
    """One connection.

    :ivar said: what has come.
    :ivar ended: nothing more will.
    """

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.said = b""
        self.ended = False

    def send(self, data: bytes) -> int:
        """Send what goes; how much that was."""
        with suppress(BlockingIOError, BrokenPipeError):
            return self.sock.send(data)
        return 0

    def read(self) -> None:
        """Take what is there."""
        try:
            while data := self.sock.recv(1 << 16):
                self.said += data
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        self.ended = True

    def has_answer(self) -> bool:
        """Whether an answer is there, and all of it."""
        self.read()
        head, _, rest = self.said.partition(b"\r\n\r\n")
        if b"chunked" in head:
            return rest.endswith(b"0\r\n\r\n")
        return bool(rest) or self.ended

    def has_ended(self) -> bool:
        self.read()
        return self.ended


@contextmanager
def connected(path: Path) -> Iterator[SocketClient]:
    """A client, which is closed in the end."""
    client = SocketClient(path)
    with client.sock:
        yield client


@inlineCallbacks
def ask(path: Path, method: str, target: str, body: Any = None) -> Any:
    """A request of a new connection, and its answer."""
    with connected(path) as client:
        client.send(request(method, target, body))
        yield until(client.has_answer)
    return Answer(client.said)
