"""The servers of the relay's TCP listeners, and the relay's options for them."""

from __future__ import annotations

import socket

from soak.ends import Where, shrink_buffer
from soak.timeouts import CONNECT, HALF_CLOSE, IDLE, STALL

#: The relay's listeners, and the servers, are spread over so many loopback addresses:
#: each pair of addresses has only so many ports, and a closed connection may hold one
#: for a minute.
HOSTS = tuple(f"127.0.0.{last}" for last in range(1, 9))


def address_name(address: tuple[str, int]) -> str:
    """An address as the relay's options and its log have it."""
    return f"{address[0]}:{address[1]}"


class Servers:
    """The servers' sockets: those that accept, refuse, or let a dial hang."""

    def __init__(self) -> None:
        self.listening: dict[socket.socket, Where] = {}
        self._sockets: list[socket.socket] = []
        #: The relay's `--dest`, by what the client meets there.
        self.addresses: dict[Where, list[str]] = {
            Where.SERVER: [
                self._listen(host, Where.SERVER, small=index % 2 == 1)
                for index, host in enumerate(HOSTS)
            ],
            Where.GREETER: [self._listen(HOSTS[0], Where.GREETER, small=False)],
            Where.CLOSED: [self._bind()],
            Where.HANGING: [self._listen_with_full_queue()],
        }

    def _open(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        self._sockets.append(sock)
        return sock

    def _bind(self) -> str:
        """A port that refuses, and stays reserved."""
        sock = self._open()
        sock.bind((HOSTS[0], 0))
        return address_name(sock.getsockname())

    def _listen(self, host: str, where: Where, *, small: bool) -> str:
        sock = self._open()
        if small:
            shrink_buffer(sock)
        sock.bind((host, 0))
        sock.listen(4096)
        self.listening[sock] = where
        return address_name(sock.getsockname())

    def _listen_with_full_queue(self) -> str:
        """A port where dials hang: its queue of one is full."""
        sock = self._open()
        sock.bind((HOSTS[0], 0))
        sock.listen(0)
        for _ in range(2):
            self._open().connect_ex(sock.getsockname())
        return address_name(sock.getsockname())

    def close(self) -> None:
        """Close all of them."""
        for sock in self._sockets:
            sock.close()


def relay_options(transport: str, servers: Servers) -> list[str]:
    """The relay's command line: listeners for each kind of server.

    The ordinary servers have a listener on each loopback address, and each of these
    relays uses all of the servers, round robin.
    """
    options = [
        *("--transport", transport),
        *("--connect-timeout", f"{CONNECT:g}"),
        *("--stall-timeout", f"{STALL:g}"),
        *("--idle-timeout", f"{IDLE:g}"),
        *("--half-close-timeout", f"{HALF_CLOSE:g}"),
        *("--drain-timeout", "1"),
        # Those that end without a byte are to have a line, too.
        "--verbose",
    ]
    for where, host in listener_hosts():
        options += ["--listen", f"{host}:0"]
        for server in servers.addresses[where]:
            options += ["--dest", server]
    return options


def listener_hosts() -> list[tuple[Where, str]]:
    """The relay's listeners, in order: the kind of server, and the host."""
    others = (Where.GREETER, Where.CLOSED, Where.HANGING)
    return [
        *((Where.SERVER, host) for host in HOSTS),
        *((where, HOSTS[0]) for where in others),
    ]
