"""The benchmark's own loads: short connections, and many that are kept.

wrk closes a connection as soon as it has the response, even if the server is to close
it: of these it closes about half first, and it counts a response that ends with the
connection as an error.  This load makes an exact number of connections, and knows which
side closed first.

A SOCKS4 proxy gets the same short connections, with the handshake before them.  A load
that sees an error raises :class:`CannotMeasure`.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from bench.children import PATIENCE, CannotMeasure
from bench.loads import AT_ONCE
from bench.origins import BODY
from bench.places import HERE

KEEPING = b"GET / HTTP/1.1\r\nHost: origin\r\n\r\n"
_CLOSING = b"GET / HTTP/1.1\r\nHost: origin\r\nConnection: close\r\n\r\n"

#: Ports that a proxy's clients connect from, below the kernel's ephemeral ports and
#: those that the benchmark listens on.  Dante connects from its client's port if it
#: can, and for a minute the kernel gives that port to no other socket, on any address.
#: With ephemeral ports there would soon be few left, and the other relays would pay for
#: the search.
SOURCE_PORTS = range(2_000, 18_000)

#: Their addresses and ports, each used once in a run: none is in TIME_WAIT.
_sources = (
    (f"127.2.{number // 256}.{number % 256}", port)
    for number, port in itertools.product(range(256 * 256), SOURCE_PORTS)
)

#: Size of a SOCKS4 reply, and how a reply begins that grants the request.
_REPLY, _GRANTED = 8, b"\0\x5a"


#: How many addresses clients have, where each is to be another.
CLIENTS = 10_000

#: linux/in.h; Python has no name for it before 3.12.
IP_BIND_ADDRESS_NO_PORT = 24


def client_hosts() -> Iterator[str]:
    """The addresses of `CLIENTS` clients, on loopback."""
    return (f"127.3.{n // 250}.{n % 250 + 1}" for n in range(CLIENTS))


def socks4_request(port: int) -> bytes:
    """A SOCKS4 request to connect to a port of 127.0.0.1, without a user, as curl's."""
    return struct.pack(">BBH4sx", 4, 1, port, socket.inet_aton("127.0.0.1"))


def short_connections(
    port: int,
    count: int,
    closed_by: Literal["client", "server"],
    *,
    to: str = HERE.relay.host,
    socks4_to: int | None = None,
    hosts: Iterator[str] | None = None,
) -> None:
    """Make `count` connections, `AT_ONCE` at a time, with one request each.

    :param closed_by: which side closes first.  The client: when it has the response,
        while the server would keep the connection.  The server: when it has responded,
        and the client waits for the end of data.
    :param to: the address that `port` is on.
    :param socks4_to: the server's port, if `port` is a SOCKS4 proxy's: the request is
        made once the proxy has connected.
    :param hosts: addresses of this machine to connect from, one for each; unless given,
        one for all.
    :raises CannotMeasure: a connection failed, or nothing moved for `PATIENCE`.
    """
    request = KEEPING if closed_by == "client" else _CLOSING
    opening = request if socks4_to is None else socks4_request(socks4_to)
    poll = select.epoll()
    connections: dict[int, socket.socket] = {}
    #: Connections that wait for a proxy's reply.
    asking: set[int] = set()
    answers: dict[int, bytes] = {}
    started = ended = 0

    def start() -> None:
        connection = socket.socket()
        number = connection.fileno()
        connection.setblocking(False)
        connections[number] = connection
        answers[number] = b""
        if socks4_to is not None:
            asking.add(number)
            _bind_to_source(connection)
        elif hosts is not None:
            # The port is chosen as it connects: not one for all servers, of which
            # there would be too few.
            connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            connection.bind((next(hosts), 0))
        connection.connect_ex((to, port))
        try:
            # It is connected already, unless a queue is full.
            connection.send(opening)
            poll.register(number, select.EPOLLIN)
        except BlockingIOError:
            poll.register(number, select.EPOLLOUT)

    def go_on(number: int, event: int) -> bool:
        """Whether the connection has ended."""
        connection = connections[number]
        if event == select.EPOLLOUT:
            connection.send(opening)
            poll.modify(number, select.EPOLLIN)
            return False
        part = connection.recv(65536)
        answers[number] += part
        if number in asking and part:
            if len(answers[number]) >= _REPLY:
                if not answers[number].startswith(_GRANTED):
                    raise CannotMeasure(
                        f"the proxy's reply does not grant: {answers[number]!r}"
                    )
                answers[number] = answers[number][_REPLY:]
                asking.remove(number)
                connection.send(request)
            return False
        done = answers[number].endswith(BODY)
        if not part and not done:
            raise CannotMeasure("a short connection ended without its response")
        if part and not (done and closed_by == "client"):
            return False
        connection.close()
        del connections[number], answers[number]
        return True

    try:
        while ended < count:
            while started < count and len(connections) < AT_ONCE:
                start()
                started += 1
            events = poll.poll(PATIENCE)
            if not events:
                raise CannotMeasure(f"short connections hang, {ended} of {count} done")
            for number, event in events:
                ended += go_on(number, event)
    except OSError as error:
        raise CannotMeasure(f"a short connection failed: {error}") from error
    finally:
        poll.close()
        for connection in connections.values():
            connection.close()


def _bind_to_source(connection: socket.socket) -> None:
    """Bind it to the next of `_sources` that is free."""
    for source in _sources:
        try:
            connection.bind(source)
        except OSError as error:
            # It has a listener, or is in TIME_WAIT from an earlier run.
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return


class IdlePairs:
    """Connections through a relay that carried one request each, and are kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[socket.socket] = []

    def grow(self, count: int) -> None:
        """Open more, until there are `count`.

        :raises CannotMeasure: one failed.
        """
        while missing := count - len(self._connections):
            try:
                self._open(min(missing, AT_ONCE))
            except OSError as error:
                raise CannotMeasure(
                    f"idle connection {len(self._connections)} of {count}"
                    f" failed: {error or type(error).__name__}"
                ) from error

    def _open(self, count: int) -> None:
        fresh = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", self._port), PATIENCE)
            self._connections.append(connection)
            fresh.append(connection)
            connection.sendall(KEEPING)
        for connection in fresh:
            self._read(connection)

    def take_turns(self, count: int) -> None:
        """Make `count` requests, `AT_ONCE` at a time, on one connection after another.

        :raises CannotMeasure: one failed.
        """
        every = self._connections
        ahead = min(AT_ONCE, len(every))
        try:
            for number in range(count + ahead):
                if number >= ahead:
                    self._read(every[(number - ahead) % len(every)])
                if number < count:
                    every[number % len(every)].sendall(KEEPING)
        except OSError as error:
            raise CannotMeasure(f"a kept connection failed: {error}") from error

    def _read(self, connection: socket.socket) -> None:
        answer = b""
        while not answer.endswith(BODY):
            part = connection.recv(65536)
            if not part:
                raise CannotMeasure("a kept connection ended")
            answer += part

    def close(self) -> None:
        """Reset them all, so that they do not fill TIME_WAIT."""
        for connection in self._connections:
            with suppress(OSError):
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                connection.close()
        self._connections.clear()


@contextmanager
def idle_pairs(port: int, count: int = 0) -> Iterator[IdlePairs]:
    """Idle pairs through the relay on `port`, for the length of a block."""
    pairs = IdlePairs(port)
    try:
        pairs.grow(count)
        yield pairs
    finally:
        pairs.close()
