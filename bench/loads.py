"""The load generators: iperf3, wrk, h2load, and two in this module.

A load that reports an error raises :class:`CannotMeasure`: a measurement with errors
is not a measurement.

Short connections are made here.  wrk closes a connection as soon as it has the
response, even if the server is to close it: of these it closes about half first, and it
counts a response that ends with the connection as an error.  This load makes an exact
number of connections, and knows which side closed first.

A SOCKS4 proxy gets the same loads, with the handshake before them.  iperf3 has none;
proxychains does it inside iperf3's process, on iperf3's own socket, by replacing
`connect`: after it, iperf3 is directly connected to the proxy.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import select
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from attrs import frozen

from bench.children import PATIENCE, CannotMeasure, child, program
from bench.origins import BODY

#: Concurrent connections, for requests and for short connections.
AT_ONCE = 32

#: Connections that one wrk opens.
WRK_CONNECTIONS = 1_000

#: The fixed rate at which latency is measured: requests a second.
RATE = 4_000

#: Connections for that rate.  h2load's clock has steps of 10 ms, in which a connection
#: must not need more than one request.
RATE_CONNECTIONS = RATE // 100

#: Seconds at the start of a run at a fixed rate that are left out.
SETTLING = 0.5

_KEEPING = b"GET / HTTP/1.1\r\nHost: origin\r\n\r\n"
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


@frozen
class Bulk:
    """A transfer of iperf3."""

    bytes: int
    seconds: float

    @property
    def gigabits(self) -> float:
        """Gb/s."""
        return self.bytes * 8 / self.seconds / 1e9


def bulk(
    port: int, streams: int, seconds: float, *, socks4_to: int | None = None
) -> Bulk:
    """Send through a relay to an iperf3 server for so many seconds.

    :param socks4_to: the server's port, if `port` is a SOCKS4 proxy's.
    """
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        to = port if socks4_to is None else socks4_to
        argv = [
            *(program("iperf3"), "-c", "127.0.0.1", "-p", str(to), "-J"),
            *("-P", str(streams), "-t", str(max(1, round(seconds)))),
        ]
        if socks4_to is not None:
            (Path(name) / "proxychains.conf").write_text(
                f"strict_chain\n[ProxyList]\nsocks4 127.0.0.1 {port}\n"
            )
            argv[:0] = [program("proxychains4"), "-q", "-f", "proxychains.conf"]
        with child("iperf3", argv, Path(name), read=True) as running:
            return read_iperf3(running.output(seconds + PATIENCE, failed=True))


def read_iperf3(text: str) -> Bulk:
    """Parse the output of `iperf3 -J`.

    :raises CannotMeasure: it reports an error, or moved nothing.
    """
    try:
        report = json.loads(text)
    except ValueError:
        raise CannotMeasure(f"iperf3's output is not JSON: {text[:60]!r}") from None
    if "error" in report:
        raise CannotMeasure(f"iperf3 reports an error: {report['error']}")
    moved = report["end"]["sum_received"]
    if not moved["bytes"]:
        raise CannotMeasure("iperf3 moved nothing")
    return Bulk(moved["bytes"], moved["seconds"])


@contextmanager
def kept_requests(
    port: int, connections: int, wait_open: Callable[[int], None]
) -> Iterator[None]:
    """Requests on kept connections, as fast as they are answered, by wrk.

    :param wait_open: waits until so many connections are open.
    :raises CannotMeasure: wrk has seen an error.
    """
    address = f"http://127.0.0.1:{port}/"
    with ExitStack() as stack:
        running = []
        # wrk opens all of its connections at once.  Those beyond the kernel's backlog
        # would be dropped, and retried after seconds.  And a busy relay accepts slowly,
        # so each wrk is stopped until all connections are open.
        for opened in range(0, connections, WRK_CONNECTIONS):
            count = min(WRK_CONNECTIONS, connections - opened)
            folder = tempfile.TemporaryDirectory(prefix="relayd-bench-")
            argv = [
                *(program("wrk"), "-t", "1", "-c", str(count)),
                # It is ended long before that.
                *("-d", "3600s", "--timeout", "60s", address),
            ]
            place = Path(stack.enter_context(folder))
            running.append(stack.enter_context(child("wrk", argv, place, read=True)))
            wait_open(opened + count)
            running[-1].process.send_signal(signal.SIGSTOP)
        for wrk in running:
            wrk.process.send_signal(signal.SIGCONT)
        yield
        for wrk in running:
            wrk.process.send_signal(signal.SIGINT)
        for wrk in running:
            read_wrk(wrk.output(PATIENCE))


def read_wrk(text: str) -> int:
    """Parse the output of wrk: how many requests were answered.

    :raises CannotMeasure: it reports an error, or no request.
    """
    for line in text.splitlines():
        if "Socket errors" in line or "Non-2xx" in line:
            raise CannotMeasure(f"wrk reports an error: {line.strip()}")
    found = re.search(r"(\d+) requests in ", text)
    if found is None or not int(found[1]):
        raise CannotMeasure("wrk got no response")
    return int(found[1])


def fixed_rate(port: int, seconds: float) -> list[float]:
    """Make `RATE` requests a second, by h2load; returns microseconds for each.

    :raises CannotMeasure: an error, or the rate was not kept.
    """
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        count = int(RATE * (seconds + SETTLING))
        each = RATE // RATE_CONNECTIONS
        argv = [
            *(program("h2load"), "--h1", "-t", "1", "--log-file", "requests"),
            *("-c", str(RATE_CONNECTIONS), "-n", str(count), f"--rps={each}"),
            # Four connections are opened in a millisecond, so that their requests are
            # spread out; opened at once, all would send at the same time.
            *("-r", "4", "--rate-period=1ms", f"http://127.0.0.1:{port}/"),
        ]
        with child("h2load", argv, Path(name), read=True) as running:
            output = running.output(seconds + 2 * PATIENCE)
        took = read_h2load(output, (Path(name) / "requests").read_text())
    if len(took) < 0.9 * RATE * seconds:
        raise CannotMeasure(f"h2load's requests are too few: {len(took)}")
    return took


def read_h2load(output: str, log: str) -> list[float]:
    """Microseconds that each request took, without the first half second.

    :param output: what h2load printed.
    :param log: its `--log-file`: start (microseconds), status, microseconds taken.
    :raises CannotMeasure: a request failed, or the rate was not kept.
    """
    counts = re.search(r"requests: (\d+) total, .* (\d+) succeeded, ", output)
    if counts is None or int(counts[1]) != int(counts[2]):
        what = counts[0] if counts else output.strip()[-60:]
        raise CannotMeasure(f"h2load reports an error: {what}")
    rows = [tuple(map(int, line.split()[:3])) for line in log.splitlines()]
    if not rows:
        raise CannotMeasure("h2load logged no request")
    first = min(row[0] for row in rows)
    last = max(row[0] for row in rows)
    rate = len(rows) * 1e6 / max(1, last - first)
    if rate < 0.95 * RATE:
        raise CannotMeasure(f"the rate was {rate:.0f} requests a second, not {RATE}")
    counted = first + SETTLING * 1e6
    return [float(took) for start, _, took in rows if start >= counted]


def socks4_request(port: int) -> bytes:
    """A SOCKS4 request to connect to a port of 127.0.0.1, without a user, as curl's."""
    return struct.pack(">BBH4sx", 4, 1, port, socket.inet_aton("127.0.0.1"))


def short_connections(
    port: int,
    count: int,
    closed_by: Literal["client", "server"],
    *,
    socks4_to: int | None = None,
) -> None:
    """Make `count` connections, `AT_ONCE` at a time, with one request each.

    :param closed_by: which side closes first.  The client: when it has the response,
        while the server would keep the connection.  The server: when it has responded,
        and the client waits for the end of data.
    :param socks4_to: the server's port, if `port` is a SOCKS4 proxy's: the request is
        made once the proxy has connected.
    :raises CannotMeasure: a connection failed, or nothing moved for `PATIENCE`.
    """
    request = _KEEPING if closed_by == "client" else _CLOSING
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
        connection.connect_ex(("127.0.0.1", port))
        try:
            # On loopback it is connected already, unless a queue is full.
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
            connection.sendall(_KEEPING)
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
                    every[number % len(every)].sendall(_KEEPING)
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
