"""Sockets that have addresses of others, on a kernel that never was."""

from __future__ import annotations

import errno
import socket
from typing import Any

from relayd.datagrams.transparent import PlacedSocket, places
from tests.datagrams.support import Bench, FakeSocket, problem

WILD = ("0.0.0.0", "::")


class Kernel:
    """Knows who has which address, and who shares it, as Linux does for UDP
    (`inet_rcv_saddr_equal` and `udp_lib_lport_inuse`, net/ipv4/udp.c)."""

    def __init__(self) -> None:
        self.bound: list[PlacingSocket] = []

    def bind(self, sock: PlacingSocket, address: Any) -> None:
        for other in self.bound:
            assert other.name is not None
            same = other.name[0] == address[0] or {other.name[0], address[0]} & {*WILD}
            if (
                same
                and other.name[1] == address[1]
                and not (sock.shared and other.shared)
            ):
                raise problem(errno.EADDRINUSE)
        self.bound.append(sock)


class PlacingSocket(FakeSocket):
    """Is bound, and shares what it is bound to if it is told to."""

    def __init__(self, kernel: Kernel, host: str = "203.0.113.1") -> None:
        super().__init__(host)
        self.kernel = kernel
        self.name: Any = None
        self.shared = False
        self.options: list[tuple[int, ...]] = []

    def setsockopt(self, *option: Any) -> None:
        self.options.append(option)
        if option[:2] == (socket.SOL_SOCKET, socket.SO_REUSEADDR):
            self.shared = bool(option[2])

    def getsockopt(self, level: int, name: int, size: int = 0) -> Any:
        return super().getsockopt(level, name, size) if size else 0

    def bind(self, address: Any) -> None:
        self.kernel.bind(self, address)
        self.name = address

    def getsockname(self) -> Any:
        return super().getsockname() if self.name is None else self.name

    def close(self) -> None:
        super().close()
        if self in self.kernel.bound:
            self.kernel.bound.remove(self)


class PlacingBench(Bench):
    """A relay whose flows' sockets are bound; they, and the listener, are the kernel's.

    :param host: of the listener.
    """

    def __init__(self, servers: Any = None, **settings: Any) -> None:
        self.kernel = Kernel()
        host = settings.pop("host", "203.0.113.1")
        settings.setdefault("own", self.is_own)
        super().__init__(servers, host=host, **settings)

    def is_own(self, address: Any) -> bool:
        return str(address).startswith(("203.0.113.", "127."))

    def _open_fake(self, family: int) -> FakeSocket:
        if self.open_error is not None:
            raise self.open_error
        sock = PlacingSocket(self.kernel)
        sock.family = socket.AddressFamily(family)
        self.sockets.append(sock)
        return sock

    def listen(self, host: str, port: int) -> PlacingSocket:
        """Another listener."""
        sock = PlacingSocket(self.kernel)
        sock.bind((host, port))
        self.nat.listen([sock])
        return sock

    def arrive_at(self, sock: PlacingSocket, source: Any, data: bytes = b"?") -> None:
        sock.inbox.append((data, source))
        self.watcher.ready(sock.number)

    @property
    def bound(self) -> list[tuple[Any, Any]]:
        """What the flows' sockets that are open are bound to, and where they lead."""
        live: list[Any] = self.live
        return [(each.name, each.peer) for each in live]

    def check(self) -> None:
        counters = self.nat.counters
        assert counters.received == counters.sent + counters.dropped.total()
        assert counters.replies_received == (
            counters.replies_sent + counters.replies_dropped.total()
        )
        flows = {each.sock.fileno() for each in self.nat.table}
        assert flows == {each.number for each in self.live}
        taken = sum(map(len, places.taken.values()))
        assert taken == sum(isinstance(f.sock, PlacedSocket) for f in self.nat.table)

    def close_only(self) -> None:
        """Close it; another relay has places still."""
        self.nat.close()
        assert not self.live
