"""The servers of the relay's UDP listeners, and the relay's options for them."""

from __future__ import annotations

import socket
import sys

from soak.datagrams import UDP_TIMEOUT, UDP_UNREPLIED
from soak.flow_scripts import BUFFER
from soak.servers import HOSTS, address_name

#: How many datagram listeners the relay has, and servers for each.
LISTENERS = SERVERS = 2

#: Linux, sock_diag(7): a socket's counters, and the index of the drops.
SO_MEMINFO, SK_DROPS = 55, 8


def flow_bound(flows: int) -> int:
    """The relay's limit of flows for each listener: those in use, and more."""
    return 2 * flows + 100


def flow_options(listeners: dict[str, list[str]], flows: int) -> list[str]:
    """The relay's options for datagrams.

    :param listeners: the servers of each, by host.
    """
    options = [
        *("--udp-timeout", f"{UDP_TIMEOUT:g}"),
        *("--udp-unreplied-timeout", f"{UDP_UNREPLIED:g}"),
        *("--max-flows", f"{flow_bound(flows)}"),
        # A flow that nobody answers would go to another server, with what its client
        # has sent: the servers here count each datagram once, and some never answer.
        *("--max-fails", "0"),
    ]
    for host, servers in listeners.items():
        options += ["--listen", f"udp:{host}:0"]
        for server in servers:
            options += ["--dest", f"udp:{server}"]
    return options


class Echoes:
    """The servers' sockets; each listener has its own."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        #: A client on one of these would look like a server: see `client_socket`.
        self.ports: set[int] = set()
        #: By the listener's host.
        self.addresses: dict[str, list[str]] = {
            host: [self._bind(host) for _ in range(SERVERS)]
            for host in HOSTS[:LISTENERS]
        }

    def _bind(self, host: str) -> str:
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * BUFFER)
        sock.bind((host, 0))
        self.sockets.append(sock)
        self.ports.add(sock.getsockname()[1])
        return address_name(sock.getsockname())

    def close(self) -> None:
        """Close all of them."""
        for sock in self.sockets:
            sock.close()


def kernel_drops(sock: socket.socket) -> int:
    """Datagrams that the kernel has dropped because a socket's queue was full."""
    counters = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * (SK_DROPS + 1))
    return int.from_bytes(counters[4 * SK_DROPS :], sys.byteorder)
