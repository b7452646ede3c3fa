"""Servers that end TLS, each with a certificate of its own, and say who they are."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.support.certificates import server_context
from tests.support.process import PATIENCE, Server


class TlsServer:
    """Answers each client with its name, when the client has said a line.

    :param name: what it says.
    :param pem: its key and certificate.
    :ivar asked: the server name of each client that has come, as it was sent.
    """

    def __init__(self, name: str, pem: Path) -> None:
        self._name = name
        self.asked: list[str | None] = []
        self._context = server_context(pem)
        self._context.sni_callback = self._ask
        self._server = Server()
        self.address = self._server.address
        self._server.socket.settimeout(None)
        self._open: list[tuple[threading.Thread, socket.socket]] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _ask(self, connection: object, name: str | None, context: object) -> None:
        self.asked.append(name)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.socket.accept()
                connection.settimeout(PATIENCE)
                # A browser connects before it has something to say.
                thread = threading.Thread(target=self._answer, args=[connection])
                self._open.append((thread, connection))
                thread.start()

    def _answer(self, connection: socket.socket) -> None:
        # A client that does not trust its certificate is gone.
        with (
            connection,
            suppress(OSError),
            self._context.wrap_socket(connection, server_side=True) as client,
        ):
            said = b""
            while not said.endswith(b"\n"):
                part = client.recv(1 << 16)
                if not part:
                    return
                said += part
            body = f"{self._name} {len(said)}\n"
            client.sendall(
                f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            client.unwrap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What waits in accept() is told by this, as it is not by a close.
        with suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for thread, _ in self._open:
            thread.join()
        self._server.close()
