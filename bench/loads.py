"""The load generators that are programs: iperf3, wrk, h2load.

A load that reports an error raises :class:`CannotMeasure`: a measurement with errors
is not a measurement.

A SOCKS4 proxy gets the same bulk, with the handshake before it.  iperf3 has none;
proxychains does it inside iperf3's process, on iperf3's own socket, by replacing
`connect`: after it, iperf3 is directly connected to the proxy.
"""

from __future__ import annotations

import json
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import frozen

from bench.children import PATIENCE, CannotMeasure, Child, child, program

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


@frozen
class Bulk:
    """A transfer of iperf3."""

    bytes: int
    seconds: float

    @property
    def gigabits(self) -> float:
        """Gb/s."""
        return self.bytes * 8 / self.seconds / 1e9


def bulk(port: int, streams: int, size: int, *, socks4_to: int | None = None) -> Bulk:
    """Send so many bytes in all through a relay to an iperf3 server.

    :param socks4_to: the server's port, if `port` is a SOCKS4 proxy's.
    """
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        to = port if socks4_to is None else socks4_to
        argv = [
            *(program("iperf3"), "-c", "127.0.0.1", "-p", str(to), "-J"),
            *("-P", str(streams), "-n", str(size)),
        ]
        if socks4_to is not None:
            (Path(name) / "proxychains.conf").write_text(
                f"strict_chain\n[ProxyList]\nsocks4 127.0.0.1 {port}\n"
            )
            argv[:0] = [program("proxychains4"), "-q", "-f", "proxychains.conf"]
        limit = time.monotonic() + PATIENCE
        while True:
            with child("iperf3", argv, Path(name), read=True) as running:
                text = running.output(4 * PATIENCE, failed=True)
            # The server may not have seen yet that the test before has ended.
            if "server is busy" not in text or time.monotonic() > limit:
                return read_iperf3(text)
            time.sleep(0.1)


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


@frozen
class KeptRequests:
    """Requests on kept connections, as fast as they are answered, by wrk.

    There are none, but the connections stay, until they are asked for.
    """

    _running: list[Child]

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Make requests for the length of a block."""
        self.send(signal.SIGCONT)
        yield
        self.send(signal.SIGSTOP)

    def send(self, signal_number: signal.Signals) -> None:
        """Send every wrk a signal."""
        for wrk in self._running:
            wrk.process.send_signal(signal_number)


@contextmanager
def kept_requests(
    port: int, connections: int, wait_open: Callable[[int], None]
) -> Iterator[KeptRequests]:
    """Connections through a relay, by wrk, that are kept for the length of a block.

    :param wait_open: waits until so many connections are open.
    :raises CannotMeasure: wrk has seen an error.
    """
    address = f"http://127.0.0.1:{port}/"
    with ExitStack() as stack:
        running: list[Child] = []
        kept = KeptRequests(running)
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
        yield kept
        # The signal must interrupt the thread that sleeps until the end: if it comes
        # before that thread has gone on, another one may take it.
        kept.send(signal.SIGCONT)
        time.sleep(0.1)
        kept.send(signal.SIGINT)
        for wrk in running:
            read_wrk(wrk.output(PATIENCE))


def read_wrk(text: str) -> int:
    """Parse the output of wrk: how many requests were answered.

    :raises CannotMeasure: it reports an error, or no request.
    """
    for line in text.splitlines():
        # Its time goes on while it is stopped, so it may count what was under way then.
        stopped = re.search(r"errors: connect 0, read 0, write 0, timeout \d+$", line)
        if ("Socket errors" in line and not stopped) or "Non-2xx" in line:
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
