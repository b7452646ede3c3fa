"""What is behind the relay's TCP listeners, and the options that lead there."""

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
    """The sockets behind the relay: those that listen, and those that don't."""

    def __init__(self) -> None:
        self.listening: dict[socket.socket, Where] = {}
        self._held: list[socket.socket] = []
        #: What to give the relay as `--dest`, by what the client meets there.
        self.addresses: dict[Where, list[str]] = {
            Where.SERVER: [
                self._listen(host, Where.SERVER, small=index % 2 == 1)
                for index, host in enumerate(HOSTS)
            ],
            Where.GREETER: [self._listen(HOSTS[0], Where.GREETER, small=False)],
            Where.CLOSED: [self._bind()],
            Where.DARK: [self._listen_to_nobody()],
        }

    def _hold(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        self._held.append(sock)
        return sock

    def _bind(self) -> str:
        """A port that refuses, and that nobody else gets."""
        sock = self._hold()
        sock.bind((HOSTS[0], 0))
        return address_name(sock.getsockname())

    def _listen(self, host: str, where: Where, *, small: bool) -> str:
        sock = self._hold()
        if small:
            shrink_buffer(sock)
        sock.bind((host, 0))
        sock.listen(4096)
        self.listening[sock] = where
        return address_name(sock.getsockname())

    def _listen_to_nobody(self) -> str:
        """A port where dials hang: its queue has room for one, and is full."""
        sock = self._hold()
        sock.bind((HOSTS[0], 0))
        sock.listen(0)
        for _ in range(2):
            self._hold().connect_ex(sock.getsockname())
        return address_name(sock.getsockname())

    def close(self) -> None:
        """Close all of them."""
        for sock in self._held:
            sock.close()


def relay_options(transport: str, servers: Servers) -> list[str]:
    """The relay's command line: a listener for each thing that clients may meet.

    The ordinary servers have one on each loopback address, and each of those
    relays takes its turns with all of the servers.
    """
    options = [
        *("--transport", transport),
        *("--connect-timeout", f"{CONNECT:g}"),
        *("--stall-timeout", f"{STALL:g}"),
        *("--idle-timeout", f"{IDLE:g}"),
        *("--half-close-timeout", f"{HALF_CLOSE:g}"),
        *("--drain-timeout", "1"),
    ]
    for where, host in listener_hosts():
        options += ["--listen", f"{host}:0"]
        for server in servers.addresses[where]:
            options += ["--dest", server]
    return options


def listener_hosts() -> list[tuple[Where, str]]:
    """The relay's listeners, in order: what is behind each, and its host."""
    others = (Where.GREETER, Where.CLOSED, Where.DARK)
    return [
        *((Where.SERVER, host) for host in HOSTS),
        *((where, HOSTS[0]) for where in others),
    ]
