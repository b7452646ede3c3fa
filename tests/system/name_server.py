"""A name server whose answers a test changes: its zone, its silence, its failures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twisted.names import dns

from tests.support.process import PATIENCE
from tests.system.namespaces import Machine

#: The port of name servers.
PORT = 53

#: Names are within this domain, of which it knows all.
DOMAIN = "test"

_LARGEST = 65535

#: The longest answer by UDP, without EDNS (RFC 1035, 4.2.1).
_LONGEST_BY_UDP = 512


class NameServer:
    """Answers what its zone says: by UDP, and by TCP what is too long for that.

    :param sock: of datagrams, bound.
    :param listener: of connections.

    :ivar zone: the records of each name; it does not exist if it is not there, and has
        no such record if that is not among them.
    :ivar silent: it does not answer.
    :ivar failing: it answers that it has failed (SERVFAIL).
    :ivar asked: how many questions there were,
    :ivar by_tcp: and how many of them by TCP.
    """

    def __init__(self, sock: socket.socket, listener: socket.socket) -> None:
        self._socket = sock
        self._listener = listener
        self.zone: dict[str, list[Any]] = {}
        self.silent = self.failing = False
        self.asked = self.by_tcp = 0

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
                    if len(answer) > _LONGEST_BY_UDP:
                        answer = _truncated(data)
                    self._socket.sendto(answer, peer)

    def serve_connections(self) -> None:
        """The same, one question a connection, until the listener is shut down."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, client.makefile("rb") as said, suppress(OSError, EOFError):
                    client.settimeout(PATIENCE)
                    answer = self._answer(said.read(int.from_bytes(said.read(2))))
                    self.by_tcp += 1
                    if answer is not None:
                        client.sendall(len(answer).to_bytes(2) + answer)

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


def _truncated(question: bytes) -> bytes:
    message = dns.Message()
    message.fromStr(question)
    message.answer = message.auth = message.trunc = 1
    message.additional = []
    return message.toStr()


@contextmanager
def name_server(machine: Machine) -> Iterator[NameServer]:
    """One at the machine's own loopback address, for the length of a block."""
    with machine.inside():
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", PORT))
        listener = socket.create_server(("127.0.0.1", PORT))
    made = NameServer(sock, listener)
    threads = [
        threading.Thread(target=each) for each in (made.serve, made.serve_connections)
    ]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        with machine.inside(), socket.socket(type=socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", PORT))
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        sock.close()
        listener.close()
