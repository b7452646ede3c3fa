"""Servers that say their name to whoever asks, and hold as many clients as come.

In one thread, which accepts, answers and closes: what they are told takes no time.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from tests.support.process import PATIENCE, connect


class NamedServers:
    """Several, in one thread.

    :param listeners: and the name of each.

    :ivar held: how many clients each has.
    """

    def __init__(self, listeners: Mapping[socket.socket, str]) -> None:
        self.held: Counter[str] = Counter(dict.fromkeys(listeners.values(), 0))
        self._selector = selectors.DefaultSelector()
        for each, name in listeners.items():
            each.setblocking(False)
            self._selector.register(each, selectors.EVENT_READ, name)
        self._listeners = {name: each for each, name in listeners.items()}
        self._ours, self._theirs = socket.socketpair()
        self._selector.register(self._theirs, selectors.EVENT_READ, "")
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock: socket.socket = key.fileobj  # type: ignore[assignment]
                if sock is self._theirs:
                    return
                name: str = key.data
                with suppress(BlockingIOError):
                    if sock is self._listeners[name]:
                        client, _ = sock.accept()
                        self.held[name] += 1
                        self._selector.register(client, selectors.EVENT_READ, name)
                    else:
                        self._answer(sock, name)

    def _answer(self, sock: socket.socket, name: str) -> None:
        said = b""
        with suppress(ConnectionError):
            said = sock.recv(100)
            if said:
                sock.sendall(name.encode())
        if not said:
            self._selector.unregister(sock)
            sock.close()
            self.held[name] -= 1


def named_servers(where: Mapping[tuple[str, int], str]) -> NamedServers:
    """Servers at these addresses, of this thread's machine, with these names."""
    return NamedServers(
        {socket.create_server(address): name for address, name in where.items()}
    )


def who(port: int, source: str = "") -> str:
    """Which server a client of a relay comes to; empty: none.

    :param source: the client's address.
    """
    own = (source, 0) if source else None
    with suppress(ConnectionError):
        with socket.create_connection(("127.0.0.1", port), PATIENCE, own) as client:
            client.sendall(b"?")
            return client.recv(100).decode()
    return ""


def hold(port: int) -> tuple[socket.socket, str]:
    """A client of a relay that stays, and which server it has come to; empty: none."""
    client = connect(port)
    with suppress(ConnectionError):
        client.sendall(b"?")
        return client, client.recv(100).decode()
    return client, ""
