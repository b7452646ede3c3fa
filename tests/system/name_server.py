"""A name server whose answers a test changes: its zone, its silence, its failures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twisted.names import dns

from tests.system.namespaces import Machine

#: The port of name servers.
PORT = 53

#: Names are within this domain, of which it knows all.
DOMAIN = "test"

_LARGEST = 65535


class NameServer:
    """Answers by UDP what its zone says.

    :param sock: bound.

    :ivar zone: the records of each name; it does not exist if it is not there, and has
        no such record if that is not among them.
    :ivar silent: it does not answer.
    :ivar failing: it answers that it has failed (SERVFAIL).
    :ivar asked: how many questions there were.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.zone: dict[str, list[Any]] = {}
        self.silent = self.failing = False
        self.asked = 0

    def addresses(self, name: str, *hosts: str, ttl: int = 1) -> None:
        """The name has these from now on."""
        self.zone[name] = [dns.Record_A(host, ttl=ttl) for host in hosts]

    def serve(self) -> None:
        """Answer until the socket is shut down."""
        while True:
            with suppress(OSError):
                data, peer = self._socket.recvfrom(_LARGEST)
                if not data:
                    return
                answer = self._answer(data)
                if answer is not None:
                    self._socket.sendto(answer, peer)

    def _answer(self, data: bytes) -> bytes | None:
        message = dns.Message()
        message.fromStr(data)
        self.asked += 1
        if self.silent:
            return None
        [query] = message.queries
        name = str(query.name).lower().rstrip(".")
        records = self.zone.get(name)
        message.answer = message.auth = 1
        message.additional = []
        if self.failing:
            message.rCode = dns.ESERVER
        elif records is None:
            message.rCode = dns.ENAME
        else:
            message.answers = [
                dns.RRHeader(
                    name.encode(), each.TYPE, dns.IN, each.ttl, each, auth=True
                )
                for each in records
                if query.type == each.TYPE
            ]
        return message.toStr()


@contextmanager
def name_server(machine: Machine) -> Iterator[NameServer]:
    """One at the machine's own loopback address, for the length of a block."""
    with machine.inside():
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", PORT))
    made = NameServer(sock)
    thread = threading.Thread(target=made.serve)
    thread.start()
    try:
        yield made
    finally:
        with machine.inside(), socket.socket(type=socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", PORT))
        thread.join()
        sock.close()
