"""UDP listeners of several addresses that are stopped, and started again.

Their flows go on meanwhile, and may all be of one address.  The others are needed as
soon as the relay is started again: its port can't be bound anew while one is open.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port, is_free
from tests.support.process import TRANSPORTS
from tests.support.steered import ME, Relayd, at, datagrams, result, running

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)

LOOPBACK = {"IPv4": "127.0.0.1", "IPv6": "::1"}


class Ends:
    """Clients of each family, and a server, of a relayd on all addresses."""

    def __init__(self, relayd: Relayd, server: socket.socket, port: int) -> None:
        self.relayd, self.server, self.port = relayd, server, port
        self.clients = {each: _datagrams(LOOPBACK[each]) for each in LOOPBACK}

    def ask(self, family: str, data: bytes) -> Any:
        """There and back; the address by which the server has it."""
        client = self.clients[family]
        client.sendto(data, (LOOPBACK[family], self.port))
        came = self._receive(self.server, data)
        self.server.sendto(data[::-1], came)
        assert self._receive(client, data[::-1])[:2] == (LOOPBACK[family], self.port)
        return came

    def _receive(self, sock: socket.socket, data: bytes) -> Any:
        found: list[Any] = []

        def came() -> bool:
            try:
                found.append(sock.recvfrom(100))
            except BlockingIOError:
                return False
            return True

        self.relayd.reactor.until(came, repr(data))
        assert found[0][0] == data
        return found[0][1]

    @property
    def listeners(self) -> list[Any]:
        listeners: list[Any] = self.relayd.served("dns").listeners
        return listeners

    def is_free(self) -> bool:
        """Whether the port is, in both families."""
        return is_free(self.port, socket.SOCK_DGRAM)


def _datagrams(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.setblocking(False)
    return sock


@contextmanager
def relaying(folder: Path, kind: str, **more: Any) -> Iterator[Ends]:
    port = free_port()
    # A client whose own port is that of a server here is taken for it: it is one that
    # the kernel gives to none.
    with datagrams(20009) as server:
        server.setblocking(False)
        udp = {"dns": dns(port, server.getsockname()[1]), **more}
        with running(folder, {"transport": kind, "udp": udp}) as relayd:
            ends = Ends(relayd, server, port)
            assert len(ends.listeners) == 2
            try:
                yield ends
            finally:
                for each in ends.clients.values():
                    each.close()


def dns(port: int, server: int) -> dict[str, Any]:
    """On all addresses."""
    return {"listen": str(port), "dest": at(server)}


@pytest.mark.parametrize("family", LOOPBACK)
def test_it_starts_again_and_its_flows_go_on(
    tmp_path: Path, kind: str, family: str
) -> None:
    """Whichever family they have; the other's clients are served as well."""
    [other] = set(LOOPBACK) - {family}
    with relaying(tmp_path, kind) as ends:
        before = ends.ask(family, b"one")
        listeners = ends.listeners
        for data in (b"two", b"three"):
            ends.relayd.do("stop", "dns")
            # New clients are refused by both.
            ends.clients[other].sendto(b"lost", (LOOPBACK[other], ends.port))
            ends.relayd.reactor.turn()
            assert ends.relayd.served("dns").counters.dropped["stopped"] > 0
            assert ends.ask(family, data) == before
            ends.relayd.do("start", "dns")
            assert ends.relayd.state("dns") == "running"
            assert ends.listeners == listeners
            assert ends.ask(family, data) == before
        assert ends.ask(other, b"other") != before


@pytest.mark.parametrize("family", LOOPBACK)
def test_it_starts_again_right_after_its_flows_were_cut(
    tmp_path: Path, kind: str, family: str
) -> None:
    with relaying(tmp_path, kind) as ends:
        for _ in range(3):
            ends.ask(family, b"one")
            stopping = ends.relayd.steered.stop("dns", True, ME)
            ends.relayd.reactor.turn()
            assert result(stopping)["sessions"] == 0
            assert not ends.relayd.served("dns").table
            ends.relayd.do("start", "dns")
            # Its port may be the same one, by chance.
            ends.ask(family, b"two")


def test_it_closes_both_once_no_flow_is_left(tmp_path: Path, kind: str) -> None:
    with relaying(tmp_path, kind) as ends:
        ends.ask("IPv6", b"one")
        ends.relayd.do("stop", "dns")
        assert not ends.is_free()
        ends.relayd.served("dns").abort_all()
        ends.relayd.reactor.advance(1)
        assert not ends.listeners
        assert ends.is_free()
        ends.relayd.do("start", "dns")
        ends.ask("IPv4", b"two")


@pytest.mark.parametrize("family", LOOPBACK)
def test_who_gives_its_listener_to_another_may_have_it_back(
    tmp_path: Path, kind: str, family: str
) -> None:
    """By reloads; the flows of before are answered all the while."""
    with relaying(tmp_path, kind) as ends, datagrams() as nobody:
        relayd, port = ends.relayd, ends.server.getsockname()[1]
        before = ends.ask(family, b"one")
        elsewhere = {"listen": at(nobody.getsockname()[1]), "dest": at(port)}
        nobody.close()
        udp = {"other": dns(ends.port, port), "dns": elsewhere}
        for _ in range(2):
            relayd.write({"transport": kind, "udp": udp})
            relayd.reload()
            ends.server.sendto(b"late", before)
            client = ends.clients[family]
            assert ends._receive(client, b"late")[:2] == (LOOPBACK[family], ends.port)
            # The other one has no flow when it stops: what it has was another's.
            relayd.do("stop", "other")
            relayd.set("dns", listen=str(ends.port))
            assert ends.ask(family, b"two") == before
            relayd.write({"transport": kind, "udp": {"dns": dns(ends.port, port)}})
            relayd.reload(discard=True)
            assert ends.ask(family, b"three") == before
