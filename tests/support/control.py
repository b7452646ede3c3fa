"""Stand-ins for a running relayd, behind a control socket: one that answers as the
design says, and one that sends whatever it is told to.

They run in threads of their own: `relayctl` blocks.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from relayd.ctl.main import main

Answer = tuple[int, Any]


class FakeRelayd(ThreadingMixIn, UnixStreamServer):
    """Answers over HTTP, and remembers what it was asked.

    :ivar answers: by method and path (without the query): the status and the JSON, or a
        function of what was asked that returns them.  Else it is 404.
    :ivar tags: the ETags of some.
    :ivar asked: method, path with its query, and the body, of each request.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.answers: dict[str, Answer | Callable[[], Answer]] = {}
        self.tags: dict[str, str] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def last(self) -> tuple[str, str, Any]:
        return self.asked[-1]


class _Handler(BaseHTTPRequestHandler):
    server: FakeRelayd
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body))
        self.server.headers.append(dict(self.headers))
        plain = f"{self.command} {self.path.partition('?')[0]}"
        found = self.server.answers.get(plain, (404, {"problems": [f"no {plain}"]}))
        status, answer = found() if callable(found) else found
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if plain in self.server.tags:
            self.send_header("ETag", self.server.tags[plain])
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_PUT = _answer

    def log_message(self, *_: Any) -> None:
        """Not to standard error."""


@contextmanager
def fake_relayd(path: Path) -> Iterator[FakeRelayd]:
    """It listens at a path, until the end."""
    server = FakeRelayd(path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def raw_server(
    path: Path,
    *pieces: bytes,
    hold: bool = False,
    asked: threading.Event | None = None,
) -> Iterator[None]:
    """Reads a request, sends the pieces, and closes.

    :param hold: the last piece is sent again and again until the client has left.
    :param asked: is set once a request has come.
    """
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.recv(65536)
                if asked is not None:
                    asked.set()
                for piece in pieces:
                    connection.sendall(piece)
                while hold:
                    connection.settimeout(0.005)
                    try:
                        if not connection.recv(1):
                            break
                    except TimeoutError:
                        # The client may take its time to read it.
                        connection.settimeout(None)
                        connection.sendall(pieces[-1] if pieces else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def run(relayd: FakeRelayd, asked: str, answer: Any, *words: str, code: int = 0) -> Any:
    """One command, which asks that; what it has sent."""
    relayd.answers[asked] = (200, answer)
    assert main(words) == code
    method, path, body = relayd.last
    assert f"{method} {path.partition('?')[0]}" == asked
    return body if method != "GET" else path.partition("?")[2]


def cells(line: str) -> list[str]:
    """A line of columns."""
    return [each.strip() for each in line.split("  ") if each.strip()]
